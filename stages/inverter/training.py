"""Training of an inverter on pictures that the frozen model drew from known prompts.

Legend: M pictures in all, B of a batch, C H W latents, T text positions, K width of the text condition, P width of the
pooled condition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.engine.checkpoint import read_checkpoint, write_checkpoint
from stages.engine.gradients import loss_scale
from stages.engine.randomness import row_generator, row_seed
from stages.inverter.model import InverterShape, TextInverter
from stages.inverter.settings import Training
from stages.models.denoising_loss import DenoisingLoss
from stages.models.latent import LatentModel

CHUNK = 64
"""Prompts or pictures in one pass where nothing is learned."""
STANDARD = 512
"""Prompts whose text latents give mean and deviation."""


@dataclass(frozen=True)
class Pairs:
    """Pictures that a model drew, and the prompts they were drawn from.

    Attributes:
        z_MCHW: Their latents, an array or a memory map.
        prompts: One a picture.
    """

    z_MCHW: np.ndarray
    prompts: Sequence[str]

    def latents(self, numbers: np.ndarray, device: torch.device) -> torch.Tensor:
        """z_BCHW of some of them, float32."""
        return torch.from_numpy(np.ascontiguousarray(self.z_MCHW[numbers])).float().to(device)

    def texts(self, numbers: np.ndarray) -> list[str]:
        """Their prompts."""
        return [self.prompts[number] for number in numbers]


def text_conditions(model: LatentModel, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the frozen text encoder makes of prompts: (B, T, K), and (B, P) for SDXL, float32."""
    condition = model.condition(prompts)
    pooled = condition.get("pooled_BE")
    return condition["text_BLE"].float(), None if pooled is None else pooled.float()


