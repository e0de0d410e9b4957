"""The oracle: a trained reader of pictures that lists each object's attributes and place.

It plays the part that BLIP-VQA and UniDet play in T2I-CompBench++: a judge that shares nothing with the models it
judges. Ours: a small convolutional detector that predicts at most one object a cell of an 8x8 grid.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from micro import MODELS, data, world
from micro.training import Recipe, pick_device, pictures_to_tensor, train

_CELL = world.SIZE // data.GRID
_WIDTHS = (32, 48, 96)
_CLASSES = {name: len(values) for name, values in data.FIELDS.items()}
_CONFIDENT = 0.5
_APART = 9.0
"""Two readings closer than this many pixels are one object."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


class Reader(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> per cell: objectness, offsets, log radius and class logits; and the background's."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = _WIDTHS
        self.body = nn.Sequential(
            nn.Conv2d(3, a, 5, 2, 2, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
            nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), _Block(b), _Block(b),
            nn.Conv2d(b, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), _Block(c), _Block(c),
        )  # fmt: skip
        self.cells = nn.Conv2d(c, 4 + sum(_CLASSES.values()), 1)
        self.ground = nn.Linear(c, len(world.BACKGROUNDS))

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(x_BCHW)
        return self.cells(h), self.ground(h.mean((2, 3)))


@dataclass(frozen=True)
class Reading:
    """What the oracle sees: ``things`` most confident first (an empty tuple: no object), and the background."""

    things: tuple[world.Thing, ...]
    background: str


class Oracle:
    def __init__(self, reader: Reader) -> None:
        self.reader = reader.eval()

    @staticmethod
    def load(folder: str | Path = MODELS / "oracle") -> Oracle:
        """Load the shipped oracle, or one that `train_oracle` made.

        Raises:
            OSError: the folder is missing, truncated or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            if config.get("model_type") != "latentmill-oracle":
                raise ValueError("config.json is not an oracle's")
            reader = Reader()
            weights = load_file(folder / "model.safetensors")
            reader.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise OSError(
                f"{folder}: no oracle can be loaded from this folder (expected config.json and model.safetensors as "
                f"written by `python -m micro.train`): {reason}"
            ) from None
        return Oracle(reader)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        half = {k: v.half() if v.is_floating_point() else v for k, v in self.reader.state_dict().items()}
        save_file({k: v.contiguous() for k, v in half.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "latentmill-oracle"}) + "\n")

    @torch.no_grad()
    def read(self, pictures: np.ndarray | Sequence[Any], batch: int = 128) -> list[Reading]:
        """Read (n, 64, 64, 3) uint8 pictures, or a sequence of RGB PIL images (resized to 64x64 where they differ)."""
        if not isinstance(pictures, np.ndarray):
            pictures = np.stack([np.asarray(p.convert("RGB").resize((world.SIZE, world.SIZE))) for p in pictures])
        device = next(self.reader.parameters()).device
        readings: list[Reading] = []
        for i in range(0, len(pictures), batch):
            cells, ground = self.reader(pictures_to_tensor(pictures[i : i + batch], device))
            readings.extend(_decode(cells.float().cpu(), ground.float().cpu()))
        return readings


def _decode(cells_BKGG: torch.Tensor, ground_BG: torch.Tensor) -> list[Reading]:
    place = cells_BKGG[:, :4]
    confidence = place[:, 0].sigmoid().numpy()
    offsets = place[:, 1:3].numpy()
    radius = place[:, 3].exp().numpy() * _CELL
    picks = [c.argmax(1).numpy() for c in cells_BKGG[:, 4:].split(list(_CLASSES.values()), dim=1)]
    grounds, names = ground_BG.argmax(1).tolist(), tuple(world.BACKGROUNDS)
    out = []
    for b in range(len(cells_BKGG)):
        things: list[world.Thing] = []
        order = np.argsort(-confidence[b], axis=None)
        for row, col in zip(*np.unravel_index(order, confidence[b].shape), strict=True):
            if confidence[b, row, col] < _CONFIDENT:
                break
            x = float((col + 0.5 + offsets[b, 0, row, col]) * _CELL)
            y = float((row + 0.5 + offsets[b, 1, row, col]) * _CELL)
            if any(np.hypot(t.x - x, t.y - y) < _APART for t in things):
                continue
            shape, color, texture, size = (
                data.FIELDS[f][p[b, row, col]] for f, p in zip(_CLASSES, picks, strict=True)
            )
            things.append(world.Thing(shape, color, texture, size, x, y, float(radius[b, row, col])))
        out.append(Reading(tuple(things), names[grounds[b]]))
    return out


# --- scoring a prompt ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How far a picture fulfils a prompt.

    Attributes:
        bound: Share of the asked objects found with *all* their asked attributes, each on an object of its own.
        relation: Whether the asked relation holds between the matched objects (None: none was asked).
        count: Whether the number of objects is the asked one (None: none was asked).
        success: All of the above.
    """

    bound: float
    relation: bool | None
    count: bool | None
    success: bool


def _fits(thing: world.Thing, asked: dict[str, str]) -> bool:
    return all(getattr(thing, field) == value for field, value in asked.items())


def score(reading: Reading, objects: Sequence[dict[str, str]], relation: str | None = None,
          count: int | None = None) -> Score:
    """Judge a reading against asked ``objects`` (attribute -> value), matched in the best way, one thing each.

    Args:
        relation: One of `world.RELATIONS`, from the first object to the second.
        count: The asked number of objects in the picture.
    """
    best = (-1.0, False)
    slots = [*reading.things, *[None] * len(objects)]
    for chosen in set(permutations(slots[:6], len(objects))) if len(objects) > 1 else ((t,) for t in slots):
        hits = [t is not None and _fits(t, asked) for t, asked in zip(chosen, objects, strict=True)]
        held = False
        if relation is not None and len(chosen) >= 2 and chosen[0] is not None and chosen[1] is not None:
            held = hits[0] and hits[1] and world.relation_of(chosen[0], chosen[1]) == relation
        best = max(best, (sum(hits) / len(objects), held))
    bound, held = best
    counted = None if count is None else len(reading.things) == count
    success = bound == 1.0 and (relation is None or held) and counted is not False
    return Score(bound, None if relation is None else held, counted, success)


# --- training -----------------------------------------------------------------------------------------------------


def degrade(x_BCHW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """What generators and autoencoders do to pictures: blur, noise, lost resolution, shifted tones."""
    kind = rng.uniform()
    if kind < 0.35:
        return x_BCHW
    if kind < 0.6:
        sigma = rng.uniform(0.3, 1.3)
        taps = torch.exp(-torch.arange(-3, 4, dtype=torch.float32) ** 2 / (2 * sigma**2))
        taps = (taps / taps.sum()).to(x_BCHW.device)
        x_BCHW = F.conv2d(x_BCHW, taps.view(1, 1, 1, 7).repeat(3, 1, 1, 1), padding=(0, 3), groups=3)
        x_BCHW = F.conv2d(x_BCHW, taps.view(1, 1, 7, 1).repeat(3, 1, 1, 1), padding=(3, 0), groups=3)
    elif kind < 0.75:
        low = int(rng.integers(30, 56))
        x_BCHW = F.interpolate(x_BCHW, (low, low), mode="area")
        x_BCHW = F.interpolate(x_BCHW, (world.SIZE, world.SIZE), mode="bilinear")
    gain = torch.empty(len(x_BCHW), 3, 1, 1, device=x_BCHW.device).uniform_(0.93, 1.07)
    shift = torch.empty(len(x_BCHW), 3, 1, 1, device=x_BCHW.device).uniform_(-0.06, 0.06)
    noise = torch.randn_like(x_BCHW) * rng.uniform(0, 0.15)
    return (x_BCHW * gain + shift + noise).clamp(-1, 1)


def cell_loss(cells_BGGK: torch.Tensor, labels_BTF: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Objectness over all cells; place and attributes at the cells that hold an object's centre.

    All on the device of ``cells_BGGK``, without a look at the host where the labels are there too.
    """
    labels_BTF = torch.as_tensor(labels_BTF, device=cells_BGGK.device)
    held_BT = (labels_BTF[..., 0] >= 0).float()
    count = held_BT.sum()
    j_BT, i_BT = (labels_BTF[..., f].div(_CELL, rounding_mode="floor").clamp(0, data.GRID - 1).long() for f in (4, 5))
    b_BT = torch.arange(len(labels_BTF), device=held_BT.device)[:, None].expand_as(i_BT)
    wanted = torch.zeros(cells_BGGK.shape[:3], device=held_BT.device)
    wanted.index_put_((b_BT, i_BT, j_BT), held_BT, accumulate=True)
    loss = F.binary_cross_entropy_with_logits(cells_BGGK[..., 0], wanted.clamp(max=1), reduction="sum") / count
    at_BTK = cells_BGGK[b_BT, i_BT, j_BT]
    offset = labels_BTF[..., 4:6] / _CELL - torch.stack([j_BT, i_BT], 2) - 0.5
    apart = F.smooth_l1_loss(at_BTK[..., 1:3], offset, beta=0.1, reduction="none").mean(2)
    radius = (labels_BTF[..., 6].clamp(min=_CELL / 100) / _CELL).log()
    each = apart + (at_BTK[..., 3] - radius).abs()
    for k, logits in enumerate(at_BTK[..., 4:].split(list(_CLASSES.values()), dim=2)):
        said = labels_BTF[..., k].clamp(min=0).long()
        each = each + F.cross_entropy(logits.transpose(1, 2), said, reduction="none")
    return loss + (each * held_BT).sum() / count


EVERY = 8000
"""Scenes from which the judge learns the combinations that the models rarely or never saw."""


def every_scene(index: int, seed: int = 0) -> world.Scene:
    """A scene like those of the training split, but for its combinations: all 256 of them are alike."""
    rng = np.random.default_rng([5, seed, index])
    combos = tuple(product(world.SHAPES, world.COLORS, world.TEXTURES))
    count = int(rng.choice(3, p=(0.5, 0.3, 0.2))) + 1
    return world.compose(rng, [combos[i] for i in rng.integers(len(combos), size=count)])


def widen_oracle(oracle: Oracle, work: Path, recipe: Recipe) -> Oracle:
    """Teach a judge all combinations alike, so that it knows a rare one that is drawn right when it sees it."""
    device = pick_device()
    scenes = [every_scene(index) for index in range(EVERY)]
    pictures = np.stack([world.render(scene) for scene in scenes])
    labels = np.stack([data.labels(scene) for scene in scenes])
    grounds = np.array([tuple(world.BACKGROUNDS).index(scene.background) for scene in scenes])
    reader = oracle.reader.train().to(device)
    loss_of = partial(_loss, reader, pictures, labels, grounds)
    return Oracle(train("oracle-wide", reader, loss_of, EVERY, recipe, work, seed=2))


def train_oracle(work: Path, recipe: Recipe) -> Oracle:
    """The judge of what the training split holds; `widen_oracle` goes on from it."""
    device = pick_device()
    count = world.TRAIN_SIZE
    pictures = data.split_pictures(work, "train", count)
    labels, grounds = data.split_labels(work, "train", count), data.split_backgrounds(work, "train", count)
    torch.manual_seed(1)
    reader = Reader().to(device)

    loss_of = partial(_loss, reader, pictures, labels, grounds)
    return Oracle(train("oracle", reader, loss_of, count, recipe, work, seed=1))


def _loss(
    reader: Reader, pictures: np.ndarray, labels: np.ndarray, grounds: np.ndarray, rows: np.ndarray,
    rng: np.random.Generator,
) -> torch.Tensor:  # fmt: skip
    rows, device = np.sort(rows), next(reader.parameters()).device
    cells, ground = reader(degrade(pictures_to_tensor(pictures[rows], device), rng))
    loss = cell_loss(cells.permute(0, 2, 3, 1), labels[rows])
    return loss + 0.3 * F.cross_entropy(ground, torch.from_numpy(grounds[rows]).to(device))


def accuracy(oracle: Oracle, pictures: np.ndarray, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Attribute accuracy over true objects (a missed object counts against each), and the pairs' relations."""
    hits: dict[str, list[bool]] = {k: [] for k in (*data.FIELDS, "found", "relation", "background", "count")}
    for reading, scene in zip(oracle.read(pictures), scenes, strict=True):
        matched = []
        for thing in scene.things:
            near = min(reading.things, key=lambda t: np.hypot(t.x - thing.x, t.y - thing.y), default=None)
            if near is not None and np.hypot(near.x - thing.x, near.y - thing.y) > _APART:
                near = None
            matched.append(near)
            hits["found"].append(near is not None)
            for field in data.FIELDS:
                hits[field].append(near is not None and getattr(near, field) == getattr(thing, field))
        if len(scene.things) == 2:
            a, b = matched
            hits["relation"].append(
                a is not None and b is not None and world.relation_of(a, b) == world.relation_of(*scene.things)
            )
        hits["background"].append(reading.background == scene.background)
        hits["count"].append(len(reading.things) == len(scene.things))
    return {name: float(np.mean(values)) for name, values in hits.items()}
