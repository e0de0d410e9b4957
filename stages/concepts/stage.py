"""Lego at scale: many concepts learn their words at once in the batches of one frozen diffusion model.

A slot of the solver is a concept: it owns rows of the token table, an optimiser state, random numbers and a stopping
rule. All slots share every pass through text encoder and U-Net. Method: Lego (Motamed, Paudel and Van Gool, ECCV 2024):
subject separation, one token a content word, context loss. Batching, stopping, checkpoints and hyperparameters: ours.

Legend: B slots, K pictures a slot and step, I training pictures, V new words, M context words, E width of a word over
all encoders, T text positions, C H W latents.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pipeline.contract import Column, Row, StageInfo, failed, ok
from stages.concepts.losses import context_loss
from stages.concepts.samples import generate, sheet
from stages.concepts.table import Concept, ConceptError, Templates, open_picture, read_concept
from stages.engine.adamw import RowAdamW
from stages.engine.checkpoint import read_checkpoint, write_checkpoint
from stages.engine.randomness import row_generator, row_seed
from stages.engine.solver import Occupancy, solve
from stages.engine.stopping import REASONS, RUNNING, StoppingRule
from stages.inverter.model import TextInverter, warm_start
from stages.models.denoising_loss import DenoisingLoss
from stages.models.fingerprint import describe_stable_diffusion
from stages.models.pictures import encode_pictures
from stages.models.unet import LatentDiffusion, read_geometry
from stages.models.words import Encoder, UnknownWord, encode, encoders_of, phrase_vectors, tokenize, word_vectors

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 128
"""Pixels of a training picture on the sheet that is kept of them."""


@dataclass(frozen=True)
class LegoSettings:
    """How words are learned. The paper publishes none of the numbers: they are ours.

    Attributes:
        steps: Most steps a concept makes; a multiple of `window`.
        pictures: Pictures a concept and step (K), half of them without the concept.
        lr: Of AdamW without weight decay, on the new words alone.
        separation: Subject separation. Off: only pictures with the concept, under the plain prompt (textual inversion).
        context: Form of the context loss, or ``none``.
        context_weight: lambda.
        temperature: Of the normalised form.
        skew: Timesteps drawn with density (1 - skew cos(pi t)): 0 is uniform, ReVersion's importance sampling is 0.5.
        window: Steps over which losses are averaged for the curve and for stopping.
        tolerance: Smallest gain of a window's loss, as a share, that counts as progress.
        patience: Windows without progress after which a concept stops; None: never before `steps`.
    """

    steps: int = 3000
    pictures: int = 4
    lr: float = 2e-3
    separation: bool = True
    context: Literal["paper", "normalised", "none"] = "normalised"
    context_weight: float = 0.01
    temperature: float = 0.07
    skew: float = 0.0
    window: int = 100
    tolerance: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.steps % self.window:
            raise ValueError(f"steps ({self.steps}) is no multiple of window ({self.window})")
        if self.separation and self.pictures % 2:
            raise ValueError(f"pictures ({self.pictures}) is odd: half of them show the subject without the concept")


@dataclass
class Prepared:
    """A concept as tensors.

    Attributes:
        z_ICHW: Latents of the training pictures.
        with_I: Which of them show the concept.
        ids_EIT, which_EIT: Their prompts, one tensor an encoder.
        start_VE: Where the new words start; concept words first, then subjects.
        positive, negative: Vectors (M, E) of each concept word's context.
        thumbnails: The training pictures, small, for the report.
    """

    concept: Concept
    z_ICHW: torch.Tensor
    with_I: torch.Tensor
    ids_EIT: tuple[torch.Tensor, ...]
    which_EIT: tuple[torch.Tensor, ...]
    start_VE: torch.Tensor
    positive: list[torch.Tensor]
    negative: list[torch.Tensor]
    thumbnails: list[Image]

    @property
    def words(self) -> tuple[str, ...]:
        return self.concept.tokens + self.concept.subject_tokens


def prepare(
    row: Row,
    model: LatentDiffusion,
    settings: LegoSettings,
    templates: Templates,
    *,
    size: int,
    max_words: int,
    root: str,
) -> Prepared:
    """Read a row of the concept table and encode its pictures.

    Raises:
        ConceptError: Something about the concept is to be mended.
    """
    concept = read_concept(row, templates, separation=settings.separation, context=settings.context != "none")
    words = concept.tokens + concept.subject_tokens
    if len(words) > max_words:
        raise ConceptError(
            f"concept {concept.name}: {len(words)} new words, the job's max_words is {max_words}: raise it"
        )
    examples = list(concept.examples(settings.separation))
    encoders = encoders_of(model.pipeline)
    try:
        start = [word_vectors(encoders, word) for word in concept.start]
        start += [phrase_vectors(encoders, subject.name) for subject in concept.subjects]
        near, far = (
            [torch.stack([word_vectors(encoders, w) for w in lists]) if lists else _none(start[0]) for lists in side]
            for side in (concept.positive, concept.negative)
        )
        prompts = [[tokenize(e, prompt, words) for _, prompt, _ in examples] for e in encoders]
    except UnknownWord as error:
        raise ConceptError(
            f"concept {concept.name}: {error} (columns 'start', 'positive', 'negative', 'concept')"
        ) from None
    except ValueError as error:
        raise ConceptError(f"concept {concept.name}: {error}") from None
    from PIL import ImageOps

    try:
        pictures = [open_picture(picture, root) for _, _, picture in examples]
    except ConceptError as error:
        raise ConceptError(f"concept {concept.name}: {error}") from None
    return Prepared(
        concept=concept,
        z_ICHW=encode_pictures(model, pictures),
        with_I=torch.tensor([shown for shown, _, _ in examples]),
        ids_EIT=tuple(torch.stack([ids for ids, _ in of_one]).to(model.device) for of_one in prompts),
        which_EIT=tuple(torch.stack([which for _, which in of_one]).to(model.device) for of_one in prompts),
        start_VE=torch.stack(start),
        positive=near,
        negative=far,
        thumbnails=[ImageOps.fit(picture, (min(size, THUMBNAIL),) * 2) for picture in pictures],
    )


def _none(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros((0, like.shape[0]))


@dataclass(frozen=True)
class Draw:
    """What one step of one concept sees: picture numbers, timesteps and noise."""

    picture_K: torch.Tensor
    t_K: torch.Tensor
    noise_KCHW: torch.Tensor


def draw(
    settings: LegoSettings,
    seed: int,
    row_id: str,
    step: int,
    with_I: torch.Tensor,
    latent: Sequence[int],
    timesteps: int,
) -> Draw:
    """The random numbers of one step: a function of (job seed, row id, step) alone, so any step can be replayed."""
    generator = row_generator(seed, row_id, f"lego {step}")
    sets = [with_I.nonzero().flatten(), (~with_I).nonzero().flatten()]
    shares = [settings.pictures // 2] * 2 if settings.separation else [settings.pictures, 0]
    chosen = [_choose(of_set, count, generator) for of_set, count in zip(sets, shares, strict=True) if count]
    level_K = _skewed(torch.rand(settings.pictures, generator=generator, dtype=torch.float64), settings.skew)
    return Draw(
        torch.cat(chosen),
        (level_K * timesteps).long().clamp(max=timesteps - 1),
        torch.randn((settings.pictures, *latent), generator=generator),
    )


def _choose(pool: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` members of the pool, each as often as any other give or take one."""
    rounds = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(math.ceil(count / len(pool)))]
    return torch.cat(rounds)[:count]


