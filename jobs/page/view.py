"""A run's output as the report sees it: which columns there are, some of their values, some of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipeline.output.commit import Record
    from pipeline.output.dataset import Output, Status

ColumnKind = Literal["image", "text", "number", "bool", "vector", "other"]
_OWN = frozenset({"id", "status", "error", "duplicate_of"})


@dataclass(frozen=True)
class View:
    """Handed to a report panel's ``draw``. Reads lazily, and never more than it is asked for."""

    output: Output

    @property
    def plan(self) -> Mapping[str, Any]:
        return self.output.plan

    @property
    def config(self) -> Mapping[str, Any]:
        """The job's own settings."""
        config: Mapping[str, Any] = self.plan.get("config", {})
        return config

    @cached_property
    def status(self) -> Status:
        return self.output.status()

    @cached_property
    def records(self) -> list[Record]:
        return list(self.output.records())

    @property
    def measures(self) -> Mapping[str, Mapping[str, float]]:
        """Numeric column -> n, mean, min, max over the rows with status ok."""
        return self.status.measures

    @cached_property
    def columns(self) -> dict[str, ColumnKind]:
        """Column -> what it holds."""
        from pipeline.output.schema import decode_schema

        return {field.name: column_kind(field) for field in decode_schema(self.plan["schema"])}

    def named(self, kind: ColumnKind) -> list[str]:
        """The columns of one kind, without id, status and error."""
        return [name for name, found in self.columns.items() if found == kind and name not in _OWN]

    def values(self, name: str, limit: int = 200_000) -> np.ndarray:
        """The non-null values of a column over the rows with status ok; of many rows, those of evenly chosen shards.

        Returns:
            (n,) float64 for numbers, (n, width) for vectors.
        """
        import numpy as np

        parts: list[np.ndarray] = []
        rows = sum(record.rows_ok for record in self.records)
        for table in self._ok([name], self._every(-(-rows // max(1, limit)))):
            column = table.column(name).drop_null()
            if self.columns[name] == "vector":
                width = table.schema.field(name).type.list_size
                flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
                parts += [values.astype(np.float64).reshape(-1, width) for values in flat]
            else:
                parts.append(column.to_numpy().astype(np.float64))
        return np.concatenate(parts) if parts else np.zeros(0)

    def rows(self, columns: Sequence[str], limit: int = 24, spread: bool = True) -> list[dict[str, Any]]:
        """Some rows with status ok as dicts; pictures as their encoded bytes.

        Args:
            columns: Columns to read.
            limit: At most so many rows.
            spread: Take them evenly from all shards; else the first ones, side by side as they stand.
        """
        chosen = self._every(max(1, len(self.records) // max(1, limit)) if spread else 1)
        each = -(-limit // max(1, len(chosen))) if spread else limit
        found: list[dict[str, Any]] = []
        for table in self._ok(columns, chosen):
            found += [{name: _bytes(value) for name, value in row.items()} for row in table.slice(0, each).to_pylist()]
            if len(found) >= limit:
                break
        return found[:limit]

    def _every(self, stride: int) -> list[Record]:
        """Every so many-th record that has rows with status ok."""
        return [record for record in self.records if record.rows_ok][::stride]

    def failures(self, limit: int = 50) -> list[dict[str, Any]]:
        """The first failed rows: id and error."""
        import pyarrow.compute as pc

        found: list[dict[str, Any]] = []
        for table in self._tables(["id", "status", "error"], [record for record in self.records if record.rows_failed]):
            bad = table.filter(pc.equal(table.column("status"), "failed"))
            found += bad.select(["id", "error"]).slice(0, limit - len(found)).to_pylist()
            if len(found) >= limit:
                break
        return found

    def _ok(self, columns: Sequence[str], records: Iterable[Record]) -> Iterator[pa.Table]:
        import pyarrow.compute as pc

        for table in self._tables([*dict.fromkeys([*columns, "status"])], records):
            yield table.filter(pc.equal(table.column("status"), "ok")).select(list(columns))

    def _tables(self, columns: Sequence[str], records: Iterable[Record]) -> Iterator[pa.Table]:
        from pipeline.output import parquet

        for record in records:
            name = self.output.locate(record)
            if name is not None:  # a file that is gone is verify's to report
                yield parquet.read(self.output.folder, name, columns)


def column_kind(field: pa.Field) -> ColumnKind:
    """What a column of an output holds."""
    import pyarrow.types as pt

    if pt.is_struct(field.type) and {child.name for child in field.type} == {"bytes", "path"}:
        return "image"
    if pt.is_string(field.type) or pt.is_large_string(field.type):
        return "text"
    if pt.is_boolean(field.type):
        return "bool"
    if pt.is_integer(field.type) or pt.is_floating(field.type):
        return "number"
    if pt.is_fixed_size_list(field.type):
        return "vector"
    return "other"


def _bytes(value: Any) -> Any:
    return value["bytes"] if isinstance(value, dict) and set(value) == {"bytes", "path"} else value
