"""What a run reads: a plain description of an input, and the files it stands for.

A `Source` is JSON-able, so that it can be written into the plan and sent to a worker. Reading itself is in
`pipeline.input.read`, decoding of pictures in `pipeline.pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from pipeline.access import options_for
from pipeline.addresses import has_password, shown, unsigned
from pipeline.failures import Fault

Format = Literal[
    "parquet", "jsonl", "csv", "text", "images", "webdataset", "datasets", "npy", "concepts", "micro-world"
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)
GENERATED = {"micro-world://": "micro-world", "one-row://": "one-row"}
"""How addresses begin whose rows are generated -> their format."""
SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "text": (".txt",),
    "images": (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga",
        ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif",
    ),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "datasets": (".arrow",),
    "npy": (".npy",),
    "concepts": ("concept.yaml",),
}  # fmt: skip
"""Format -> how the names of its files end; one whose rows are generated has none."""


class SourceError(ValueError):
    """The input cannot be read as described; the message names the file or column and what to do."""

    fault = Fault.CHANGED


class MissingColumn(SourceError):
    """A file lacks a column that is asked for."""

    def __init__(self, path: str, column: str, there: Sequence[str]) -> None:
        self.path, self.column, self.there = path, column, tuple(there)
        super().__init__(f"{path}: has no column {column!r}; it has {', '.join(there)}")

    def __reduce__(self) -> tuple[type[MissingColumn], tuple[str, str, tuple[str, ...]]]:
        return MissingColumn, (self.path, self.column, self.there)


class Damaged(SourceError):
    """From some place on, a file does not hold what it should."""

    fault = Fault.FILE


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: Files, folders or globs (``**`` too), local or any fsspec address. ``micro-world://heldout?rows=64&seed=0``
            generates rows ``image``, ``caption``, ``scene`` (JSON) from `micro.world` (``train`` or ``heldout``).
            ``one-row://name`` is a row of that id without columns, for a job whose rows are its `variants`.
            The output folder of a finished run stands for its ``data/part-*.parquet``.
        format: How to read the files. None: found from the names and, for a folder, from what is in it.
        columns: Name in a row -> name in the input. Empty: all columns under their own names. Otherwise only these
            (and those in a run's ``keep``) are read. Fixed names by format: text ``text``; images ``image``,
            ``path``, and ``text`` from a ``.txt`` beside the picture; webdataset the members' extensions (``jpg``,
            ``json`` ...), with ``image`` for whichever picture member there is, ``text`` for ``txt``, and a JSON
            member's keys; npy ``embedding``.
        id: The input's column with a unique id for each row. None: ``<file>#<row number>``, with the file's path below
            the common folder of the input (images: the path itself; webdataset: ``<file>/<key>``; a finished run's
            output: its ids).
        images: Names in a row (after mapping) that hold pictures as encoded bytes, or as paths relative to the row's
            file. Columns that say so themselves (``struct<bytes, path>``, image folders, tar members) need no naming.
        storage_options: For fsspec: endpoint, keys ... Never written to the output and no part of any fingerprint.
        max_pixels: A picture with more pixels fails its row before it is decoded.
        variants: Column -> values: every row of the input stands for one row a value, which the column holds and the id
            ends in (``<id>/<value>``). Rows of the input stay together; a run's ``limit`` counts the rows made so.
        allow: Folders and beginnings of addresses that rows may point to, beside the folder of their own file
            (`pipeline.addresses.placed`).
        draft: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size as far as both sides keep so many pixels; null: whole.
        dedupe: ``content``: of the rows that hold the same, the first is processed, the others name it.
        signed: Web address without its query -> the whole, as ``path`` was given. Kept apart like the storage options.
    """

    path: tuple[str, ...]
    format: Format | Literal["one-row"] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    id: str | None = None
    images: tuple[str, ...] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    max_pixels: int = 100_000_000
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    signed: Mapping[str, str] = field(default_factory=dict)
    dedupe: Literal["content"] | None = None
    draft: int | None = None

    def __post_init__(self) -> None:
        """Sets queries aside: nothing that names a file, in ids, plans or messages, ever sees a signature."""
        signed = dict(self.signed)
        for entry in self.path:
            bare = unsigned(entry)
            if has_password(bare):
                raise SourceError(f"{shown(bare)}: holds a password; write it into `storage_options`")
            if bare == entry:
                continue
            if signed.setdefault(bare, entry) != entry:
                raise SourceError(f"{bare}: two addresses differ only in what follows `?`; fetch the files first")
        object.__setattr__(self, "path", tuple(map(unsigned, self.path)))
        object.__setattr__(self, "signed", signed)

    def whole(self, address: str) -> str:
        """An address as it is to be opened, with the query that it was given with."""
        return self.signed.get(address, address)

    def drawn(self, count: int) -> Source:
        """The same, with so many rows for each, told apart by the column ``draw``; with one, no column."""
        return replace(self, variants={"draw": tuple(map(str, range(count)))} if count > 1 else {})

    def reachable(self) -> Source:
        """The same, with the options that were granted for the stores it lies in, unless it brings its own."""
        if self.storage_options:
            return self
        found = [options_for(entry, "store") for entry in self.path]
        return replace(self, storage_options=found[0]) if found and all(one == found[0] for one in found) else self

    def to_json(self) -> dict[str, Any]:
        """Everything but the storage options and the queries of addresses, which may hold secrets."""
        plain = asdict(self)
        del plain["storage_options"], plain["signed"]
        if not self.allow:  # newer than some plans
            del plain["allow"]
        for name in ("dedupe", "draft"):
            if plain[name] is None:
                del plain[name]
        return plain

    @staticmethod
    def from_json(
        plain: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None,
        signed: Mapping[str, str] | None = None,
    ) -> Source:  # fmt: skip
        """The source of a plan, with what no plan holds."""
        secrets = {"storage_options": dict(storage_options or {}), "signed": dict(signed or {})}
        lists = {key: tuple(plain.get(key, ())) for key in ("path", "images", "allow")}
        variants = {name: tuple(values) for name, values in plain.get("variants", {}).items()}
        return Source(**{**plain, **lists, "variants": variants, **secrets})
