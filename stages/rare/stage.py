"""The stage of `rare-concepts`: a concept and a method in, a new picture of the concept and its noise latent out.

A row stands for one picture to be kept. It draws `candidates` latents by its method, makes a picture of each, and keeps
the best; so what a row becomes depends on the job and on its own id, not on the rows beside it.

Legend: B pictures at once, K pictures of a concept, M candidates, E embedding width; C H W latents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.contract import Row, StageInfo, failed, ok
from stages.concepts.concept import ConceptError
from stages.engine.gradients import loss_scale
from stages.engine.randomness import row_generator
from stages.inversion.schemes import check_method
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import CPU_SLOTS, InvertImages
from stages.models.captions import token_counts
from stages.models.clip import identity
from stages.models.families import open_latent_model, read_geometry
from stages.models.fingerprint import describe_model
from stages.models.latent import Condition
from stages.models.memory import fitting_slots
from stages.models.names import shipped
from stages.models.pictures import fit_picture, to_picture
from stages.models.sampler import sample
from stages.models.settings import SamplingSettings
from stages.ovi.scoring import asked_of
from stages.rare.anchors import AnchorFinder, check
from stages.rare.anchors import identity as identity_of_anchors
from stages.rare.candidates import Candidates, new_noise
from stages.rare.columns import columns, filled
from stages.rare.guides import Texts, check_guide, drawn_by, lacks, read_texts, uses_anchor
from stages.rare.inverted import InvertedDataset, fingerprint
from stages.rare.references import PICTURE_COLUMNS, ConceptRow, References, invert, read_concept_row
from stages.rare.scores import Judge
from stages.rare.seed_select import Target, centroid, embedder, optimise_noise
from stages.rare.settings import ComposeGuide, Guide, NoiseMethod, RandomMethod, RareConceptsSettings, SeedSelectMethod

if TYPE_CHECKING:
    from PIL.Image import Image


class RareConcepts:
    """New noise for a concept by one of several methods a row, pictures from it, and the best of a few kept.

    Rows carry what `stages.rare.references.read_concept_row` reads, and `method` (a method's label) and `number`, both
    also at the end of their id. Whatever is random about a row is drawn from the seed, the concept's id and the number,
    so that all methods start from the same noise.
    """

    known_as = "stages.rare_concepts:RareConcepts"
    Settings = RareConceptsSettings

    def __init__(self, settings: RareConceptsSettings) -> None:
        self.settings = settings
        self.model = open_latent_model(settings)
        self.rooms = self.model.rooms
        self._slots = settings.slots or fitting_slots(
            self.model, "predict", otherwise=CPU_SLOTS, rows=2 if settings.guidance > 1 else 1
        )
        self.methods: dict[str, NoiseMethod] = {method.label: method for method in settings.methods}
        self.guides: dict[str, Guide] = {guide.label: guide for guide in settings.drawn}
        self.judge = Judge(settings, self.model.device, self.rooms)
        inversion = InvertImagesSettings(
            **settings.part(SamplingSettings).model_dump(), methods=(settings.inversion,), steps=settings.steps,
            pictures=False, slots=self.slots,
        )  # fmt: skip
        self.inversion = InvertImages(inversion, self.model)
        self.finder = None if settings.anchors is None else AnchorFinder(settings.anchors, str(self.model.device))
        self.dataset = None
        if settings.seeds is not None:
            found = self.model.geometry.fingerprints()
            denoiser = found[next(iter(found))]["fingerprint"]
            self.dataset = InvertedDataset(settings.seeds, settings.by, denoiser, settings.sampler)

    @staticmethod
    def describe(settings: RareConceptsSettings) -> StageInfo:
        geometry = read_geometry(settings)
        check_method(settings.inversion, geometry, geometry.schedule(settings.steps))
        geometry.check_guidance(settings.guidance, settings.negative)
        for guide in settings.drawn:
            check_guide(guide, geometry, settings.guidance)
        models = geometry.fingerprints()
        encoder = partial(
            identity, settings.encoder, revision=settings.encoder_revision, allow_pickle=settings.allow_pickle
        )  # fmt: skip
        if "text" in settings.scores or settings.follows_pictures:
            models["clip_image"] = encoder("image")
        if "text" in settings.scores:
            models["clip_text"] = encoder("text")
        if "oracle" in settings.scores:
            models["oracle"] = describe_model(settings.oracle or shipped("micro:oracle"))
        if settings.anchors is not None:
            if not any(map(uses_anchor, settings.drawn)):
                raise ValueError("anchors: no guide draws by one; add r2f or aapb to guides, or leave anchors out")
            check(settings.anchors)
            models["anchors"] = dict(identity_of_anchors(settings.anchors))
        if settings.seeds is not None:
            models["seeds"] = {"path": settings.seeds, "revision": "", "fingerprint": fingerprint(settings.seeds)}
        metadata = {"model": settings.model, "steps": str(settings.steps), "guidance": str(settings.guidance)}
        return StageInfo(columns(settings, geometry.latent_shape), models, metadata, needs=_needs(settings))

    @property
    def slots(self) -> int:
        """Pictures at once; as `self.inversion` has it too, in the same room."""
        return min(self._slots, self.rooms["rows"].rows)

    def shrink(self) -> bool:
        """Half as many pictures at once, after running out of memory; False when there is only one."""
        return self.rooms["rows"].halve(self.slots)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row out for each in. The shard's rows are held together, so that a concept is inverted once and the
        sampler's batches stay full."""
        good: list[tuple[Row, ConceptRow]] = []
        for row in map(self._anchored, rows):
            try:
                good.append((row, self._read(row)))
            except ValueError as error:
                yield failed(row, str(error))
        concepts = self._gather(list({concept.key: concept for _, concept in good}.values()))
        groups: dict[tuple[str, str], list[Row]] = {}
        for row, concept in good:
            found = concepts[concept.key]
            problem = found if isinstance(found, str) else self._lacks(found, self.methods[row["method"]])
            if problem:
                yield failed(row, problem)
            else:
                groups.setdefault((concept.key, row["method"]), []).append(row)
        candidates = self._candidates(groups, concepts)
        while batch := list(islice(candidates, max(1, self.slots // self.settings.candidates))):
            yield from self._drawn(batch)

    # --- concepts

    def _anchored(self, row: Row) -> Row:
        """A row with the anchor that its guide needs and that it does not name itself, where there is one."""
        guide = self.guides.get(self._guide(row))
        if self.finder is None or guide is None or not uses_anchor(guide) or str(row.get("anchor") or "").strip():
            return row
        prompt = row.get("prompt")
        found = self.finder.find(prompt) if isinstance(prompt, str) and prompt.strip() else None
        if found is None:
            return row
        return {**row, "anchor": found.text, "anchor_distance": found.distance, "anchor_count": found.count}

    def _read(self, row: Row) -> ConceptRow:
        label, guide, number = row.get("method"), self._guide(row), row.get("number")
        if label not in self.methods:
            raise ConceptError(f"no method {label!r}: the job has {', '.join(self.methods)}")
        if guide not in self.guides:
            raise ConceptError(f"no guide {guide!r}: the job has {', '.join(self.guides)}")
        concept = read_concept_row(_key(row), row, self.settings.max_pictures)
        if problem := lacks(self.guides[guide], read_texts(concept.name, row)):
            raise ConceptError(f"concept {concept.name}: {problem}{self._sought(row)}")
        if "oracle" in self.settings.scores and asked_of(row) is None:
            raise ConceptError(f"concept {concept.name}: the oracle needs the column 'objects' (a list of attributes)")
        if number is None:
            raise ConceptError(f"concept {concept.name}: the row has no number")
        return concept

    def _sought(self, row: Row) -> str:
        """What to add where no anchor was found."""
        if self.settings.anchors is None or str(row.get("anchor") or "").strip():
            return ""
        least, path = self.settings.anchors.min_rows, self.settings.anchors.reference
        return f"; no caption that {least} rows of {path} have is the prompt with one word replaced or left out"

    def _guide(self, row: Row) -> str:
        """The label of the guide that a row is drawn by."""
        return str(row["guide"]) if self.settings.guides else self.settings.drawn[0].label

    def _gather(self, concepts: Sequence[ConceptRow]) -> dict[str, References | str]:
        """Key -> the concept's latents: from the dataset where the row brings no pictures, else by inverting them."""
        settings = self.settings
        if self.dataset is None:
            return invert(concepts, self.inversion, root=settings.root, fit=settings.fit, allow=settings.allow or ())
        own = [concept for concept in concepts if concept.pictures]
        rest = [concept for concept in concepts if not concept.pictures]
        found = invert(own, self.inversion, root=settings.root, fit=settings.fit, allow=settings.allow or ())
        if rest:
            found = found | self.dataset.find(rest, self.model.geometry.latent_shape, settings.max_pictures)
        return found

    def _lacks(self, concept: References, method: NoiseMethod) -> str | None:
        """Why a method cannot serve a concept."""
        if not isinstance(method.start_method, RandomMethod) and len(concept.ids) < 2:
            return f"concept {concept.name}: {method.label} needs at least 2 pictures, there are {len(concept.ids)}"
        if (isinstance(method, SeedSelectMethod) or "image" in self.settings.scores) and not concept.pictures:
            return (
                f"concept {concept.name}: {method.label} or the score 'image' needs pictures of it; give some "
                "(an inversion dataset keeps them with pictures: true)"
            )
        return None

    # --- new noise

    def _candidates(
        self, groups: Mapping[tuple[str, str], Sequence[Row]], concepts: Mapping[str, References | str]
    ) -> Iterator[Candidates]:
        """Candidates of all rows, concept by concept and method by method."""
        centres: dict[str, torch.Tensor] = {}
        for (key, label), group in groups.items():
            concept = concepts[key]
            assert isinstance(concept, References)
            if self.settings.follows_pictures and key not in centres and concept.pictures:
                centres = {key: centroid(self.judge.images(list(concept.pictures)))}
            yield from self._grown(concept, centres.get(key), key, self.methods[label], group)

    def _grown(
        self, concept: References, centre_E: torch.Tensor | None, key: str, method: NoiseMethod, rows: Sequence[Row]
    ) -> Iterator[Candidates]:
        """Candidates of a concept's rows by one method; those of `seed-select` are made as they are asked for."""
        M, store = self.settings.candidates, self.settings.store
        numbers = Counter(str(row["number"]) for row in rows)  # each is drawn by all guides
        generators = [
            row_generator(self.settings.seed, f"{key}/{number}", str(candidate))
            for number in numbers
            for candidate in range(M)
        ]
        z_BCHW, weight_BK = new_noise(method.start_method, concept.z_KCHW.to(self.model.device), generators)
        if isinstance(method, SeedSelectMethod):
            assert centre_E is not None
            parts: Iterable[tuple[torch.Tensor, torch.Tensor]] = self._selected(method, concept, centre_E, z_BCHW)
        else:
            parts = [(z_BCHW, torch.full((len(z_BCHW), 2), math.nan))]
        pairs = (pair for z_PCHW, losses_P2 in parts for pair in zip(z_PCHW, losses_P2, strict=True))
        fresh = zip(numbers, weight_BK.split(M), strict=True)
        seeds: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for row in sorted(rows, key=lambda row: list(self.guides).index(self._guide(row))):
            number = str(row["number"])
            if number not in seeds:
                made, weight_MK = next(fresh)
                z_MCHW, losses_M2 = (torch.stack(values) for values in zip(*islice(pairs, M), strict=True))
                seeds[made] = torch.from_numpy(z_MCHW.numpy().astype(store).astype(np.float32)), weight_MK, losses_M2
            guide, texts = self.guides[self._guide(row)], read_texts(concept.name, row)
            yield Candidates(row, concept, centre_E, method, guide, texts, number, *seeds[number])
            numbers[number] -= 1
            if not numbers[number]:
                del seeds[number]

    def _selected(
        self, method: SeedSelectMethod, concept: References, centre_E: torch.Tensor, z_BCHW: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Noise that `seed-select` makes of this, and its losses (B, 2), as many rows at once as there are slots."""
        model = self.model
        x_KCHW = torch.stack([fit_picture(picture, model.geometry.picture_size) for picture in concept.pictures])
        with torch.no_grad():
            latent_CHW = model.encode(x_KCHW.to(model.device)).mean(0)
        iterations, rate = method.budget

        def selected(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            part_BCHW = z_BCHW[part].to(model.device)
            count = len(part_BCHW)
            target = Target(centre_E.to(model.device).expand(count, -1), latent_CHW.expand(count, *latent_CHW.shape))
            done = optimise_noise(
                part_BCHW, self._condition([concept.prompt] * count), target,
                predict=model.predictor(self.settings.guidance),
                schedule=model.schedule(method.steps or self.settings.steps),
                embed=embedder(model.decode, self.judge.images), iterations=iterations, rate=rate,
                scale=loss_scale(model.dtypes.values()),
            )  # fmt: skip
            return done.z_BCHW.cpu(), torch.stack([done.start_B, done.loss_B], 1)

        room = model.rooms["select"]
        room.rows = min(room.rows, self.slots)
        yield from room.parts(len(z_BCHW), selected)

    # --- pictures

    @torch.no_grad()
    def _condition(self, prompts: list[str]) -> Condition:
        return self.model.condition(prompts, guided=self.settings.guidance > 1, negative=self.settings.negative)

    @torch.no_grad()
    def _pictures(self, guide: Guide, z_BCHW: torch.Tensor, texts: Sequence[Texts]) -> list[Image]:
        """A picture a latent, drawn by a guide with the job's sampler; by `plain` as the model's pipeline draws it."""
        settings, schedule = self.settings, self.model.schedule(self.settings.steps)
        made: list[Image] = []
        for start in range(0, len(texts), self.slots):
            part_BCHW = z_BCHW[start : start + self.slots].to(self.model.device)
            predict, told = drawn_by(
                guide, self.model, texts[start : start + self.slots],
                guidance=settings.guidance, steps=len(schedule), negative=settings.negative,
            )  # fmt: skip
            x_BCHW = self.model.decode(sample(predict, schedule, part_BCHW, told))
            made += [to_picture(x_CHW) for x_CHW in x_BCHW.cpu()]
        return made

    def _drawn(self, batch: Sequence[Candidates]) -> Iterator[Row]:
        """Pictures of some rows' candidates, scored; each row with the best of its own."""
        for one in batch:
            if not one.finite:
                yield failed(one.row, f"{one.method.label}: a seed is not finite; lower its `lr`, or use dtype float32")

        def drawn_alike(one: Candidates) -> tuple[str, tuple[bool, ...]]:
            return one.guide.label, one.texts.contrasts

        finite = sorted((one for one in batch if one.finite), key=drawn_alike)
        for _, alike in groupby(finite, drawn_alike):
            yield from self._drawn_alike(list(alike))

    def _drawn_alike(self, batch: Sequence[Candidates]) -> Iterator[Row]:
        """The same of rows that are drawn by one guide, by as many texts each."""
        M = self.settings.candidates
        owners = [one for one in batch for _ in range(M)]
        pictures = self._pictures(
            batch[0].guide, torch.cat([one.z_MCHW for one in batch]), [one.texts for one in owners]
        )
        measured = self.judge.measure(pictures, owners)
        for number, one in enumerate(batch):
            own = measured[number * M : (number + 1) * M]
            (read,) = token_counts([one.concept.prompt], self.model.readers)
            yield ok(one.row, **read, **filled(one, own, self.judge.best(own), self.settings))


def _needs(settings: RareConceptsSettings) -> dict[tuple[str, ...], str]:
    """Columns without which no row can be drawn, and why."""
    needs: dict[tuple[str, ...], str] = {("prompt",): "a concept's prompt says what to draw"}
    if settings.seeds is None:
        for method in settings.methods:
            if not isinstance(method.start_method, RandomMethod) or isinstance(method, SeedSelectMethod):
                needs[PICTURE_COLUMNS] = f"{method.label} starts from a concept's pictures"
        if "image" in settings.scores:
            needs[PICTURE_COLUMNS] = "the score 'image' needs a concept's pictures"
    for guide in settings.drawn:
        if isinstance(guide, ComposeGuide):
            needs["parts",] = f"{guide.label} draws by a list of texts, each of one attribute"
        elif uses_anchor(guide) and settings.anchors is None:
            needs["anchor",] = f"{guide.label} draws by a text near the prompt, of what the model draws well"
    if "oracle" in settings.scores:
        needs["objects",] = "the oracle needs a list of the attributes that a concept shows"
    return needs


def _key(row: Row) -> str:
    """The id of the concept that a row is one of."""
    key = str(row["id"])
    for column in ("number", "guide", "method"):
        key = key.removesuffix(f"/{row.get(column)}")
    return key