def _skewed(u_K: torch.Tensor, skew: float) -> torch.Tensor:
    """Uniform numbers -> density 1 - skew cos(pi x) on [0, 1], by bisection (ReVersion's importance sampling)."""
    if not skew:
        return u_K
    low, high = torch.zeros_like(u_K), torch.ones_like(u_K)
    for _ in range(40):
        middle = (low + high) / 2
        below = middle - skew * torch.sin(math.pi * middle) / math.pi < u_K
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@dataclass
class Slot:
    """A concept in flight."""

    row: Row
    prepared: Prepared
    checkpoint: str | None
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


class LegoProblem:
    """The solver's view: one variable v_BVE, one pass of the frozen model for all slots.

    Rows come in with their `Prepared` under the key ``prepared``.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        settings: LegoSettings,
        *,
        size: int,
        slots: int,
        max_words: int,
        seed: int,
        checkpoints: str | None = None,
        checkpoint_seconds: float = 120.0,
    ) -> None:
        self.model, self.settings, self.seed, self.max_words = model, settings, seed, max_words
        self.checkpoints, self.checkpoint_seconds = checkpoints, checkpoint_seconds
        self.loss = DenoisingLoss(model)
        self.encoders: tuple[Encoder, ...] = encoders_of(model.pipeline)
        side = size // model.pipeline.vae_scale_factor
        self.latent_shape = (int(model.unet.config["in_channels"]), side, side)
        self.width = sum(e.width for e in self.encoders)
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Forget all rows and allocate for so many slots (their checkpoints stay)."""
        device, B = self.model.device, slots
        self.slots = slots
        self.held: list[Slot | None] = [None] * B
        self.v_BVE = torch.zeros((B, self.max_words, self.width), device=device, requires_grad=True)
        self.optimiser = RowAdamW(self.v_BVE, self.settings.lr, weight_decay=0.0)
        rule = StoppingRule(
            limit=self.settings.steps // self.settings.window,
            relative=self.settings.tolerance,
            patience=self.settings.patience,
        )
        self.stopper = rule.start(B, device)
        self.sums_2B = torch.zeros((2, B), device=device)  # of the window: noise-prediction loss, context loss
        self.active_B = torch.zeros(B, dtype=torch.bool, device=device)  # still learning
        self.loaded_B = torch.zeros(B, dtype=torch.bool, device=device)
        self.z_BICHW = torch.zeros((B, 1, *self.latent_shape), device=device)
        lengths = [e.tokenizer.model_max_length for e in self.encoders]
        self.ids_EBIT = [torch.zeros((B, 1, T), dtype=torch.long, device=device) for T in lengths]
        self.which_EBIT = [torch.full((B, 1, T), -1, dtype=torch.long, device=device) for T in lengths]
        self.near_BVME, self.far_BVME = (torch.zeros((B, self.max_words, 1, self.width), device=device) for _ in "+-")
        self.near_BVM, self.far_BVM = (
            torch.zeros((B, self.max_words, 1), dtype=torch.bool, device=device) for _ in "+-"
        )
        self.saved = time.monotonic()

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            self._load(slot, row)

    @torch.no_grad()
    def _load(self, slot: int, row: Row) -> None:
        prepared: Prepared = row["prepared"]
        pictures = len(prepared.z_ICHW)
        context = max([1, *(len(side) for side in prepared.positive + prepared.negative)])
        self._grow(pictures, context)
        self.z_BICHW[slot, :pictures] = prepared.z_ICHW
        for target, source in zip(self.ids_EBIT + self.which_EBIT, prepared.ids_EIT + prepared.which_EIT, strict=True):
            target[slot, :pictures] = source
        for words_BVME, present_BVM, lists in (
            (self.near_BVME, self.near_BVM, prepared.positive),
            (self.far_BVME, self.far_BVM, prepared.negative),
        ):
            present_BVM[slot] = False
            for number, words_ME in enumerate(lists):
                words_BVME[slot, number, : len(words_ME)] = words_ME
                present_BVM[slot, number, : len(words_ME)] = True
        self.v_BVE[slot] = 0
        self.v_BVE[slot, : len(prepared.start_VE)] = prepared.start_VE
        self.optimiser.reset([slot])
        self.stopper.reset([slot])
        self.sums_2B[:, slot] = 0
        self.active_B[slot] = self.loaded_B[slot] = True
        self.held[slot] = Slot(row, prepared, self._checkpoint_path(row, prepared))
        self._restore(slot)

    def _grow(self, pictures: int, context: int) -> None:
        """Room for this many training pictures and context words: these tensors never enter a network whole."""
        if pictures > self.z_BICHW.shape[1]:
            self.z_BICHW = _wider(self.z_BICHW, 1, pictures)
            self.ids_EBIT = [_wider(x, 1, pictures) for x in self.ids_EBIT]
            self.which_EBIT = [_wider(x, 1, pictures) for x in self.which_EBIT]
        if context > self.near_BVM.shape[2]:
            self.near_BVME, self.far_BVME = _wider(self.near_BVME, 2, context), _wider(self.far_BVME, 2, context)
            self.near_BVM, self.far_BVM = _wider(self.near_BVM, 2, context), _wider(self.far_BVM, 2, context)

    def step(self) -> torch.Tensor:
        """One step of every active concept: K pictures each, one pass for all."""
        settings, model = self.settings, self.model
        B, K = self.slots, settings.pictures
        picture_BK = torch.zeros((B, K), dtype=torch.long)
        t_BK = torch.zeros((B, K), dtype=torch.long)
        noise_BKCHW = torch.zeros((B, K, *self.latent_shape))
        active = self.active_B.tolist()
        for b, slot in enumerate(self.held):
            if slot is not None and active[b]:
                drawn = draw(
                    settings,
                    self.seed,
                    slot.row["id"],
                    slot.step,
                    slot.prepared.with_I,
                    self.latent_shape,
                    self.loss.timesteps,
                )
                picture_BK[b], t_BK[b], noise_BKCHW[b] = drawn.picture_K, drawn.t_K, drawn.noise_KCHW
        picture_BK, t_BK, noise_BKCHW = (x.to(model.device) for x in (picture_BK, t_BK, noise_BKCHW))
        loss_B, context_B = self._losses(picture_BK, t_BK, noise_BKCHW)
        total = torch.where(self.active_B, loss_B + settings.context_weight * context_B, 0.0).sum()
        (grad_BVE,) = torch.autograd.grad(total, self.v_BVE)
        self.optimiser.step(grad_BVE, self.active_B)
        self.sums_2B += torch.stack([loss_B, context_B]).detach()
        ended = []
        for b, slot in enumerate(self.held):
            if slot is not None and active[b]:
                slot.step += 1
                if slot.step % settings.window == 0:
                    ended.append(b)
        self._close_windows(ended)
        if self.checkpoints and time.monotonic() - self.saved > self.checkpoint_seconds:
            self.save()
        return self.loaded_B & ~self.active_B

    def _losses(
        self, picture_BK: torch.Tensor, t_BK: torch.Tensor, noise_BKCHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        B, K = picture_BK.shape
        rows_B1 = torch.arange(B, device=picture_BK.device)[:, None]
        z, noise = self.z_BICHW[rows_B1, picture_BK].flatten(0, 1), noise_BKCHW.flatten(0, 1)
        t = t_BK.flatten()
        v = self.v_BVE[:, None].expand(-1, K, -1, -1).flatten(0, 1)
        ids = [x[rows_B1, picture_BK].flatten(0, 1) for x in self.ids_EBIT]
        which = [x[rows_B1, picture_BK].flatten(0, 1) for x in self.which_EBIT]
        condition, pooled = encode(self.encoders, ids, which, v)
        loss_B = self.loss(z, noise, t, condition, pooled).view(B, K).mean(1)
        if self.settings.context == "none":
            return loss_B, torch.zeros_like(loss_B)
        widths = [e.width for e in self.encoders]
        context = [
            context_loss(own, near, far, self.near_BVM, self.far_BVM, self.settings.context, self.settings.temperature)
            for own, near, far in zip(
                *(x.split(widths, -1) for x in (self.v_BVE, self.near_BVME, self.far_BVME)), strict=True
            )
        ]
        return loss_B, torch.stack(context).sum(0)

    def _close_windows(self, ended: Sequence[int]) -> None:
        """Write the curve of the concepts whose window ends here, and ask the stopping rule."""
        if not ended:
            return
        ended_B = torch.zeros_like(self.active_B)
        ended_B[list(ended)] = True
        means_2B = self.sums_2B / self.settings.window
        self.sums_2B = torch.where(ended_B, 0.0, self.sums_2B)
        objective_B = means_2B[0] + self.settings.context_weight * means_2B[1]
        means, norms = means_2B.tolist(), self.v_BVE.detach().norm(dim=-1).tolist()
        for b in ended:
            slot = self._slot(b)
            words = len(slot.prepared.words)
            slot.curve.append(
                {"step": slot.step, "loss": means[0][b], "context": means[1][b], "norms": norms[b][:words]}
            )
        self.active_B &= ~self.stopper.update(objective_B, ended_B)

    def unload(self, slots: Sequence[int]) -> list[Row]:
        rows = []
        for b in slots:
            slot = self._slot(b)
            reason = REASONS[int(self.stopper.reason_B[b])]
            row = {k: v for k, v in slot.row.items() if k != "prepared"}
            if slot.checkpoint:
                self._save(b)
            if reason == "diverged":
                rows.append(
                    failed(
                        row,
                        f"concept {slot.prepared.concept.name}: the loss is not finite; lower lr ({self.settings.lr})",
                    )
                )
            else:
                rows.append(ok(row, **self._outputs(b, slot, reason)))
            self.held[b] = None
            self.active_B[b] = self.loaded_B[b] = False
        return rows

    def _outputs(self, b: int, slot: Slot, reason: str) -> Row:
        concept, last = slot.prepared.concept, slot.curve[-1]
        vectors = self.v_BVE[b].detach().cpu().numpy().copy()
        start = slot.prepared.start_VE.norm(dim=-1).tolist()
        return {
            "name": concept.name,
            "phrase": concept.phrase,
            "tokens": json.dumps(list(slot.prepared.words)),
            "words": json.dumps([*concept.words, *(s.name for s in concept.subjects)]),
            "embeddings": vectors,
            "norms": json.dumps(last["norms"]),
            "start_norms": json.dumps(start),
            "loss": last["loss"],
            "context_loss": last["context"],
            "steps": slot.step,
            "stopped": reason,
            "seconds": slot.seconds + time.monotonic() - slot.began,
            "curve": json.dumps(slot.curve),
            "pictures": len(slot.prepared.z_ICHW),
            "settings": json.dumps(asdict(self.settings) | {"templates": vars(concept.templates), "seed": self.seed}),
            "training": sheet(slot.prepared.thumbnails, columns=min(8, len(slot.prepared.thumbnails))),
        }

    def _slot(self, b: int) -> Slot:
        slot = self.held[b]
        if slot is None:
            raise RuntimeError(f"slot {b} holds no concept")
        return slot

    # --- checkpoints

    def _checkpoint_path(self, row: Row, prepared: Prepared) -> str | None:
        """A file whose name changes with all that the learned words depend on."""
        if not self.checkpoints:
            return None
        said = [row["id"], self.seed, asdict(self.settings), prepared.words, self.width, prepared.with_I.tolist()]
        digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=16)
        for tensor in (
            prepared.z_ICHW,
            prepared.start_VE,
            *prepared.ids_EIT,
            *prepared.which_EIT,
            *prepared.positive,
            *prepared.negative,
        ):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return f"{self.checkpoints.rstrip('/')}/{prepared.concept.name}-{digest.hexdigest()}.safetensors"

    def save(self) -> None:
        """Write a checkpoint of every concept in flight."""
        for b, slot in enumerate(self.held):
            if slot is not None and slot.checkpoint:
                self._save(b)
        self.saved = time.monotonic()

    def _save(self, b: int) -> None:
        slot = self._slot(b)
        tensors = {
            "v": self.v_BVE[b],
            "first": self.optimiser.first[b],
            "second": self.optimiser.second[b],
            "sums": self.sums_2B[:, b],
            "stopper": torch.stack([x[b].double() for x in self._stopper_state()]),
        }
        seconds = slot.seconds + time.monotonic() - slot.began
        write_checkpoint(slot.checkpoint or "", tensors, {"step": slot.step, "seconds": seconds, "curve": slot.curve})

    def _restore(self, b: int) -> None:
        slot = self._slot(b)
        found = read_checkpoint(slot.checkpoint) if slot.checkpoint else None
        if found is None:
            return
        tensors, meta = found
        tensors = {name: tensor.to(self.model.device) for name, tensor in tensors.items()}
        slot.step, slot.seconds, slot.curve = meta["step"], meta["seconds"], meta["curve"]
        self.v_BVE[b] = tensors["v"]
        self.optimiser.first[b], self.optimiser.second[b] = tensors["first"], tensors["second"]
        self.optimiser.steps_B[b] = slot.step
        self.sums_2B[:, b] = tensors["sums"]
        for state_B, value in zip(self._stopper_state(), tensors["stopper"], strict=True):
            state_B[b] = value.to(state_B.dtype)
        self.active_B[b] = self.stopper.reason_B[b] == RUNNING

    def _stopper_state(self) -> tuple[torch.Tensor, ...]:
        stopper = self.stopper
        return stopper.steps_B, stopper.best_B, stopper.mark_B, stopper.stalled_B, stopper.reason_B


