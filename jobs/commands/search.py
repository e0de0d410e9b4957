"""``latentmill search``: the rows of a reference nearest to a text or a picture, as a table and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.errors import errors, printable
from jobs.commands.stores import StorageOptions, reaching

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from index.reference import Reference
    from jobs.page.hits import Hit


def search(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="Output of a `reference` job.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Some text, or the path of a picture.")],
    k: Annotated[int, typer.Option("-k", min=1, metavar="N", help="How many rows to show.")] = 10,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write an HTML page with the pictures.")
    ] = None,
    storage_options: StorageOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Find the rows of a reference nearest to a text or a picture."""
    with errors(), reaching(reference, storage_options):
        found = find(reference, query, k)
        if page is not None:
            write_page(page, reference, query, found)
    if as_json:
        typer.echo(json.dumps([{"id": h.id, "cosine": h.cosine, **h.columns} for h in found], default=str))
    else:
        print_table(query, found)
        if page is not None:
            typer.echo(f"page: {page}")


def find(path: str, query: str, k: int) -> list[Hit]:
    """The k rows nearest to a query, best first.

    Args:
        path: Output of a `reference` job.
        query: The path or address of a picture, if it ends as a picture's name does and holds no space, or is there;
            else a text.

    Raises:
        ValueError: k exceeds the rows, the picture is not there, or the reference's encoder cannot encode the query.
    """
    from index.reference import Reference
    from jobs.page.hits import hits
    from pipeline.output.dataset import Output

    reference = Reference.open(path)
    found = reference.neighbours(embed(reference, query), min(k, reference.rows))
    return hits(Output.open(path), reference, found.positions_BK[0], found.cos_BK[0].tolist())


def embed(reference: Reference, query: str) -> torch.Tensor:
    """The query's embedding (1, E), by the reference's own encoders, checked to be the same weights as then.

    Raises:
        ValueError: There is no such encoder, or it has changed, or the query is empty.
    """
    from jobs.page.queries import encoder

    if not query.strip():
        raise ValueError("the query is empty: write some text, or the path of a picture")
    if _names_picture(query):
        picture = _picture(query)  # first: an encoder takes longer to load than a wrong path to be seen
        images: Any = encoder(reference, "image")
        return images([picture])
    texts: Any = encoder(reference, "text")
    return texts([query])


def _names_picture(query: str) -> bool:
    """Whether a query is meant as the path of a picture: a text that happens to end in ``.png`` has spaces in it."""
    from pipeline.input.source import SUFFIXES

    return query.lower().endswith(SUFFIXES["images"]) and (not any(map(str.isspace, query)) or Path(query).is_file())


def _picture(path: str) -> Image:
    """The picture at a path or address.

    Raises:
        ValueError: It is not there, or is none.
    """
    from pipeline.input.fetch import picture_bytes
    from pipeline.input.rows import Encoded
    from pipeline.input.source import Source
    from pipeline.pictures import PictureError, decode_picture

    source = Source((path,), allow=(path,))  # the user names it: no row does
    try:
        return decode_picture(picture_bytes(Encoded(None, path), source, "."), source.max_pixels)
    except PictureError as error:
        raise ValueError(f"the query names a picture, {path}: {error}") from None


def print_table(query: str, found: Sequence[Hit]) -> None:
    """The rows in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jobs.page.html import shorten

    def plain(text: Any, limit: int) -> Text:
        """Words of a row: brackets in a plain string would be rich's markup, a link or an error."""
        return Text(printable(shorten(text, limit)))

    names = list(dict.fromkeys(name for hit in found for name in hit.columns))
    table = Table(title=plain(query, 80), title_justify="left")
    for name in ("", "cosine"):
        table.add_column(name, justify="right")
    for name in ("id", *names):
        table.add_column(name)
    for rank, hit in enumerate(found, start=1):
        cells = [plain(hit.columns.get(name, ""), 60) for name in names]
        table.add_row(str(rank), f"{hit.cosine:.4f}", plain(hit.id, 60), *cells)
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
