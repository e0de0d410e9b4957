"""Rows as training code reads them: Parquet, a folder of pictures, WebDataset tars, embeddings, stacked arrays.

The first three `datasets.load_dataset` takes, with a split for each row; ``npy`` is what clip-retrieval writes, and
``safetensors`` a file for each table. The same rows in the same order give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.input.rows import is_picture
from pipeline.output.schema import noted

Layout = Literal["parquet", "imagefolder", "webdataset", "npy", "safetensors"]
Shapes = Mapping[str, tuple[int, ...]]
"""Columns with arrays -> the shape of each; -1 for what differs from row to row."""
CAPTIONS = ("caption", "text", "prompt")
EMBEDDINGS = {"img_emb": "embedding", "text_emb": "text_embedding"}
"""clip-retrieval's folder -> the column."""
Open = Callable[[str, str], Any]
"""Opens a file below the output folder: name, mode."""
HELD_ROWS = 64
TAR_ROWS = 10_000
"""Pictures a tar."""


def split_of(own: str, test: float) -> str:
    """``train`` or ``test`` by a hash of the id, so that a picture stays on its side whatever else there is.

    Args:
        own: The row's id.
        test: Share of the rows that are for testing.
    """
    digest = hashlib.blake2b(own.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest) < test * 2**64 else "train"


def writer(
    layout: Layout, folder: str, open_file: Open, shapes: Shapes = MappingProxyType({}), parts: int = 1
) -> Writer:
    """A writer of that layout below `folder`.

    Args:
        shapes: Of the arrays that are written as such; other lists are written as JSON where the layout has no type
            for them.
        parts: How many tables are going to be written, for names of equal length.
    """
    kinds: dict[Layout, type[Writer]] = {
        "parquet": _Parquet, "imagefolder": _ImageFolder, "webdataset": _WebDataset, "npy": _Npy,
        "safetensors": _Safetensors,
    }  # fmt: skip
    return kinds[layout](folder, open_file, shapes, parts)


class Writer:
    """Takes rows with an ``id``, an encoded ``image`` and perhaps a ``label`` and its number ``class``; files are open
    until the end."""

    def __init__(self, folder: str, open_file: Open, shapes: Shapes, parts: int) -> None:
        self.folder, self.open_file, self.shapes, self.stack = folder, open_file, shapes, ExitStack()
        self.width, self.count = len(str(max(parts - 1, 0))), 0

    def add(self, split: str, rows: pa.Table) -> None:
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> None:
        """A file as a whole."""
        with self.open_file(f"{self.folder}/{name}", "wb") as file:
            file.write(data)

    def part(self) -> str:
        """The number of the next table, with as many digits as the last one has."""
        self.count += 1
        return f"{self.count - 1:0{self.width}d}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


class _Parquet(Writer):
    """``train.parquet``: a row group for each table."""

    def __init__(self, folder: str, open_file: Open, shapes: Shapes, parts: int) -> None:
        super().__init__(folder, open_file, shapes, parts)
        self._writers: dict[str, pq.ParquetWriter] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        if split not in self._writers:
            handle = self.stack.enter_context(self.open_file(f"{self.folder}/{split}.parquet", "wb"))
            self._writers[split] = self.stack.enter_context(pq.ParquetWriter(handle, noted(rows.schema)))
        self._writers[split].write_table(rows.cast(noted(rows.schema)))


class _ImageFolder(Writer):
    """``train/<label>/<id>.png`` (``train/<id>.png`` without labels) and ``train/metadata.jsonl``.

    More pictures are ``train/<column>/<id>.png``, which the metadata's ``<column>_file_name`` names.
    """

    def __init__(self, folder: str, open_file: Open, shapes: Shapes, parts: int) -> None:
        super().__init__(folder, open_file, shapes, parts)
        self._listings: dict[str, Any] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        if split not in self._listings:
            name = f"{self.folder}/{split}/metadata.jsonl"
            self._listings[split] = self.stack.enter_context(self.open_file(name, "wb"))
        others = [field.name for field in rows.schema if is_picture(field.type) and field.name != "image"]
        for row in _rows(rows):
            label = str(row["label"]) if row.get("label") is not None else None
            told: dict[str, str | None] = {"file_name": self._picture(split, label, row["id"], row.pop("image"))}
            for name in others:
                picture = row.pop(name)
                told[f"{name}_file_name"] = None if picture is None else self._picture(split, name, row["id"], picture)
            self._listings[split].write(_json({**told, **row}) + b"\n")

    def _picture(self, split: str, folder: str | None, own: str, picture: Mapping[str, bytes]) -> str:
        """Write one; its name below the split."""
        data = picture["bytes"]
        name = f"{_plain(own)}.{_suffix(data)}"
        name = name if folder is None else f"{_plain(folder)}/{name}"
        self.put(f"{split}/{name}", data)
        return name


