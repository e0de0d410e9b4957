"""The miniature world: 64x64 RGB pictures of one to three coloured, textured shapes, and their captions.

Everything is drawn from ``(seed, index)`` alone, so a picture is the same in every process and on every machine.
Shapes are signed distance functions, so edges are anti-aliased without supersampling.

The world has a long tail on purpose (see `rarity`): hearts are red or pink and moons yellow or blue, as bananas are
yellow in photographs; a few other colours were seen at most `RARE_SEEN` times in training, and some never.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Literal

import numpy as np

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLORS = {
    "red": (214, 40, 45),
    "orange": (242, 132, 24),
    "yellow": (245, 200, 20),
    "green": (38, 150, 66),
    "blue": (38, 92, 205),
    "purple": (122, 50, 168),
    "pink": (240, 120, 180),
    "black": (38, 38, 44),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = {
    "white": (250, 250, 250),
    "beige": (240, 226, 200),
    "grey": (196, 198, 202),
    "sky": (190, 222, 246),
    "mint": (196, 236, 210),
}
SIZES = {"small": (9.5, 10.5), "medium": (12.0, 13.5), "large": (15.0, 16.5)}
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
PLURALS = {"cross": "crosses"} | {s: s + "s" for s in SHAPES if s != "cross"}

Split = Literal["train", "heldout"]
TRAIN_SIZE = 100_000
RARE_SEEN = 5
_SPLIT_SEED = {"train": 0, "heldout": 1}
_MARGIN = 1.5


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, its centre in pixels (x to the right, y down) and its radius in pixels."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """One to three objects on a background; ``things`` are in the order in which a caption names them."""

    things: tuple[Thing, ...]
    background: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Scene:
        raw = json.loads(text)
        return Scene(tuple(Thing(**thing) for thing in raw["things"]), raw["background"])


Combination = tuple[str, str, str]


def rarity(shape: str, color: str, texture: str) -> Literal["frequent", "rare", "never"]:
    """How often training pictures hold this combination: ``rare`` means exactly `RARE_SEEN` times."""
    if shape == "heart":
        if texture == "checkered" or color in ("yellow", "purple"):
            return "never"
        return "frequent" if color in ("red", "pink") else "rare"
    if shape == "moon":
        if texture == "checkered" or color in ("orange", "black"):
            return "never"
        return "frequent" if color in ("yellow", "blue") else "rare"
    if texture == "checkered" and shape in ("star", "ring"):
        return "rare" if shape == "star" else "never"
    return "frequent"


@lru_cache
def combinations(kind: str) -> tuple[Combination, ...]:
    """All (shape, colour, texture) of one rarity, in a fixed order."""
    return tuple(c for c in product(SHAPES, COLORS, TEXTURES) if rarity(*c) == kind)


# --- sampling -----------------------------------------------------------------------------------------------------


def relation_of(a: Thing, b: Thing) -> str:
    """Where ``a`` stands seen from ``b``, along the axis on which they are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _place(rng: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Centres that keep objects inside the picture, apart from each other, and pairs clearly on one axis."""
    while True:
        centres: list[tuple[float, float]] = []
        for r in radii:
            for _ in range(60):
                x, y = rng.uniform(r + _MARGIN, SIZE - r - _MARGIN, 2)
                if all(np.hypot(x - u, y - v) > r + s + 2 for (u, v), s in zip(centres, radii, strict=False)):
                    centres.append((float(x), float(y)))
                    break
            else:
                break
        if len(centres) < len(radii):
            continue
        if len(centres) == 2:
            dx, dy = (abs(centres[0][i] - centres[1][i]) for i in (0, 1))
            if abs(dx - dy) < 8:
                continue
        return centres


def _pick(rng: np.random.Generator, items: Sequence) -> object:
    return items[int(rng.integers(len(items)))]


def _sizes(rng: np.random.Generator, count: int) -> list[str]:
    """At most one large object, and none among three: they would not fit."""
    first = str(_pick(rng, tuple(SIZES) if count < 3 else ("small", "medium")))
    rest = [str(_pick(rng, ("small", "medium")))
            for _ in range(count - 1)]
    names = [first, *rest]
    rng.shuffle(names)
    return names


def compose(
    rng: np.random.Generator,
    combos: Sequence[Combination],
    background: str | None = None,
    relation: str | None = None,
    sizes: Sequence[str] | None = None,
) -> Scene:
    """A scene of the given (shape, colour, texture) combinations, with everything else drawn from ``rng``."""
    sizes = list(sizes or _sizes(rng, len(combos)))
    radii = [float(rng.uniform(*SIZES[size])) for size in sizes]
    background = background or str(_pick(rng, tuple(BACKGROUNDS)))
    while True:
        centres = _place(rng, radii)
        things = tuple(
            Thing(s, c, t, size, x, y, r)
            for (s, c, t), size, (x, y), r in zip(combos, sizes, centres, radii, strict=True)
        )
        if relation is None or relation_of(things[0], things[1]) == relation:
            return Scene(things, background)


def sample_scene(index: int, split: Split = "train", seed: int = 0) -> Scene:
    """The ``index``-th scene of a split. Held-out scenes hold frequent combinations only.

    In the training split the first ``RARE_SEEN * len(combinations("rare"))`` scenes are the only ones with rare
    combinations, one object each.
    """
    rng = np.random.default_rng([_SPLIT_SEED[split], seed, index])
    rare = combinations("rare")
    if split == "train" and index < RARE_SEEN * len(rare):
        return compose(rng, [rare[index % len(rare)]])
    frequent = combinations("frequent")
    kind = rng.uniform()
    if kind < 0.35:
        return compose(rng, [frequent[rng.integers(len(frequent))]])
    count = 2 if kind < 0.80 else 3
    if rng.uniform() < 0.25:  # a group of equal objects, of one size
        combo = frequent[rng.integers(len(frequent))]
        return compose(rng, [combo] * count, sizes=_sizes(rng, 3)[:1] * count)
    return compose(rng, [frequent[i] for i in rng.integers(len(frequent), size=count)])


# --- captions -----------------------------------------------------------------------------------------------------

_OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ", "photo of ", "there is ", "here is ")
_GROUNDS = (" on a {} background", " on {}", " against a {} background", " in front of a {} background")


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(thing: Thing, plural: bool = False, size: bool = True, texture: bool = True, color: bool = True) -> str:
    """``small striped red star``, without an article; ``medium`` and ``plain`` go without saying."""
    words = []
    if size and thing.size != "medium":
        words.append(thing.size)
    if texture and thing.texture != "plain":
        words.append(thing.texture)
    if color:
        words.append(thing.color)
    words.append(PLURALS[thing.shape] if plural else thing.shape)
    return " ".join(words)


def is_group(scene: Scene) -> bool:
    """Whether all the objects (two or three) agree in shape, colour and texture."""
    return len(scene.things) > 1 and len({(t.shape, t.color, t.texture) for t in scene.things}) == 1


def caption(scene: Scene, rng: np.random.Generator, detail: Literal["full", "varied"] = "varied") -> str:
    """An English caption. ``full`` names every attribute; ``varied`` leaves some out and changes the wording."""
    full = detail == "full"
    size = full or rng.uniform() < 0.6
    texture = full or rng.uniform() < 0.93
    color = full or rng.uniform() < 0.9
    things = scene.things
    if is_group(scene):
        same_size = len({t.size for t in things}) == 1
        text = f"{COUNT_WORDS[len(things)]} {describe(things[0], True, size and same_size, texture, color)}"
    else:
        names = [_article(describe(t, False, size, texture, color)) for t in things]
        if len(things) == 1:
            bare = describe(things[0], False, size, texture, color)
            text = names[0] if full or rng.uniform() < 0.92 else f"one {bare}"
        elif len(things) == 2:
            text = _pair(things, names, rng, full)
        else:
            text = f"{names[0]}, {names[1]} and {names[2]}"
    opening = "" if full else str(_pick(rng, _OPENINGS))
    if opening in ("there is ", "here is ") and is_group(scene):
        opening = "there are " if opening == "there is " else "here are "
    text = opening + text
    if full or rng.uniform() < 0.55:
        text += (_GROUNDS[0] if full else str(_pick(rng, _GROUNDS))).format(scene.background)
    return text


def _pair(things: Sequence[Thing], names: Sequence[str], rng: np.random.Generator, full: bool) -> str:
    if not full and rng.uniform() < 0.2:
        return f"{names[0]} and {names[1]}"
    first = 0 if full or rng.uniform() < 0.5 else 1
    relation = relation_of(things[first], things[1 - first])
    words = {
        "left of": ("to the left of", "left of", "on the left of"),
        "right of": ("to the right of", "right of", "on the right of"),
        "above": ("above", "above", "over"),
        "below": ("below", "below", "under"),
    }[relation]
    return f"{names[first]} {words[0] if full else _pick(rng, words)} {names[1 - first]}"


# --- drawing ------------------------------------------------------------------------------------------------------


def _polygon(px: np.ndarray, py: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon (negative inside); ``corners`` is (n, 2)."""
    best = np.full(px.shape, 1e9, np.float32)
    inside = np.zeros(px.shape, bool)
    previous = np.roll(corners, 1, axis=0)
    for (ax, ay), (bx, by) in zip(previous, corners, strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((px - ax) * ex + (py - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (px - ax - t * ex) ** 2 + (py - ay - t * ey) ** 2)
        if ay != by:
            inside ^= ((ay > py) != (by > py)) & (px < ex * (py - ay) / ey + ax)
    return np.where(inside, -1, 1) * np.sqrt(best)


def _star(points: int, inner: float) -> np.ndarray:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angles) * radius, np.sin(angles) * radius], 1).astype(np.float32)


