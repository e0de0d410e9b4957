"""What a run is, settled before its input is scanned: format, columns, types, and the fields of its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.contract import StageInfo, StageSpec
from pipeline.input.contents import Contents
from pipeline.input.files import resolve
from pipeline.input.formats.columnar import is_output
from pipeline.input.read import wanted_columns
from pipeline.input.rows import Wanted, is_picture
from pipeline.input.source import Source
from pipeline.output import schema as columns_of
from pipeline.run.columns import (
    Watched,
    check_needs,
    check_pictures,
    check_texts,
    look,
    mistaken_texts,
    unused_captions,
    written_by_runs,
)  # fmt: skip
from pipeline.storage import Folder


class PlanError(ValueError):
    """The run cannot be planned; the message says what to change."""


@dataclass(frozen=True)
class RunSpec:
    """All that decides which bytes a run writes, and where.

    Attributes:
        stage: The stage that maps the rows.
        source: The input.
        output: Output folder; local, or any fsspec address.
        config: The settings that change the output's bytes (JSON-able). Part of the run fingerprint; the fields
            that differ on a resume are named by their dotted keys. Leave resources and the output folder out.
        seed: Recorded, part of the fingerprint.
        shard_rows: Rows a shard: what one worker takes at a time.
        keep: Columns of a row (names after mapping, else the input's names) copied to the output.
        offered: Columns that are kept as well, where an earlier run wrote them into the input. No part of the
            fingerprint: a resumed run keeps those that its plan names.
        asked: Key of the job file that a kept column stands for, where it is not ``keep``; messages name it.
        limit: Only the first so many rows of the input.
        storage_options: fsspec's, for the output. Not recorded.
        renamed: Name of a setting in `config` -> what job files call it now; messages say that.
        speed: Names of settings, in `config` and the stage's, that change no byte: a resumed run may have others.
    """

    stage: StageSpec
    source: Source
    output: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    shard_rows: int = 1000
    keep: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    speed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Draft:
    """A run's settled description, before its input has been scanned.

    Attributes:
        source: Resolved.
        wanted: What is read of each row.
        schema: The output's, as far as the beginning of the input tells the kept columns' types.
        kept: Names of the columns copied from the input, and the key of the job file that asks for each.
        fields: What goes into the fingerprint beside the input's content, by dotted name.
        bytes_per_row: Estimate.
        notes: What the user should know of the input, by what has been seen so far.
    """

    source: Source
    wanted: Wanted
    info: StageInfo
    schema: pa.Schema
    kept: Mapping[str, str]
    fields: Mapping[str, Any]
    bytes_per_row: float
    notes: tuple[str, ...] = ()


def draft(spec: RunSpec) -> Draft:
    """Settle format, columns and types; reads the first rows of the input and the stage's description.

    Raises:
        SourceError, PlanError
    """
    if spec.shard_rows < 1:
        raise PlanError(f"shard_rows is {spec.shard_rows}; it has to be at least 1")
    source = resolve(spec.source)
    info = spec.stage.describe()
    keep = (*spec.keep, *_offered(spec, source, info))
    wanted = wanted_columns(source, keep)
    asked = {name: spec.asked.get(name, "keep") for name in keep}
    seen = look(source, asked, spec.limit, info.reads)
    check_pictures(source, seen, info.reads)
    check_texts(source, seen, info.reads)
    check_needs(source, seen, info.needs)
    kept = {name: (wanted or {}).get(name, name) for name in keep}
    fields = [seen.field(name, column) for name, column in kept.items()]
    try:
        note = {"latentmill": _file_note(spec, info)}
        schema = columns_of.output_schema(fields, info.columns, note, twins=_may_hold_twins(source, seen.schema))
    except ValueError as error:
        raise PlanError(str(error)) from None
    for name in info.bodily:
        if seen.schema is not None or any(raw.values.get(kept[name]) is not None for raw in seen.rows):
            _refuse_addresses(schema.field(name))
    size = sum(columns_of.sample_bytes(seen.rows, column) for column in kept.values())
    settled, size = _fields(spec, source, info, schema), size + _row_bytes(info)
    texts = (*unused_captions(source, seen, info.reads), *mistaken_texts(source, seen, info.reads))
    notes = (*texts, *_unpinned(info), *info.notes)
    return Draft(source, wanted, info, schema, asked, settled, size, notes)


def _offered(spec: RunSpec, source: Source, info: StageInfo) -> tuple[str, ...]:
    """The columns that are kept beside those that are asked for."""
    taken = {*spec.keep, *source.columns, *source.variants, *(column.name for column in info.columns)}
    return written_by_runs(source, [name for name in spec.offered if name not in taken])


def _refuse_addresses(column: pa.Field) -> None:
    """A kept column that has to hold pictures does.

    Raises:
        PlanError: It holds their addresses.
    """
    kind = column.type
    if not (is_picture(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise PlanError(
            f"the column {column.name!r} holds addresses of pictures ({kind}), and the output has to hold the pictures "
            "themselves: give their folder or a Parquet file with their bytes as the input"
        )


def _may_hold_twins(source: Source, schema: pa.Schema | None) -> bool:
    """Whether rows may come out as duplicates: they are looked for, or the step before looked for them."""
    told = schema is not None and is_output(schema) and "duplicate_of" in schema.names
    return told or source.dedupe is not None


def _unpinned(info: StageInfo) -> Iterator[str]:
    """What to say of models from the hub that may be others tomorrow."""
    found = [model for model in info.models.values() if model.get("commit")]
    moving = {model["commit"]: model["path"] for model in found if model.get("revision") != model["commit"]}
    for commit, path in moving.items():
        yield f"{path}: taken from a branch, which moves; to have the same model later: revision: {commit}"


def _row_bytes(info: StageInfo) -> float:
    size = 60.0  # id, status, error
    for column in info.columns:
        if column.kind == "tensor":
            values = 1
            for extent in column.shape:
                values *= extent if extent > 0 else 128  # of a latent of a megapixel, whatever its shape
            size += values * (2 if column.dtype == "float16" else 4)
        else:
            size += {"string": 60, "json": 100, "image": 100_000}.get(column.kind, 8)
    return size


def _file_note(spec: RunSpec, info: StageInfo) -> str:
    """What every file says about where it comes from."""
    models = {role: dict(model) for role, model in info.models.items()}
    note = {"version": columns_of.SCHEMA_VERSION, "stage": spec.stage.name, "seed": spec.seed, "models": models}
    return json.dumps({**note, "metadata": dict(info.metadata), "config": spec.config}, sort_keys=True, default=str)


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _flat(value[key], f"{prefix}.{key}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _fields(spec: RunSpec, source: Source, info: StageInfo, schema: pa.Schema) -> dict[str, Any]:
    """Everything that changes the bytes, but the input's content. A model counts by its fingerprint if it has one."""
    described = source.to_json()
    models = {
        role: {key: model[key] for key in model if key not in ("path", "commit") or not model.get("fingerprint")}
        for role, model in info.models.items()
    }
    fields = {
        "shard_rows": spec.shard_rows,
        "limit": spec.limit,
        "seed": spec.seed,
        "keep": list(spec.keep),
        "stage": spec.stage.name,
        "output columns": [f"{f.name}: {f.type}" for f in schema],
        "layout version": columns_of.SCHEMA_VERSION,
        **dict(_flat(spec.config, "config")),
        **dict(_flat({key: value for key, value in described.items() if key != "path"}, "input")),
        "input.path": [file if "://" in file else Folder.at(file).root for file in source.path],
        **dict(_flat(spec.stage.params, "stage")),
        **dict(_flat(models, "models")),
        **dict(_flat(info.metadata, "stage metadata")),
    }
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def watched(drafted: Draft) -> Watched:
    """What learns of the columns while the input is scanned."""
    return Watched(drafted.source, drafted.kept, drafted.info.reads)


def compared(drafted: Draft) -> Contents | None:
    """What finds rows that hold the same, where that is asked for."""
    return None if drafted.source.dedupe is None else Contents(drafted.source, drafted.info.reads)


def fingerprint(fields: Mapping[str, Any], content: str) -> str:
    text = json.dumps({**fields, "input content": content}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
