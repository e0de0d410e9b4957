"""A run as the app reads it: files by shard, rows by place, pages, counts, histograms. No table is held in Python."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.view.columns import PLACE, Shown, quoted, shown
from jobs.view.database import Database, address
from jobs.view.query import BadRequest, Cursor, Order, Sql, filters, find

if TYPE_CHECKING:
    from pipeline.output.dataset import Output, Status

BINS = 48
UNIT_BINS = 60
"""Whole numbers that lie within so many get a bar each."""
FIRST_FILES, MOST_ROWS, MOST_VALUES = 16, 500, 50


@dataclass(frozen=True)
class Part:
    """The file of a committed shard."""

    shard: int
    path: str
    rows: int
    checksum: str


@dataclass(frozen=True)
class Place:
    """Where a row is: its shard, and its number in there. Both stay while a run goes on."""

    shard: int
    row: int

    def __str__(self) -> str:
        return f"{self.shard}-{self.row}"

    @staticmethod
    def parse(text: str | None) -> Place:
        """
        Raises:
            BadRequest: It is no place.
        """
        match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text or "", re.ASCII)
        if not match:
            raise BadRequest("at: a place such as 12-345 is wanted")
        return Place(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Page:
    """Rows of a table.

    Attributes:
        places: Where they are.
        next: Cursor of the page that follows; None at the end.
    """

    places: tuple[Place, ...]
    next: str | None


@dataclass(frozen=True)
class Run:
    """An output, opened.

    Attributes:
        name: What the page calls it.
        output: Its folder and plan.
        status: Its counts when it was opened.
        parts: Its files in the order of shards.
        columns: By name.
    """

    name: str
    output: Output
    status: Status
    parts: tuple[Part, ...]
    columns: dict[str, Shown]
    database: Database

    @staticmethod
    def open(name: str, output: Output, database: Database) -> Run:
        """
        Raises:
            OutputError: A committed file is gone, or a column has a name that DuckDB keeps for itself.
        """
        from pipeline.output.planfile import OutputError
        from pipeline.output.schema import decode_schema

        schema = decode_schema(output.plan["schema"])
        if taken := {column.lower() for column in schema.names} & {*PLACE, "filename"}:
            raise OutputError(f"{output.path}: the column {taken.pop()!r} has a name that DuckDB keeps for itself; "
                              "rename it with the input's `columns`")  # fmt: skip
        parts = tuple(_parts(output))
        names = list(schema.names)
        if parts:
            described = database.rows(Sql("DESCRIBE SELECT * FROM read_parquet(?)", ([parts[0].path],)))
            names = [row[0] for row in described]
        return Run(name, output, output.status(), parts, shown(schema, names), database)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def key(self) -> str:
        """Changes with the rows."""
        return f"{self.output.run}-{len(self.parts)}-{self.status.progress.rows_failed}"

    def _from(self, parts: Sequence[Part]) -> Sql:
        return Sql(" FROM read_parquet(?)", ([part.path for part in parts],))

    def _ask(self, query: Sql) -> list[tuple[Any, ...]]:
        return self.database.rows(query)

    def page(self, given: str | None, order: Order | None, after: str | None, limit: int) -> Page:
        """The places of the rows that follow a cursor, in the output's own order or in another."""
        limit = min(max(1, limit), MOST_ROWS)
        where = filters(self.columns, given)
        cursor = Cursor.decode(after) if after else None
        found = list(
            self._in_order(where, order, cursor, limit + 1) if order else self._as_they_stand(where, cursor, limit + 1)
        )
        more = found[limit - 1].encode() if len(found) > limit else None
        return Page(tuple(Place(self.parts[one.file].shard, one.row) for one in found[:limit]), more)

    def _in_order(self, where: Sql, order: Order, cursor: Cursor | None, limit: int) -> Iterator[Cursor]:
        if not self.parts:
            return
        query = Sql(f"SELECT file_index, file_row_number, {order.key}") + self._from(self.parts)
        query += Sql(" WHERE (") + where + Sql(")")
        if cursor:
            query += Sql(" AND (") + order.beyond(cursor) + Sql(")")
        for file, row, key in self._ask(query + Sql(f" ORDER BY {order.clause} LIMIT {limit:d}")):
            yield Cursor(file, row, key)

    def _as_they_stand(self, where: Sql, cursor: Cursor | None, limit: int) -> Iterator[Cursor]:
        """A few files at first, twice as many each time: a page does not wait for files that it does not reach."""
        first, wanted = (cursor.file, cursor.row) if cursor else (0, -1)
        files, left = FIRST_FILES, limit
        while left and first < len(self.parts):
            query = Sql("SELECT file_index, file_row_number") + self._from(self.parts[first : first + files])
            query += Sql(" WHERE (") + where + Sql(")")
            query += Sql(" AND (file_index > 0 OR file_row_number > ?)", (wanted,))
            query += Sql(f" ORDER BY file_index, file_row_number LIMIT {left:d}")
            for file, row in self._ask(query):
                left -= 1
                yield Cursor(first + file, row)
            first, files, wanted = first + files, 2 * files, -1

    def count(self, given: str | None) -> int:
        """How many rows pass the filters."""
        where = filters(self.columns, given)
        if where.text == "TRUE" or not self.parts:
            return self.rows
        ((count,),) = self._ask(Sql("SELECT count(*)") + self._from(self.parts) + Sql(" WHERE ") + where)
        return int(count)

    def fetch(self, places: Sequence[Place], names: Sequence[str]) -> list[dict[str, Any]]:
        """Cells of rows by their places, in that order; pictures and vectors only tell whether they are there."""
        if not places:
            return []
        columns = [find(self.columns, name) for name in names]
        parts = {shard: self._part(shard) for shard in sorted({place.shard for place in places})}
        shards = list(parts)
        chosen = [f"{c.selected if c.plain else f'{c.sql} IS NOT NULL'}" for c in columns]
        query = Sql(f"SELECT {', '.join([*PLACE, *chosen])}") + self._from(list(parts.values()))
        by_file: dict[int, list[int]] = {}
        for place in places:
            by_file.setdefault(shards.index(place.shard), []).append(place.row)
        wanted = [
            Sql(f"file_index = {file:d} AND file_row_number IN ({', '.join(str(int(row)) for row in rows)})")
            for file, rows in by_file.items()
        ]
        text = " OR ".join(f"({one.text})" for one in wanted)
        found = {
            Place(shards[file], row): dict(zip(names, cells, strict=True))
            for file, row, *cells in self._ask(query + Sql(f" WHERE {text}"))
        }
        missing = next((place for place in places if place not in found), None)
        if missing is not None:
            raise BadRequest(f"there is no row {missing} in {self.name}")
        return [found[place] for place in places]

    def _part(self, shard: int) -> Part:
        part = next((part for part in self.parts if part.shard == shard), None)
        if part is None:
            raise BadRequest(f"{self.name} has no shard {shard}, or not yet")
        return part

    def cell(self, place: Place, name: str, field: str | None = None) -> Any:
        """One cell as it is: a picture's bytes, a vector's values; None where it is null.

        Args:
            field: Of a struct.
        """
        column = find(self.columns, name)
        what = column.sql if field is None else f"{column.sql}.{quoted(field)}"
        query = Sql(f"SELECT {what}") + self._from([self._part(place.shard)])
        found = self._ask(query + Sql(" WHERE file_row_number = ?", (place.row,)))
        if not found:
            raise BadRequest(f"there is no row {place} in {self.name}")
        return found[0][0]

    def checksum(self, place: Place) -> str:
        """Of the file that the row is in."""
        return self._part(place.shard).checksum

    def find_id(self, row_id: str) -> Place | None:
        """Where the row of an id is."""
        query = Sql("SELECT file_index, file_row_number") + self._from(self.parts)
        found = self._ask(query + Sql(f" WHERE {self.columns['id'].sql} = ? LIMIT 1", (row_id,)))
        return Place(self.parts[found[0][0]].shard, found[0][1]) if found else None

    def values(self, name: str, given: str | None) -> dict[str, Any]:
        """The commonest values of a column among the rows that pass the filters on other columns."""
        column = find(self.columns, name)
        if column.kind not in ("text", "bool", "number"):
            raise BadRequest(f"values of {name!r} ({column.kind}) are not counted")
        if not self.parts:
            return {"values": [], "distinct": 0}
        where = filters(self.columns, given, without=name)
        inner = Sql(f"SELECT {column.sql} AS value, count(*) AS rows") + self._from(self.parts)
        inner += Sql(" WHERE ") + where + Sql(" GROUP BY ALL")
        query = Sql("SELECT left(value::VARCHAR, 300), value::VARCHAR = left(value::VARCHAR, 300), rows, "
                    "count(*) OVER () FROM (") + inner  # fmt: skip
        found = self._ask(query + Sql(f") ORDER BY rows DESC, value LIMIT {MOST_VALUES}"))
        listed = [{"value": value, "whole": whole is not False, "rows": rows} for value, whole, rows, _ in found]
        return {"values": listed, "distinct": found[0][3] if found else 0}

    def histogram(self, name: str, given: str | None) -> dict[str, Any]:
        """How a numeric column is spread over the rows that pass the filters on other columns.

        The outermost 0.1 % on each side stand in the last bars where they would stretch the axis to four times.

        Returns:
            ``edges``, ``counts`` (one less), ``rows`` (finite), ``other`` (null, NaN, infinite), ``min``, ``max``,
            ``mean``, ``median`` (approximate).
        """
        column = find(self.columns, name)
        if column.kind != "number":
            raise BadRequest(f"{name!r} ({column.kind}) has no histogram")
        if not self.parts:
            return {"edges": [], "counts": [], "rows": 0, "other": 0}
        x = f"{column.sql}::DOUBLE"
        where = Sql(" WHERE ") + filters(self.columns, given, without=name)
        real = f"{column.sql} IS NOT NULL AND isfinite({x})"
        facts = Sql(
            f"SELECT count(*), count(*) FILTER ({real}), min({x}) FILTER ({real}), max({x}) FILTER ({real}), "
            f"avg({x}) FILTER ({real}), approx_quantile({x}, [0.001, 0.5, 0.999]) FILTER ({real})"
        )
        ((total, rows, low, high, mean, quantiles),) = self._ask(facts + self._from(self.parts) + where)
        told = {"rows": rows, "other": total - rows, "min": low, "max": high, "mean": mean}
        if not rows:
            return {"edges": [], "counts": [], **told}
        edges = _edges(low, high, (quantiles[0], quantiles[2]), rows, whole=not column.is_float)
        width, bars = edges[1] - edges[0], len(edges) - 1
        binned = Sql(f"SELECT greatest(0, least({bars - 1}, floor(({x} - ?) / ?)))::INTEGER, count(*)",
                     (edges[0], width)) + self._from(self.parts)  # fmt: skip
        found = dict(self._ask(binned + where + Sql(f" AND {real} GROUP BY 1")))
        return {"edges": edges, "counts": [found.get(bar, 0) for bar in range(bars)], "median": quantiles[1], **told}


def _edges(low: float, high: float, inner: tuple[float, float], rows: int, whole: bool) -> list[float]:
    if low == high:
        return [low - 0.5, low + 0.5]
    if whole and high - low <= UNIT_BINS:
        return [low - 0.5 + n for n in range(int(high - low) + 2)]
    if rows >= 1000 and inner[1] > inner[0] and high - low > 4 * (inner[1] - inner[0]):
        low, high = inner
    width = (high - low) / BINS
    if not math.isfinite(width) or low + width <= low:
        return [low, high]
    return [low + n * width for n in range(BINS)] + [high]


def _parts(output: Output) -> Iterator[Part]:
    from pipeline.output.planfile import OutputError

    listed = output.listings()
    for record in output.records(lambda name, error: None):  # a damaged record's shard is done again
        name = output.locate(record, listed)
        if name is None:
            raise OutputError(f"{output.path}: the file of shard {record.shard} is gone or cut; run the job again")
        yield Part(record.shard, address(output.folder, name), record.rows, record.checksum)
