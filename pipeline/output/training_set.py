"""Pictures with labels as training code reads them: Parquet, a folder of pictures, or WebDataset tars.

Each is one that `datasets.load_dataset` takes, with a split for each row. The same rows in the same order give the same
bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.output.schema import noted

Layout = Literal["parquet", "imagefolder", "webdataset"]
Open = Callable[[str, str], Any]
"""Opens a file below the output folder: name, mode."""
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


def writer(layout: Layout, folder: str, open_file: Open) -> Writer:
    """A writer of that layout below `folder`."""
    kinds: dict[Layout, type[Writer]] = {"parquet": _Parquet, "imagefolder": _ImageFolder, "webdataset": _WebDataset}
    return kinds[layout](folder, open_file)


class Writer:
    """Takes rows with ``id``, ``image`` (encoded), ``label`` and ``class``; files are open until the end."""

    def __init__(self, folder: str, open_file: Open) -> None:
        self.folder, self.open_file, self.stack = folder, open_file, ExitStack()

    def add(self, split: str, rows: pa.Table) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


class _Parquet(Writer):
    """``train.parquet``: a row group for each table."""

    def __init__(self, folder: str, open_file: Open) -> None:
        super().__init__(folder, open_file)
        self._writers: dict[str, pq.ParquetWriter] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        if split not in self._writers:
            handle = self.stack.enter_context(self.open_file(f"{self.folder}/{split}.parquet", "wb"))
            self._writers[split] = self.stack.enter_context(pq.ParquetWriter(handle, noted(rows.schema)))
        self._writers[split].write_table(rows.cast(noted(rows.schema)))


class _ImageFolder(Writer):
    """``train/<label>/<id>.png`` and ``train/metadata.jsonl``."""

    def __init__(self, folder: str, open_file: Open) -> None:
        super().__init__(folder, open_file)
        self._listings: dict[str, Any] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        if split not in self._listings:
            name = f"{self.folder}/{split}/metadata.jsonl"
            self._listings[split] = self.stack.enter_context(self.open_file(name, "wb"))
        for row in rows.to_pylist():
            data = row.pop("image")["bytes"]
            name = f"{_plain(row['label'])}/{_plain(row['id'])}.{_suffix(data)}"
            with self.open_file(f"{self.folder}/{split}/{name}", "wb") as file:
                file.write(data)
            self._listings[split].write(_json({"file_name": name, **row}) + b"\n")


class _WebDataset(Writer):
    """``train-000000.tar`` with ``<id>.png``, ``<id>.cls`` and ``<id>.json``."""

    def __init__(self, folder: str, open_file: Open) -> None:
        super().__init__(folder, open_file)
        self._open: dict[str, tuple[ExitStack, tarfile.TarFile]] = {}
        self._counts: dict[str, int] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        for row in rows.to_pylist():
            tar, key, data = self._tar(split), _plain(row["id"]), row.pop("image")["bytes"]
            _put(tar, f"{key}.{_suffix(data)}", data)
            _put(tar, f"{key}.cls", str(row["class"]).encode())
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