def split(count: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the held-out pictures, a fixed random choice.

    Raises:
        ValueError: Too few: one text latent alone has no deviation, and would train an inverter of NaN.
    """
    order = np.random.default_rng([seed, count]).permutation(count)
    held = max(1, round(count * held_out))
    if count - held < 2:
        raise ValueError(f"{count} pictures are too few to train on: at least 2 beside the {held} held out are needed")
    return np.sort(order[held:]), np.sort(order[:held])


def warm_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: 5 % of the steps rise, the rest falls along a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def train_inverter(
    model: LatentModel,
    pairs: Pairs,
    shape: InverterShape,
    settings: Training,
    *,
    seed: int,
    checkpoint: str | None = None,
    checkpoint_seconds: float = 120.0,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[TextInverter, dict[str, Any]]:
    """Train an inverter; goes on from the checkpoint where there is one.

    The loss is the error of the text latents plus, with a small weight, the frozen model's noise-prediction loss under
    the inverted ones (ours).

    Args:
        model: The frozen model that drew the pictures.
        pairs: Its pictures.
        shape: Of the inverter.
        settings: See there.
        seed: Everything random is drawn from (seed, step).
        checkpoint: File of the checkpoint.
        checkpoint_seconds: Time between two of them.
        report: Takes a line of progress about every twentieth of the way.

    Returns:
        The inverter, and its measures on the held-out pictures with the training curve (JSON-able).
    """
    torch.manual_seed(row_seed(seed, "inverter", "weights"))
    inverter = TextInverter(shape).to(model.device)
    trained, held = split(len(pairs.prompts), settings.held_out, seed)
    _standardise(inverter, model, pairs, trained, seed)
    noise_loss = DenoisingLoss(model)
    optimiser = torch.optim.AdamW(inverter.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    # One scale for the batch's one loss: a step whose gradient overflows is skipped, as its kind does.
    scale = loss_scale(model.dtypes.values())
    scaler = torch.amp.GradScaler(model.device.type, init_scale=scale or 1.0, enabled=scale is not None)
    first, curve = _resume(checkpoint, inverter, optimiser, scaler)
    saved = time.monotonic()
    model.rooms["training"].relief = model.rooms["gradient"].relief
    inverter.train()
    for step in range(first, settings.steps):
        generator = row_generator(seed, "inverter", f"step {step}")
        chosen = trained[torch.randint(len(trained), (settings.batch_size,), generator=generator).numpy()]
        batch = _Batch.of(pairs, chosen, settings.noise_rows, noise_loss.timesteps, generator)
        errors, gradients = _gradients(model, inverter, noise_loss, batch, settings.noise_weight, scaler)
        for weight, gradient in zip(inverter.parameters(), gradients, strict=True):
            weight.grad = gradient
        for group in optimiser.param_groups:  # PyTorch's schedulers warn of every step that is skipped or resumed from
            group["lr"] = settings.lr * warm_cosine(step, settings.steps)
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update()
        if (step + 1) % max(1, settings.steps // 20) == 0 or step + 1 == settings.steps:
            curve.append({"step": step + 1, "error": errors[0].item(), "noise_loss": errors[1].item()})
            report(f"inverter: step {step + 1} of {settings.steps}, error {curve[-1]['error']:.4f}")
        if checkpoint and time.monotonic() - saved > checkpoint_seconds:
            _keep(checkpoint, inverter, optimiser, scaler, step + 1, curve)
            saved = time.monotonic()
    if checkpoint:
        _keep(checkpoint, inverter, optimiser, scaler, settings.steps, curve)
    inverter.eval().requires_grad_(False)
    return inverter, measure(model, inverter, pairs, held) | {"curve": curve, "trained_on": len(trained)}


@dataclass(frozen=True)
class _Batch:
    """Some of the pictures, on the host, and what is drawn for the first R of them.

    Attributes:
        prompts: B of them.
        t_R, noise_RCHW: Time and noise of the noise-prediction loss; R may be 0.
    """

    z_BCHW: torch.Tensor
    prompts: Sequence[str]
    t_R: torch.Tensor
    noise_RCHW: torch.Tensor

    @staticmethod
    def of(pairs: Pairs, chosen: np.ndarray, rows: int, timesteps: int, generator: torch.Generator) -> _Batch:
        z_BCHW = pairs.latents(chosen, torch.device("cpu"))
        rows = min(rows, len(z_BCHW))
        t_R = torch.randint(timesteps, (rows,), generator=generator)
        noise_RCHW = torch.randn((rows, *z_BCHW.shape[1:]), generator=generator)
        return _Batch(z_BCHW, pairs.texts(chosen), t_R, noise_RCHW)


def _gradients(
    model: LatentModel, inverter: TextInverter, noise_loss: DenoisingLoss, batch: _Batch, noise_weight: float,
    scaler: torch.amp.GradScaler,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:  # fmt: skip
    """(error, noise-prediction loss) of a batch, and the gradient of their weighted, scaled sum to each weight; in
    parts, each with its share in the means, where the device does not take the batch at once."""
    weights, count, noisy = [*inverter.parameters()], len(batch.prompts), len(batch.t_R)

    def work(part: slice) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        z_BCHW = batch.z_BCHW[part].to(model.device)
        text_BTK, pooled_BP = text_conditions(model, batch.prompts[part])
        guess_BTK, guess_BP = inverter(z_BCHW)
        error = len(z_BCHW) / count * _standard_error(inverter, guess_BTK, text_BTK, guess_BP, pooled_BP)
        noise, rows = torch.zeros((), device=model.device), max(0, min(part.stop, noisy) - part.start)
        if rows:
            own = slice(part.start, part.start + rows)
            loss_R = noise_loss(
                z_BCHW[:rows], batch.noise_RCHW[own].to(model.device), batch.t_R[own].to(model.device),
                guess_BTK[:rows], None if guess_BP is None else guess_BP[:rows],
            )  # fmt: skip
            noise = rows / noisy * loss_R.mean()
        total = scaler.scale(error + noise_weight * noise)
        return torch.stack([error.detach(), noise.detach()]), torch.autograd.grad(total, weights, allow_unused=True)

    parts = list(model.rooms["training"].parts(count, work))
    slopes = zip(*(slopes for _, slopes in parts), strict=True)
    return torch.stack([errors for errors, _ in parts]).sum(0), [_added(own) for own in slopes]


def _added(slopes: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of the parts' gradients to one weight; None: no part depends on it."""
    there = [slope for slope in slopes if slope is not None]
    return sum(there[1:], there[0]) if there else None


def _standard_error(
    inverter: TextInverter,
    guess_BTK: torch.Tensor,
    text_BTK: torch.Tensor,
    guess_BP: torch.Tensor | None,
    pooled_BP: torch.Tensor | None,
) -> torch.Tensor:
    """Mean squared error in units of the training latents' variance: 1 for the mean latent."""
    error = ((guess_BTK - text_BTK) / inverter.std_TK).square().mean()
    if guess_BP is None or pooled_BP is None:
        return error
    return error + ((guess_BP - pooled_BP) / inverter.std_P).square().mean()


@torch.no_grad()
def _standardise(inverter: TextInverter, model: LatentModel, pairs: Pairs, trained: np.ndarray, seed: int) -> None:
    """Mean and deviation of each number of the text latent over some hundred training prompts."""
    some = np.random.default_rng([seed, 1]).choice(trained, min(len(trained), STANDARD), replace=False)
    room = model.rooms["texts"]
    parts = list(room.parts(len(some), lambda part: text_conditions(model, pairs.texts(some[part])), CHUNK))
    text = torch.cat([part[0] for part in parts]).double()
    # The start token's latent never changes: a floor keeps it from being divided by nothing.
    floor = 0.05 * text.std(0).mean().clamp(min=1e-6)
    inverter.mean_TK.copy_(text.mean(0))
    inverter.std_TK.copy_(text.std(0, unbiased=False).clamp(min=float(floor)))
    if inverter.shape.pooled:
        pooled = torch.cat([part[1] for part in parts if part[1] is not None]).double()
        inverter.mean_P.copy_(pooled.mean(0))
        inverter.std_P.copy_(pooled.std(0, unbiased=False).clamp(min=1e-4))


@torch.no_grad()
def measure(model: LatentModel, inverter: TextInverter, pairs: Pairs, held: np.ndarray) -> dict[str, float]:
    """Error and cosine of the text latents of held-out pictures, beside those of the mean latent."""

    def summed(part: slice) -> np.ndarray:
        chosen, sums = held[part], np.zeros(5)
        z_BCHW = pairs.latents(chosen, model.device)
        text, _ = text_conditions(model, pairs.texts(chosen))
        mean = inverter.mean_TK.expand_as(text)
        for place, guess in ((0, inverter(z_BCHW)[0]), (2, mean)):
            sums[place] += float((guess - text).square().mean((1, 2)).sum())
            # Of the departures from the mean: raw cosines are all near one, for every latent shares its large numbers.
            sums[place + 1] += float(torch.cosine_similarity((guess - mean).flatten(1), (text - mean).flatten(1)).sum())
        sums[4] += len(chosen)
        return sums

    mse, cosine, mean_mse, _, count = sum(model.rooms["measured"].parts(len(held), summed, CHUNK), np.zeros(5))
    return {
        "held_out": int(count),
        "mse": mse / count,
        "cosine": cosine / count,
        "mean_latent_mse": mean_mse / count,
        "explained": 1 - mse / mean_mse if mean_mse else 0.0,
    }


# --- checkpoints


def _keep(
    path: str, inverter: TextInverter, optimiser: torch.optim.AdamW, scaler: torch.amp.GradScaler, step: int,
    curve: list[dict[str, Any]],
) -> None:  # fmt: skip
    tensors = {f"model.{name}": tensor for name, tensor in inverter.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    write_checkpoint(path, tensors, {"step": step, "curve": curve, "scaler": scaler.state_dict()})


def _resume(
    path: str | None, inverter: TextInverter, optimiser: torch.optim.AdamW, scaler: torch.amp.GradScaler
) -> tuple[int, list[dict[str, Any]]]:
    found = read_checkpoint(path) if path else None
    if found is None:
        return 0, []
    tensors, meta = found
    inverter.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("adam."):
            _, number, name = key.split(".")
            states.setdefault(int(number), {})[name] = tensor
    plain = optimiser.state_dict()
    optimiser.load_state_dict({"state": states, "param_groups": plain["param_groups"]})
    if meta.get("scaler"):  # none in checkpoints of before
        scaler.load_state_dict(meta["scaler"])
    return meta["step"], meta["curve"]
