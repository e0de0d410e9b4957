"""Job ``judge-corpus``: which corpus helps a classifier most, beside real pictures and at equal size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from jobs.page.html import Html, escape, table, tag
from jobs.page.view import View
from jobs.schema.base import Input, RowJob
from jobs.schema.concept_input import absolute
from jobs.schema.panel import Panel
from pipeline.contract import StageSpec
from pipeline.input.source import Source
from stages.judging.settings import REAL, JudgeCorpusSettings, Judging

if TYPE_CHECKING:
    import pipeline.run.driver

JUDGEMENT = "judgement.json"
TRAININGS = "one-row://training"


class PictureSource(Input):
    """Pictures with labels: as `input`, but that its store is opened with the job's `storage_options`."""

    @model_validator(mode="after")
    def _no_keys_of_its_own(self) -> PictureSource:
        if self.storage_options:
            raise ValueError("storage_options: write them into those of the job, which open all of its stores")
        return self


class JudgeCorpus(RowJob, Judging):
    """Classifiers trained on real pictures, and on real pictures and one of several corpora, at equal size; judged by
    held-out pictures of the classes that the real ones hold often, rarely and never.

    A row is a training: a corpus and a trial. Each set of pictures is a folder, WebDataset, Parquet file or the output
    of another job, with its labels in the columns `labels`.
    """

    job: Literal["judge-corpus"] = "judge-corpus"
    input: Input
    """The held-out pictures, with labels: all classifiers are judged by them, and none is trained on one."""
    real: PictureSource
    """The real pictures: every classifier is trained on them."""
    corpora: dict[str, PictureSource] = Field(min_length=1)
    """Name -> pictures that a classifier is trained on beside the real ones."""
    trials: int = Field(3, ge=1)
    """Trainings of each corpus, each with weights and an order of its own."""
    baseline: str = REAL
    """What the others are compared with: the name of a corpus, or ``real``: real pictures alone, repeated."""
    shard_rows: int = Field(1, ge=1)
    """Trainings a shard: what one worker takes at a time, and what is lost when it dies."""

    @field_validator("corpora")
    @classmethod
    def _plain_names(cls, corpora: Mapping[str, PictureSource]) -> Mapping[str, PictureSource]:
        for name in corpora:
            if name == REAL or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"a corpus cannot be called {name!r}: use letters, digits, - and _, and not {REAL!r}")
        return corpora

    @model_validator(mode="after")
    def _names_that_are_there(self) -> JudgeCorpus:
        if self.baseline not in self.names:
            raise ValueError(f"baseline: no corpus is called {self.baseline!r}: {', '.join(self.names)}")
        if self.keep:
            raise ValueError("keep: a row is a training, which has no columns of the input's")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What classifiers are trained on, real pictures alone first."""
        return (REAL, *self.corpora)

    def source(self) -> Source:
        trials = tuple(map(str, range(self.trials)))
        return Source((TRAININGS,), variants={"corpus": self.names, "trial": trials})

    def stage(self) -> StageSpec:
        settings = self.part(
            JudgeCorpusSettings, held_out=_described(self.input), real=_described(self.real),
            corpora={name: _described(given) for name, given in self.corpora.items()},
        )  # fmt: skip
        return StageSpec.of("stages.judging.stage:JudgeCorpus", settings)

    products: ClassVar[tuple[str, ...]] = (JUDGEMENT,)

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Write what each corpus is worth, with intervals."""
        from stages.judging.measures import group_of, judgement

        shares: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.names}
        counts: dict[str, int] = {}
        for rows in finished.tables(["status", "corpus", "trial", "by_class", "real_counts"]):
            for row in rows.to_pylist():
                if row["status"] == "ok":
                    told = json.loads(row["by_class"])
                    shares[row["corpus"]][str(row["trial"])] = {own: hit / shown for own, (hit, shown) in told.items()}
                    counts = json.loads(row["real_counts"])
        groups = {own: group_of(count, self.rare) for own, count in counts.items()}
        found = {"baseline": self.baseline, "corpora": judgement(shares, groups, self.baseline)}
        with finished.output.open_file(JUDGEMENT, "wb") as file:
            file.write(json.dumps(found, indent=1, ensure_ascii=False).encode())

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        return _CARD.format(output=finished.output.path, rare=self.rare, baseline=self.baseline, trials=self.trials)

    def panels(self) -> list[Panel]:
        return [Panel("What each corpus is worth", _draw_judgement, _NOTE)]


_CARD = """## The judgement

`{output}/judgement.json` has, of each corpus, the mean share of held-out pictures that were told right, over classes
that the real pictures hold often, rarely (at most {rare} pictures) and never; and what it gains over `{baseline}`.
Intervals are 95 % by bootstrap over classes and trials ({trials}), so they speak of other classes and other trainings.

"""
_NOTE = "Mean share told right over classes, with 95 % intervals; beneath, what is gained over the baseline, in points."


def _described(given: Input) -> dict[str, Any]:
    """A set as JSON, without secrets; found from any working directory."""
    plain = given.source().to_json()
    return {**plain, "path": [absolute(entry) for entry in plain["path"]]}


def _draw_judgement(view: View) -> Html:
    try:
        with view.output.open_file(JUDGEMENT) as file:
            found: dict[str, Any] = json.loads(file.read())
    except FileNotFoundError:
        return Html("")
    groups = list(dict.fromkeys(group for own in found["corpora"].values() for group in own))
    classes = {group: own[group]["classes"] for own in found["corpora"].values() for group in own}
    head = ["corpus", *(f"{group} ({classes[group]} classes)" for group in groups)]
    lines = [[name, *(_cell(own.get(group)) for group in groups)] for name, own in found["corpora"].items()]
    gains = [
        [name, *(_cell(own.get(group, {}).get("difference"), 100) for group in groups)]
        for name, own in found["corpora"].items()
        if name != found["baseline"]
    ]
    above = [f"gained over {found['baseline']}", *groups]
    right = range(1, len(groups) + 1)
    return escape([table(head, lines, right), tag("div", table(above, gains, right))])


def _cell(told: Mapping[str, float] | None, points: int = 1) -> str:
    """A mean and its interval; as shares, or as points with their sign."""
    if told is None:
        return ""
    form = ".2f" if points == 1 else "+.1f"
    mean, low, high = (format(points * told[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
