"""Two outputs of one kind of job, row by row: ids that one of them lacks, other statuses, other values.

Rows are matched by id, which tells the rows of several methods apart too; their order and shards may differ. In memory
are 25 bytes a row of the second output, and of the rows themselves a shard of each at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.input.ids import Uniqueness
from pipeline.input.rows import is_picture
from pipeline.output import parquet
from pipeline.output.commit import Record
from pipeline.output.dataset import SUCCESS, Output
from pipeline.output.planfile import OutputError
from pipeline.output.schema import decode_schema
from pipeline.pictures import PictureError, decode_picture

OWN = ("id", "status")
MOST_PIXELS = 500_000_000
HELD = 1 << 20
"""Relative differences of which a median is taken."""


@dataclass(frozen=True)
class Difference:
    """What differs for one id.

    Attributes:
        what: ``only in A``, ``only in B``, ``status``, or a column's name.
        a, b: The values, where they are text, a number or a status; else what they are.
        max_abs: Largest difference of two numbers in it; of pixels, of 255.
        relative: Euclidean distance over the larger of the two norms.
    """

    id: str
    what: str
    a: str = ""
    b: str = ""
    max_abs: float | None = None
    relative: float | None = None


class Median:
    """Of any number of values; above `HELD` of them, of evenly chosen ones."""

    def __init__(self) -> None:
        self._values, self._every, self._seen = list[float](), 1, 0

    def add(self, value: float) -> None:
        if self._seen % self._every == 0:
            self._values.append(value)
        self._seen += 1
        if len(self._values) >= HELD:
            self._values, self._every = self._values[::2], self._every * 2

    @property
    def value(self) -> float | None:
        return float(np.median(self._values)) if self._values else None


@dataclass
class ColumnDiff:
    """What became of a column in the rows that are ok in both.

    Attributes:
        compared, different: Rows.
        max_abs, relative: Over the rows that differ, where both values are numbers or pictures of one size.
    """

    compared: int = 0
    different: int = 0
    max_abs: float | None = None
    relative: Median = field(default_factory=Median)

    def add(self, max_abs: float | None, relative: float | None) -> None:
        self.different += 1
        if max_abs is not None:
            self.max_abs = max(self.max_abs or 0.0, max_abs)
        if relative is not None:
            self.relative.add(relative)


@dataclass
class Diff:
    """Two outputs compared.

    Attributes:
        rows_a, rows_b, both: Rows by id.
        only_a, only_b: Ids that the other lacks.
        statuses: (in A, in B) -> rows, where they differ.
        columns: Name -> what differs.
        missing: Columns that one of them lacks, or that hold something else in the other, as sentences.
        unfinished: Outputs that have not all their rows yet.
    """

    rows_a: int = 0
    rows_b: int = 0
    both: int = 0
    only_a: int = 0
    only_b: int = 0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    columns: dict[str, ColumnDiff] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        differ = any(column.different for column in self.columns.values())
        return not (self.only_a or self.only_b or self.statuses or self.missing or differ)


def diff(
    a: str, b: str, columns: Sequence[str] | None = None, tolerance: float = 0.0,
    tell: Callable[[Difference], None] = lambda found: None,
) -> Diff:  # fmt: skip
    """Compare two outputs.

    Args:
        columns: Only these; None: all that both have.
        tolerance: Numbers x and y are equal up to ``tolerance * max(1, |x|, |y|)``; pixels count in 255ths.
        tell: Gets each difference.

    Raises:
        OutputError: One is no output, or they are of different kinds of job, or a file is gone.
        ValueError: A column is in neither.
    """
    first, second = Output.open(a), Output.open(b)
    kinds = [str(output.plan["config"].get("job")) for output in (first, second)]
    if kinds[0] != kinds[1]:
        raise OutputError(f"{a} is of the job {kinds[0]}, {b} of {kinds[1]}: only runs of one kind can be compared")
    fields, missing = _shared(first, second, columns)
    unfinished = tuple(output.path for output in (first, second) if not output.folder.exists(SUCCESS))
    found = Diff(columns={own.name: ColumnDiff() for own in fields}, missing=missing, unfinished=unfinished)
    other = _Rows(second, [*OWN, *(own.name for own in fields)])
    for table in first.tables([*OWN, *(own.name for own in fields)]):
        found.rows_a += len(table)
        ids, here, there = table["id"].to_pylist(), list[int](), list[int]()
        for n, place in enumerate(other.places(ids)):
            if place < 0:
                found.only_a += 1
                tell(Difference(ids[n], "only in A"))
            else:
                here.append(n)
                there.append(place)
        found.both += len(here)
        for pair in other.pairs(table, here, there):
            _compare(pair, fields, tolerance, found, tell)
    found.rows_b, found.only_b = len(other.shard_N), int((~other.met_N).sum())
    for own in other.unmet():
        tell(Difference(own, "only in B"))
    return found


def _shared(a: Output, b: Output, columns: Sequence[str] | None) -> tuple[list[pa.Field], tuple[str, ...]]:
    """The fields that both have and that hold the same kind of thing, and what is said of the others."""
    schemas = [decode_schema(output.plan["schema"]) for output in (a, b)]
    names = list(dict.fromkeys(name for schema in schemas for name in schema.names if name not in OWN))
    for name in columns or ():
        if name not in names:
            raise ValueError(f"no column {name!r} in either; there are {', '.join(names)}")
    wanted = [name for name in names if columns is None or name in columns]
    shared, missing = [], []
    for name in wanted:
        lacking = [output.path for output, schema in zip((a, b), schemas, strict=True) if name not in schema.names]
        if lacking:
            missing.append(f"{lacking[0]} has no column {name!r}")
            continue
        one, other = (schema.field(name) for schema in schemas)
        if _kind(one.type) != _kind(other.type):
            missing.append(f"the column {name!r} is {one.type} in {a.path} and {other.type} in {b.path}")
        else:
            shared.append(one)
    return shared, tuple(missing)


def _kind(kind: pa.DataType) -> str:
    """What is compared how: ``number``, ``array``, ``picture``, else by its type."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    if (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)) and _kind(kind.value_type) == "number":
        return "array"
    return "picture" if is_picture(kind) else str(kind)