def _wider(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The tensor with zeros appended along one dimension (-1 would do as well: nothing reads them)."""
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


COLUMNS = (
    Column("name", "string", doc="the concept's name as it stands in its tokens"),
    Column("phrase", "string", doc="the concept as it is written in a prompt"),
    Column("tokens", "json", doc="the new words, in the order of `embeddings`; subjects last"),
    Column("words", "json", doc="what each of them stands for"),
    Column("norms", "json", doc="norm of each embedding"),
    Column("start_norms", "json", doc="norm of the word it started from"),
    Column("loss", "float64", doc="noise-prediction loss, mean over the last window"),
    Column("context_loss", "float64", doc="context loss, mean over the last window"),
    Column("steps", "int64"),
    Column("stopped", "string", doc="limit, or stalled"),
    Column("seconds", "float64", doc="time in its slot"),
    Column("pictures", "int64", doc="training pictures"),
    Column("curve", "json", doc="step, losses and norms at the end of each window"),
    Column("settings", "json"),
    Column("training", "image", doc="the training pictures, subject by subject, those with the concept first"),
)
"""What `LearnConcepts` adds to a row, beside ``embeddings``, whose shape depends on the model."""


@dataclass(frozen=True)
class Samples:
    """Pictures of learned concepts on new subjects, drawn when a concept is finished.

    Attributes:
        subjects: Nouns that take the subject's place.
        prompt: ``{subject}`` and ``{concept}`` are filled in; the concept's own prompt when None.
        count: Pictures a subject.
        steps, guidance: Of the sampler.
    """

    subjects: tuple[str, ...]
    prompt: str | None = None
    count: int = 2
    steps: int = 30
    guidance: float = 7.5


class LearnConcepts:
    """Stage: rows of a concept table -> rows with the concept's word embeddings.

    Args:
        model: Folder or hub id of a Stable Diffusion 1.x, 2.x or XL model.
        revision, variant: Of the hub repository.
        dtype: Of the frozen networks; the words are float32.
        device: Where it runs; ``auto`` takes the GPU where there is one.
        size: Side of the training pictures in pixels; the model's own when None.
        settings: Fields of `LegoSettings`.
        templates: Fields of `Templates`.
        slots: Concepts in one batch.
        max_words: Most new words a concept has, subjects included.
        samples: Fields of `Samples`; None: no sample pictures.
        inverter: Folder of a trained inverter that gives each word a start near what its pictures invert to.
        inverter_steps: Steps of the text encoder alone that move the words there.
        seed: The job's seed.
        root: Folder that relative picture addresses start from.
        checkpoints: Folder for checkpoints of concepts in flight; None: no checkpoints.
        checkpoint_seconds: Time between two of them.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        size: int | None = None,
        settings: dict[str, Any] | None = None,
        templates: dict[str, str] | None = None,
        slots: int = 8,
        max_words: int = 4,
        samples: dict[str, Any] | None = None,
        inverter: str | None = None,
        inverter_steps: int = 200,
        seed: int = 0,
        root: str = "",
        checkpoints: str | None = None,
        checkpoint_seconds: float = 120.0,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings, self.templates = LegoSettings(**(settings or {})), Templates(**(templates or {}))
        self.samples = None if samples is None else Samples(**samples)
        self.seed = seed
        self.size, self.root = read_geometry(model, revision=revision, size=size).size, root
        self.model = LatentDiffusion.load(
            model, revision=revision, variant=variant, dtype=dtype, device=device, size=size
        )
        self.problem = LegoProblem(
            self.model,
            self.settings,
            size=self.size,
            slots=slots,
            max_words=max_words,
            seed=seed,
            checkpoints=checkpoints,
            checkpoint_seconds=checkpoint_seconds,
        )
        self.inverter = None if inverter is None else TextInverter.load(inverter, self.model.device)
        self.inverter_steps = inverter_steps
        self.occupancy = Occupancy()

    @staticmethod
    def describe(
        model: str, *, revision: str | None = None, size: int | None = None, max_words: int = 4, **others: Any
    ) -> StageInfo:
        """Columns, models and metadata, from configurations alone."""
        geometry = read_geometry(model, revision=revision, size=size)
        widths = encoder_widths(model, geometry.kind, revision)
        LegoSettings(**(others.get("settings") or {}))
        embeddings = Column("embeddings", "tensor", (max_words, sum(widths)), doc="a row a token, zeros after the last")
        drawn = Column("samples", "image", doc="the concept on new subjects, a row a subject")
        return StageInfo(
            columns=(*COLUMNS, embeddings, *([drawn] if others.get("samples") else [])),
            models=describe_stable_diffusion(model, geometry.kind, revision),
            metadata={
                "scheduler": json.dumps(dict(geometry.scheduler)),
                "vae_scaling_factor": str(geometry.scaling_factor),
                "encoder_widths": json.dumps(widths),
            },
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        self.problem.resize(self.problem.slots)  # an earlier call may have ended in the middle
        for row in solve(self.problem, (self._prepare(row) for row in rows), occupancy=self.occupancy):
            yield row if self.samples is None or row["status"] == "failed" else {**row, "samples": self._sample(row)}

    def shrink(self) -> bool:
        """Half the slots, after the device ran out of memory."""
        if self.problem.slots == 1:
            return False
        self.problem.resize(self.problem.slots // 2)
        return True

    def _sample(self, row: Row) -> Image:
        """A sheet of the finished concept on new subjects: a row a subject."""
        samples = self.samples
        assert samples is not None
        prompt = samples.prompt or json.loads(row["settings"])["templates"]["with_"]
        prompts = [
            prompt.format(subject=s, concept=row["phrase"]) for s in samples.subjects for _ in range(samples.count)
        ]
        words = json.loads(row["tokens"])
        made = generate(
            self.model,
            prompts,
            words,
            torch.from_numpy(row["embeddings"][: len(words)]),
            seeds=[row_seed(self.seed, row["id"], f"sample {number}") for number in range(len(prompts))],
            steps=samples.steps,
            guidance=samples.guidance,
            size=self.size,
        )
        return sheet(made, columns=samples.count)

    def _prepare(self, row: Row) -> Row:
        if row.get("status") == "failed":
            return row
        try:
            prepared = prepare(
                row,
                self.model,
                self.settings,
                self.templates,
                size=self.size,
                max_words=self.problem.max_words,
                root=self.root,
            )
        except ConceptError as error:
            return failed(row, str(error))
        if self.inverter is not None:
            prepared.start_VE = warm_start(
                self.problem.encoders,
                self.inverter,
                prepared.z_ICHW,
                prepared.ids_EIT,
                prepared.which_EIT,
                prepared.start_VE,
                steps=self.inverter_steps,
                lr=self.settings.lr,
            )
        return {**row, "prepared": prepared}


def encoder_widths(model: str, kind: str, revision: str | None = None) -> list[int]:
    """Width of each text encoder's input embeddings, from the configurations of a diffusers folder or hub id."""
    from transformers import CLIPTextConfig

    folders = ["text_encoder", "text_encoder_2"] if kind == "sdxl" else ["text_encoder"]
    configs = [CLIPTextConfig.from_pretrained(model, subfolder=folder, revision=revision) for folder in folders]
    return [int(config.hidden_size) for config in configs]