_TRIANGLE = np.array([[0, -1], [0.95, 0.72], [-0.95, 0.72]], np.float32)
_STAR = _star(5, 0.45)
_A = 0.34
_CROSS = np.array(
    [[-_A, -1], [_A, -1], [_A, -_A], [1, -_A], [1, _A], [_A, _A], [_A, 1], [-_A, 1], [-_A, _A], [-1, _A], [-1, -_A],
     [-_A, -_A]], np.float32) * 0.95  # fmt: skip


@lru_cache
def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return (np.stack([x, y - 2.5], 1) / 15.5).astype(np.float32)


def _distance(shape: str, px: np.ndarray, py: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels of a shape of radius ``r`` centred on the origin."""
    if shape == "circle":
        return np.hypot(px, py) - 0.92 * r
    if shape == "square":
        return np.maximum(np.abs(px), np.abs(py)) - 0.8 * r
    if shape == "ring":
        return np.abs(np.hypot(px, py) - 0.70 * r) - 0.26 * r
    if shape == "moon":
        return np.maximum(np.hypot(px, py) - 0.97 * r, 0.72 * r - np.hypot(px - 0.52 * r, py + 0.12 * r))
    corners = {"triangle": _TRIANGLE, "star": _STAR, "cross": _CROSS}.get(shape)
    return _polygon(px, py, (_heart() if corners is None else corners) * r)


def _weave(texture: str, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """How much of the accent colour a texture puts at each pixel, in [0, 1]."""
    if texture == "striped":  # diagonal, 8 px apart
        return np.clip(0.5 + 2.2 * np.sin((px + py) * (2 * np.pi / 8.0 / np.sqrt(2))), 0, 1)
    if texture == "dotted":  # 7 px apart
        u, v = (px + 3.5) % 7 - 3.5, (py + 3.5) % 7 - 3.5
        return np.clip(2.45 - np.hypot(u, v), 0, 1)
    if texture == "checkered":  # 5 px squares
        return np.clip(0.5 + 4 * np.sin(px * np.pi / 5) * np.sin(py * np.pi / 5), 0, 1)
    return np.zeros_like(px)


def render(scene: Scene) -> np.ndarray:
    """The picture, (64, 64, 3) uint8."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    ground = np.asarray(BACKGROUNDS[scene.background], np.float32)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = ground * (1.02 - 0.08 * axis[:, None, None] / SIZE)  # a little darker towards the floor
    for thing in scene.things:
        reach = thing.r + 2
        x0, x1 = max(0, int(thing.x - reach)), min(SIZE, int(thing.x + reach) + 1)
        y0, y1 = max(0, int(thing.y - reach)), min(SIZE, int(thing.y + reach) + 1)
        py, px = np.meshgrid(axis[y0:y1] - np.float32(thing.y), axis[x0:x1] - np.float32(thing.x), indexing="ij")
        cover = np.clip(0.5 - _distance(thing.shape, px, py, thing.r), 0, 1)[..., None]
        color = np.asarray(COLORS[thing.color], np.float32)
        accent = color * 0.25 + 255 * 0.75
        weave = _weave(thing.texture, px, py)[..., None]
        paint = color * (1 - weave) + accent * weave
        image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - cover) + paint * cover
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def picture(index: int, split: Split = "train", seed: int = 0) -> np.ndarray:
    return render(sample_scene(index, split, seed))


def pictures(indices: Iterable[int], split: Split = "train", seed: int = 0, workers: int | None = None) -> np.ndarray:
    """Many pictures at once, (n, 64, 64, 3) uint8, drawn by a pool of processes."""
    indices = list(indices)
    workers = workers or os.cpu_count() or 1
    draw = partial(picture, split=split, seed=seed)
    if workers == 1 or len(indices) < 2000:
        return np.stack([draw(i) for i in indices])
    with ProcessPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(draw, indices, chunksize=250)))


def caption_of(index: int, split: Split = "train", seed: int = 0, wording: int = 0,
               detail: Literal["full", "varied"] = "varied") -> str:
    """The caption of the ``index``-th scene; ``wording`` chooses among many."""
    rng = np.random.default_rng([_SPLIT_SEED[split], seed, index, 1 + wording])
    return caption(sample_scene(index, split, seed), rng, detail)
