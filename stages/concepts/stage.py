"""The stage of `learn-concepts`: rows of a concept table in, rows with the concept's word embeddings out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pipeline.contract import Row, StageInfo, failed
from stages.concepts.columns import columns
from stages.concepts.concept import ConceptError
from stages.concepts.prepare import Prepared, prepare
from stages.concepts.problem import LegoProblem
from stages.concepts.samples import generate, sheet
from stages.concepts.settings import LearnConceptsSettings, Samples
from stages.engine.randomness import row_seed
from stages.engine.solver import Occupancy, solve
from stages.inverter.model import TextInverter
from stages.inverter.warm_start import warm_start
from stages.models.families import open_latent_model, read_geometry
from stages.models.memory import fitting_slots

if TYPE_CHECKING:
    from PIL.Image import Image


CPU_SLOTS = 8


class LearnConcepts:
    """Words for concepts, many concepts in one batch (`stages.concepts.problem`).

    A row that is no usable concept fails with what is to be mended; a concept whose loss is not finite fails alone.
    """

    known_as = "stages.lego:LearnConcepts"
    Settings = LearnConceptsSettings

    def __init__(self, settings: LearnConceptsSettings) -> None:
        self.settings = settings
        self.model = open_latent_model(settings)
        slots = settings.slots or fitting_slots(
            self.model, "gradient", otherwise=CPU_SLOTS, rows=settings.settings.pictures
        )  # fmt: skip
        self.rooms = self.model.rooms
        self.room = self.rooms["words"]
        self.room.rows, self.room.relief = slots, self.rooms["gradient"].relief
        self.problem = LegoProblem(
            self.model, settings.settings, slots=slots, max_words=settings.max_words,
            seed=settings.seed, checkpoints=settings.checkpoints, checkpoint_seconds=settings.checkpoint_seconds,
        )  # fmt: skip
        self.inverter = None if settings.inverter is None else TextInverter.load(settings.inverter, self.model.device)
        self.occupancy = Occupancy()

    @staticmethod
    def describe(settings: LearnConceptsSettings) -> StageInfo:
        """Columns, models and metadata, from configurations alone."""
        geometry = read_geometry(settings)
        geometry.refuse_flow("words are learned by the noise-prediction loss")
        return StageInfo(
            columns=columns(settings.max_words, sum(geometry.word_widths), settings.samples is not None),
            models=geometry.fingerprints(),
            needs={("concept",): "a concept's words, for instance 'frozen in ice', are what is learned"},
            metadata={
                "scheduler": json.dumps(dict(geometry.scheduler)),
                "vae_scaling_factor": str(geometry.scaling_factor),
                "encoder_widths": json.dumps(list(geometry.word_widths)),
            },
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        # An earlier call may have ended in the middle, or another worker have run out.
        self.problem.resize(min(self.problem.slots, self.room.rows))
        prepared = (self._prepare(row) for row in rows)
        for row in solve(self.problem, prepared, occupancy=self.occupancy, room=self.room):
            samples = self.settings.samples
            yield row if samples is None or row["status"] == "failed" else {**row, "samples": self._draw(row, samples)}

    @property
    def holds(self) -> int:
        """Most concepts at a time: in the slots, and waiting for them."""
        return 2 * self.problem.slots

    def shrink(self) -> bool:
        """Half the slots, after the device ran out of memory."""
        return self.room.halve(min(self.problem.slots, self.room.rows))

    def _prepare(self, row: Row) -> Row:
        if row.get("status") == "failed":
            return row
        try:
            prepared = prepare(
                row, self.model, self.settings.settings, self.settings.templates,
                max_words=self.settings.max_words, root=self.settings.root,
                allow=self.settings.allow or (),
            )  # fmt: skip
        except ConceptError as error:
            return failed(row, str(error))
        return {**row, "prepared": prepared if self.inverter is None else self._warm(prepared, self.inverter)}

    def _warm(self, prepared: Prepared, inverter: TextInverter) -> Prepared:
        """The concept with its words near what the inverter reads off its pictures."""
        start_VE = warm_start(
            self.problem.encoders, inverter, *prepared.as_they_are(), prepared.start_VE, lr=self.settings.settings.lr
        )
        return replace(prepared, start_VE=start_VE)

    def _draw(self, row: Row, samples: Samples) -> Image:
        """A sheet of the finished concept on new subjects: a row a subject."""
        prompt = samples.prompt or json.loads(row["settings"])["templates"]["with_"]
        prompts = [
            prompt.format(subject=subject, concept=row["phrase"])
            for subject in samples.subjects
            for _ in range(samples.draws)
        ]
        tokens = json.loads(row["tokens"])
        drawn = generate(
            self.model, prompts, tokens, torch.from_numpy(row["embeddings"][: len(tokens)]),
            seeds=[row_seed(self.settings.seed, row["id"], f"sample {number}") for number in range(len(prompts))],
            steps=samples.steps, guidance=samples.guidance,
        )  # fmt: skip
        return sheet(drawn, columns=samples.draws)
