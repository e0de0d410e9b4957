"""Amounts in words: times, rates, counts, sizes, prices, measured figures with their units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEAST_PLAIN, _LEAST_MIXED = 1e-3, 0.1


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 04 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def short(seconds: float) -> str:
    """A time that may be far below a second: ``83 us``, ``5.9 ms``, else as `duration`."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return duration(seconds)


def rate(rows_per_second: float) -> str:
    """Rows a second, or a minute where they are slow."""
    if rows_per_second >= 1 or rows_per_second == 0:
        return f"{rows_per_second:,.0f} rows/s" if rows_per_second >= 10 else f"{rows_per_second:.1f} rows/s"
    return f"{rows_per_second * 60:.1f} rows/min"


def count(number: int, thing: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size(amount: float, digits: str = ".1f") -> str:
    """``3.2 MB``.

    Args:
        digits: Format of the figure; whole bytes and terabytes have one of their own.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:{digits}} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def price(amount: float) -> str:
    """Two digits after the point, or two that count if it is less than one."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def figure(value: float | None, name: str = "") -> str:
    """A measured figure as a person writes it: ``37.6 dB``, ``0.935``, ``1,234``, ``2.4 × 10⁻⁷``; None is nothing.

    Args:
        name: Of the column that it is of, which tells the unit.
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    of = unit(name)
    if of == "s":
        return short(value) if value >= 0 else f"-{short(-value)}"
    size = abs(value)
    if of == "dB":
        text = f"{value:.1f}"
    elif (value == int(value) and size < 1e15) or 1000 <= size < 1e15:
        text = f"{value:,.0f}"
    elif size >= 1e15 or size < _LEAST_PLAIN:
        text = scientific(value)
    elif size >= 100:
        text = f"{value:.1f}"
    else:
        text = f"{value:#.3g}"
    return f"{text}\u202f{of}" if of else text


def figures(values: Sequence[float | None], name: str = "") -> list[str]:
    """A column of figures in one style: where some are tiny and none is large, all are written with powers of ten."""
    sizes = [abs(value) for value in values if value is not None and value and math.isfinite(value)]
    tiny = sizes and not unit(name) and min(sizes) < _LEAST_PLAIN and max(sizes) < _LEAST_MIXED
    return [scientific(value) if tiny and value else figure(value, name) for value in values]


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is there; None where nothing is."""
    there = [float(value) for value in values if value is not None]
    return sum(there) / len(there) if there else None


def scientific(value: float) -> str:
    """``2.4 × 10⁻⁷``."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(power)).translate(_RAISED)}"


def unit(name: str) -> str:
    """The unit of a column by its name; empty for plain figures."""
    words = name.split("_")
    return "dB" if "psnr" in words else "s" if "seconds" in words else ""
