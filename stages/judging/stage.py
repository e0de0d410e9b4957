"""The stage of `judge-corpus`: a corpus and a trial in, what a classifier learnt from it out.

It reads whole sets of pictures, so it stands above the rooms that read inputs, where other stages see rows alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pipeline.contract import Column, Row, StageInfo, failed, ok
from stages.engine.device import chosen_device
from stages.engine.randomness import row_seed
from stages.engine.room import Rooms
from stages.judging.measures import GROUPS, by_class, group_of, mean_of, name_of
from stages.judging.mixture import mix
from stages.judging.network import check
from stages.judging.sets import Census, SetError, census, read
from stages.judging.settings import HELD_OUT, REAL, JudgeCorpusSettings, key_of
from stages.judging.training import Heads, predict, repeatable, train

COLUMNS = (
    Column("corpus", "string", doc="what was added to the real pictures; real: more of them"),
    Column("trial", "int64", doc="which of the trainings, each from a seed of its own"),
    Column("accuracy", "float32", doc="share of all held-out pictures that were told right"),
    *(Column(group, "float32", doc=f"mean over the classes that are {text} in the real pictures")
      for group, text in (("never", "absent"), ("rare", "rare"), ("frequent", "frequent"))),
    Column("pictures", "int64", doc="trained on, real and added"),
    Column("added", "int64", doc="of the corpus among them"),
    Column("repeats", "float32", doc="how often each usable picture of the corpus is among them, on average"),
    Column("usable", "int64", doc="pictures of the corpus with a known class"),
    Column("left_out", "int64", doc="its other ones: unreadable, without a label, or of a class that nobody asks for"),
    Column("loss", "float32", doc="of the last epoch"),
    Column("by_label", "json", doc="label column -> share told right"),
    Column("by_class", "json", doc="class -> [pictures told right, all]"),
    Column("real_counts", "json", doc="class -> real pictures of it"),
)  # fmt: skip


class JudgeCorpus:
    """Rows with a ``corpus`` and a ``trial`` to what a classifier is worth that was trained on it.

    All sets are read once, into files on the local disk.

    Raises:
        SetError: A set cannot be read.
    """

    Settings = JudgeCorpusSettings

    def __init__(self, settings: JudgeCorpusSettings) -> None:
        self.settings = settings
        self.device = chosen_device(settings.device)
        self.rooms, self._spilled = Rooms(self.device, relief=self._spill), False
        self._scratch = TemporaryDirectory(prefix="latentmill-judge-")
        self.sets = {
            key: read(key, given, settings.labels, settings.size, f"{self._scratch.name}/{number}")
            for number, (key, given) in enumerate(settings.sets.items())
        }
        self.held_out, self.real = self.sets[HELD_OUT], self.sets[REAL]
        self._told = self.held_out.digests()

    @staticmethod
    def describe(settings: JudgeCorpusSettings) -> StageInfo:
        """Counts all sets by their labels; no picture is read.

        Raises:
            SetError: A set cannot be read, or shares no class with the held-out pictures.
            ValueError: The classifier's library is not there.
        """
        check(settings.classifier)
        found = {key: census(key, given, settings.labels) for key, given in settings.sets.items()}
        models = {
            key: {"path": ", ".join(settings.sets[key]["path"]), "revision": "", "fingerprint": own.fingerprint}
            for key, own in found.items()
        }
        return StageInfo(COLUMNS, models, {"classifier": settings.classifier}, {}, tuple(_notes(found, settings.rare)))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            key = key_of(str(row["corpus"]))
            problem = self.problems[REAL] or self.problems[key]
            try:
                yield failed(row, problem) if problem else self._judged(row, key)
            except torch.OutOfMemoryError:
                yield failed(row, f"a batch of {self.settings.batch_size} pictures of {self.settings.size} pixels does "
                             "not fit the device: lower batch_size or size, or take another classifier")  # fmt: skip

    def _spill(self, work: str) -> bool:
        """From now on a training keeps what it can in the host's memory."""
        self._spilled, had = True, self._spilled
        return work == "training" and not had

    @cached_property
    def heads(self) -> Heads:
        """Of what the real and the held-out pictures show; what else a corpus shows can be right nowhere."""
        return Heads([*self.real.labels, *self.held_out.labels])

    @cached_property
    def usable(self) -> dict[str, list[int]]:
        """Set -> the numbers of its pictures whose class is known."""
        return {
            key: [n for n, label in enumerate(own.labels) if self.heads.knows(label)] for key, own in self.sets.items()
        }

    @cached_property
    def added(self) -> int:
        """Pictures of each corpus that are trained on."""
        counts = [len(self.usable[key]) for key in self.sets if key not in (HELD_OUT, REAL) and self.usable[key]]
        return self.settings.added or min(counts, default=1)

    @cached_property
    def problems(self) -> dict[str, str | None]:
        """Why a set must not be trained on."""
        return {key: self._leak(key) or self._strange(key) for key in self.sets if key != HELD_OUT}

    def _leak(self, key: str) -> str | None:
        """A set that holds what a classifier will be asked."""
        told = self._told
        shared = [(own, told[digest]) for digest, own in self.sets[key].digests().items() if digest in told]
        if not shared:
            return None
        own, there = shared[0]
        return (
            f"{len(shared)} pictures of {key} are held-out ones too ({own} is {there} there), so the classifier would "
            f"be asked what it was told: take them out of {key}, or name other pictures as the {HELD_OUT}"
        )

    def _strange(self, key: str) -> str | None:
        if self.usable[key]:
            return None
        own, asked = (name_of(one.labels[0]) for one in (self.sets[key], self.held_out))
        return (
            f"no picture of {key} is of a class that the real or the held-out ones have ({own!r} here, {asked!r} "
            f"there): map its columns with {key}.columns"
        )

    def _judged(self, row: Row, key: str) -> Row:
        settings, trial = self.settings, str(row["trial"])
        random = np.random.default_rng(row_seed(settings.seed, f"trial {trial}", "mixture"))
        mixture = mix(self.real, self.sets[key], self.usable[key], self.added, random)
        with repeatable():
            ((net, loss),) = self.rooms["training"].parts(1, lambda part: train(
                mixture, self.heads, settings, seed=settings.seed, trial=trial, device=self.device,
                spilled=self._spilled,
            ))  # fmt: skip
            if not math.isfinite(loss):
                return failed(row, f"the training diverged: the loss is {loss}; lower `lr` ({settings.lr:g})")
            said_NL = predict(net, self.held_out.x_NHWC, self.heads, self.device, self.rooms["held-out"])
        right_NL = said_NL == self.heads.encode(self.held_out.labels)
        usable = len(self.usable[key])
        return ok(
            row, trial=int(trial), pictures=len(mixture), added=self.added, repeats=self.added / usable, usable=usable,
            left_out=self.sets[key].left_out + len(self.sets[key].ids) - usable, loss=loss,
            **self._measured(right_NL),
        )  # fmt: skip

    def _measured(self, right_NL: np.ndarray) -> Row:
        """The columns that tell how often a classifier was right."""
        asked, counts = self.held_out.labels, Counter(self.real.labels)
        right_N: list[bool] = np.all(right_NL, axis=1).tolist()
        classes = by_class(asked, right_N)
        real = {name_of(label): counts[label] for label in sorted(set(asked))}
        groups = {name: group_of(count, self.settings.rare) for name, count in real.items()}
        means: Row = {of: mean_of(classes, [name for name in classes if groups[name] == of]) for of in GROUPS}
        by_label = dict(zip(self.settings.labels, right_NL.mean(0).tolist(), strict=True))
        return {
            "accuracy": sum(right_N) / len(right_N), **means, "by_label": json.dumps(by_label),
            "by_class": json.dumps(classes), "real_counts": json.dumps(real),
        }  # fmt: skip


def _notes(found: dict[str, Census], rare: int) -> Iterator[str]:
    """What the sets hold, for the plan; refuses what cannot be compared."""
    asked, real = found[HELD_OUT].counts, found[REAL].counts
    groups = Counter(group_of(real.get(label, 0), rare) for label in asked)
    shown = ", ".join(f"{groups[group]} {group}" for group in GROUPS)
    yield f"{asked.total()} held-out pictures of {len(asked)} classes: {shown} among the {real.total()} real ones"
    heads = Heads(list(asked))
    for name, own in found.items():
        if not any(map(heads.knows, own.counts)):
            example, wanted = (name_of(next(iter(one))) for one in (own.counts, asked))
            raise SetError(
                f"{name}: no picture is of a class that the held-out ones have ({example!r} here, {wanted!r} there); "
                f"map the columns with {name}.columns, or name others in labels"
            )
        if own.unlabelled:
            yield f"{name}: {own.unlabelled} pictures have no label and are left out"
