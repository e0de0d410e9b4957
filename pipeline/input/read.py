"""Read rows of any format, named as the stage wants them.

Pictures come out encoded (`Encoded`); they are fetched and decoded by `prepare`, which may run in another thread. A row
that is damaged comes out with ``error`` set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.input.formats.arrays import NPY
from pipeline.input.formats.columnar import DATASETS, PARQUET
from pipeline.input.formats.concepts import CONCEPTS
from pipeline.input.formats.delimited import CSV
from pipeline.input.formats.images import IMAGES
from pipeline.input.formats.text import JSONL, TEXT
from pipeline.input.formats.webdataset import WEBDATASET
from pipeline.input.formats.world import MICRO_WORLD
from pipeline.input.pictures import PictureError, decode_picture
from pipeline.input.rows import Encoded, Format, Raw, Span, Wanted, as_encoded, open_input
from pipeline.input.source import Source, SourceError
from pipeline.input.variants import repeated
from pipeline.storage import patiently

FORMATS: dict[str, Format] = {
    "parquet": PARQUET,
    "jsonl": JSONL,
    "csv": CSV,
    "text": TEXT,
    "images": IMAGES,
    "webdataset": WEBDATASET,
    "datasets": DATASETS,
    "npy": NPY,
    "concepts": CONCEPTS,
    "micro-world": MICRO_WORLD,
}


def reader_of(source: Source) -> Format:
    """How a resolved source is read."""
    assert source.format is not None
    format = FORMATS[source.format]
    for name, values in source.variants.items():
        format = repeated(format, name, values)
    return format


def wanted_columns(source: Source, keep: tuple[str, ...]) -> Wanted:
    """What has to be read for a stage and the kept columns."""
    if not source.columns:
        return None
    kept = {name: name for name in keep if name not in source.columns and name not in source.variants}
    return {**source.columns, **kept}


def read_rows(source: Source, spans: tuple[Span, ...], skip: int, count: int, wanted: Wanted) -> Iterator[Raw]:
    """Rows ``skip`` to ``skip + count`` of the spans laid end to end.

    Args:
        source: Resolved.
    """
    read = reader_of(source).rows
    for span in spans:
        size = span.stop - span.start
        if skip >= size:
            skip -= size
            continue
        asked, found = span.part(skip, count), 0
        for raw in read(source, asked, wanted):
            found += 1
            yield raw
        if found < asked.stop - asked.start:
            gone = asked.start + found
            raise SourceError(f"{span.path}: row {gone} and what follows are gone; the input changed during the run")
        count -= found
        skip = 0
        if not count:
            return


def prepare(raw: Raw, source: Source, folder: str) -> tuple[dict[str, Any] | None, str | None]:
    """A row as the stage gets it, its pictures decoded: (row, None), or (None, why not).

    Columns that are only kept are left out: the stage has no use for them, and a damaged picture in one is no reason to
    fail the row.

    Args:
        folder: Of the row's file; relative picture paths start there.
    """
    if raw.error is not None:
        return None, raw.error
    row: dict[str, Any] = {"id": raw.id}
    for name, value in raw.values.items():
        if name == "id" or (source.columns and name not in source.columns and name not in source.variants):
            continue
        if name in source.images:
            value = as_encoded(value)
        if isinstance(value, Encoded):
            try:
                row[name] = decode_picture(picture_bytes(value, source, folder), source.max_pixels)
            except PictureError as error:
                return None, f"{name}: {error}"
        else:
            row[name] = value
    return row, None


def picture_bytes(value: Encoded, source: Source, folder: str) -> bytes:
    """The encoded bytes of a picture, fetched if only its place is known. They are kept on ``value``.

    Raises:
        PictureError: The file is not there, or there is neither bytes nor path.
    """
    if value.data is None:
        if not value.path:
            raise PictureError("no picture (null)")
        path = value.path if "://" in value.path or value.path.startswith("/") else f"{folder}/{value.path}"
        try:
            with open_input(path, source) as handle:
                value.data = patiently(handle.read)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise PictureError(f"{path}: {error.strerror or 'cannot be read'}") from None
    return value.data
