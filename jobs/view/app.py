"""What the page asks for: addresses, their parameters, their answers. Knows no sockets."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.view import lines, pictures
from jobs.view.compare import Comparison, Pair
from jobs.view.database import Database
from jobs.view.query import BadRequest, Order, find
from jobs.view.run import Page, Place, Run
from jobs.view.search import Searcher, searchable
from jobs.view.source import shows_source, source_picture

if TYPE_CHECKING:
    from pipeline.output.dataset import Output

STATIC = Path(__file__).with_name("static")
STYLES = (Path(__file__).parent.with_name("page") / "tokens.css", STATIC / "view.css")
FILES = {"": ("index.html", "text/html"), "view.js": ("view.js", "text/javascript"),
         "table.js": ("table.js", "text/javascript"), "panels.js": ("panels.js", "text/javascript"),
         "markup.js": ("markup.js", "text/javascript")}  # fmt: skip
STALE_S = 2.0
"""A run that is not complete is opened anew when the page asks for it again after so long."""


@dataclass(frozen=True)
class Answer:
    """A body, its content type, and what tells whether a browser's copy is still good."""

    body: bytes
    type: str
    tag: str = ""


Asked = Mapping[str, str]


@dataclass
class App:
    """Runs by name, and the answers to what is asked about them.

    Attributes:
        outputs: Name -> output folder.
    """

    outputs: Mapping[str, Output]
    _runs: dict[str, Run] = field(default_factory=dict)
    _opened: dict[str, float] = field(default_factory=dict)
    _searchers: dict[str, Searcher] = field(default_factory=dict)
    _pair: tuple[str, Comparison] | None = None
    _turn: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._database = Database([output.folder for output in self.outputs.values()])
        self._routes: dict[str, Callable[[Asked], Answer]] = {
            "api/runs": self._list, "api/rows": self._rows, "api/count": self._count, "api/values": self._values,
            "api/histogram": self._histogram, "api/row": self._row, "api/vector": self._vector,
            "api/search": self._search, "api/compare": self._compare, "api/pairs": self._pairs,
            "picture": self._picture, "latent": self._latent, "source": self._source,
        }  # fmt: skip

    def close(self) -> None:
        self._database.close()

    def answer(self, path: str, asked: Asked) -> Answer | None:
        """The answer to a path without its first slash; None where there is nothing.

        Raises:
            BadRequest, ValueError: What is asked makes no sense, or cannot be done.
        """
        if path in FILES:
            name, kind = FILES[path]
            return Answer((STATIC / name).read_bytes(), f"{kind}; charset=utf-8")
        if path == "view.css":
            return Answer(b"\n".join(style.read_bytes() for style in STYLES), "text/css; charset=utf-8")
        route = self._routes.get(path)
        if route is None:
            return None
        try:
            return route(asked)
        except OSError:  # files were published, or a shard was done again, since the run was opened
            for name in {asked[key] for key in ("run", "from", "a", "b") if key in asked}:
                self.run(name, anew=True)
            return route(asked)

    def run(self, name: str | None, anew: bool = False) -> Run:
        """
        Args:
            anew: Read its records again.

        Raises:
            BadRequest: There is none of that name.
        """
        if name is None or name not in self.outputs:
            raise BadRequest(f"there is no run {str(name)[:100]!r}")
        with self._turn:
            known = self._runs.get(name)
            if known is None or anew:
                known = self._runs[name] = Run.open(name, self.outputs[name], self._database)
                self._opened[name] = time.monotonic()
            return known

    def _list(self, asked: Asked) -> Answer:
        return _json({"runs": [self._told(self._fresh(name)) for name in self.outputs]})

    def _fresh(self, name: str) -> Run:
        run = self.run(name)
        old = time.monotonic() - self._opened[name] > STALE_S
        return self.run(name, anew=True) if old and run.status.state != "complete" else run

    def _told(self, run: Run) -> dict[str, Any]:
        counted = run.status.progress
        return {
            "name": run.name, "path": run.output.path, "job": dict(run.output.plan.get("config") or {}).get("job", ""),
            "state": run.status.state, "key": run.key, "rows": run.rows, "planned": counted.rows,
            "ok": counted.rows_ok, "failed": counted.rows_failed, "duplicates": counted.rows_duplicate,
            "search": searchable(run), "source": shows_source(run),
            "columns": [column.to_json() for column in run.columns.values()],
        }  # fmt: skip

    def _rows(self, asked: Asked) -> Answer:
        run = self.run(asked.get("run"))
        names = _names(asked)
        if at := asked.get("at"):
            page = Page((Place.parse(at),), None)
        else:
            sort = asked.get("sort")
            order = Order.by(find(run.columns, sort), asked.get("down") == "1") if sort else None
            page = run.page(asked.get("filters"), order, asked.get("after"), _whole(asked, "limit", 50))
        return _json({"rows": self._cells(run, page.places, names), "next": page.next})

    def _cells(self, run: Run, places: Sequence[Place], names: Sequence[str]) -> list[dict[str, Any]]:
        found = run.fetch(places, names)
        return [{"at": str(place), "cells": cells} for place, cells in zip(places, found, strict=True)]

    def _count(self, asked: Asked) -> Answer:
        return _json({"rows": self.run(asked.get("run")).count(asked.get("filters"))})

    def _values(self, asked: Asked) -> Answer:
        return _json(self.run(asked.get("run")).values(asked.get("column", ""), asked.get("filters")))

    def _histogram(self, asked: Asked) -> Answer:
        return _json(self.run(asked.get("run")).histogram(asked.get("column", ""), asked.get("filters")))

    def _row(self, asked: Asked) -> Answer:
        run = self.run(asked.get("run"))
        place = Place.parse(asked.get("at"))
        (cells,) = run.fetch([place], list(run.columns))
        return _json({"at": str(place), "cells": cells, "lines": lines.lines(run, place, cells)})

    def _vector(self, asked: Asked) -> Answer:
        run, place, column = self._one(asked, "vector")
        return _json({"vector": pictures.summary(run.cell(place, column.name), column.shape)})

    def _latent(self, asked: Asked) -> Answer:
        run, place, column = self._one(asked, "vector")
        kind, body = pictures.latent(run.cell(place, column.name), column.shape)
        return Answer(body, kind, f"{run.checksum(place)}-{place}-{column.sql}")

    def _picture(self, asked: Asked) -> Answer:
        run, place, column = self._one(asked, "image")
        size = _whole(asked, "size", 192)
        kind, body = pictures.thumbnail(run.cell(place, column.name, "bytes"), size)
        return Answer(body, kind, f"{run.checksum(place)}-{place}-{column.sql}-{size}")

    def _source(self, asked: Asked) -> Answer:
        run, place = self.run(asked.get("run")), Place.parse(asked.get("at"))
        size = _whole(asked, "size", 192)
        kind, body = pictures.drawn(source_picture(run, place), size)
        return Answer(body, kind, f"{run.checksum(place)}-{place}-{size}")

    def _one(self, asked: Asked, kind: str) -> tuple[Run, Place, Any]:
        run = self.run(asked.get("run"))
        column = find(run.columns, asked.get("column"))
        if column.kind != kind:
            raise BadRequest(f"column {column.name!r} holds no {kind}")
        return run, Place.parse(asked.get("at")), column

    def _search(self, asked: Asked) -> Answer:
        """Rows of the reference ``run`` nearest to ``text``, or to the cell ``from``, ``at``, ``column``."""
        run = self.run(asked.get("run"))
        if not searchable(run):
            raise BadRequest(f"{run.name} has no index to search; a `reference` job makes one")
        with self._turn:
            searcher = self._searchers.setdefault(run.name, Searcher(run))
        if "text" in asked:
            found = searcher.text(asked["text"])
        else:
            found = searcher.cell(self.run(asked.get("from")), Place.parse(asked.get("at")), asked.get("column", ""))
        rows = self._cells(run, [place for place, _ in found], _names(asked))
        return _json({"rows": [row | {"cosine": cosine} for row, (_, cosine) in zip(rows, found, strict=True)]})

    def _compared(self, asked: Asked) -> Comparison:
        a, b = self.run(asked.get("a")), self.run(asked.get("b"))
        key = f"{a.name}/{a.key} {b.name}/{b.key}"
        with self._turn:
            if self._pair is None or self._pair[0] != key:
                made = Comparison.of(a, b)
                if self._pair is not None:
                    self._pair[1].drop()
                self._pair = (key, made)
            return self._pair[1]

    def _compare(self, asked: Asked) -> Answer:
        return _json(self._compared(asked).summary())

    def _pairs(self, asked: Asked) -> Answer:
        both = self._compared(asked)
        found, after = both.page(
            asked.get("show", "any"), asked.get("column"), asked.get("sort"), asked.get("down") == "1",
            asked.get("after"), _whole(asked, "limit", 50),
        )  # fmt: skip
        names = _names(asked)
        told = [{"a": a, "b": b} for a, b in zip(self._side(both.a, found, "a", names),
                                                 self._side(both.b, found, "b", names), strict=True)]  # fmt: skip
        return _json({"pairs": told, "next": after})

    def _side(self, run: Run, found: Sequence[Pair], side: str, names: Sequence[str]) -> list[dict[str, Any] | None]:
        places = [getattr(pair, side) for pair in found]
        there = [place for place in places if place is not None]
        cells = dict(zip(there, self._cells(run, there, [n for n in names if n in run.columns]), strict=True))
        return [None if place is None else cells[place] for place in places]


def _names(asked: Asked) -> list[str]:
    try:
        names = json.loads(asked.get("columns") or '["id"]')
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > 200:
        raise BadRequest("columns: a JSON list of names is wanted")
    return list(dict.fromkeys(names))


def _whole(asked: Asked, name: str, default: int) -> int:
    text = asked.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise BadRequest(f"{name}: a whole number is wanted")
    return int(text)


def _json(told: Any) -> Answer:
    return Answer(json.dumps(_plain(told), allow_nan=False).encode(), "application/json")


def _plain(value: Any) -> Any:
    """A value as JSON has it: NaN, infinities, and whole numbers that a browser would round are texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 2**53 else str(value)
    if isinstance(value, decimal.Decimal | datetime.date | datetime.time | bytes):
        return str(value)
    return value
