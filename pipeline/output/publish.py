"""What readers of an output see: ``data/part-*.parquet``, the dataset card, ``_SUCCESS``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.output.commit import ATTEMPTS, Record
from pipeline.output.dataset import SET_ASIDE, SUCCESS, Output, Tally
from pipeline.output.leftovers import Leftovers, remove
from pipeline.output.planfile import OutputError
from pipeline.output.schema import decode_schema

CARD = "README.md"


def set_aside(output: Output, listed: dict[str, int]) -> list[str]:
    """Move files in ``data/`` that are not this run's out of readers' way.

    Args:
        listed: What lies there; what is moved is taken out of it.

    Returns:
        Their names.
    """
    strangers = [name for name in listed if output.shard_named(name) is None]
    for name in strangers:
        output.check()
        output.folder.move(f"data/{name}", f"{SET_ASIDE}/{name}")
        del listed[name]
    return strangers


def publish(output: Output, tally: Tally, title: str, description: str) -> None:
    """Give the committed files that have not got them their final names, then the card, then ``_SUCCESS``; delete what
    is left over.

    Safe to repeat.

    Raises:
        OutputError: A committed file is gone.
        LockLost: Another run has the folder.
    """
    listed, shards, attempts = output.listings(), 0, list[str]()
    leftovers, present = Leftovers(output, listed), listed[ATTEMPTS]
    content = hashlib.blake2b(digest_size=8)
    for record in output.several(partial(_publish_part, output, listed), output.records()):
        content.update(record.checksum.encode())
        leftovers.spare(record)
        shards += 1
        if record.file in present and (present[record.file] != record.size or not output.folder.local):
            attempts.append(f"{ATTEMPTS}/{record.file}")  # copied, or cut when it had been
    if shards != int(output.plan["shards"]):
        raise OutputError(f"{output.path}: {shards} of {output.plan['shards']} shards have a record; run the job again")
    remove(output, attempts)
    output.check()
    output.folder.write(CARD, card(output, tally, content.hexdigest(), title, description).encode())
    summary = {"rows": int(output.plan["rows"]), "ok": tally.ok, "failed": tally.failed,
               **({"duplicates": tally.duplicates} if tally.duplicates else {}), "shards": tally.shards,
               "fingerprint": output.plan["fingerprint"]}  # fmt: skip
    output.check()  # who stands still from here on may write it into a folder of another; `Output.status` counts too
    output.folder.write(SUCCESS, (json.dumps(summary) + "\n").encode())
    leftovers.remove()


def _publish_part(output: Output, listed: dict[str, dict[str, int]], record: Record) -> Record:
    part = output.part(record.shard)
    base = part.rpartition("/")[2]
    gone = OutputError(f"{output.path}: the file of shard {record.shard} is gone or cut; run the job again")
    if listed[ATTEMPTS].get(record.file) != record.size:
        if listed["data"].get(base) != record.size:
            raise gone
        return record
    output.check()
    its_own = output.named_at_commit or (record.replaced and listed["data"].get(base) in (record.replaced, record.size))
    # Nothing is deleted on a store: whoever stood still between copy and deletion, and has lost the folder meanwhile,
    # would delete what another has published. A file of this name is written over; attempts go together afterwards.
    rename = output.folder.move if output.folder.local else output.folder.copy
    if base in listed["data"] and not its_own:
        rename(part, f"{SET_ASIDE}/{base}")
    try:
        rename(f"{ATTEMPTS}/{record.file}", part)
    except FileNotFoundError:
        raise gone from None
    return record


def card(output: Output, tally: Tally, content: str, title: str, description: str) -> str:
    """The dataset card: what `datasets` reads (YAML), then columns, counts, measures and models for people.

    The configuration's description names the content: `datasets` keys its cache by the folder's last name and this
    block alone, and would else hand out another dataset that was once loaded from a folder of the same name.

    Args:
        content: Digest of the committed files' checksums.
    """
    schema, plan = decode_schema(output.plan["schema"]), output.plan
    front = ["---", "configs:", "- config_name: default", f"  description: content {content}",
             "  data_files:", "  - split: train", f"    path: {output.parts}", "tags:", "- latentmill",
             "---"]  # fmt: skip
    docs = {column["name"]: column for column in plan["stage_columns"]}
    rows = [f"| {_code(f.name)} | {_kind(f.type, docs.get(f.name))} | {docs.get(f.name, {}).get('doc', '')} |"
            for f in schema]  # fmt: skip
    measures = [f"| {_code(name)} | {m['n']} | {m['mean']:.4g} | {m['min']:.4g} | {m['max']:.4g} |"
                for name, m in tally.measures.items()]  # fmt: skip
    models = [f"| {role} | {_code(model.get('path', ''))} | {_revision(model)} |"
              for role, model in plan["models"].items()]  # fmt: skip
    notes = plan.get("notes") or ()
    errors = [f"- {count} x {_code(reason)}" for reason, count in tally.errors.items()]
    parts = [
        "\n".join(front), f"# {title}", description.strip(),
        f"## Rows\n\n{plan['rows']} rows in {plan['shards']} files: {tally.ok} processed, {tally.failed} failed "
        "(`status` and `error` say which and why; their outputs are null)." + _duplicates(tally),
        "\n".join(errors),
        "## Input\n\n" + "\n".join(f"- {_code(note)}" for note in notes) if notes else "",
        "## Load\n\n```python\nfrom datasets import load_dataset\n\n"
        f"dataset = {loading(output)}\n```",
        "## Columns\n\n| column | type | meaning |\n|---|---|---|\n" + "\n".join(rows),
        "## Measures\n\n| column | rows | mean | least | greatest |\n|---|---|---|---|---|\n" + "\n".join(measures)
        if measures else "",
        "## Models\n\n| role | model | revision |\n|---|---|---|\n" + "\n".join(models) if models else "",
        _versions(tally),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _versions(tally: Tally) -> str:
    """What the rows were made with: a line, or where a run was resumed under others, a line for each."""
    if len(tally.made_with) < 2:
        return "".join(f"Made with {_code(made_with)}." for made_with in tally.made_with)
    lines = [f"- {shards} files: {_code(made_with)}" for made_with, shards in sorted(tally.made_with.items())]
    return "## Versions\n\nNot all rows were made with the same packages:\n\n" + "\n".join(lines)


def _duplicates(tally: Tally) -> str:
    if not tally.duplicates:
        return ""
    return (
        f" {tally.duplicates} more are duplicates (`status` is `duplicate`): `duplicate_of` is the id of the row that "
        "holds the same, and has their outputs."
    )


def _code(text: str) -> str:
    """Words of a stranger, from rows or their files' headers: no markup, no link of theirs shows on the page."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return "`" + plain.replace("`", "'").replace("|", "\\|") + "`"


def _revision(model: Mapping[str, str]) -> str:
    """Branch, tag or commit as it was asked for, and the commit that it stood for."""
    asked, commit = model.get("revision", ""), model.get("commit", "")
    return " ".join(_code(word) for word in dict.fromkeys((asked, commit)) if word) or "-"


def loading(output: Output, path: str | None = None) -> str:
    """The expression that opens a dataset with `datasets`, which takes a folder of this machine, or files anywhere.

    Args:
        path: How the folder is named; None: as the user did.
    """
    path = output.path.rstrip("/") if path is None else path
    if "://" not in path:
        return f'load_dataset("{path}", split="train")'
    return f'load_dataset("parquet", data_files="{path}/{output.parts}", split="train")'


def _kind(arrow: Any, column: dict[str, Any] | None) -> str:
    if column is not None and column["kind"] == "tensor":
        shape = " x ".join(str(extent) if extent >= 0 else "any" for extent in column["shape"])
        return f"{column['dtype']}, {shape} (flattened)"
    if column is not None and column["kind"] == "image":
        return "picture"
    return "picture" if str(arrow).startswith("struct<bytes") else str(arrow)
