"""``latentmill search``: the rows of a reference nearest to a text or a picture, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from index.reference import Reference
    from pipeline.input.rows import Span
    from pipeline.output.dataset import Output

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NOT_SHOWN = ("id", "embedding", "norm", "status", "error")


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: Its id.
        cosine: To the query.
        columns: Its kept columns, without pictures and vectors.
        picture: From its kept columns, or read again from the job's input; None where there is none any more.
    """

    id: str
    cosine: float
    columns: dict[str, Any]
    picture: Image | bytes | None


def find(path: str, query: str, k: int) -> list[Hit]:
    """The k rows nearest to a query, best first.

    Args:
        path: Output of a `reference` job.
        query: The path of a picture, if a file with a picture's name is there; else a text.

    Raises:
        ValueError: k exceeds the rows, or the reference's encoder cannot encode the query.
    """
    from index.reference import Reference
    from pipeline.output.dataset import Output

    reference = Reference.open(path)
    found = reference.neighbours(embed(reference, query), min(k, reference.rows))
    return hits(Output.open(path), reference, found.positions_BK[0], found.cos_BK[0].tolist())


def embed(reference: Reference, query: str) -> torch.Tensor:
    """The query's embedding (1, E), by the reference's own encoders, checked to be the same weights as then.

    Raises:
        ValueError: There is no such encoder, or it has changed.
    """
    from transformers.utils import logging

    from index.reference import require_encoder
    from stages.models import clip

    logging.disable_progress_bar()  # of loading weights, which takes a moment
    is_picture = query.lower().endswith(PICTURES) and Path(query).is_file()
    role, key = ("image", "encoder") if is_picture else ("text", "text_encoder")
    made_with = reference.facts[key]
    if made_with is None:
        raise ValueError(
            f"{reference.path}: no {role} encoder belongs to this reference, so it cannot be searched by {role}; "
            f"make it again with `{key}:` set"
        )
    place, revision = made_with["path"], made_with["revision"] or None
    require_encoder(reference.path, made_with, clip.identity(place, "image" if is_picture else "text", revision))
    if is_picture:
        from pipeline.input.pictures import decode_picture

        picture = decode_picture(Path(query).read_bytes(), 100_000_000)
        return clip.ImageEncoder(place, revision)([picture])
    return clip.TextEncoder(place, revision)([query])


def hits(output: Output, reference: Reference, positions_K: np.ndarray, cos_K: Sequence[float]) -> list[Hit]:
    """Rows by their numbers in the reference, with their columns and pictures."""
    from pipeline.output import parquet

    places = reference.table.take(positions_K).to_pylist()
    wanted: dict[int, list[int]] = {}
    for place in places:
        wanted.setdefault(place["part"], []).append(place["row"])
    columns: dict[tuple[int, int], dict[str, Any]] = {}
    for record in output.records():
        if record.shard not in wanted:
            continue
        name = output.locate(record)
        if name is None:
            continue
        with parquet.opened(output.folder, name) as file:
            names = [column for column in file.schema_arrow.names if column not in NOT_SHOWN]
        if not names:
            continue
        rows = parquet.read(output.folder, name, names).take(wanted[record.shard])
        for row, plain in zip(wanted[record.shard], rows.to_pylist(), strict=True):
            columns[record.shard, row] = plain
    again = _pictures(output, wanted)
    found = []
    for place, cosine in zip(places, cos_K, strict=True):
        at = (place["part"], place["row"])
        values = columns.get(at, {})
        kept = next((value["bytes"] for value in values.values() if _is_picture(value)), None)
        shown = {name: cell for name, cell in values.items() if not _is_picture(cell) and not isinstance(cell, list)}
        found.append(Hit(place["id"], float(cosine), shown, kept or again.get(at)))
    return found


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def _span_of(spans: Sequence[Span], row: int) -> Span:
    """The one row of a shard, as a span of its own file."""
    from pipeline.input.source import SourceError

    left = row
    for span in spans:
        if left < span.stop - span.start:
            return span.part(left, 1)
        left -= span.stop - span.start
    raise SourceError(f"the shard has no row {row}")


def _pictures(output: Output, wanted: dict[int, list[int]]) -> dict[tuple[int, int], Image]:
    """Pictures of rows, read again from the job's input as far as it is still there."""
    from pipeline.input.pictures import PictureError, decode_picture
    from pipeline.input.read import picture_bytes, read_rows, wanted_columns
    from pipeline.input.rows import Encoded, as_encoded
    from pipeline.input.source import Source, SourceError
    from pipeline.run.plan import read_shards

    source = Source.from_json(output.plan["source"])
    found: dict[tuple[int, int], Image] = {}
    for shard in read_shards(output.own):
        for row in wanted.get(shard.index, ()):
            try:
                span = _span_of(shard.spans, row)
                raw = next(read_rows(source, (span,), 0, 1, wanted_columns(source, ())))
                value = raw.values.get("image")
                if "image" in source.images:
                    value = as_encoded(value)
                if isinstance(value, Encoded):
                    folder = span.path.rpartition("/")[0]
                    found[shard.index, row] = decode_picture(picture_bytes(value, source, folder), source.max_pixels)
            except (SourceError, PictureError, OSError, StopIteration):
                continue
    return found


def print_table(query: str, found: Sequence[Hit]) -> None:
    """The rows in the terminal."""
    from rich.console import Console
    from rich.table import Table

    from jobs.page.html import shorten

    names = list(dict.fromkeys(name for hit in found for name in hit.columns))
    table = Table(title=shorten(query, 80), title_justify="left")
    for name in ("", "cosine"):
        table.add_column(name, justify="right")
    for name in ("id", *names):
        table.add_column(name)
    for rank, hit in enumerate(found, start=1):
        cells = [shorten(hit.columns.get(name, ""), 60) for name in names]
        table.add_row(str(rank), f"{hit.cosine:.4f}", shorten(hit.id, 60), *cells)
    Console().print(table)


def write_page(page: Path, reference: str, query: str, found: Sequence[Hit]) -> None:
    """The rows as one self-contained HTML page with their pictures."""
    from jobs.page.html import Exhibit, gallery, table, tag, words
    from jobs.page.report import document

    exhibits = [Exhibit(hit.picture, _caption(hit), f"cosine {hit.cosine:.4f}") for hit in found]
    names = list(dict.fromkeys(name for hit in found for name in hit.columns))
    rows = [
        [str(rank), f"{hit.cosine:.4f}", words(hit.id), *(words(hit.columns.get(name, "")) for name in names)]
        for rank, hit in enumerate(found, start=1)
    ]
    head = tag(
        "header",
        tag("p", "latentmill", class_="brand"),
        tag("h1", words(query, 120)),
        tag("p", f"the {len(found)} nearest rows of ", tag("code", reference), class_="sub"),
    )
    body = [tag("section", gallery(exhibits)), tag("section", table(["", "cosine", "id", *names], rows, (0, 1)))]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document(f"{query} · latentmill", head, body), encoding="utf-8")


def _caption(hit: Hit) -> str:
    text = next((value for name in ("caption", "text", "prompt") if (value := hit.columns.get(name))), hit.id)
    return str(text)
