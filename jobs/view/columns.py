"""What the page is told of a column: what it holds, how it is shown, and which filters it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.page.amounts import unit
from jobs.page.view import ColumnKind, column_kind

if TYPE_CHECKING:
    import pyarrow as pa

PLACE = ("file_index", "file_row_number")
"""DuckDB's own columns of a Parquet file: which file of the list, which row in it."""


@dataclass(frozen=True)
class Shown:
    """A column of an output.

    Attributes:
        name: As the output has it.
        sql: As DuckDB calls it, quoted: names that differ in case alone are told apart there by a number.
        kind: What it holds.
        type: Arrow's name of its type.
        shape: Of a vector's values; empty where it differs from row to row.
        doc: What it is.
    """

    name: str
    sql: str
    kind: ColumnKind
    type: str
    shape: tuple[int, ...] = ()
    doc: str = ""

    @property
    def is_float(self) -> bool:
        """Whether its values are fractions, and may be NaN."""
        return self.kind == "number" and self.type in ("halffloat", "float", "double")

    @property
    def plain(self) -> bool:
        """Whether a cell of a table can show it: no picture, no vector."""
        return self.kind not in ("image", "vector")

    @property
    def ordered(self) -> bool:
        """Whether rows can be sorted by it."""
        return self.kind in ("text", "number", "bool")

    @property
    def selected(self) -> str:
        """The expression that a table's cell shows; binary columns and lists in words."""
        if self.kind != "other":
            return self.sql
        if "binary" in self.type:
            return f"(octet_length({self.sql})::VARCHAR || ' bytes')"
        return f"left({self.sql}::VARCHAR, 2000)"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "type": self.type, "shape": list(self.shape), "doc": self.doc,
                "unit": unit(self.name), "whole": self.kind == "number" and not self.is_float}  # fmt: skip


def shown(schema: pa.Schema, duck_names: Sequence[str]) -> dict[str, Shown]:
    """The columns of an output by their names.

    Args:
        duck_names: What DuckDB calls them, in the same order.
    """
    return {
        field.name: Shown(field.name, quoted(name), column_kind(field), str(field.type), *_noted(field.metadata))
        for field, name in zip(schema, duck_names, strict=True)
    }


def _noted(metadata: Mapping[bytes, bytes] | None) -> tuple[tuple[int, ...], str]:
    import json

    told = metadata or {}
    shape = tuple(json.loads(told.get(b"shape", b"[]")))
    return shape if -1 not in shape else (), told.get(b"doc", b"").decode(errors="replace")


def quoted(name: str) -> str:
    """A name as SQL writes it, whatever characters it has."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text of ours as SQL writes it; what comes from a browser or a row is a parameter instead."""
    return "'" + text.replace("'", "''") + "'"
