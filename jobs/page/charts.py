"""Charts as inline SVG with HTML labels: they fit any width, need no script, and follow the page's colours.

Shapes live in a stretched 100 x 100 view box; labels are HTML beside it, so that text never stretches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.page.amounts import figure, scientific
from jobs.page.html import Html, tag

_COLOURS = 6


def number(value: float) -> str:
    """A figure as a person would write it: ``0``, ``0.031``, ``12.4``, ``1,234``, ``5.6 M``."""
    if value != value or math.isinf(value):
        return str(value)
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return scientific(value)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if size >= scale:
            return f"{value / scale:.3g} {unit}"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values from `low` to `high`, both ends inside."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [0.0 if n == 0 else n * step for n in range(first, last + 1)]


@dataclass(frozen=True)
class _Axes:
    x_low: float
    x_high: float
    y_high: float
    y_low: float = 0.0

    def x(self, value: float) -> float:
        return 100 * (value - self.x_low) / ((self.x_high - self.x_low) or 1)

    def y(self, value: float) -> float:
        return 100 - 100 * (value - self.y_low) / ((self.y_high - self.y_low) or 1)


def _frame(axes: _Axes, shapes: Sequence[Html], title: str, x_label: str, y_label: str, legend: Any = None) -> Html:
    y_ticks = ticks(axes.y_low, axes.y_high, 3)
    x_ticks = ticks(axes.x_low, axes.x_high, 4)
    grid = [tag("line", x1=0, x2=100, y1=f"{axes.y(t):.2f}", y2=f"{axes.y(t):.2f}", class_="grid") for t in y_ticks]
    svg = tag("svg", grid, shapes, viewBox="0 0 100 100", preserveAspectRatio="none", role="img", aria_label=title)
    y_axis = [tag("span", number(t), style=f"top:{axes.y(t):.2f}%") for t in y_ticks]
    x_axis = [tag("span", number(t), style=f"left:{axes.x(t):.2f}%") for t in x_ticks]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("span", y_label, class_="unit") if y_label else None, legend),
        tag(
            "div",
            tag("div", y_axis, class_="y"),
            svg,
            tag("div", x_axis, class_="x"),
            tag("div", x_label, class_="xl") if x_label else None,
            class_="plot",
        ),
        class_="chart",
    )


def histogram(values: Any, title: str, bins: int | None = None, measure: str = "") -> Html:
    """How the values are spread, with count, mean, median and extremes beneath.

    Args:
        values: Numbers; what is not finite is counted, not drawn. The outermost 0.1 % on each side are drawn in the
            last bars when they would stretch the axis.
        bins: Number of bars; found from the data when left out.
        measure: The column that the values are of, which tells their unit.
    """
    import numpy as np

    given = np.asarray(values, dtype=np.float64).ravel()
    finite = given[np.isfinite(given)]
    if finite.size == 0:
        return tag("figure", tag("figcaption", tag("b", title)), tag("p", "no values", class_="quiet"), class_="chart")
    low, high = float(finite.min()), float(finite.max())
    inner_low, inner_high = (float(q) for q in np.quantile(finite, [0.001, 0.999]))
    if finite.size >= 1000 and inner_high > inner_low and (high - low) > 4 * (inner_high - inner_low):
        low, high = inner_low, inner_high
    distinct = np.unique(finite[:10_000])
    whole = bool(np.all(finite == np.round(finite)))
    if low == high:
        edges = np.array([low - 0.5, low + 0.5])
    elif whole and high - low <= 60:
        edges = np.arange(low - 0.5, high + 1)
    else:
        q75, q25 = np.quantile(finite, [0.75, 0.25])
        width = 2 * float(q75 - q25) / finite.size ** (1 / 3)
        found = math.ceil((high - low) / width) if width > 0 else 20
        edges = np.linspace(low, high, (bins or min(48, max(8, found, min(12, distinct.size)))) + 1)
    counts, edges = np.histogram(np.clip(finite, edges[0], edges[-1]), edges)
    axes = _Axes(float(edges[0]), float(edges[-1]), float(counts.max()) * 1.04)
    shapes = []
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if not count:
            continue
        width = axes.x(right) - axes.x(left)
        tip = tag("title", f"{number(left)} to {number(right)}: {count:,}")
        bar = {"x": f"{axes.x(left) + 0.06 * width:.3f}", "width": f"{0.88 * width:.3f}", "y": f"{axes.y(count):.2f}"}
        shapes.append(tag("rect", tip, **bar, height=f"{100 - axes.y(count):.2f}", class_="c1"))
    facts = [
        ("n", f"{finite.size:,}"),
        ("mean", figure(float(finite.mean()), measure)),
        ("median", figure(float(np.median(finite)), measure)),
        ("min", figure(float(finite.min()), measure)),
        ("max", figure(float(finite.max()), measure)),
    ]
    if given.size > finite.size:
        facts.append(("not finite", f"{given.size - finite.size:,}"))
    notes = tag("dl", [(tag("div", tag("dt", name), tag("dd", value))) for name, value in facts], class_="facts")
    return tag("div", _frame(axes, shapes, title, "", ""), notes, class_="cell")


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str = "",
    y_label: str = "",
    *,
    fill: bool = False,
    from_zero: bool = True,
) -> Html:
    """One line for each series, name -> (x values, y values); points that are not finite break the line.

    Args:
        fill: Shade the area below (for a single series).
        from_zero: Let the vertical axis start at 0 where all values are positive.
    """
    points = {
        name: [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x)]
        for name, (xs, ys) in series.items()
    }
    heights = [y for pairs in points.values() for _, y in pairs if math.isfinite(y)]
    widths = [x for pairs in points.values() for x, _ in pairs]
    if not heights:
        return tag("figure", tag("figcaption", tag("b", title)), tag("p", "no values", class_="quiet"), class_="chart")
    low, high = min(heights), max(heights)
    low = 0.0 if from_zero and low >= 0 else low - 0.05 * (high - low)
    high = high + 0.06 * ((high - low) or 1)
    axes = _Axes(min(widths), max(widths), high, low)
    shapes: list[Html] = []
    legend: list[Html] = []
    for index, (name, pairs) in enumerate(points.items()):
        colour = f"c{index % _COLOURS + 1}"
        for run in _runs(pairs):
            path = " ".join(f"{axes.x(x):.2f},{axes.y(y):.2f}" for x, y in run)
            if fill:
                base = f"{axes.x(run[-1][0]):.2f},100 {axes.x(run[0][0]):.2f},100"
                shapes.append(tag("polygon", points=f"{path} {base}", class_=f"area {colour}"))
            shapes.append(tag("polyline", points=path, class_=f"line {colour}"))
        legend.append(tag("span", tag("i", class_=colour), name, class_="key"))
    return _frame(axes, shapes, title, x_label, y_label, legend if len(points) > 1 else None)


def _runs(pairs: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in pairs:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def bars(values: Mapping[str, float], title: str, unit: str = "") -> Html:
    """Horizontal bars, one for each name, in the order given; negative values count as 0 for the bar's length."""
    top = max([value for value in values.values() if math.isfinite(value)], default=0.0)
    rows = [
        tag(
            "div",
            tag("span", name, class_="name"),
            tag("span", tag("i", style=f"width:{_percent(value, top):.1f}%", class_="c1"), class_="track"),
            tag("span", number(value), class_="n"),
            class_="bar",
        )
        for name, value in values.items()
    ]
    caption = tag("figcaption", tag("b", title), tag("span", unit, class_="unit") if unit else None)
    return tag("figure", caption, rows, class_="chart bars")


def _percent(value: float, top: float) -> float:
    return 100 * max(0.0, value) / top if top > 0 and math.isfinite(value) else 0.0
