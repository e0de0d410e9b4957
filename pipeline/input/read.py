"""Read rows of any format, named as the stage wants them.

Pictures come out encoded (`Encoded`); they are fetched and decoded by `prepare`, which may run in another thread. A row
that is damaged comes out with ``error`` set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.contract import Form
from pipeline.failures import Away, described, passing
from pipeline.input.damage import tolerant
from pipeline.input.fetch import picture_bytes
from pipeline.input.files import InputFile
from pipeline.input.formats.arrays import NPY
from pipeline.input.formats.columnar import DATASETS, PARQUET
from pipeline.input.formats.concepts import CONCEPTS
from pipeline.input.formats.delimited import CSV
from pipeline.input.formats.images import IMAGES
from pipeline.input.formats.single import ONE_ROW
from pipeline.input.formats.text import JSONL, TEXT
from pipeline.input.formats.webdataset import WEBDATASET
from pipeline.input.formats.world import MICRO_WORLD
from pipeline.input.forms import FormError, as_picture, as_text, missing
from pipeline.input.rows import Encoded, FileScan, Format, Raw, Span, Wanted
from pipeline.input.source import Source, SourceError
from pipeline.input.variants import repeated
from pipeline.pictures import PictureError, decode_picture

OWN_COLUMNS = ("id", "status", "error", "duplicate_of")
"""What rows carry through a stage beside its columns."""
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
    "one-row": ONE_ROW,
}


def reader_of(source: Source) -> Format:
    """How a resolved source is read."""
    assert source.format is not None
    format = tolerant(FORMATS[source.format])
    for name, values in source.variants.items():
        format = repeated(format, name, values)
    return format


def scanned_again(source: Source, file: InputFile, digest: str, rows: int) -> tuple[FileScan, bool]:
    """A file that was planned, as it is now, and whether it holds what it held.

    Args:
        source: Resolved.
        digest, rows: What the plan says of it.
    """
    scan = reader_of(source).scan(source, file, lambda row: False)
    if not scan.is_of(digest, rows) and scan.keys is not None:  # it may have been read through when it was planned
        scan = reader_of(source).scan(source, file, lambda row: False, lambda row, values: None)
    return scan, scan.is_of(digest, rows)


def wanted_columns(source: Source, keep: tuple[str, ...]) -> Wanted:
    """What has to be read for a stage and the kept columns."""
    if not source.columns:
        return None
    kept = {name: name for name in keep if name not in source.columns and name not in source.variants}
    return {**source.columns, **kept}


def read_rows(
    source: Source, spans: tuple[Span, ...], skip: int, count: int, wanted: Wanted,
    opening: Callable[[Span], None] = lambda span: None,
) -> Iterator[Raw]:  # fmt: skip
    """Rows ``skip`` to ``skip + count`` of the spans laid end to end.

    Args:
        source: Resolved.
        opening: Called before a span's file is opened.

    Raises:
        SourceError: The input is not what was planned.
        Away: A store or server is.
        OSError: A file cannot be read.
    """
    read = reader_of(source).rows
    for span in spans:
        size = span.stop - span.start
        if skip >= size:
            skip -= size
            continue
        asked, found = span.part(skip, count), 0
        with _told(span.path):
            opening(asked)
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


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What goes wrong names the file that was read, so that nobody takes it for trouble with the output."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        if passing(error):
            raise Away(f"{path} cannot be read now: {described(error)}") from error
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{path}: is gone; the input changed during the run") from None
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be read: {described(error)}") from error
        raise


def prepare(
    raw: Raw, source: Source, folder: str, reads: Mapping[str, Form] | None = None,
    take: Callable[[int], None] = lambda size: None,
) -> tuple[dict[str, Any] | None, str | None]:  # fmt: skip
    """A row as the stage gets it, its pictures decoded: (row, None), or (None, why not).

    Columns that the stage does not read, or that are only kept, are left out: a damaged picture in one is no reason to
    fail the row. So are somebody else's ``status`` and ``error``, which say nothing of this run.

    Args:
        folder: Of the row's file; relative picture paths start there.
        reads: Columns that the stage takes, and in which form; None: all, as they are found.
        take: Told of the bytes that a picture is going to take, before it is decoded; may wait until they are free.
    """
    if raw.error is not None:
        return None, raw.error
    row: dict[str, Any] = {"id": raw.id}
    for name, value in raw.values.items():
        if name in OWN_COLUMNS or not _handed_on(name, source, reads):
            continue
        try:
            row[name] = _formed(name, value, source, folder, (reads or {}).get(name, "value"), take)
        except (FormError, PictureError) as error:
            return None, f"{name}: {error}"
    return row, None


def _handed_on(name: str, source: Source, reads: Mapping[str, Form] | None) -> bool:
    if name in source.variants:
        return True
    return (not source.columns or name in source.columns) and (reads is None or name in reads)


def _formed(
    name: str, value: Any, source: Source, folder: str, form: Form, take: Callable[[int], None]
) -> Any:  # fmt: skip
    """The value in the form that the stage takes it in."""
    if form in ("text", "text?"):
        try:
            return as_text(value)
        except FormError:
            if form == "text":
                raise
            return None
    if name in source.images or (form == "picture" and not missing(value)):
        value = as_picture(value)
    if isinstance(value, Encoded):
        return decode_picture(picture_bytes(value, source, folder), source.max_pixels, take, source.draft)
    return value