@dataclass(frozen=True)
class _Pair:
    """Two tables, and the rows in them that belong together."""

    a: pa.Table
    here_M: np.ndarray
    b: pa.Table
    there_M: np.ndarray

    def columns(self, name: str) -> tuple[pa.Array, pa.Array]:
        """A column's values of these rows; not for pictures, whose bytes may be more than an array holds."""
        columns = (self.a[name].take(pa.array(self.here_M)), self.b[name].take(pa.array(self.there_M)))
        return columns[0].combine_chunks(), columns[1].combine_chunks()

    def cells(self, name: str, n: int) -> tuple[pa.Scalar, pa.Scalar]:
        return self.a[name][int(self.here_M[n])], self.b[name][int(self.there_M[n])]

    def only(self, chosen_M: np.ndarray) -> _Pair:
        return _Pair(self.a, self.here_M[chosen_M], self.b, self.there_M[chosen_M])


class _Rows:
    """The rows of an output by id.

    Attributes:
        shard_N, row_N: Where each row lies, in the order of the sorted hashes of the ids.
        met_N: It was asked for.
    """

    def __init__(self, output: Output, columns: Sequence[str]) -> None:
        self._output, self._columns, self._listed = output, columns, output.listings()
        self._records: list[Record] = []
        hashes, shards, rows = [], [], []
        for number, record in enumerate(output.records()):
            self._records.append(record)
            ids = self._read(number, ["id"])["id"].to_pylist()
            hashes.append(Uniqueness.hashes(ids, len(ids)))
            shards.append(np.full(len(ids), number, np.int32))
            rows.append(np.arange(len(ids), dtype=np.int32))
        self._hash_N = np.concatenate([np.empty(0, np.uint64), *hashes])
        order_N = np.argsort(self._hash_N)
        self._hash_N = self._hash_N[order_N]
        self.shard_N = np.concatenate([np.empty(0, np.int32), *shards])[order_N]
        self.row_N = np.concatenate([np.empty(0, np.int32), *rows])[order_N]
        self.met_N = np.zeros(len(order_N), bool)
        self._held: tuple[int, pa.Table] | None = None

    def _read(self, number: int, columns: Sequence[str]) -> pa.Table:
        record = self._records[number]
        name = self._output.locate(record, self._listed)
        if name is None:
            path = self._output.path
            raise OutputError(f"{path}: the file of shard {record.shard} is gone or cut; run the job again")
        return parquet.read(self._output.folder, name, columns)

    def places(self, ids: Sequence[str]) -> Iterator[int]:
        """The place of each id; -1 where there is none."""
        hash_M = Uniqueness.hashes(ids, len(ids))
        place_M = np.searchsorted(self._hash_N, hash_M)
        last = len(self._hash_N) - 1
        for place, own in zip(place_M.tolist(), hash_M.tolist(), strict=True):
            yield place if place <= last and int(self._hash_N[place]) == own else -1

    def pairs(self, table: pa.Table, here: Sequence[int], there: Sequence[int]) -> Iterator[_Pair]:
        """Rows of a table and the other output's rows of their ids, a shard of the other at a time.

        Args:
            here, there: Rows of the table, and the places of their ids.
        """
        here_M, there_M = np.array(here, np.int64), np.array(there, np.int64)
        self.met_N[there_M] = True
        for number in np.unique(self.shard_N[there_M]).tolist():
            of_M = self.shard_N[there_M] == number
            if self._held is None or self._held[0] != number:
                self._held = number, self._read(number, self._columns)
            yield _Pair(table, here_M[of_M], self._held[1], self.row_N[there_M[of_M]].astype(np.int64))

    def unmet(self) -> Iterator[str]:
        """Ids that were never asked for."""
        left_M = np.flatnonzero(~self.met_N)
        for number in np.unique(self.shard_N[left_M]).tolist():
            rows = np.sort(self.row_N[left_M[self.shard_N[left_M] == number]])
            yield from self._read(number, ["id"])["id"].take(pa.array(rows)).to_pylist()


