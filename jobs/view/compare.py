"""Two runs row by row: joined by id, what differs told by column, rows found by what differs in them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from jobs.view.columns import Shown
from jobs.view.query import BadRequest, Cursor, Sql, joined
from jobs.view.run import MOST_ROWS, Place, Run

_numbers = itertools.count()
SHOWN = ("any", "all", "same", "only_a", "only_b")


@dataclass(frozen=True)
class Pair:
    """Two rows of one id; None where a run has no such row."""

    a: Place | None
    b: Place | None


@dataclass(frozen=True)
class Comparison:
    """A table in DuckDB's own memory with a row an id: where it is in both, what differs, by how much.

    Attributes:
        columns: Those of both runs that were compared: texts, numbers, yes and no.
        table: Its name.
    """

    a: Run
    b: Run
    columns: tuple[Shown, ...]
    table: str

    @staticmethod
    def of(a: Run, b: Run) -> Comparison:
        """Join them; takes a second or so for a million rows each.

        Raises:
            BadRequest: One has no rows yet.
        """
        if not a.parts or not b.parts:
            raise BadRequest(f"{(b if a.parts else a).name} has no rows yet")
        columns = tuple(
            column
            for name, column in a.columns.items()
            if name != "id" and column.ordered and name in b.columns and b.columns[name].kind == column.kind
        )
        made = Comparison(a, b, columns, f"pair_{next(_numbers)}")
        a.database.rows(made._joining())
        return made

    def drop(self) -> None:
        """Free its memory."""
        self.a.database.rows(Sql(f"DROP TABLE {self.table}"))

    def _joining(self) -> Sql:
        sides = [
            Sql(f"(SELECT {run.columns['id'].sql} AS id, file_index AS file, file_row_number AS row_number, "
                + ", ".join(f"{run.columns[column.name].sql} AS c{n}" for n, column in enumerate(self.columns))
                + " FROM read_parquet(?))", ([part.path for part in run.parts],))
            for run in (self.a, self.b)
        ]  # fmt: skip
        told = ["a.file AS a_file", "a.row_number AS a_row", "b.file AS b_file", "b.row_number AS b_row"]
        both = "a.file IS NOT NULL AND b.file IS NOT NULL"
        for n, column in enumerate(self.columns):
            told.append(f"CASE WHEN {both} THEN a.c{n} IS DISTINCT FROM b.c{n} END AS d{n}")
            if column.kind == "number":
                told.append(f"b.c{n}::DOUBLE - a.c{n}::DOUBLE AS by{n}")
        return (Sql(f"CREATE TABLE {self.table} AS SELECT {', '.join(told)} FROM ")
                + sides[0] + Sql(" a FULL JOIN ") + sides[1] + Sql(" b ON a.id = b.id"))  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Rows of both, of one alone, equal ones; by column how many differ, and of numbers the mean difference."""
        counted = ["count(*)", "count(*) FILTER (b_file IS NULL)", "count(*) FILTER (a_file IS NULL)",
                   f"count(*) FILTER ({self._shown('same')})"]  # fmt: skip
        for n, column in enumerate(self.columns):
            real = f"FILTER (isfinite(by{n}))"
            counted.append(f"count(*) FILTER (d{n})")
            counted += [f"avg(by{n}) {real}", f"max(abs(by{n})) {real}"] if column.kind == "number" else ["NULL"] * 2
        (total, only_a, only_b, same, *by_column), *_ = self.a.database.rows(
            Sql(f"SELECT {', '.join(counted)} FROM {self.table}")
        )
        columns = [
            {"name": column.name, "kind": column.kind, "differ": differ, "mean": mean, "most": most}
            for column, differ, mean, most in zip(
                self.columns, by_column[::3], by_column[1::3], by_column[2::3], strict=True
            )
        ]
        return {"both": total - only_a - only_b, "only_a": only_a, "only_b": only_b, "same": same,
                "columns": columns}  # fmt: skip

    def _shown(self, what: str) -> str:
        both = "a_file IS NOT NULL AND b_file IS NOT NULL"
        differing = " OR ".join(f"d{n}" for n in range(len(self.columns))) or "FALSE"
        return {
            "all": "TRUE",
            "any": f"{both} AND ({differing})",
            "same": f"{both} AND NOT ({differing})",
            "only_a": "b_file IS NULL",
            "only_b": "a_file IS NULL",
        }[what]

    def page(
        self, what: str, differing: str | None, sort: str | None, down: bool, after: str | None, limit: int
    ) -> tuple[list[Pair], str | None]:
        """Pairs of rows, and the cursor of the next page.

        Args:
            what: One of `SHOWN`.
            differing: A column in which they differ; None: whichever.
            sort: A numeric column, by whose difference (b - a) they are sorted; None: as the join left them.

        Raises:
            BadRequest: One of these is none.
        """
        if what not in SHOWN:
            raise BadRequest(f"show: one of {', '.join(SHOWN)}")
        where = Sql(self._shown(what))
        if differing:
            where = Sql(f"d{self._number(differing, 'text', 'number', 'bool')}")
        key = f"by{self._number(sort, 'number')}" if sort else "NULL::DOUBLE"
        if sort:
            key = f"CASE WHEN isnan({key}) THEN NULL ELSE {key} END"
        cursor = Cursor.decode(after) if after else None
        conditions = [where, *([_beyond(key, down, cursor)] if cursor else [])]
        query = Sql(f"SELECT rowid, {key}, a_file, a_row, b_file, b_row FROM {self.table} WHERE ")
        query += joined(conditions, "AND")
        limit = min(max(1, limit), MOST_ROWS)
        query += Sql(f" ORDER BY {key} {'DESC' if down else 'ASC'} NULLS LAST, rowid LIMIT {limit + 1:d}")
        found = self.a.database.rows(query)
        pairs = [Pair(_place(self.a, *row[2:4]), _place(self.b, *row[4:6])) for row in found[:limit]]
        last = Cursor(0, found[limit - 1][0], found[limit - 1][1]).encode() if len(found) > limit else None
        return pairs, last

    def _number(self, name: str, *kinds: str) -> int:
        for n, column in enumerate(self.columns):
            if column.name == name and column.kind in kinds:
                return n
        raise BadRequest(f"{name[:100]!r} is no column of both runs that this is done by")


def _place(run: Run, file: int | None, row: int | None) -> Place | None:
    return None if file is None or row is None else Place(run.parts[file].shard, row)


def _beyond(key: str, down: bool, cursor: Cursor) -> Sql:
    behind = Sql("rowid > ?", (cursor.row,))
    if cursor.key is None:
        return joined([Sql(f"({key}) IS NULL"), behind], "AND")
    further = Sql(f"({key}) {'<' if down else '>'} ?", (cursor.key,))
    equal = joined([Sql(f"({key}) = ?", (cursor.key,)), behind], "AND")
    return joined([further, equal, Sql(f"({key}) IS NULL")], "OR")
