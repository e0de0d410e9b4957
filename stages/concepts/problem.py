"""Lego at scale: many concepts learn their words at once in the batches of one frozen diffusion model.

A slot of the solver is a concept: it owns rows of the token table, an optimiser state, random numbers and a stopping
rule. All slots share every pass through text encoder and U-Net. Method: Lego (Motamed, Paudel and Van Gool, ECCV 2024):
subject separation, one token a content word, context loss. Batching, stopping, checkpoints and hyperparameters: ours.

Legend: B slots (b of them learning), K pictures a slot and step, I training pictures, F forms and P prompts of each
(`stages.concepts.prepare`), V new words, M context words, E width of a word over all encoders, T text positions, C H W
latents.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.contract import Row, failed, ok
from stages.concepts.columns import filled
from stages.concepts.draws import Draw, draw
from stages.concepts.losses import context_loss
from stages.concepts.prepare import Prepared
from stages.concepts.settings import LegoSettings
from stages.concepts.templates import texts
from stages.engine.adamw import RowAdamW
from stages.engine.checkpoint import read_checkpoint, write_checkpoint
from stages.engine.device import sent
from stages.engine.gradients import RowGradient, loss_scale
from stages.engine.slots import slot_mask
from stages.engine.stopping import REASONS, RUNNING, StoppingRule
from stages.models.denoising_loss import DenoisingLoss
from stages.models.latent import LatentModel
from stages.models.words import encode


@dataclass
class Slot:
    """A concept in flight.

    Attributes:
        checkpoint: File of its checkpoint; None: it has none.
        step: Steps made.
        began: Clock when it came into its slot.
        seconds: Spent in slots of earlier processes.
        curve: Step, losses and norms at the end of each window.
    """

    row: Row
    prepared: Prepared
    checkpoint: str | None
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spent(self) -> float:
        """Seconds in slots, of this process and of those before it."""
        return self.seconds + time.monotonic() - self.began


class LegoProblem:
    """The solver's view: one variable v_BVE, one pass of the frozen model for all slots.

    Rows come in with their `Prepared` under the key ``prepared``.

    Args:
        model: Frozen; gradients flow through it to the words.
        settings: See there.
        slots: Concepts in one batch (B).
        max_words: Most new words a concept has (V).
        seed: The job's seed.
        checkpoints: Folder for checkpoints of concepts in flight; None: no checkpoints.
        checkpoint_seconds: Time between two of them.
    """

    def __init__(
        self,
        model: LatentModel,
        settings: LegoSettings,
        *,
        slots: int,
        max_words: int,
        seed: int,
        checkpoints: str | None = None,
        checkpoint_seconds: float = 120.0,
    ) -> None:
        self.model, self.settings, self.seed, self.max_words = model, settings, seed, max_words
        self.checkpoints, self.checkpoint_seconds = checkpoints, checkpoint_seconds
        self.loss = DenoisingLoss(model)
        self.encoders = model.text_encoders
        self.latent_shape = model.geometry.latent_shape
        self.width = sum(model.geometry.word_widths)
        self.resize(slots)

    def resize(self, slots: int) -> None:
        """Forget all rows and allocate for so many slots (their checkpoints stay)."""
        device, B, V, E = self.model.device, slots, self.max_words, self.width
        self.slots = slots
        self.held: list[Slot | None] = [None] * B
        self.v_BVE = torch.zeros((B, V, E), device=device, requires_grad=True)
        self.gradient = RowGradient(B, loss_scale(self.model.dtypes.values()), device)
        self.optimiser = RowAdamW(self.v_BVE, self.settings.lr, weight_decay=0.0)
        rule = StoppingRule(
            limit=self.settings.steps // self.settings.window,
            relative=self.settings.tolerance,
            patience=self.settings.patience,
        )
        self.stopper = rule.start(B, device)  # its steps are windows
        self.sums_2B = torch.zeros((2, B), device=device)  # of the window: noise-prediction loss, context loss
        self.active_B = torch.zeros(B, dtype=torch.bool, device=device)  # still learning
        self.learning: list[int] = []  # these, as the host knows them: it changes where windows end alone
        self.loaded_B = torch.zeros(B, dtype=torch.bool, device=device)
        F, P = 2 if self.settings.flip else 1, len(texts(self.settings.templates) or "1")
        self.z_BIFCHW = torch.zeros((B, 1, F, *self.latent_shape), device=device)
        self.std_BIFCHW = torch.zeros_like(self.z_BIFCHW) if self.settings.posterior == "sample" else None
        lengths = [e.tokenizer.model_max_length for e in self.encoders]
        self.ids_EBIPT = [torch.zeros((B, 1, P, T), dtype=torch.long, device=device) for T in lengths]
        self.which_EBIPT = [torch.full((B, 1, P, T), -1, dtype=torch.long, device=device) for T in lengths]
        self.near_BVME, self.far_BVME = (torch.zeros((B, V, 1, E), device=device) for _ in "+-")
        self.near_BVM, self.far_BVM = (torch.zeros((B, V, 1), dtype=torch.bool, device=device) for _ in "+-")
        self.saved = time.monotonic()

    # --- concepts in and out

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            self._load(slot, row)

    @torch.no_grad()
    def _load(self, b: int, row: Row) -> None:
        prepared: Prepared = row["prepared"]
        pictures = len(prepared.with_I)
        self._widen(pictures, max([1, *(len(words) for words in prepared.positive + prepared.negative)]))
        self.z_BIFCHW[b, :pictures] = prepared.z_IFCHW
        if self.std_BIFCHW is not None and prepared.std_IFCHW is not None:
            self.std_BIFCHW[b, :pictures] = prepared.std_IFCHW
        given = prepared.ids_EIPT + prepared.which_EIPT
        for target, source in zip(self.ids_EBIPT + self.which_EBIPT, given, strict=True):
            target[b, :pictures] = source
        for words_BVME, present_BVM, side in (
            (self.near_BVME, self.near_BVM, prepared.positive),
            (self.far_BVME, self.far_BVM, prepared.negative),
        ):
            present_BVM[b] = False
            for number, words_ME in enumerate(side):
                words_BVME[b, number, : len(words_ME)] = words_ME
                present_BVM[b, number, : len(words_ME)] = True
        self.v_BVE[b] = 0
        self.v_BVE[b, : len(prepared.start_VE)] = prepared.start_VE
        self.gradient.reset([b])
        self.optimiser.reset([b])
        self.stopper.reset([b])
        self.sums_2B[:, b] = 0
        self.active_B[b] = self.loaded_B[b] = True
        self.held[b] = Slot(row, prepared, self._checkpoint_file(row, prepared))
        self._restore(b)
        if self.active_B[b]:
            self.learning = sorted([*self.learning, b])

    def _widen(self, pictures: int, context: int) -> None:
        """Room for this many training pictures and context words: these tensors never enter a network whole."""
        if pictures > self.z_BIFCHW.shape[1]:
            self.z_BIFCHW = _wider(self.z_BIFCHW, 1, pictures)
            if self.std_BIFCHW is not None:
                self.std_BIFCHW = _wider(self.std_BIFCHW, 1, pictures)
            self.ids_EBIPT = [_wider(x, 1, pictures) for x in self.ids_EBIPT]
            self.which_EBIPT = [_wider(x, 1, pictures) for x in self.which_EBIPT]
        if context > self.near_BVM.shape[2]:
            self.near_BVME, self.far_BVME = _wider(self.near_BVME, 2, context), _wider(self.far_BVME, 2, context)
            self.near_BVM, self.far_BVM = _wider(self.near_BVM, 2, context), _wider(self.far_BVM, 2, context)

    def unload(self, slots: Sequence[int]) -> list[Row]:
        rows = []
        for b in slots:
            slot = self._slot(b)
            if slot.checkpoint:
                self._save(b)
            rows.append(self._finished(b, slot))
            self.held[b] = None
            self.active_B[b] = self.loaded_B[b] = False
        self.learning = [b for b in self.learning if b not in slots]
        return rows

    def _finished(self, b: int, slot: Slot) -> Row:
        row = {k: v for k, v in slot.row.items() if k != "prepared"}
        reason = REASONS[int(self.stopper.reason_B[b])]
        if reason == "diverged":
            name = slot.prepared.concept.name
            return failed(row, f"concept {name}: the loss is not finite; lower lr ({self.settings.lr})")
        outputs = filled(
            slot.prepared, self.v_BVE[b], slot.curve, settings=self.settings, seed=self.seed, stopped=reason,
            seconds=slot.spent,
        )  # fmt: skip
        return ok(row, **outputs)

    def _slot(self, b: int) -> Slot:
        slot = self.held[b]
        if slot is None:
            raise RuntimeError(f"slot {b} holds no concept")
        return slot

    # --- a step

    def step(self) -> torch.Tensor:
        """One step of every active concept: K pictures each, one pass for all."""
        learning = self.learning
        if not learning:  # all were restored from checkpoints of their last step
            return self.loaded_B & ~self.active_B
        loss_B, context_B = self.losses(learning, self._draws(learning))
        total_B = loss_B + self.settings.context_weight * context_B
        grad_BVE, skip_B = self.gradient(total_B, self.v_BVE, self.active_B)
        self.optimiser.step(grad_BVE, self.active_B & ~skip_B)
        self.sums_2B += torch.stack([loss_B, context_B]).detach()
        for b in learning:
            self._slot(b).step += 1
        self._close_windows([b for b in learning if self._slot(b).step % self.settings.window == 0])
        if self.checkpoints and time.monotonic() - self.saved > self.checkpoint_seconds:
            self.save()
        return self.loaded_B & ~self.active_B

    def quiet(self) -> int:
        """See `stages.engine.solver.Problem`: a concept ends where its window does."""
        loaded = [slot for slot in self.held if slot is not None]
        if len(self.learning) < len(loaded):  # restored from a checkpoint of its last step
            return 1
        return min(self.settings.window - slot.step % self.settings.window for slot in loaded)

    def _draws(self, learning: Sequence[int]) -> list[Draw]:
        """The random numbers of this step, of these slots."""
        drawn = []
        for b in learning:
            slot = self._slot(b)
            drawn.append(
                draw(
                    self.settings, self.seed, slot.row["id"], slot.step, slot.prepared.with_I, self.latent_shape,
                    self.loss.timesteps,
                )
            )  # fmt: skip
        return drawn

    def losses(self, slots: Sequence[int], drawn: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise-prediction loss, mean over a slot's K pictures, and context loss: loss_B and context_B.

        Args:
            slots: Those that are asked for (b of them); the networks are not shown the others, whose losses are zero.
            drawn: Their random numbers.
        """
        b, K, device = len(slots), self.settings.pictures, self.model.device

        def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return sent(torch.stack(list(parts)), device).flatten(0, 1)

        slot_b = sent(slots, device)
        slot, picture = slot_b.repeat_interleave(K), stacked([one.picture_K for one in drawn])
        template, flip = stacked([one.template_K for one in drawn]), stacked([one.flip_K for one in drawn])
        ids, which = ([x[slot, picture, template] for x in side] for side in (self.ids_EBIPT, self.which_EBIPT))
        v = self.v_BVE[slot_b, None].expand(-1, K, -1, -1).flatten(0, 1)
        text, pooled = encode(self.encoders, ids, which, v)
        z = self.z_BIFCHW[slot, picture, flip]
        if self.std_BIFCHW is not None:
            place = [one.posterior_KCHW for one in drawn if one.posterior_KCHW is not None]
            z = z + self.std_BIFCHW[slot, picture, flip] * stacked(place)
        noise, t = stacked([one.noise_KCHW for one in drawn]), stacked([one.t_K for one in drawn])
        loss = self.loss(z, noise, t, text, pooled)
        loss_B = loss.new_zeros(self.slots).index_copy(0, slot_b, loss.view(b, K).mean(1))
        asked_B = slot_mask(self.slots, slots, loss_B.device)
        return loss_B, torch.where(asked_B, self._context(loss_B), 0.0)

    def _context(self, like_B: torch.Tensor) -> torch.Tensor:
        """context_B, summed over the encoders: each holds vectors of its own for a word."""
        form, temperature = self.settings.context, self.settings.temperature
        if form == "none":
            return torch.zeros_like(like_B)
        parts = (x.split(self.model.geometry.word_widths, -1) for x in (self.v_BVE, self.near_BVME, self.far_BVME))
        costs = [
            context_loss(own, near, far, self.near_BVM, self.far_BVM, form, temperature)
            for own, near, far in zip(*parts, strict=True)
        ]
        return torch.stack(costs).sum(0)

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
            own = norms[b][: len(slot.prepared.tokens)]
            slot.curve.append({"step": slot.step, "loss": means[0][b], "context": means[1][b], "norms": own})
        self.active_B &= ~self.stopper.update(objective_B, ended_B)
        self.learning = [b for b, active in enumerate(self.active_B.tolist()) if active]

    # --- checkpoints

    def _checkpoint_file(self, row: Row, prepared: Prepared) -> str | None:
        """A file whose name changes with all that the learned words depend on."""
        if not self.checkpoints:
            return None
        settings = self.settings.model_dump()
        described = [row["id"], self.seed, settings, prepared.tokens, self.width, prepared.with_I.tolist()]
        if self.gradient.scale is not None:
            described.append(self.gradient.scale)
        digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
        for tensor in prepared.tensors():
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
        stopper = torch.stack([state_B[b].double() for state_B in self._stopper_state()])
        meta = {"step": slot.step, "seconds": slot.spent, "curve": slot.curve}
        write_checkpoint(slot.checkpoint or "", self._slot_state(b) | {"stopper": stopper}, meta)

    @torch.no_grad()
    def _restore(self, b: int) -> None:
        slot = self._slot(b)
        found = read_checkpoint(slot.checkpoint) if slot.checkpoint else None
        if found is None:
            return
        tensors, meta = found
        slot.step, slot.seconds, slot.curve = meta["step"], meta["seconds"], meta["curve"]
        self.optimiser.steps_B[b] = slot.step
        for name, state in self._slot_state(b).items():
            state.copy_(tensors[name])
        for state_B, value in zip(self._stopper_state(), tensors["stopper"], strict=True):
            state_B[b] = value.to(state_B.dtype)
        self.active_B[b] = self.stopper.reason_B[b] == RUNNING

    def _slot_state(self, b: int) -> dict[str, torch.Tensor]:
        """A slot's part of what changes while it learns: views, to be read and written."""
        state = {
            "v": self.v_BVE[b],
            "first": self.optimiser.first[b],
            "second": self.optimiser.second[b],
            "sums": self.sums_2B[:, b],
        }
        if self.gradient.scale is not None:  # a step that overflowed was no update
            state |= {"scale": self.gradient.scale_B[b], "updates": self.optimiser.steps_B[b]}
        return state

    def _stopper_state(self) -> tuple[torch.Tensor, ...]:
        stopper = self.stopper
        return stopper.steps_B, stopper.best_B, stopper.mark_B, stopper.stalled_B, stopper.reason_B


def _wider(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The tensor with zeros appended along one dimension (-1 would do as well: nothing reads them)."""
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
