"""A finished output in the layouts of other tools: its rows with status ``ok``, each once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.input.rows import is_picture
from pipeline.output.dataset import SUCCESS, Output
from pipeline.output.planfile import OutputError
from pipeline.output.schema import decode_schema
from pipeline.output.training_set import EMBEDDINGS, Layout, Shapes, writer
from pipeline.storage import Folder

TOLD = ("id", "status", "error")
PICTURES = ("image", "picture")
"""The first of these is what a row's picture is; else the first column of pictures."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rows: Rows with status ``ok``.
        others: Rows that failed or are duplicates, which are left out.
        notes: What is left out of the rows, as sentences.
    """

    rows: int
    others: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Choice:
    """Of an output's columns, those that a layout takes.

    Attributes:
        columns: Besides ``id``.
        picture: The column that becomes ``image``.
    """

    columns: tuple[str, ...]
    picture: str | None
    shapes: Shapes
    notes: tuple[str, ...] = ()


def export(out: str, dest: str, layout: Layout, columns: Sequence[str] | None = None) -> Exported:
    """Write an output's rows to a new folder.

    Args:
        dest: A folder that is not there, or empty; on a disk or a store.
        columns: Only these; None: all that the layout can hold.

    Raises:
        OutputError: The output is unfinished, or holds other rows than its records say.
        ValueError: The folder is not empty, or no column is what the layout needs.
    """
    output, target = Output.open(out), Folder.at(dest)
    if not output.folder.exists(SUCCESS):
        raise OutputError(f"{out} is unfinished; run the job again, then export it")
    if next(target.names(), None) is not None:
        raise ValueError(f"{dest} is not empty: name a new folder, or delete it")
    chosen = _chosen(output, layout, columns)
    expected = sum(record.rows_ok for record in output.records())
    parts = sum(record.rows_ok > 0 for record in output.records())
    rows = others = 0
    with writer(layout, "", partial(_opened, target), chosen.shapes, parts) as files:
        for table in output.tables(["id", "status", *chosen.columns]):
            good = table.filter(pc.equal(table["status"], "ok"))
            rows, others = rows + len(good), others + len(table) - len(good)
            if len(good):
                files.add("train", _named(good, chosen))
    if rows != expected:
        raise OutputError(f"{out}: {rows} rows were exported, its records say {expected}; run `latentmill verify`")
    return Exported(rows, others, chosen.notes)


def _opened(target: Folder, name: str, mode: str) -> Any:
    """A new file below the folder."""
    path = target.path(name.lstrip("/"))
    if target.local:
        target.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    return target.fs.open(path, mode)


def _chosen(output: Output, layout: Layout, columns: Sequence[str] | None) -> _Choice:
    schema = decode_schema(output.plan["schema"])
    for name in columns or ():
        if name not in schema.names:
            raise ValueError(f"no column {name!r}; there are {', '.join(schema.names)}")
    fields = [own for own in schema if own.name not in TOLD and (columns is None or own.name in columns)]
    pictures = [own.name for own in fields if is_picture(own.type)]
    picture = next((name for name in (*PICTURES, *pictures) if name in pictures), None)
    if (
        picture not in (None, "image")
        and layout in ("imagefolder", "webdataset")
        and "image" in [f.name for f in fields]
    ):
        raise ValueError("the column 'image' holds no pictures: name those to export with --columns, without it")
    choose = {
        "imagefolder": _for_folder, "npy": _for_npy, "safetensors": _for_tensors, "webdataset": _for_tars,
        "parquet": _for_parquet,
    }[layout]  # fmt: skip
    return choose(output, fields, picture)


def _shape(field: pa.Field) -> tuple[int, ...] | None:
    """The shape of a column's arrays; None: it holds none."""
    listed = pa.types.is_fixed_size_list(field.type) or pa.types.is_list(field.type)
    if not listed or not pa.types.is_floating(field.type.value_type):
        return None
    told = (field.metadata or {}).get(b"shape")
    length = field.type.list_size if pa.types.is_fixed_size_list(field.type) else -1
    return tuple(json.loads(told)) if told else (length,)