class _WebDataset(Writer):
    """``train-000000.tar`` with ``<id>.png``, ``<id>.cls`` or ``<id>.txt``, and ``<id>.json``.

    More pictures are ``<id>.<column>.png``; arrays, in their shape, ``<id>.<column>.npy``, NaN or empty where a row has
    none: `datasets` wants the same members of every row.
    """

    def __init__(self, folder: str, open_file: Open, shapes: Shapes, parts: int) -> None:
        super().__init__(folder, open_file, shapes, parts)
        self._open: dict[str, tuple[ExitStack, tarfile.TarFile]] = {}
        self._counts: dict[str, int] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        arrays = {name: rows[name] for name in self.shapes}
        pictures = [field.name for field in rows.schema if is_picture(field.type)]
        caption = next((name for name in CAPTIONS if name in rows.column_names), None)
        for n, row in enumerate(_rows(rows.drop_columns(list(arrays)))):
            tar, key = self._tar(split), _plain(row["id"])
            for name in pictures:
                if (picture := row.pop(name)) is not None:
                    ending = _suffix(picture["bytes"])
                    _put(tar, f"{key}.{ending if name == 'image' else f'{name}.{ending}'}", picture["bytes"])
            for name, column in arrays.items():
                _put(tar, f"{key}.{name}.npy", _npy(_array(column[n], self.shapes[name])))
            if "class" in row:
                _put(tar, f"{key}.cls", str(row["class"]).encode())
            elif caption is not None:
                _put(tar, f"{key}.txt", str(row[caption] or "").encode())
            _put(tar, f"{key}.json", _json(row))

    def _tar(self, split: str) -> tarfile.TarFile:
        number, rest = divmod(self._counts.get(split, 0), TAR_ROWS)
        self._counts[split] = self._counts.get(split, 0) + 1
        if rest == 0:
            if split in self._open:
                self._open[split][0].close()
            own = self.stack.enter_context(ExitStack())
            handle = own.enter_context(self.open_file(f"{self.folder}/{split}-{number:06d}.tar", "wb"))
            self._open[split] = own, own.enter_context(tarfile.open(fileobj=handle, mode="w|"))  # noqa: SIM115
        return self._open[split][1]


class _Npy(Writer):
    """clip-retrieval's folders: ``img_emb/img_emb_0.npy``, ``text_emb/...``, and ``metadata/metadata_0.parquet`` with
    ``image_path``, ``caption`` and what else a row says of itself. Embeddings have length 1, as there."""

    def add(self, split: str, rows: pa.Table) -> None:
        number = self.part()
        for folder, name in EMBEDDINGS.items():
            if name in self.shapes:
                self.put(f"{folder}/{folder}_{number}.npy", _npy(_unit(_stacked(rows[name], self.shapes[name]))))
        plain = rows.drop_columns([field.name for field in rows.schema if pa.types.is_nested(field.type)])
        captions = next((plain[name] for name in CAPTIONS if name in plain.column_names), None)
        facts = {"image_path": rows["id"], **({} if captions is None else {"caption": captions})}
        facts |= {name: plain[name] for name in plain.column_names if name not in facts}
        with self.open_file(f"{self.folder}/metadata/metadata_{number}.parquet", "wb") as file:
            pq.write_table(pa.table(facts), file)


class _Safetensors(Writer):
    """``part-0.safetensors``: a tensor (N, ...) a column, NaN where a row has none; ``ids`` in its metadata."""

    def add(self, split: str, rows: pa.Table) -> None:
        from safetensors.numpy import save

        stacked = {name: _stacked(rows[name], shape) for name, shape in self.shapes.items()}
        told = {"ids": json.dumps(rows["id"].to_pylist()), "format": "pt"}
        self.put(f"part-{self.part()}.safetensors", save(stacked, told))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """One after another; of a table's pictures a few are in memory twice."""
    for start in range(0, len(table), HELD_ROWS):
        yield from table.slice(start, HELD_ROWS).to_pylist()


def _stacked(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """(N, *shape) of an array a row, in the dtype that is stored; NaN where there is none."""
    kind = column.type.value_type.to_pandas_dtype()
    all_N = np.full((len(column), *shape), np.nan, kind)
    there_N = column.is_valid().to_numpy()
    values = column.drop_null().combine_chunks().flatten()
    all_N[there_N] = np.asarray(values, kind).reshape(-1, *shape)
    return all_N


def _array(cell: pa.Scalar, shape: tuple[int, ...]) -> np.ndarray:
    """A row's array; flat where its shape is not known, NaN or empty where there is none."""
    if not cell.is_valid:
        return np.full((0,) if -1 in shape else shape, np.nan, cell.type.value_type.to_pandas_dtype())
    values = cell.values.to_numpy(zero_copy_only=False)
    return values.reshape(shape) if shape.count(-1) < 2 else values


def _unit(z_NE: np.ndarray) -> np.ndarray:
    """Rows of length 1, in their own dtype; a row of zeros stays."""
    norm_N1 = np.linalg.norm(z_NE.astype(np.float64), axis=1, keepdims=True)
    return (z_NE / np.where(norm_N1 == 0, 1, norm_N1)).astype(z_NE.dtype)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without time and owner, so that bytes repeat."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _plain(name: str) -> str:
    """A name for a file or folder; one that had to be changed gets a hash of what it was, so that none meet."""
    plain = re.sub(r"[^\w-]", "_", name)[:100]
    digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return plain if plain == name else f"{plain}-{digest}"


def _suffix(data: bytes) -> str:
    """Of an encoded picture's file; only its head is read."""
    with Image.open(io.BytesIO(data)) as picture:
        return {"jpeg": "jpg"}.get(found := str(picture.format).lower(), found)


def _json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode()
