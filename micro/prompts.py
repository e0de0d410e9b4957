"""Fixed prompt sets in the manner of T2I-CompBench++, with what the oracle must find in a picture of each.

``colour``, ``shape``, ``texture``: two objects whose attributes must not be exchanged; ``spatial``: a relation in the
plane; ``numeracy``: counts; ``complex``: everything at once. Beside them ``single`` (one object, frequent),
``rare`` (seen at most five times in training) and ``never`` (not once).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from micro import world

FOLDER = Path(__file__).parent / "prompts"
COMPBENCH = ("colour", "shape", "texture", "spatial", "numeracy", "complex")
CATEGORIES = (*COMPBENCH, "single", "rare", "never")
SIZE = 300


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it asks for.

    Attributes:
        objects: One dict of asked attributes (``shape``, ``color``, ``texture``, ``size``) an object.
        relation: One of `world.RELATIONS`, from the first object to the second, or None.
        count: How many objects there should be in all, or None where it isn't said.
        background: A background's name, or None. Not scored: the categories are about objects.
    """

    id: str
    category: str
    prompt: str
    objects: tuple[dict[str, str], ...]
    relation: str | None = None
    count: int | None = None
    background: str | None = None


@lru_cache
def load(category: str) -> tuple[Prompt, ...]:
    """The prompts of one category, in file order.

    Raises:
        ValueError: there is no such category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"no prompt set {category!r}: there are {', '.join(CATEGORIES)}")
    lines = (FOLDER / f"{category}.jsonl").read_text().splitlines()
    return tuple(Prompt(**{**(raw := json.loads(line)), "objects": tuple(raw["objects"])}) for line in lines)


# --- how the files were made ---------------------------------------------------------------------------------------

_Draft = tuple[str, list[dict[str, str]], dict[str, object]]


def _name(asked: dict[str, str], plural: bool = False) -> str:
    shape = world.PLURALS[asked["shape"]] if plural else asked["shape"]
    words = [asked[f] for f in ("size", "texture", "color") if f in asked and asked[f] not in ("plain", "medium")]
    return " ".join([*words, shape])


def _a(asked: dict[str, str]) -> str:
    name = _name(asked)
    return ("an " if name[0] in "aeiou" else "a ") + name


def _frequent(rng: np.random.Generator, *fields: str) -> dict[str, str]:
    """The named attributes of a frequent combination."""
    frequent = world.combinations("frequent")
    chosen = dict(zip(("shape", "color", "texture"), frequent[rng.integers(len(frequent))], strict=True))
    return {f: chosen[f] for f in fields}


def _two(rng: np.random.Generator, *fields: str) -> list[dict[str, str]]:
    """Two objects that differ in every named attribute."""
    while True:
        a, b = _frequent(rng, *fields), _frequent(rng, *fields)
        if all(a[f] != b[f] for f in fields):
            return [a, b]


def _colour(rng: np.random.Generator) -> _Draft:
    pair = _two(rng, "shape", "color")
    return f"{_a(pair[0])} and {_a(pair[1])}", pair, {}


def _shape(rng: np.random.Generator) -> _Draft:
    pair = _two(rng, "shape")
    for asked in pair:
        if rng.uniform() < 0.6:
            asked["size"] = ("small", "large")[rng.integers(2)]
    if all(asked.get("size") == "large" for asked in pair):
        del pair[1]["size"]
    return f"{_a(pair[0])} and {_a(pair[1])}", pair, {}


def _texture(rng: np.random.Generator) -> _Draft:
    while True:
        pair = _two(rng, "shape", "texture")
        if all(asked["texture"] != "plain" for asked in pair):
            return f"{_a(pair[0])} and {_a(pair[1])}", pair, {}


_PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def _spatial(rng: np.random.Generator) -> _Draft:
    pair = _two(rng, "shape", "color")
    relation = world.RELATIONS[rng.integers(4)]
    return f"{_a(pair[0])} {_PHRASES[relation]} {_a(pair[1])}", pair, {"relation": relation}


def _numeracy(rng: np.random.Generator) -> _Draft:
    count = int(rng.integers(1, 4))
    asked = _frequent(rng, "shape", "color", "texture")
    if rng.uniform() < 0.4:
        del asked["texture"]
    text = f"{world.COUNT_WORDS[count]} {_name(asked, plural=count > 1)}"
    return text, [asked] * count, {"count": count}


def _complex(rng: np.random.Generator) -> _Draft:
    ground = tuple(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))]
    if rng.uniform() < 0.5:
        pair = _two(rng, "shape", "color", "texture")
        relation = world.RELATIONS[rng.integers(4)]
        text, more = f"{_a(pair[0])} {_PHRASES[relation]} {_a(pair[1])}", {"relation": relation}
        return f"{text} on a {ground} background", pair, {**more, "background": ground}
    things = [*_two(rng, "shape", "color"), _frequent(rng, "shape", "color")]
    text = f"{_a(things[0])}, {_a(things[1])} and {_a(things[2])} on a {ground} background"
    return text, things, {"count": 3, "background": ground}


def _one(kind: str) -> Callable[[np.random.Generator], _Draft]:
    def draft(rng: np.random.Generator) -> _Draft:
        combos = world.combinations(kind)
        asked = dict(zip(("shape", "color", "texture"), combos[rng.integers(len(combos))], strict=True))
        return _a(asked), [asked], {}

    return draft


_MAKERS: dict[str, Callable[[np.random.Generator], _Draft]] = {
    "colour": _colour, "shape": _shape, "texture": _texture, "spatial": _spatial, "numeracy": _numeracy,
    "complex": _complex, "single": _one("frequent"), "rare": _one("rare"), "never": _one("never"),
}  # fmt: skip


def make(category: str, seen: frozenset[str], size: int = SIZE) -> tuple[list[Prompt], int]:
    """Draw a prompt set, and count those whose wording is also a training caption.

    Wordings in ``seen`` are drawn again as long as unseen ones can be found; then distinct ones; then any.
    """
    rng = np.random.default_rng([11, CATEGORIES.index(category)])
    chosen: list[Prompt] = []
    texts: set[str] = set()
    for number in range(size):
        draft = None
        for attempt in range(600):
            text, objects, more = _MAKERS[category](rng)
            if text not in texts and (text not in seen or attempt >= 400):
                draft = text, objects, more
                break
        text, objects, more = draft or _MAKERS[category](rng)
        texts.add(text)
        chosen.append(Prompt(f"{category}-{number:03d}", category, text, tuple(objects), **more))  # type: ignore[arg-type]
    return chosen, sum(p.prompt in seen for p in chosen)


def main() -> None:
    """Write the files again: ``python -m micro.prompts``."""
    from micro import data

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("micro/work"))
    work = parser.parse_args().work
    captions = data.split_captions(work, "train", world.TRAIN_SIZE, 6)
    seen = frozenset(captions.reshape(-1).tolist())
    FOLDER.mkdir(exist_ok=True)
    for category in CATEGORIES:
        prompts, known = make(category, seen)
        lines = (json.dumps({k: v for k, v in asdict(p).items() if v is not None}) for p in prompts)
        (FOLDER / f"{category}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{category}: {len(prompts)} prompts, {len({p.prompt for p in prompts})} distinct, "
              f"{known} also worded like a training caption")


if __name__ == "__main__":
    main()
