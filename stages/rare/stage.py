"""The stage of `rare-concepts`: a concept and a method in, a new picture of the concept and its seed out.

A row stands for one picture to be kept. It draws `candidates` seeds by its method, makes a picture of each, and keeps
the best; so what a row becomes depends on the job and on its own id, not on the rows beside it.

Legend: B pictures at once, K pictures of a concept, M candidates, N numbers a seed, E embedding width; C H W latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from pipeline.contract import Column, Row, StageInfo, failed, ok
from stages.concepts.concept import ConceptError
from stages.concepts.samples import sheet
from stages.engine.methods import Method
from stages.engine.randomness import row_generator
from stages.inversion.metrics import noise_statistics
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import NOISE_STATISTICS, InvertImages
from stages.models.clip import ImageEncoder, TextEncoder, identity
from stages.models.fingerprint import describe_model, describe_stable_diffusion
from stages.models.pictures import fit_picture, to_picture
from stages.models.sampler import sample
from stages.models.schedule import make_schedule
from stages.models.unet import LatentDiffusion, read_geometry
from stages.ovi.scoring import asked_of, clip_scores, oracle_scores
from stages.rare import noise as grow
from stages.rare.references import Asked, References, SeedDataset, fingerprint, invert, read_asked
from stages.rare.seed_select import Target, centroid, embedder, optimise_seeds
from stages.rare.settings import (
    AnySeedMethod,
    LinearMethod,
    NaoMethod,
    RandomMethod,
    SeedSelectMethod,
    SlerpMethod,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from stages.models.pictures import Fit

Scored = Literal["text", "image", "oracle"]
SCORE_COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "text": (Column("clip_score", "float32", doc="100 max(cos(picture, prompt), 0)"),),
    "image": (Column("clip_image", "float32", doc="100 max(cos(picture, mean of the concept's pictures), 0)"),),
    "oracle": (
        Column("bound", "float32", doc="share of the asked objects that the oracle finds"),
        Column("success", "bool", doc="the oracle finds everything that was asked"),
    ),
}  # fmt: skip
THUMBNAIL = 128


def parse(methods: Sequence[Mapping[str, Any]]) -> tuple[Method, ...]:
    """Method settings from their JSON form."""
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(AnySeedMethod)
    return tuple(adapter.validate_python(dict(method)) for method in methods)


@dataclass(frozen=True)
class Grown:
    """A row and its candidate seeds.

    Attributes:
        centre_E: Mean direction of the concept's pictures in CLIP space, where it is needed.
        seed_MCHW: Float32, as they will be stored.
        weight_MK: What each of the concept's seeds counted for in each candidate.
        losses_M2: Of `seed-select`: loss at the start and at the end of each candidate; NaN otherwise.
    """

    row: Row
    concept: References
    centre_E: torch.Tensor | None
    label: str
    number: str
    seed_MCHW: torch.Tensor
    weight_MK: torch.Tensor
    losses_M2: torch.Tensor


class RareConcepts:
    """New seeds of a concept by one of several methods a row, pictures from them, and the best of a few kept.

    Rows carry what `stages.rare.references.read_asked` reads, and `method` (a method's label) and `number`, both also
    at the end of their id. Whatever is random about a row is drawn from the seed, the concept's id and the number, so
    that all methods start from the same noise.

    Args:
        model, revision, variant, dtype, device: See `stages.models.unet.LatentDiffusion.load`; None: CUDA if any.
        methods: Settings in JSON form.
        inversion: Settings of the method that inverts the pictures, in JSON form.
        seeds, by: Output of an `invert-images` run and its column with concept names, instead of pictures.
        steps, guidance, negative: Of the sampler that draws the new pictures.
        size, fit: Side of the pictures, and what is done with pictures of another shape.
        clip, clip_revision: Model that scores, and that `seed-select` optimises against.
        scores: What is measured; the first decides which candidate is kept, the next ones between equals.
        oracle: Folder of the oracle; None: the shipped one.
        candidates: Pictures that are drawn for a row.
        most: Pictures of a concept that are used.
        root: Folder that relative picture addresses start from.
        store: dtype of stored latents; pictures are drawn from the stored numbers.
        slots: Pictures at once.
    """

    known_as = "stages.rare_concepts:RareConcepts"

    def __init__(
        self, model: str, methods: Sequence[Mapping[str, Any]], *, clip: str, inversion: Mapping[str, Any],
        revision: str | None = None, variant: str | None = None, dtype: str = "float32", device: str | None = None,
        seeds: str | None = None, by: str = "concept", steps: int = 50, guidance: float = 7.5,
        negative: str | None = None, size: int | None = None, fit: Fit = "crop", clip_revision: str | None = None,
        scores: Sequence[Scored] = ("text", "image"), oracle: str | None = None, candidates: int = 1, most: int = 16,
        root: str = "", store: str = "float32", slots: int = 16, seed: int = 0,
    ) -> None:  # fmt: skip
        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LatentDiffusion.load(
            model, revision=revision, variant=variant, dtype=dtype, device=device, size=size
        )
        self.geometry = read_geometry(model, revision=revision, size=size)
        self.methods = {method.label: method for method in parse(methods)}
        self.scores, self.candidates, self.most, self.seed = tuple(scores), candidates, most, seed
        self.steps, self.guidance, self.negative = steps, guidance, negative
        self.fit, self.root, self.store, self.slots = fit, root, np.dtype(store), slots
        inverting = InvertImagesSettings.model_validate(
            {"methods": [inversion], "steps": steps, "slots": slots, "pictures": False}
        )
        self.inversion = InvertImages(inverting, self.model)
        self.dataset = None
        if seeds is not None:
            self.dataset = SeedDataset(seeds, by, describe_model(model, revision, "unet")["fingerprint"])
        self._clip = (clip, clip_revision)
        self.oracle = None
        if "oracle" in self.scores:
            from micro.oracle import Oracle

            self.oracle = Oracle.load(oracle) if oracle else Oracle.load()

    @cached_property
    def images(self) -> ImageEncoder:
        """The image encoder that scores."""
        return ImageEncoder(*self._clip, device=str(self.model.device))

    @cached_property
    def texts(self) -> TextEncoder:
        """Its text encoder."""
        return TextEncoder(*self._clip, device=str(self.model.device))

    @staticmethod
    def describe(
        model: str, methods: Sequence[Mapping[str, Any]], *, clip: str, inversion: Mapping[str, Any],
        revision: str | None = None, variant: str | None = None, dtype: str = "float32", device: str | None = None,
        seeds: str | None = None, by: str = "concept", steps: int = 50, guidance: float = 7.5,
        negative: str | None = None, size: int | None = None, fit: Fit = "crop", clip_revision: str | None = None,
        scores: Sequence[Scored] = ("text", "image"), oracle: str | None = None, candidates: int = 1, most: int = 16,
        root: str = "", store: str = "float32", slots: int = 16, seed: int = 0,
    ) -> StageInfo:  # fmt: skip
        geometry = read_geometry(model, revision=revision, size=size)
        make_schedule(geometry.scheduler, steps)
        chosen = parse(methods)
        kept_as: Literal["float16", "float32"] = "float16" if store == "float16" else "float32"
        columns = [
            Column("concept", "string"),
            Column("prompt", "string"),
            Column("method", "string"),
            Column("number", "int64", doc="of the row among those of its concept and method"),
            Column("image", "image"),
            Column("latent", "tensor", geometry.latent_shape, kept_as, doc="z_T: the seed that draws the picture"),
            Column("parents", "json", doc="the concept's own seeds: id, weight in this one, dB regenerated"),
            Column("score", "float32", doc=f"what candidates were ranked by: {scores[0]}"),
            *(column for name in scores for column in SCORE_COLUMNS[name]),
            Column("candidate_scores", "tensor", (candidates,), doc="score of every candidate, the kept one too"),
            *(Column(name, "float32", doc="of the seed; a Gaussian one has 0, 1, 0, 0") for name in NOISE_STATISTICS),
        ]  # fmt: skip
        if any(isinstance(method, SeedSelectMethod) for method in chosen):
            columns.append(Column("select_start", "float32", doc="loss of the seed before it was optimised"))
            columns.append(Column("select_loss", "float32", doc="the same before the last update"))
        columns.append(Column("references", "image", doc="the concept's pictures, on its first row by each method"))
        models = describe_stable_diffusion(model, geometry.kind, revision)
        if "text" in scores or _uses_centre(scores, chosen):
            models["clip_image"] = identity(clip, "image", clip_revision)
        if "text" in scores:
            models["clip_text"] = identity(clip, "text", clip_revision)
        if "oracle" in scores:
            import micro

            models["oracle"] = describe_model(oracle or str(micro.MODELS / "oracle"))
        if seeds is not None:
            models["seeds"] = {"path": seeds, "revision": "", "fingerprint": fingerprint(seeds)}
        metadata = {"model": model, "steps": str(steps), "guidance": str(guidance)}
        return StageInfo(tuple(columns), models, metadata)

    def shrink(self) -> bool:
        """Half as many pictures at once, after running out of memory; False when there is only one."""
        if self.slots == 1:
            return False
        self.slots //= 2
        self.inversion.slots = self.slots
        return True

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row out for each in. The shard's rows are held together, so that a concept is inverted once and the
        sampler's batches stay full."""
        good: list[tuple[Row, Asked]] = []
        for row in rows:
            try:
                good.append((row, self._read(row)))
            except ValueError as error:
                yield failed(row, str(error))
        concepts = self._gather(list({asked.key: asked for _, asked in good}.values()))
        groups: dict[tuple[str, str], list[Row]] = {}
        for row, asked in good:
            found = concepts[asked.key]
            problem = found if isinstance(found, str) else self._lacks(found, self.methods[row["method"]])
            if problem:
                yield failed(row, problem)
            else:
                groups.setdefault((asked.key, row["method"]), []).append(row)
        grown = self._grown(groups, concepts)
        while batch := list(islice(grown, max(1, self.slots // self.candidates))):
            yield from self._drawn(batch)

    def _grown(
        self, groups: Mapping[tuple[str, str], Sequence[Row]], concepts: Mapping[str, References | str]
    ) -> Iterator[Grown]:
        """Candidate seeds of all rows, concept by concept and method by method."""
        needed = _uses_centre(self.scores, list(self.methods.values()))
        centres: dict[str, torch.Tensor] = {}
        for (key, label), group in groups.items():
            concept = concepts[key]
            assert isinstance(concept, References)
            if needed and key not in centres and concept.pictures:
                centres = {key: centroid(self.images(list(concept.pictures)))}
            yield from self._grow(concept, centres.get(key), key, label, group)

    # --- what is asked

    def _read(self, row: Row) -> Asked:
        label, number = row.get("method"), row.get("number")
        if label not in self.methods:
            raise ConceptError(f"no method {label!r}: the job has {', '.join(self.methods)}")
        asked = read_asked(_key(row), row, self.most)
        if "oracle" in self.scores and asked_of(row) is None:
            raise ConceptError(f"concept {asked.name}: the oracle needs the column 'objects' (a list of attributes)")
        if number is None:
            raise ConceptError(f"concept {asked.name}: the row has no number")
        return asked

    def _gather(self, asked: Sequence[Asked]) -> dict[str, References | str]:
        """The concepts' seeds: from the dataset where the row brings no pictures, else by inverting them."""
        if self.dataset is None:
            return invert(asked, self.inversion, root=self.root, fit=self.fit)
        own = [concept for concept in asked if concept.pictures]
        rest = [concept for concept in asked if not concept.pictures]
        found = invert(own, self.inversion, root=self.root, fit=self.fit)
        return found | (self.dataset.find(rest, self.geometry.latent_shape, self.most) if rest else {})

    def _lacks(self, concept: References, method: Method) -> str | None:
        """Why a method cannot serve a concept."""
        start = method.start if isinstance(method, SeedSelectMethod) else getattr(method, "method", "")
        if start != "random" and len(concept.ids) < 2:
            return f"concept {concept.name}: {method.label} needs at least 2 pictures, there are {len(concept.ids)}"
        if (isinstance(method, SeedSelectMethod) or "image" in self.scores) and not concept.pictures:
            return (
                f"concept {concept.name}: {method.label} or the score 'image' needs pictures of it; give some "
                "(an inversion dataset keeps them with pictures: true)"
            )
        return None

    # --- new seeds

    def _grow(
        self, concept: References, centre_E: torch.Tensor | None, key: str, label: str, rows: Sequence[Row]
    ) -> Iterator[Grown]:
        """Candidate seeds of a concept's rows by one method; dear ones are made as they are asked for."""
        method, count = self.methods[label], self.candidates
        ids = [f"{key}/{row['number']}" for row in rows for _ in range(count)]
        purposes = [str(candidate) for _ in rows for candidate in range(count)]
        generators = [row_generator(self.seed, *one) for one in zip(ids, purposes, strict=True)]
        z_BCHW, weight_BK = grow_seeds(_start_of(method), concept.seed_KCHW.to(self.model.device), generators)
        parts: Iterable[tuple[torch.Tensor, torch.Tensor]]
        if isinstance(method, SeedSelectMethod):
            assert centre_E is not None
            parts = self._optimised(method, concept, centre_E, z_BCHW)
        else:
            parts = [(z_BCHW, torch.full((len(ids), 2), math.nan))]
        pairs = (pair for z_PCHW, losses_P2 in parts for pair in zip(z_PCHW, losses_P2, strict=True))
        for row, weight_MK in zip(rows, weight_BK.split(count), strict=True):
            own = list(islice(pairs, count))
            seed_MCHW, losses_M2 = (torch.stack(values) for values in zip(*own, strict=True))
            stored = torch.from_numpy(seed_MCHW.numpy().astype(self.store).astype(np.float32))
            yield Grown(row, concept, centre_E, label, str(row["number"]), stored, weight_MK, losses_M2)

    def _optimised(
        self, method: SeedSelectMethod, concept: References, centre_E: torch.Tensor, z_BCHW: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Seeds that `seed-select` makes of these, and their losses (B, 2), as many at once as there are slots."""
        device = self.model.device
        x_KCHW = torch.stack([fit_picture(picture, self.geometry.size) for picture in concept.pictures]).to(device)
        with torch.no_grad():
            latent_CHW = self.model.encode(x_KCHW).mean(0)
        schedule = make_schedule(self.geometry.scheduler, method.steps or self.steps).to(device)
        iterations, rate = method.budget
        for part_BCHW in z_BCHW.split(self.slots):
            count = len(part_BCHW)
            with torch.no_grad():
                condition = self._condition([concept.prompt] * count)
            target = Target(centre_E.to(device).expand(count, -1), latent_CHW.expand(count, *latent_CHW.shape))
            done = optimise_seeds(
                part_BCHW.to(device), condition, target, predict=self.model.predictor(self.guidance), schedule=schedule,
                embed=embedder(self.model.decode, self.images), iterations=iterations, rate=rate,
            )  # fmt: skip
            yield done.z_BCHW.cpu(), torch.stack([done.start_B, done.loss_B], 1)

    # --- pictures

    def _condition(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return self.model.condition(prompts, size=self.geometry.size, guided=self.guidance > 1, negative=self.negative)

    @torch.no_grad()
    def _pictures(self, seed_BCHW: torch.Tensor, prompts: list[str]) -> list[Image]:
        """A picture a seed, as the model's own pipeline draws it with DDIM."""
        schedule = make_schedule(self.geometry.scheduler, self.steps).to(self.model.device)
        made: list[Image] = []
        for start in range(0, len(prompts), self.slots):
            part_BCHW = seed_BCHW[start : start + self.slots].to(self.model.device)
            condition = self._condition(prompts[start : start + self.slots])
            z_BCHW = sample(self.model.predictor(self.guidance), schedule, part_BCHW, condition)
            made += [to_picture(x.cpu()) for x in self.model.decode(z_BCHW)]
        return made

    def _drawn(self, batch: Sequence[Grown]) -> Iterator[Row]:
        """Pictures of some rows' candidates, scored; each row with the best of its own."""
        for one in batch:
            if not bool(one.seed_MCHW.isfinite().all()):
                yield failed(one.row, f"{one.label}: a seed is not finite; lower its rate, or use dtype float32")
        batch = [one for one in batch if bool(one.seed_MCHW.isfinite().all())]
        if not batch:
            return
        prompts = [one.concept.prompt for one in batch for _ in range(self.candidates)]
        pictures = self._pictures(torch.cat([one.seed_MCHW for one in batch]), prompts)
        scored = self._scored(pictures, [one for one in batch for _ in range(self.candidates)])
        for number, one in enumerate(batch):
            own = scored[number * self.candidates : (number + 1) * self.candidates]
            best = max(range(self.candidates), key=lambda m: [_value(own[m], name) for name in self.scores])
            yield ok(one.row, **self._outputs(one, own, best))

    def _scored(self, pictures: Sequence[Image], owners: Sequence[Grown]) -> list[Row]:
        """The measures of each picture, and the picture, as a row."""
        found: list[Row] = [
            {"image": picture} | {name: one.row.get(name) for name in ("objects", "relation", "count")}
            for picture, one in zip(pictures, owners, strict=True)
        ]
        if "text" in self.scores:
            prompts = list(dict.fromkeys(one.concept.prompt for one in owners))
            texts = dict(zip(prompts, self.texts(prompts).numpy(), strict=True))
            rows = [row | {"text": texts[one.concept.prompt]} for row, one in zip(found, owners, strict=True)]
            found = clip_scores(rows, self.images)
        if "image" in self.scores:
            if "text" not in self.scores:
                seen = self.images(list(pictures)).numpy()
                found = [row | {"seen": own} for row, own in zip(found, seen, strict=True)]
            seen_BE = torch.from_numpy(np.stack([row["seen"] for row in found]))
            centre_BE = torch.stack([one.centre_E for one in owners if one.centre_E is not None])
            cosine_B = nn.functional.cosine_similarity(seen_BE, centre_BE, dim=1).clamp_min(0)
            found = [row | {"clip_image": 100 * float(cosine)} for row, cosine in zip(found, cosine_B, strict=True)]
        return oracle_scores(found, self.oracle) if self.oracle is not None else found

    def _outputs(self, one: Grown, scored: Sequence[Row], best: int) -> dict[str, Any]:
        latent_CHW = one.seed_MCHW[best]
        made: dict[str, Any] = {
            "concept": one.concept.name,
            "prompt": one.concept.prompt,
            "method": one.label,
            "number": int(one.number),
            "image": scored[best]["image"],
            "latent": latent_CHW.numpy().astype(self.store),
            "parents": _parents(self.methods[one.label], one.concept, one.weight_MK[best]),
            "score": _value(scored[best], self.scores[0]),
            "candidate_scores": np.array([_value(row, self.scores[0]) for row in scored], dtype=np.float32),
            **{name: values[0] for name, values in noise_statistics(latent_CHW[None]).items()},
            **{column.name: scored[best][column.name] for name in self.scores for column in SCORE_COLUMNS[name]},
        }
        if isinstance(self.methods[one.label], SeedSelectMethod):
            made |= {"select_start": float(one.losses_M2[best, 0]), "select_loss": float(one.losses_M2[best, 1])}
        if one.number == "0" and one.concept.pictures:
            small = [picture.resize((THUMBNAIL, THUMBNAIL)) if picture.width > THUMBNAIL else picture
                     for picture in one.concept.pictures]  # fmt: skip
            made["references"] = sheet(small)
        return made


def grow_seeds(
    method: Method, seed_KCHW: torch.Tensor, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """New seeds (B, C, H, W) by one method, and what each reference counted for in each (B, K); both on the CPU.

    The weight of a reference: in `slerp` its share of the arc, in `linear` its weight before the sum is made Gaussian,
    in `nao` how far from the centroid (0) the seed lies towards it (1).

    Args:
        seed_KCHW: The concept's seeds, at least two but for `random`; on the device that computes.
        generators: One a seed, on the CPU.
    """
    count, (known, *shape), device = len(generators), seed_KCHW.shape, seed_KCHW.device
    noise_BCHW = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    weight_BK = torch.zeros((count, known))
    if isinstance(method, RandomMethod):
        return noise_BCHW, weight_BK
    z_KN, rows = seed_KCHW.flatten(1), torch.arange(count)
    place_B = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    order_BK = torch.stack([torch.randperm(known, generator=generator) for generator in generators])
    if isinstance(method, LinearMethod):
        # Normalised exponential numbers are uniform on the simplex.
        weight_BK = torch.stack([torch.empty(known).exponential_(generator=generator) for generator in generators])
        weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
        z_BN = grow.combine(weight_BK.to(device), z_KN)
    elif isinstance(method, SlerpMethod):
        t_B = method.margin + (1 - 2 * method.margin) * place_B
        weight_BK[rows, order_BK[:, 0]], weight_BK[rows, order_BK[:, 1]] = 1 - t_B, t_B
        first_B, second_B = order_BK[:, 0].to(device), order_BK[:, 1].to(device)
        z_BN = grow.slerp(t_B.to(device), z_KN[first_B], z_KN[second_B])
    elif isinstance(method, NaoMethod):
        t_B = (1 - method.margin) * place_B
        weight_BK[rows, order_BK[:, 0]] = t_B
        paths = grow.norm_aware_centroid(z_KN, points=method.points, limit=method.updates)
        z_BN = grow.along(paths.path_KPN, order_BK[:, 0].to(device), t_B.to(device))
    else:
        raise TypeError(f"{type(method).__name__} makes no seeds of its own")
    return z_BN.view(count, *shape).cpu(), weight_BK


def _start_of(method: Method) -> Method:
    """The method that draws a method's seeds: itself, or where `seed-select` starts."""
    return parse([{"method": method.start}])[0] if isinstance(method, SeedSelectMethod) else method


def _uses_centre(scores: Sequence[Scored], methods: Sequence[Method]) -> bool:
    """Whether the CLIP direction of a concept's pictures is needed."""
    return "image" in scores or any(isinstance(one, SeedSelectMethod) for one in methods)


def _key(row: Row) -> str:
    """The id of the concept that a row is one of."""
    return str(row["id"]).removesuffix(f"/{row.get('number')}").removesuffix(f"/{row.get('method')}")


def _value(scored: Row, name: str) -> float:
    """What a score ranks by; the oracle's is 1 when all is found, and half the share of objects otherwise."""
    if name == "oracle":
        return (float(scored["bound"]) + float(scored["success"])) / 2
    return float(scored["clip_score" if name == "text" else "clip_image"])


def _parents(method: Method, concept: References, weight_K: torch.Tensor) -> str:
    """The pictures that a seed comes from, with their weights: all of them where their centroid is in it."""
    through_centroid = isinstance(method, NaoMethod | SeedSelectMethod)
    return json.dumps([
        {"id": own, "weight": round(float(weight), 4), "psnr": None if psnr is None else round(psnr, 2)}
        for own, weight, psnr in zip(concept.ids, weight_K, concept.psnr, strict=True)
        if through_centroid or float(weight) > 0
    ])  # fmt: skip