def _compare(
    pair: _Pair, fields: Sequence[pa.Field], tolerance: float, found: Diff, tell: Callable[[Difference], None]
) -> None:
    (ids, others), (before, after) = ([column.to_pylist() for column in pair.columns(name)] for name in OWN)
    if ids != others:
        raise OutputError("two ids share a 64-bit hash, so these outputs cannot be compared in this process; try again")
    for own, one, other in zip(ids, before, after, strict=True):
        if one != other:
            found.statuses[one, other] += 1
            tell(Difference(own, "status", one, other))
    same_K = np.flatnonzero([one == other for one, other in zip(before, after, strict=True)])
    pair = pair.only(same_K)
    for own in fields:
        column = found.columns[own.name]
        column.compared += len(same_K)
        for n in _suspects(pair, own):
            cells = pair.cells(own.name, n)
            if (difference := _difference(*cells, tolerance)) is not None:
                column.add(*difference)
                tell(Difference(ids[same_K[n]], own.name, _shown(cells[0]), _shown(cells[1]), *difference))


Found = tuple[float | None, float | None]
"""Largest absolute difference, and relative one; None where there is none to tell."""


def _suspects(pair: _Pair, own: pa.Field) -> Sequence[int]:
    """The rows whose values are not the same at first sight: all others are."""
    kind = _kind(own.type)
    if kind == "picture":
        return range(len(pair.here_M))
    a, b = pair.columns(own.name)
    there_N = a.is_valid().to_numpy(False) & b.is_valid().to_numpy(False)
    equal_N = ~there_N & (a.is_valid().to_numpy(False) == b.is_valid().to_numpy(False))
    x, y = a.filter(pa.array(there_N)), b.filter(pa.array(there_N))
    fixed = all(pa.types.is_fixed_size_list(column.type) for column in (a, b))
    if kind == "array" and fixed and a.type.list_size == b.type.list_size:
        values = (np.asarray(column.flatten()).reshape(len(x), a.type.list_size) for column in (x, y))
        equal_N[there_N] = np.equal(*values).all(1)
    elif kind == "number" or pa.types.is_string(own.type):
        equal_N[there_N] = pc.equal(x, y).to_numpy(False)
    return np.flatnonzero(~equal_N).tolist()


