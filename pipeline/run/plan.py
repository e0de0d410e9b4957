"""The plan of a run: its shards and the fingerprint that a rerun has to match; made once, compared at every start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline import machine
from pipeline.input.contents import Contents
from pipeline.input.files import list_files
from pipeline.input.read import scanned_again
from pipeline.input.shards import Shard
from pipeline.input.source import Source
from pipeline.output import planfile
from pipeline.output.lock import LOST, LockLost
from pipeline.output.schema import decode_schema, encode_schema
from pipeline.run.draft import Draft, PlanError, RunSpec, compared, draft, fingerprint, watched
from pipeline.run.scan import Scans, one_by_one
from pipeline.run.survey import Survey, survey
from pipeline.run.versions import versions
from pipeline.storage import Folder

RUN_DIGITS = 12
"""Of a run's id: names bear it."""
COLUMNS = "output columns"
_GROWS = (
    "rows", "shards", "files", "input_bytes", "estimated_bytes", "fingerprint", "notes", "input_content", "limit",
)  # fmt: skip
"""What of a plan is another when it grows."""
LIMITS = ("input.allow", "input.max_pixels")
"""What they refuse is a failed row, what they let through is as it would have been: a resumed run may have others."""


MORE_ROWS = " (A limit may grow, or go, where nothing else is another; for fewer rows start another folder.)"

MOVED = " (If these are the same files in another place, link them to where they were, which the plan goes by: ln -s.)"


class PlanMismatch(PlanError):
    """The output folder holds a run that was planned differently.

    Attributes:
        fields: Differing field -> (value in the output folder, value now).
    """

    def __init__(
        self, output: str, fields: Mapping[str, tuple[Any, Any]], renamed: Mapping[str, str] | None = None
    ) -> None:
        self.output, self.fields = output, dict(fields)
        now = {f"config.{old}": f"config.{name}" for old, name in (renamed or {}).items()}
        places = (_places(now.get(name, name), *pair) for name, pair in self.fields.items())
        lines = "\n".join(f"  {place}: {_apart(old, new)}" for found in places for place, old, new in found)
        super().__init__(
            f"{output} holds a run that was planned differently:\n{lines}\n"
            "Change it back to resume, or name another output folder."
            + (MORE_ROWS if "limit" in self.fields else "")
            + (MOVED if "input.path" in self.fields else "")
        )


