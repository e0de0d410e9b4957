"""Draws docs/figures/architecture.svg from the sources: ``python -m tests.support.draw_imports``."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tests.support import ROOT
from tests.support.imports import PAGE, House, Import, read_house, read_imports

FIGURE = ROOT / "docs" / "figures" / "architecture.svg"
WIDTH, MARGIN = 1100, 24
BOX, GAP = 48, 34
WINGS = ((MARGIN + 80, 680), (750, WIDTH - MARGIN - 20))
"""Left and right edge of each wing."""
COLOURS = {
    "latentmill": ("#e6e6e6", "#555555"),
    "jobs": ("#f7e6c9", "#9a6a14"),
    "stages": ("#dbe9d3", "#4d7a35"),
    "pipeline": ("#d7e4f2", "#3a6590"),
    "index": ("#eadcf0", "#7b4a90"),
    "micro": ("#f3dada", "#9c4343"),
}
"""Package -> fill and line."""


@dataclass(frozen=True)
class Box:
    """A room on paper."""

    room: str
    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def arrows(house: House, imports: Iterable[Import]) -> set[tuple[str, str]]:
    """Which room imports which, without what a longer way says already (the transitive reduction)."""
    below: dict[str, set[str]] = {room: set() for room in house.rooms}
    for one in imports:
        source, target = house.room(one.source), house.room(one.target)
        if source is not None and target is not None and source != target:
            below[source].add(target)
    reached: dict[str, set[str]] = {}
    for rooms in reversed(house.floors):  # from the ground up: all that a room leads to is known when it is needed
        for room in rooms:
            reached[room] = below[room].union(*(reached.get(target, set()) for target in below[room]))
    return {
        (room, target)
        for room, targets in below.items()
        for target in targets
        if not any(target in reached[other] for other in targets if other != target)
    }


def boxes(house: House) -> dict[str, Box]:
    """Where each room stands."""
    placed: dict[str, Box] = {}
    for number, rooms in enumerate(house.floors):
        y = MARGIN + number * (BOX + GAP)
        sides: dict[int | None, list[str]] = {}
        for room in rooms:
            sides.setdefault(house.wings.get(room), []).append(room)
        for wing, own in sides.items():
            left, right = WINGS[wing] if wing is not None else (WINGS[0][0], WINGS[1][1])
            width = min(300 if wing is None else 250, (right - left - 16 * (len(own) - 1)) / len(own))
            start = (left + right - len(own) * width - 16 * (len(own) - 1)) / 2
            for place, room in enumerate(own):
                placed[room] = Box(room, start + place * (width + 16), y, width)
    return placed


def says(room: str) -> str:
    """The first paragraph of a room's docstring, up to a colon unless it comes at once."""
    path = ROOT / room
    file = path / "__init__.py" if path.is_dir() else path
    first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].replace("\n", " ")
    head, colon, rest = first.replace("`", "").partition(": ")
    return head if head.count(" ") > 5 else f"{head}{colon}{rest}"


def draw(house: House, imports: Sequence[Import], said: Mapping[str, str]) -> str:
    """The figure as SVG."""
    placed = boxes(house)
    height = 2 * MARGIN + len(house.floors) * (BOX + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" role="img" aria-label="rooms by floor, with arrows to what they import">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#666"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    return "\n".join([*parts, *_arrows(placed, arrows(house, imports)), *_rooms(placed, said), "</svg>\n"])


def _arrows(placed: Mapping[str, Box], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Curves from box to box; one that skips floors runs down a channel between the boxes on its way."""
    channels: dict[tuple[str, str], float] = {}
    order = sorted(pairs, key=lambda pair: (placed[pair[1]].y - placed[pair[0]].y, placed[pair[0]].y, pair))
    for source, target in order:
        channels[source, target] = _channel(placed[source], placed[target], placed.values(), channels.values())
    leaving, coming = _ports(placed, channels, 0), _ports(placed, channels, 1)
    drawn = []
    for pair in sorted(channels):
        (x0, y0), (x1, y1) = (leaving[pair], placed[pair[0]].y + BOX), (coming[pair], placed[pair[1]].y)
        path = f"M{x0:.0f} {y0:.0f}{_curve(x0, y0, x1, y1)}"
        if y1 - y0 > GAP:
            x = channels[pair]
            path = f"M{x0:.0f} {y0:.0f}{_curve(x0, y0, x, y0 + GAP)}V{y1 - GAP:.0f}{_curve(x, y1 - GAP, x1, y1)}"
        drawn.append(f'<path d="{path}" fill="none" stroke="#666" stroke-width="1.3" marker-end="url(#tip)"/>')
    return drawn


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    """Down, across and down again."""
    middle = (y0 + y1) / 2
    return f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"


def _channel(source: Box, target: Box, boxes: Iterable[Box], taken: Iterable[float]) -> float:
    """Where an arrow may run down past the floors between: the free place that bends it least."""
    between = [box for box in boxes if source.y < box.y < target.y]
    if not between:
        return (source.middle + target.middle) / 2
    free = [
        x
        for x in range(MARGIN // 2, WIDTH - MARGIN // 2)
        if all(x < box.x - 7 or x > box.x + box.width + 7 for box in between)
    ]
    apart = next(gap for gap in (6, 4, 2, -1) if any(all(abs(x - t) > gap for t in taken) for x in free))
    free = [x for x in free if all(abs(x - t) > apart for t in taken)]  # closer where it is crowded
    return min(free, key=lambda x: abs(x - source.middle) + abs(x - target.middle))


def _ports(
    placed: Mapping[str, Box], channels: Mapping[tuple[str, str], float], end: int
) -> dict[tuple[str, str], float]:
    """Where on the edge of its box each arrow starts (`end` 0) or ends (1): side by side, so that they do not cross."""
    sharing: dict[str, list[tuple[str, str]]] = {}
    for pair in sorted(channels, key=lambda pair: (channels[pair], placed[pair[1 - end]].middle)):
        sharing.setdefault(pair[end], []).append(pair)
    return {
        pair: placed[room].x + placed[room].width * (number + 1) / (len(own) + 1)
        for room, own in sharing.items()
        for number, pair in enumerate(own)
    }


def _rooms(placed: Mapping[str, Box], said: Mapping[str, str]) -> list[str]:
    drawn = []
    for room, box in placed.items():
        fill, line = COLOURS[room.partition("/")[0]]
        drawn.append(
            f'<rect x="{box.x:.0f}" y="{box.y}" width="{box.width:.0f}" height="{BOX}" rx="7" fill="{fill}" '
            f'stroke="{line}"/>'
        )
        lines = _wrapped(said.get(room, ""), int(box.width / 5.6))
        top = box.y + (BOX - 14 - 11 * len(lines)) / 2 + 11
        drawn.append(
            f'<text x="{box.middle:.0f}" y="{top:.0f}" text-anchor="middle" font-size="13" font-weight="bold" '
            f'fill="{line}">{escape(room)}</text>'
        )
        drawn += [
            f'<text x="{box.middle:.0f}" y="{top + 13 + 11 * number:.0f}" text-anchor="middle" font-size="10" '
            f'fill="#333">{escape(text)}</text>'
            for number, text in enumerate(lines)
        ]
    return drawn


def _wrapped(text: str, width: int) -> list[str]:
    """At most two lines."""
    return textwrap.wrap(text, width, max_lines=2, placeholder=" …")


def figure() -> str:
    """The figure as it should stand in docs."""
    house = read_house(PAGE.read_text(encoding="utf-8"))
    return draw(house, read_imports(ROOT), {room: says(room) for room in house.rooms})


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
