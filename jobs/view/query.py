"""Filters and orders as SQL. What comes from the browser is a parameter; columns come from the output's own list."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.view.columns import Shown

LONGEST_VALUE, MOST_FILTERS = 10_000, 50


class BadRequest(ValueError):
    """What was asked makes no sense; the message says why."""


@dataclass(frozen=True)
class Sql:
    """A piece of SQL and the values of its ``?``."""

    text: str
    values: tuple[Any, ...] = ()

    def __add__(self, other: Sql) -> Sql:
        return Sql(self.text + other.text, self.values + other.values)


def joined(parts: Sequence[Sql], word: str) -> Sql:
    """Conditions joined by AND or OR, each in brackets; none of them is true."""
    if not parts:
        return Sql("TRUE")
    text = f" {word} ".join(f"({part.text})" for part in parts)
    return Sql(text, tuple(value for part in parts for value in part.values))


def find(columns: Mapping[str, Shown], name: Any) -> Shown:
    """A column by the name that a browser gives.

    Raises:
        BadRequest: There is none.
    """
    if not isinstance(name, str) or name not in columns:
        raise BadRequest(f"there is no column {str(name)[:100]!r}")
    return columns[name]


def filters(columns: Mapping[str, Shown], given: str | None, without: str | None = None) -> Sql:
    """The condition that a browser's filters stand for.

    Args:
        given: JSON: a list of ``{"column", "op", "value"}``.
        without: Filters on this column are left out.

    Raises:
        BadRequest: One names no column, no operator of its kind, or no value of its kind.
    """
    try:
        plain = json.loads(given or "[]")
    except ValueError:
        raise BadRequest("filters: not JSON") from None
    if not isinstance(plain, list) or not all(isinstance(one, dict) for one in plain) or len(plain) > MOST_FILTERS:
        raise BadRequest(f"filters: a list of at most {MOST_FILTERS} objects is wanted")
    return joined(
        [
            _condition(find(columns, one.get("column")), str(one.get("op")), one.get("value"))
            for one in plain
            if without is None or one.get("column") != without
        ],
        "AND",
    )


def _condition(column: Shown, op: str, value: Any) -> Sql:
    if op in ("null", "notnull"):
        return Sql(f"{column.sql} IS {'NOT ' if op == 'notnull' else ''}NULL")
    make = {"text": _of_text, "number": _of_number, "bool": _of_bool}.get(column.kind)
    found = make(column, op, value) if make else None
    if found is None:
        raise BadRequest(f"column {column.name!r} ({column.kind}) takes no filter {op[:40]!r}")
    return found


def _of_text(column: Shown, op: str, value: Any) -> Sql | None:
    if op == "in":
        if not isinstance(value, list) or not 0 < len(value) <= 100:
            raise BadRequest(f"column {column.name!r}: a list of 1 to 100 values is wanted")
        return joined([_of_text(column, "is", one) or Sql("FALSE") for one in value], "OR")
    if not isinstance(value, str) or len(value) > LONGEST_VALUE:
        raise BadRequest(f"column {column.name!r}: a text of at most {LONGEST_VALUE:,} characters is wanted")
    text = {
        "contains": "contains(lower({0}), lower(?))",
        "lacks": "NOT contains(lower({0}), lower(?))",
        "starts": "starts_with({0}, ?)",
        "is": "{0} = ?",
        "isnot": "{0} IS DISTINCT FROM ?",
    }.get(op)
    return None if text is None else Sql(text.format(column.sql), (value,))


def _of_number(column: Shown, op: str, value: Any) -> Sql | None:
    if op == "between":
        if not isinstance(value, list) or len(value) != 2:
            raise BadRequest(f"column {column.name!r}: two numbers are wanted, or null for no limit")
        parts = [
            Sql(f"{column.sql} {sign} {_cast(column)}", (_number(column, one),))
            for sign, one in zip((">=", "<="), value, strict=True)
            if one is not None and one != ""
        ]
        real = [Sql(f"NOT isnan({column.sql})")] if column.is_float else []  # to DuckDB NaN is above all numbers
        return joined([Sql(f"{column.sql} IS NOT NULL"), *real, *parts], "AND")
    if op == "nan":
        return Sql(f"isnan({column.sql})") if column.is_float else Sql("FALSE")
    sign = {"is": "=", "isnot": "IS DISTINCT FROM"}.get(op)
    return None if sign is None else Sql(f"{column.sql} {sign} {_cast(column)}", (_number(column, value),))


def _cast(column: Shown) -> str:
    """A figure as a user types it is meant in the column's own precision: 0.1 is the float32 that is called so."""
    return "?::FLOAT" if column.type in ("float", "halffloat") else "?"


def _number(column: Shown, value: Any) -> int | float:
    if isinstance(value, str):  # whole numbers beyond 2^53 have no exact number in a browser
        try:
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or (abs(value) > 1e308 and not math.isinf(value)):
        raise BadRequest(f"column {column.name!r}: a number is wanted")
    if math.isnan(value):
        raise BadRequest(f"column {column.name!r}: NaN is found with the filter 'nan'")
    return value


def _of_bool(column: Shown, op: str, value: Any) -> Sql | None:
    if op != "is":
        return None
    if not isinstance(value, bool):
        raise BadRequest(f"column {column.name!r}: true or false is wanted")
    return Sql(f"{column.sql} = ?", (value,))


@dataclass(frozen=True)
class Order:
    """By a column, nulls and NaN last, rows that are equal in the order of the output.

    Attributes:
        key: The expression.
        down: Greatest first.
    """

    key: str
    down: bool

    @staticmethod
    def by(column: Shown, down: bool) -> Order:
        """
        Raises:
            BadRequest: It has no order.
        """
        if not column.ordered:
            raise BadRequest(f"rows cannot be sorted by {column.name!r} ({column.kind})")
        key = f"CASE WHEN isnan({column.sql}) THEN NULL ELSE {column.sql} END" if column.is_float else column.sql
        return Order(key, down)

    @property
    def clause(self) -> str:
        return f"{self.key} {'DESC' if self.down else 'ASC'} NULLS LAST, file_index, file_row_number"

    def beyond(self, cursor: Cursor) -> Sql:
        """The rows that follow the cursor's."""
        behind = Sql("(file_index > ? OR (file_index = ? AND file_row_number > ?))",
                     (cursor.file, cursor.file, cursor.row))  # fmt: skip
        if cursor.key is None:
            return Sql(f"({self.key}) IS NULL AND ") + behind
        sign = "<" if self.down else ">"
        further = Sql(f"({self.key}) {sign} ?", (cursor.key,))
        return joined(
            [further, Sql(f"({self.key}) = ? AND ", (cursor.key,)) + behind, Sql(f"({self.key}) IS NULL")], "OR"
        )


@dataclass(frozen=True)
class Cursor:
    """The last row of a page: where it is, and its key. To the browser it is a text without meaning."""

    file: int
    row: int
    key: Any = field(default=None)

    def encode(self) -> str:
        return base64.urlsafe_b64encode(json.dumps([self.file, self.row, self.key]).encode()).decode()

    @staticmethod
    def decode(text: str) -> Cursor:
        """
        Raises:
            BadRequest: It is none of ours.
        """
        try:
            file, row, key = json.loads(base64.urlsafe_b64decode(text.encode()))
        except ValueError:
            raise BadRequest("after: no cursor of this app") from None
        if type(file) is not int or type(row) is not int or not isinstance(key, str | int | float | bool | None):
            raise BadRequest("after: no cursor of this app")
        return Cursor(file, row, key)