def _difference(one: pa.Scalar, other: pa.Scalar, tolerance: float) -> Found | None:
    """How far apart two values are; None where they are equal."""
    if not (one.is_valid and other.is_valid):
        return None if one.is_valid == other.is_valid else (None, None)
    kind = _kind(one.type)
    if kind in ("number", "array"):
        return _numbers(one, other, tolerance)
    if kind == "picture":
        return _pictures(one, other, tolerance)
    return None if one.as_py() == other.as_py() else (None, None)


def _values(cell: pa.Scalar) -> np.ndarray:
    """A number, or a list of them, in float64; whole numbers beyond 2**53 stay whole."""
    if isinstance(cell, pa.ListScalar | pa.FixedSizeListScalar | pa.LargeListScalar):
        values = cell.values
        return np.asarray(values.to_numpy(zero_copy_only=False))
    return np.atleast_1d(np.asarray(cell.as_py()))


def _numbers(one: pa.Scalar, other: pa.Scalar, tolerance: float) -> Found | None:
    x, y = _values(one), _values(other)
    if x.shape != y.shape:
        return None, None
    if np.array_equal(x, y):
        return None
    whole = x.dtype.kind in "iu" and y.dtype.kind in "iu"
    with np.errstate(invalid="ignore"):  # whole numbers as such: float64 takes some that differ for the same
        away = np.abs(x.astype(object) - y.astype(object)) if whole else np.abs(x.astype(float) - y.astype(float))
    return _apart(x.astype(np.float64), y.astype(np.float64), away.astype(np.float64), tolerance)


def _apart(x: np.ndarray, y: np.ndarray, away: np.ndarray, tolerance: float) -> Found | None:
    """How far two arrays of one shape are apart; None where they are equal within the tolerance.

    Args:
        away: Their absolute difference.
    """
    equal = (away == 0) | (np.isinf(x) & (x == y)) | (np.isnan(x) & np.isnan(y))
    if (equal | (away <= tolerance * np.maximum(1, np.maximum(np.abs(x), np.abs(y))))).all():
        return None
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        return None, None
    norm = max(float(np.linalg.norm(x[finite])), float(np.linalg.norm(y[finite])))
    distance = float(np.linalg.norm(away[finite]))
    return float(away[finite].max()), distance / norm if norm else 0.0


def _pictures(one: pa.Scalar, other: pa.Scalar, tolerance: float) -> Found | None:
    """By pixels: other bytes may hold the same picture."""
    before, after = one.as_py()["bytes"], other.as_py()["bytes"]
    if before == after:
        return None
    try:
        x, y = (np.asarray(decode_picture(data or b"", MOST_PIXELS), np.float64) for data in (before, after))
    except PictureError:
        return None, None
    if x.shape != y.shape:
        return None, None
    found = _apart(x / 255, y / 255, np.abs(x - y) / 255, tolerance)
    return None if found is None else (float(np.abs(x - y).max()), found[1])


def _shown(cell: pa.Scalar) -> str:
    value: Any = cell.as_py() if _kind(cell.type) not in ("array", "picture") or not cell.is_valid else None
    if cell.is_valid and value is None:
        return "picture" if _kind(cell.type) == "picture" else f"{len(_values(cell))} numbers"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.9g}"
    return "" if value is None else str(value)