def _places(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, as deep as they are built alike: settings by their keys, methods one by one."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                yield from _places(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new and _methods(old) and _methods(old) == _methods(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _places(f"{name}[{i}]", *pair)
    else:
        yield name, old, new


def _methods(value: Any) -> list[Any]:
    """What a list of settings is of, in its order; empty for any other value."""
    settings = isinstance(value, list) and all(isinstance(one, Mapping) for one in value)
    return [one.get("method") for one in value] if settings else []


def _apart(old: Any, new: Any) -> str:
    """How two values of a plan differ, in words; of two lists what only one of them holds."""
    if old == new:
        return f"has been written anew since then ({new})"
    if isinstance(old, list) and isinstance(new, list) and (differing := [one for one in old if one not in new]):
        old, new = differing, [one for one in new if one not in old]
    return f"was {old!r}, is {new!r}"


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. Small: shards are listed lazily from the input's file table.

    Attributes:
        rows: Planned rows.
        shards: Number of shards.
        files: Number of input files.
        input_bytes: Their size (0 for generated rows).
        format: The input's format, found or given.
        columns: Columns that the output will have, in order.
        models: Role -> path, revision, fingerprint (from the stage's description).
        fingerprint: Hex digest over all that changes the bytes.
        estimated_bytes: Rough size of the output before compression, from the columns' types and a sample of the
            kept columns; pictures that the stage makes are guessed at 100 kB.
        notes: What the user should know of the input: what is left out of it, columns that some files lack.
    """

    rows: int
    shards: int
    files: int
    input_bytes: int
    format: str
    columns: tuple[str, ...]
    models: Mapping[str, Mapping[str, str]]
    fingerprint: str
    estimated_bytes: int
    notes: tuple[str, ...] = ()


def make_plan(spec: RunSpec, drafted: Draft | None = None, scans: Scans = one_by_one) -> Plan:
    """Plan a run without writing anything (``--dry-run``).

    Args:
        drafted: Its draft, where that is made already: it describes the stage and fingerprints the models.
        scans: How the input's files are scanned.

    Raises:
        SourceError: The input cannot be read as described, or two rows share an id (both named).
        PlanError: Columns clash or are missing.
    """
    drafted = drafted or draft(spec)
    totals, contents = Survey(), compared(drafted)
    columns, nothing = watched(drafted), lambda file, scan: None
    for _ in survey(drafted.source, spec.shard_rows, spec.limit, totals, nothing, columns, scans, contents):
        pass
    for _ in _twins(contents, totals):
        pass
    return _plan(drafted, totals)


def _twins(contents: Contents | None, totals: Survey) -> Iterator[tuple[int, str]]:
    """Number of each row that is a duplicate, and the id of the first that holds the same; ``totals`` notes them."""
    if contents is None:
        return
    count, example = 0, ""
    for row, first in contents.twins():
        count, example = count + 1, example or f"row {row + 1:,} of the input holds what {first!r} holds"
        yield row, first
    told = f" and are not processed again: they get the status `duplicate` ({example})" if count else ""
    totals.notes.append(f"{count:,} of {totals.rows:,} rows hold what an earlier row holds{told}")


def _plan(drafted: Draft, totals: Survey) -> Plan:
    return Plan(
        rows=totals.rows,
        shards=totals.shards,
        files=totals.files,
        input_bytes=totals.bytes,
        format=str(drafted.source.format),
        columns=tuple(drafted.schema.names),
        models=drafted.info.models,
        fingerprint=fingerprint(drafted.fields, totals.content),
        estimated_bytes=int(totals.rows * drafted.bytes_per_row),
        notes=(*drafted.notes, *totals.notes),
    )


def write_plan(
    spec: RunSpec,
    drafted: Draft,
    folder: Folder,
    created: float,
    check: Callable[[], None] = lambda: None,
    scans: Scans = one_by_one,
    named_at_commit: bool = False,
) -> dict[str, Any]:
    """Scan the input and write the plan; it exists once ``plan.json`` does.

    Args:
        folder: The bookkeeping folder inside the output folder.
        check: Asked before the plan is put in place; raises if the folder is another run's by now.
        scans: How the input's files are scanned.
        named_at_commit: Files get their final names while the run goes on.

    Returns:
        What ``plan.json`` holds.

    Raises:
        LockLost: Another driver has planned here meanwhile; its plan stands.
    """
    run = machine.here.token()[:RUN_DIGITS]
    plan = _written(spec, drafted, folder, run, check, scans)
    early = {"named_at_commit": True} if named_at_commit else {}
    content = {"created": created, "run": run, "tables": run, **early, **plan}
    return _in_place(folder, "plan.json", content)


def grow_plan(
    spec: RunSpec,
    drafted: Draft,
    folder: Folder,
    old: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
    scans: Scans = one_by_one,
) -> dict[str, Any]:
    """Scan the input to a further limit, and write what the plan grows to. The run stays the same, and its shards as
    they are, the last of them however short; further rows are further shards, whose files say how many there are by
    then, so that no file that is published changes its name.

    Args:
        folder: The bookkeeping folder inside the output folder.
        old: The plan so far; it differs in its limit alone.
        check, scans: As for `write_plan`.

    Returns:
        What the new form of the plan holds.

    Raises:
        PlanError: The rows that were planned would be cut otherwise by now, or with further rows the output would have
            other types, or too many files for their numbers.
        LockLost: Another driver has let it grow meanwhile.
    """
    run, tables = str(old["run"]), machine.here.token()[:RUN_DIGITS]
    plan, before = _written(spec, drafted, folder, tables, check, scans, old), planfile.steps(old)
    reached = [{name: step[name] for name in ("rows", "shards", "tables")} for step in before]
    reached.append({"rows": plan["rows"], "shards": plan["shards"], "tables": tables})
    content = {
        **old,
        **{name: plan[name] for name in _GROWS},
        "fields": {**old["fields"], "limit": spec.limit},
        "tables": tables,
        "steps": reached,
    }
    return _in_place(folder, planfile.grown_name(run, len(before)), content)


def _written(
    spec: RunSpec, drafted: Draft, folder: Folder, token: str, check: Callable[[], None], scans: Scans,
    old: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scan the input into tables of this token: what the plan holds besides.

    Args:
        old: A plan that these have to begin with.
    """
    totals, columns, contents = Survey(), watched(drafted), compared(drafted)
    ends = sorted({int(step["rows"]) for step in planfile.steps(old)}) if old else []
    with planfile.Tables(folder, token, twins=contents is not None) as tables:
        before = None if old is None else _Before(spec.output, folder, old)
        for shard in survey(
            drafted.source, spec.shard_rows, spec.limit, totals, tables.file, columns, scans, contents, ends
        ):  # fmt: skip
            if before is not None:
                before.shard(shard)
            tables.shard(shard)
        for row, first in _twins(contents, totals):
            twin = (*_place(row, spec.shard_rows, ends), first)
            if before is not None:
                before.twin(twin)
            tables.twin(*twin)
        plan, schema = _plan(drafted, totals), columns.settled(drafted.schema)
        if before is not None:
            before.end(plan, schema)
        check()
    return {
        **asdict(plan),
        "versions": versions(),
        "fields": dict(drafted.fields),
        "input_content": totals.content,
        "source": drafted.source.to_json(),
        "stage": {"target": spec.stage.name, "params": dict(spec.stage.params)},
        "config": dict(spec.config),
        "seed": spec.seed,
        "shard_rows": spec.shard_rows,
        "limit": spec.limit,
        "keep": list(drafted.kept),
        "stage_columns": [asdict(column) for column in drafted.info.columns],
        "metadata": dict(drafted.info.metadata),
        "reads": drafted.info.reads and dict(drafted.info.reads),
        "schema": encode_schema(schema),
    }


def _place(row: int, every: int, ends: Sequence[int]) -> tuple[int, int]:
    """Shard of a row, and its place there, where shards have so many rows and end behind some rows besides."""
    shards = start = 0
    for end in ends:
        if row < end:
            break
        shards, start = shards - (start - end) // every, end
    further, place = divmod(row - start, every)
    return shards + further, place


class _Before:
    """A plan so far, read beside what it grows to, a shard at a time. Each function raises PlanError where they do not
    go together."""

    def __init__(self, output: str, folder: Folder, old: Mapping[str, Any]) -> None:
        self._output, self._old = output, old
        self._shards, self._twins = planfile.read_shards(folder, old), planfile.read_twins(folder, old)
        self._further = int(old["shards"])

    def shard(self, shard: Shard) -> None:
        if shard.index < self._further and _cut(next(self._shards, None)) != _cut(shard):
            raise self._others()

    def twin(self, twin: tuple[int, int, str]) -> None:
        if twin[0] < self._further and next(self._twins, None) != twin:
            raise self._others()

    def end(self, plan: Plan, schema: pa.Schema) -> None:
        """What was planned has been found, and the whole of it has the same columns and as long names."""
        if next(self._shards, None) is not None or next(self._twins, None) is not None:
            raise self._others()
        columns = ((was, schema.field(was.name)) for was in decode_schema(self._old["schema"]))
        if apart := [f"{was.name} {now.type}, not {was.type}" for was, now in columns if now != was]:
            raise self._error(f"with further rows columns would have other types ({'; '.join(apart)})")
        if len(str(plan.shards)) > max(5, len(str(planfile.steps(self._old)[0]["shards"]))):
            raise self._error(f"{plan.shards} files are more than its files' names have digits for")

    def _others(self) -> PlanError:
        return self._error("the rows that it holds would be cut or named otherwise by now")

    def _error(self, why: str) -> PlanError:
        return PlanError(f"{self._output}: {why}; name another output folder")


def _cut(shard: Shard | None) -> Any:
    """What makes a shard the same; where in a file its rows lie may be told otherwise."""
    return shard and (shard.ids, [(span.name, span.start, span.stop) for span in shard.spans])


def _in_place(folder: Folder, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Create a plan's file.

    Raises:
        LockLost: Another driver has put its own there meanwhile.
    """
    text = json.dumps(content, indent=1, default=str)
    if not folder.create(name, text.encode()):
        raise LockLost(LOST)
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def more_rows(found: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether what differs from a plan is its limit alone, and that has grown, or is gone."""
    old, new = found.get("limit", (None, None))
    return set(found) == {"limit"} and old is not None and (new is None or new > old)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], speed: frozenset[str] = frozenset(), models: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Fields that differ. What the config already says is not said again for the stage's parameters.

    A field that one side lacks and that is null on the other does not differ: options that are new since a plan was
    made are null unless they are asked for. Nor do columns that a stage has gained since: what the plan lacks is not
    written. Nor settings that change no byte, nor a path that was written short and the path that it stands for. Nor
    the folder of a model that has moved: its fingerprint is compared. Nor limits that decide alone which rows fail.

    Args:
        speed: Names of settings that change no byte.
        models: Where the models lie now whose fingerprints are among the fields.
    """
    if old == new:
        return {}
    old, new = _deciding(old, speed), _deciding(new, speed)
    names = [*old, *(name for name in new if name not in old)]
    found = {n: (old.get(n), new.get(n)) for n in names if not _alike(_said(old.get(n)), _said(new.get(n)), models)}
    for limit in LIMITS:
        found.pop(limit, None)
    if set(old.get(COLUMNS) or ()) <= set(new.get(COLUMNS) or ()):
        found.pop(COLUMNS, None)
    said = [pair for name, pair in found.items() if name.startswith("config.")]
    return {name: pair for name, pair in found.items() if not (name.startswith("stage.") and pair in said)}


def _deciding(fields: Mapping[str, Any], speed: frozenset[str]) -> dict[str, Any]:
    """Fields without the settings, at whatever depth, that change no byte."""

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: kept(part) for key, part in value.items() if key not in speed}
        return [kept(part) for part in value] if isinstance(value, list) else value

    def settings(name: str) -> bool:
        return name.startswith(("config.", "stage."))

    return {
        name: kept(value) if settings(name) else value
        for name, value in fields.items()
        if not (settings(name) and name.rpartition(".")[2] in speed)
    }


def _said(value: Any) -> Any:
    """A value without what is null in it."""
    if isinstance(value, Mapping):
        return {key: _said(part) for key, part in value.items() if part is not None}
    return [_said(part) for part in value] if isinstance(value, list) else value


def _alike(old: Any, new: Any, models: Sequence[str]) -> bool:
    """Whether two values are the same, but for paths that are relative or begin with ``~`` in an old plan, and for
    those of models that have moved."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_alike(old[key], new[key], models) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_alike(then, now, models) for then, now in zip(old, new, strict=True))
    if isinstance(old, str) and isinstance(new, str) and os.path.isabs(new):
        moved = os.path.isabs(old) and any(f"{path}/".startswith(f"{new}/") for path in models)
        return moved or new in (old, os.path.abspath(os.path.expanduser(old)))
    return bool(old == new)


def check_input(source: Source, folder: Folder, limit: int | None) -> dict[str, tuple[Any, Any]]:
    """Whether the input is still what the plan saw: differing file -> (then, now); at most a few are named.

    A file whose size and version are the same counts as unchanged; another is scanned again and compared by content.
    """
    found: dict[str, tuple[Any, Any]] = {}
    now = list_files(source)
    for name, size, version, content, rows in planfile.read_files(folder):
        file = next(now, None)
        if file is None or file.name != name:
            found["input.files"] = (name, file.name if file is not None else "(no further file)")
            return found
        if (file.size, file.version) != (size, version):
            scan, same = scanned_again(source, file, content, rows)
            if not same:
                found[f"input file {name}"] = (f"{rows} rows, {size} bytes", f"{scan.rows} rows, {file.size} bytes")
                if len(found) >= 5:
                    return found
    extra = next(now, None)
    if extra is not None and limit is None:
        found["input.files"] = ("(no further file)", extra.name)
    return found
