"""Whether an output holds what an undisturbed run of the same job wrote: every id once, every value, every product."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.output.dataset import Output
from pipeline.output.products import PRODUCTS

CLOSE = 2e-3
"""Of numbers, relative to their column's largest: a shard that had to be halved is computed in batches of another size,
which round otherwise (docs/architecture.md), and a few steps of an optimiser carry that on."""
SMALL = 1e-2
"""Of the largest fraction in a cell: smaller ones are compared with so much."""
LEVELS = 2
"""Of pictures, for the same reason."""
TIMES = ("seconds",)
"""Columns that tell how long a row took, which no two runs agree on."""


def compare(expected: pa.Table, found: pa.Table) -> tuple[list[str], dict[str, float]]:
    """(what is wrong, columns that differ within rounding -> by how much)."""
    wrong, rounded = [], dict[str, float]()
    ids, own = expected["id"].to_pylist(), found["id"].to_pylist()
    lost, doubled = Counter(ids) - Counter(own), [name for name, count in Counter(own).items() if count > 1]
    if lost or doubled or len(own) != len(ids):
        return [f"{lost.total()} ids lost ({list(lost)[:3]}), {len(doubled)} doubled, {len(own)} rows"], {}
    if ids != own:
        wrong.append("the rows are not in the planned order")
    if expected.schema != found.schema:
        wrong.append("other columns")
    for name in expected.column_names:
        if name in TIMES:
            continue
        one, other = expected[name].combine_chunks(), found[name].combine_chunks()
        if one.equals(other):
            continue
        off = _distance(one, other)
        if off is None or off > (LEVELS if pa.types.is_struct(one.type) else CLOSE):
            place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not a.equals(b))
            wrong.append(f"{name} of {ids[place]!r} is another: {_short(one[place])} then, {_short(other[place])} now")
        else:
            rounded[name] = max(off, rounded.get(name, 0.0))
    return wrong, rounded


def _distance(one: pa.Array, other: pa.Array) -> float | None:
    """The largest difference of numbers, relative to the largest of them, or of pictures in levels; None: no such."""
    if one.is_null().to_pylist() != other.is_null().to_pylist():
        return None
    if pa.types.is_struct(one.type) and "bytes" in {one.type.field(i).name for i in range(one.type.num_fields)}:
        pairs = zip(one.to_pylist(), other.to_pylist(), strict=True)
        return max((_levels(a["bytes"], b["bytes"]) for a, b in pairs if a is not None), default=0.0)
    if pa.types.is_string(one.type):
        return _told_distance(one.to_pylist(), other.to_pylist())
    kind = one.type.value_type if pa.types.is_fixed_size_list(one.type) else one.type
    if not pa.types.is_floating(kind):
        return None
    return _relative(*(np.array([v for v in x.to_pylist() if v is not None], dtype=np.float64) for x in (one, other)))


def _relative(one: np.ndarray, other: np.ndarray) -> float | None:
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        return None
    return float(np.nanmax(np.abs(one - other), initial=0) / max(float(np.nanmax(np.abs(one), initial=0)), 1e-12))


def _told_distance(one: list[str | None], other: list[str | None]) -> float | None:
    """The largest of columns that hold JSON, whose fractions are of all sizes: each is compared with itself; what is no
    fraction has to be the same."""
    off = 0.0
    for a, b in zip(one, other, strict=True):
        if a == b or a is None or b is None:
            continue
        try:
            (shape, numbers), (other_shape, other_numbers) = (_taken_apart(json.loads(text)) for text in (a, b))
        except ValueError:
            return None
        if shape != other_shape:
            return None
        x, y = np.array(numbers), np.array(other_numbers)
        least = SMALL * float(np.abs(x).max(initial=0))  # below it a rounding may be all there is
        off = max(off, float((np.abs(x - y) / np.maximum(np.abs(x), max(least, 1e-12))).max(initial=0)))
    return off


def _taken_apart(value: Any) -> tuple[Any, list[float]]:
    """(the value without its fractions, which are left as a mark; the fractions, in order)."""
    if isinstance(value, float):
        return "a fraction", [value]
    if isinstance(value, dict):
        parts = [(name, *_taken_apart(part)) for name, part in value.items()]
        return [(name, shape) for name, shape, _ in parts], [x for *_, numbers in parts for x in numbers]
    if isinstance(value, list):
        taken = [_taken_apart(part) for part in value]
        return [shape for shape, _ in taken], [x for _, numbers in taken for x in numbers]
    return value, []


def _levels(one: bytes, other: bytes) -> float:
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(data)), dtype=int) for data in (one, other))
    return float(np.abs(a - b).max()) if a.shape == b.shape else np.inf


def _short(value: Any) -> str:
    return str(value.as_py())[:80]


def table(output: Output) -> pa.Table:
    """All committed rows, in order."""
    return pa.concat_tables(list(output.tables())).combine_chunks()


def products(output: Output) -> dict[str, str]:
    """What ``finish`` made, file -> digest; files of facts (JSON) hold times, and count by their names alone."""
    try:
        listed = json.loads(output.folder.read(PRODUCTS))["files"]
    except FileNotFoundError:
        return {}
    found = {}
    for file in listed:
        told = file["name"].endswith(".json")
        found[file["name"]] = "" if told else hashlib.blake2b(output.folder.read(file["name"])).hexdigest()
    return found