def _shapes(fields: Sequence[pa.Field]) -> dict[str, tuple[int, ...]]:
    return {own.name: shape for own in fields if (shape := _shape(own)) is not None}


def _for_parquet(output: Output, fields: Sequence[pa.Field], picture: str | None) -> _Choice:
    return _Choice(tuple(own.name for own in fields), None, {})


def _for_folder(output: Output, fields: Sequence[pa.Field], picture: str | None) -> _Choice:
    if picture is None:
        raise ValueError(f"{output.path} has no column of pictures, of which a folder of pictures could be made")
    _require(output, picture)
    out = [own.name for own in fields if _shape(own) is not None]
    kept = tuple(own.name for own in fields if own.name not in out)
    return _Choice(kept, picture, {}, _left_out(out, "a folder of pictures holds no arrays"))


def _for_tars(output: Output, fields: Sequence[pa.Field], picture: str | None) -> _Choice:
    if picture is not None:
        _require(output, picture)
    others = [own.name for own in fields if is_picture(own.type) and own.name != picture]
    out = [name for name in others if _lacking(output, name) is not None]
    kept = [own for own in fields if own.name not in out]
    notes = _left_out(out, "some rows have none, and `datasets` wants the same members of every row")
    return _Choice(tuple(own.name for own in kept), picture, _shapes(kept), notes)


def _require(output: Output, picture: str) -> None:
    if (own := _lacking(output, picture)) is not None:
        raise ValueError(f"row {own!r} is ok and has no {picture}: name other columns with --columns, or --to parquet")


def _lacking(output: Output, picture: str) -> str | None:
    """The first row that is ok and has no picture; no picture's bytes are read."""
    for table in output.tables(["id", "status", f"{picture}.path"]):
        lacking = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.is_null(table[picture])))
        if len(lacking):
            return str(lacking["id"][0].as_py())
    return None


def _for_npy(output: Output, fields: Sequence[pa.Field], picture: str | None) -> _Choice:
    shapes = {name: shape for name, shape in _shapes(fields).items() if name in EMBEDDINGS.values()}
    if "embedding" not in shapes:
        raise ValueError(f"{output.path} has no column 'embedding', which this layout is for; try --to safetensors")
    lacking = 0
    if "text_embedding" in shapes:
        for table in output.tables(["status", "text_embedding"]):
            lacking += table.filter(pc.equal(table["status"], "ok"))["text_embedding"].null_count
    if lacking:
        del shapes["text_embedding"]
    notes = (f"text_emb is left out: {lacking:,} rows have no text_embedding",) if lacking else ()
    plain = [own.name for own in fields if not pa.types.is_nested(own.type)]
    out = [own.name for own in fields if own.name not in (*plain, *EMBEDDINGS.values())]
    return _Choice(
        (*plain, *shapes), None, shapes, notes + _left_out(out, "clip-retrieval's layout has no place for it")
    )


def _for_tensors(output: Output, fields: Sequence[pa.Field], picture: str | None) -> _Choice:
    shapes = {name: shape for name, shape in _shapes(fields).items() if -1 not in shape}
    if not shapes:
        raise ValueError(f"{output.path} has no column of arrays of one size; try --to webdataset")
    out = [own.name for own in fields if own.name not in shapes]
    return _Choice(tuple(shapes), None, shapes, _left_out(out, "tensors of one shape alone are stacked"))


def _left_out(names: Sequence[str], why: str) -> tuple[str, ...]:
    return (f"left out: {', '.join(names)} ({why})",) if names else ()


def _named(rows: pa.Table, chosen: _Choice) -> pa.Table:
    """The rows under the names that a layout knows."""
    rows = rows.drop_columns(["status"])
    if chosen.picture is None or chosen.picture == "image":
        return rows
    return rows.rename_columns(["image" if name == chosen.picture else name for name in rows.column_names])
