"""Rows drawn from the miniature world: ``micro-world://heldout?rows=64&seed=0``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.extras import miniature
from pipeline.input.files import InputFile
from pipeline.input.rows import Begins, Encoded, FileScan, Format, Look, Raw, Span, Wanted, fixed, picked
from pipeline.input.source import Source, SourceError
from pipeline.pictures import encode_picture


def _world(address: str) -> tuple[str, int, int]:
    """``micro-world://heldout?rows=64&seed=0`` -> split, rows, seed."""
    parts = urlsplit(address)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    unknown = set(query) - {"rows", "seed"}
    if parts.netloc not in ("train", "heldout") or unknown or not query.get("rows", "64").isdecimal():
        raise SourceError(f"{address}: expected micro-world://train?rows=N&seed=N, or heldout in place of train")
    return parts.netloc, int(query.get("rows", "64")), int(query.get("seed", "0"))


def _world_scan(source: Source, file: InputFile, begins: Begins, look: Look | None = None) -> FileScan:
    with miniature():
        import micro.world  # noqa: F401  # said while it is planned, and not in every row
    split, rows, seed = _world(file.path)
    return FileScan(rows, f"micro-world:{split}:{seed}:{rows}")


def _world_rows(source: Source, span: Span, wanted: Wanted) -> Iterator[Raw]:
    from PIL import Image

    with miniature():
        from micro.world import caption_of, render, sample_scene

    split, _, seed = _world(span.path)
    names = set(wanted.values()) if wanted is not None else {"image", "caption", "scene"}
    for index in range(span.start, span.stop):
        scene = sample_scene(index, split, seed)  # type: ignore[arg-type]
        values: dict[str, Any] = {"caption": caption_of(index, split, seed), "scene": scene.to_json()}  # type: ignore[arg-type]
        if "image" in names:
            values["image"] = Encoded(encode_picture(Image.fromarray(render(scene))))
        yield Raw(f"{split}-{seed}#{index}", picked(values, wanted))


MICRO_WORLD = Format(_world_scan, _world_rows, fixed(image="image", caption="string", scene="string"))
