"""Training of one classifier, and what it says of held-out pictures.

Legend: M training pictures, N held-out ones, B of a batch, L labels of a picture, D values of all heads; H W C pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.engine.randomness import row_seed
from stages.engine.room import Room
from stages.judging.mixture import Mixture
from stages.judging.network import build
from stages.judging.sets import Label
from stages.judging.settings import Judging

SHIFT = 8
"""Pictures are moved by up to a ``SHIFT``-th of their side, what comes in mirrored at the edge."""
WEIGHT_DECAY = 0.01
SMOOTHING = 0.05
EVALUATED = 256


def rise_and_fall(step: int, steps: int) -> float:
    """Share of the highest rate: the first tenth of the steps rises, the rest falls along a cosine to zero."""
    rising = max(1, steps // 10)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Heads:
    """The values of each label, and where they lie among a classifier's outputs.

    Args:
        classes: All that there are; their parts are the values.
    """

    def __init__(self, classes: Sequence[Label]) -> None:
        self.values = [sorted(set(column)) for column in zip(*classes, strict=True)]
        self._numbers = [{value: number for number, value in enumerate(column)} for column in self.values]
        self.sizes = [len(column) for column in self.values]

    def knows(self, label: Label) -> bool:
        """Whether each part is a value of its head."""
        return all(part in numbers for part, numbers in zip(label, self._numbers, strict=True))

    def encode(self, labels: Sequence[Label]) -> np.ndarray:
        """(N, L): the number of each part; -1 of one that its head does not know."""
        found = [[numbers.get(part, -1) for part, numbers in zip(own, self._numbers, strict=True)] for own in labels]
        return np.array(found, np.int64).reshape(len(labels), len(self.sizes))


def train(
    mixture: Mixture, heads: Heads, settings: Judging, *, seed: int, trial: str, device: str, spilled: bool = False
) -> tuple[nn.Module, float]:
    """A classifier, and the mean loss of its last epoch.

    The mean over heads of the cross-entropy, smoothed; AdamW with one rise and fall of the rate.

    Args:
        seed, trial: Weights, order, shifts and mirrors are drawn from these, whatever the pictures are.
        spilled: What a step keeps for its way back lies in the host's memory: the same numbers, and slower. (A batch in
            parts would be another training, where a classifier norms by the batch.)
    """
    kept: Callable[[], AbstractContextManager[Any]] = nullcontext
    if spilled:
        kept = partial(torch.autograd.graph.save_on_cpu, pin_memory=torch.device(device).type == "cuda")
    torch.manual_seed(row_seed(seed, f"trial {trial}", "weights"))
    random = np.random.default_rng(row_seed(seed, f"trial {trial}", "order"))
    net = build(settings.classifier, sum(heads.sizes)).to(device).train()
    y_ML = torch.from_numpy(heads.encode(mixture.labels()))
    batch = min(settings.batch_size, len(mixture))
    steps = len(mixture) // batch
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=WEIGHT_DECAY)
    share = partial(rise_and_fall, steps=steps * settings.epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    mean = 0.0
    for _ in range(settings.epochs):
        order_M, mean = random.permutation(len(mixture)), 0.0
        for step in range(steps):
            places_B = order_M[step * batch : (step + 1) * batch]
            x_BHWC = _moved(mixture.pictures(places_B), random, settings.flip)
            with kept():
                loss = _loss(net(_prepared(x_BHWC, device)), y_ML[places_B].to(device), heads)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            mean += loss.item() / steps
    return net.eval(), mean


@torch.no_grad()
def predict(net: nn.Module, x_NHWC: np.ndarray, heads: Heads, device: str, room: Room | None = None) -> np.ndarray:
    """The likeliest value of each label, (N, L).

    Args:
        room: Pictures at once.
    """

    def said(part: slice) -> np.ndarray:
        logits_BD = net(_prepared(x_NHWC[part], device))
        return torch.stack([own.argmax(1) for own in logits_BD.split(heads.sizes, 1)], 1).cpu().numpy()

    return np.concatenate([*(room or Room()).parts(len(x_NHWC), said, EVALUATED)])


@contextmanager
def repeatable() -> Iterator[None]:
    """While it lasts, a GPU adds up in the same order each time, as far as torch can have it so."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _loss(logits_BD: torch.Tensor, y_BL: torch.Tensor, heads: Heads) -> torch.Tensor:
    parts = logits_BD.split(heads.sizes, 1)
    losses = [
        nn.functional.cross_entropy(part, y_B, label_smoothing=SMOOTHING)
        for part, y_B in zip(parts, y_BL.unbind(1), strict=True)
    ]
    return torch.stack(losses).mean()


def _moved(x_BHWC: np.ndarray, random: np.random.Generator, flip: bool) -> np.ndarray:
    """Each picture shifted by its own number of pixels, and perhaps mirrored."""
    side = x_BHWC.shape[1]
    most = side // SHIFT
    shifts_B2 = random.integers(0, 2 * most + 1, (len(x_BHWC), 2))
    mirrored_B = random.integers(0, 2, len(x_BHWC)) if flip else np.zeros(len(x_BHWC), int)
    wide_BHWC = np.pad(x_BHWC, ((0, 0), (most, most), (most, most), (0, 0)), mode="reflect")
    moved = [
        wide_HWC[top : top + side, left : left + side, :][:, :: -1 if mirrored else 1]
        for wide_HWC, (top, left), mirrored in zip(wide_BHWC, shifts_B2.tolist(), mirrored_B.tolist(), strict=True)
    ]
    return np.stack(moved)


def _prepared(x_BHWC: np.ndarray, device: str) -> torch.Tensor:
    """x_BCHW in [-1, 1]."""
    x = torch.from_numpy(np.array(x_BHWC)).to(device)  # a copy: a memory map cannot be written
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1
