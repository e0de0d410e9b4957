"""From a picture back to the text latent it was drawn from: a small transformer, trained on the model's own pictures.

A frozen text-to-image model draws pictures from known prompts; the inverter learns to give back the text encoder's
output from the picture's VAE latent. One pass a picture then gives a condition without a caption, and a start for new
words. Ours: summaries of Lego speak of such a module, the paper's figures don't show it.

Legend: B pictures, C H W latents, N patches, T text positions, K width of the text condition, P width of SDXL's pooled
condition (0 without), D width of the transformer, V new words, E their width over all encoders.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.contract import Column, Row, StageInfo, batches, failed, ok
from stages.engine.checkpoint import read_checkpoint, write_checkpoint
from stages.engine.randomness import row_generator, row_seed
from stages.models.denoising_loss import DenoisingLoss
from stages.models.fingerprint import describe_stable_diffusion
from stages.models.pictures import encode_pictures
from stages.models.unet import LatentDiffusion, read_geometry
from stages.models.words import Encoder, encode

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class InverterShape:
    """What an inverter maps from and to, and how large it is.

    Attributes:
        latent: (C, H, W) of the pictures' latents.
        text: (T, K) of the text condition.
        pooled: P; 0 where the model has no pooled condition.
        patch: Side of a patch in latent pixels.
        width, layers, heads: Of the transformer.
    """

    latent: tuple[int, int, int]
    text: tuple[int, int]
    pooled: int = 0
    patch: int = 2
    width: int = 256
    layers: int = 6
    heads: int = 8

    def __post_init__(self) -> None:
        if self.latent[1] % self.patch or self.latent[2] % self.patch:
            raise ValueError(f"patch {self.patch} does not divide latents of {self.latent[1]} x {self.latent[2]}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")


class TextInverter(nn.Module):
    """Patches of the latent and one query a text position go through a transformer; the queries become the text latent.

    What it predicts is standardised by the training latents' mean and deviation, which it keeps.
    """

    def __init__(self, shape: InverterShape) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape.latent
        patches = (height // shape.patch) * (width // shape.patch)
        self.patches = nn.Conv2d(channels, shape.width, shape.patch, stride=shape.patch)
        self.places = nn.Parameter(torch.randn(1, patches, shape.width) * 0.02)
        self.queries = nn.Parameter(torch.randn(1, shape.text[0] + (shape.pooled > 0), shape.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(shape.width), enable_nested_tensor=False)
        self.head = nn.Linear(shape.width, shape.text[1])
        self.pooled_head = nn.Linear(shape.width, shape.pooled) if shape.pooled else None
        self.mean_TK: torch.Tensor
        self.std_TK: torch.Tensor
        self.mean_P: torch.Tensor
        self.std_P: torch.Tensor
        for name, size in (("TK", shape.text), ("P", (shape.pooled,))):
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"std_{name}", torch.ones(size))

    def forward(self, z_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text condition (B, T, K), and the pooled one (B, P) where there is one."""
        seen_BND = self.patches(z_BCHW).flatten(2).transpose(1, 2) + self.places
        asked = self.queries.expand(len(z_BCHW), -1, -1)
        told = self.body(torch.cat([seen_BND, asked], 1))[:, seen_BND.shape[1] :]
        text_BTK = self.head(told[:, : self.shape.text[0]]) * self.std_TK + self.mean_TK
        if self.pooled_head is None:
            return text_BTK, None
        return text_BTK, self.pooled_head(told[:, -1]) * self.std_P + self.mean_P

    def save(self, folder: str) -> None:
        """Write config.json and model.safetensors into a folder, local or remote."""
        import fsspec
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        for name, data in ((CONFIG, json.dumps(asdict(self.shape)).encode()), (WEIGHTS, save(tensors))):
            filesystem, path = fsspec.core.url_to_fs(f"{folder.rstrip('/')}/{name}")
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            with filesystem.open(path, "wb") as file:
                file.write(data)

    @staticmethod
    def load(folder: str, device: torch.device | str = "cpu") -> TextInverter:
        """Read an inverter; a finished ``train-inverter`` output works as well as its ``inverter`` folder.

        Raises:
            ValueError: There is none.
        """
        import fsspec
        from safetensors.torch import load

        for place in (folder, f"{folder.rstrip('/')}/inverter"):
            filesystem, path = fsspec.core.url_to_fs(f"{place.rstrip('/')}/{WEIGHTS}")
            if filesystem.exists(path):
                raw = json.loads(filesystem.cat_file(f"{path.rpartition('/')[0]}/{CONFIG}"))
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
                inverter = TextInverter(InverterShape(**fields))
                inverter.load_state_dict(load(filesystem.cat_file(path)))
                return inverter.to(device).eval().requires_grad_(False)
        raise ValueError(f"no trained inverter in {folder}: run a train-inverter job and name its output folder")


# --- training


@dataclass(frozen=True)
class InverterTraining:
    """How an inverter is trained.

    Attributes:
        steps, batch: Optimiser steps and pictures in each.
        lr: Peak learning rate of AdamW; 5 % of the steps warm up, the rest follows a cosine to zero.
        weight_decay: Of AdamW.
        noise_weight: Weight of the noise-prediction loss under the inverted text latent.
        noise_rows: Pictures of each batch that it is measured on; 0 turns it off.
        held_out: Share of the pictures kept for the final measures.
    """

    steps: int = 10_000
    batch: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.01
    noise_weight: float = 0.1
    noise_rows: int = 16
    held_out: float = 0.05


@dataclass(frozen=True)
class Pairs:
    """Pictures that a model drew, and the prompts they were drawn from.

    Attributes:
        z_MCHW: Their latents, an array or a memory map.
        prompts: One a picture.
    """

    z_MCHW: np.ndarray
    prompts: Sequence[str]


def text_conditions(
    model: LatentDiffusion, prompts: Sequence[str], size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the frozen text encoder makes of prompts: (B, T, K), and (B, P) for SDXL, float32."""
    condition = model.condition(list(prompts), size=size)
    pooled = condition.get("pooled_BE")
    return condition["text_BLE"].float(), None if pooled is None else pooled.float()


def split(count: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the held-out pictures, a fixed random choice."""
    order = np.random.default_rng([seed, count]).permutation(count)
    held = max(1, round(count * held_out))
    if count - held < 1:
        raise ValueError(f"{count} pictures are too few to train on: generate at least 2")
    return np.sort(order[held:]), np.sort(order[:held])


def train_inverter(
    model: LatentDiffusion,
    pairs: Pairs,
    shape: InverterShape,
    settings: InverterTraining,
    *,
    size: int,
    seed: int,
    checkpoint: str | None = None,
    checkpoint_seconds: float = 120.0,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[TextInverter, dict[str, Any]]:
    """Train an inverter; goes on from the checkpoint where there is one.

    Args:
        model: The frozen model that drew the pictures.
        pairs: Its pictures.
        shape: Of the inverter.
        settings: See there.
        size: Side of the pictures in pixels.
        seed: Everything random is drawn from (seed, step).
        checkpoint: File of the checkpoint.
        checkpoint_seconds: Time between two of them.
        report: Takes a line of progress about every twentieth of the way.

    Returns:
        The inverter, and its measures on the held-out pictures with the training curve (JSON-able).
    """
    device = model.device
    torch.manual_seed(row_seed(seed, "inverter", "weights"))
    inverter = TextInverter(shape).to(device)
    trained, held = split(len(pairs.prompts), settings.held_out, seed)
    _standardise(inverter, model, pairs, trained, size, seed)
    loss_of = DenoisingLoss(model)
    optimiser = torch.optim.AdamW(inverter.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    warm = max(1, settings.steps // 20)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, settings.steps - warm))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    first, curve = _resume(checkpoint, inverter, optimiser, schedule)
    saved = time.monotonic()
    inverter.train()
    for step in range(first, settings.steps):
        generator = row_generator(seed, "inverter", f"step {step}")
        chosen = trained[torch.randint(len(trained), (settings.batch,), generator=generator).numpy()]
        z = torch.from_numpy(np.ascontiguousarray(pairs.z_MCHW[chosen])).float().to(device)
        text, pooled = text_conditions(model, [pairs.prompts[i] for i in chosen], size)
        guess, guess_pooled = inverter(z)
        error = _standard_error(inverter, guess, text, guess_pooled, pooled)
        noise_loss = torch.zeros((), device=device)
        if settings.noise_rows:
            few = settings.noise_rows
            t = torch.randint(loss_of.timesteps, (few,), generator=generator).to(device)
            noise = torch.randn((few, *shape.latent), generator=generator).to(device)
            some_pooled = None if guess_pooled is None else guess_pooled[:few]
            noise_loss = loss_of(z[:few], noise, t, guess[:few], some_pooled).mean()
        optimiser.zero_grad(set_to_none=True)
        (error + settings.noise_weight * noise_loss).backward()
        nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(1, settings.steps // 20) == 0 or step + 1 == settings.steps:
            curve.append({"step": step + 1, "error": error.item(), "noise_loss": noise_loss.item()})
            report(f"inverter: step {step + 1} of {settings.steps}, error {curve[-1]['error']:.4f}")
        if checkpoint and time.monotonic() - saved > checkpoint_seconds:
            _keep(checkpoint, inverter, optimiser, step + 1, curve)
            saved = time.monotonic()
    if checkpoint:
        _keep(checkpoint, inverter, optimiser, settings.steps, curve)
    inverter.eval().requires_grad_(False)
    return inverter, measure(model, inverter, pairs, held, size) | {"curve": curve, "trained_on": len(trained)}


def _standard_error(
    inverter: TextInverter,
    guess: torch.Tensor,
    text: torch.Tensor,
    guess_pooled: torch.Tensor | None,
    pooled: torch.Tensor | None,
) -> torch.Tensor:
    """Mean squared error in units of the training latents' variance: 1 for the mean latent."""
    error = ((guess - text) / inverter.std_TK).square().mean()
    if guess_pooled is None or pooled is None:
        return error
    return error + ((guess_pooled - pooled) / inverter.std_P).square().mean()


@torch.no_grad()
def _standardise(
    inverter: TextInverter, model: LatentDiffusion, pairs: Pairs, trained: np.ndarray, size: int, seed: int
) -> None:
    """Mean and deviation of each number of the text latent over some hundred training prompts."""
    some = np.random.default_rng([seed, 1]).choice(trained, min(len(trained), 512), replace=False)
    parts = [
        text_conditions(model, [pairs.prompts[i] for i in some[at : at + 64]], size) for at in range(0, len(some), 64)
    ]
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
def measure(
    model: LatentDiffusion, inverter: TextInverter, pairs: Pairs, held: np.ndarray, size: int
) -> dict[str, float]:
    """Error and cosine of the text latents of held-out pictures, beside those of the mean latent."""
    sums = np.zeros(5)
    for at in range(0, len(held), 64):
        chosen = held[at : at + 64]
        z = torch.from_numpy(np.ascontiguousarray(pairs.z_MCHW[chosen])).float().to(model.device)
        text, _ = text_conditions(model, [pairs.prompts[i] for i in chosen], size)
        mean = inverter.mean_TK.expand_as(text)
        for place, guess in ((0, inverter(z)[0]), (2, mean)):
            sums[place] += float((guess - text).square().mean((1, 2)).sum())
            # Of the departures from the mean: raw cosines are all near one, for every latent shares its large numbers.
            sums[place + 1] += float(torch.cosine_similarity((guess - mean).flatten(1), (text - mean).flatten(1)).sum())
        sums[4] += len(chosen)
    mse, cosine, mean_mse, _, count = sums
    return {
        "held_out": int(count),
        "mse": mse / count,
        "cosine": cosine / count,
        "mean_latent_mse": mean_mse / count,
        "explained": 1 - mse / mean_mse if mean_mse else 0.0,
    }


def _keep(
    path: str, inverter: TextInverter, optimiser: torch.optim.AdamW, step: int, curve: list[dict[str, Any]]
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in inverter.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    write_checkpoint(path, tensors, {"step": step, "curve": curve})


def _resume(
    path: str | None, inverter: TextInverter, optimiser: torch.optim.AdamW, schedule: torch.optim.lr_scheduler.LambdaLR
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
    for _ in range(meta["step"]):
        schedule.step()
    return meta["step"], meta["curve"]


# --- a start for new words


def warm_start(
    encoders: Sequence[Encoder],
    inverter: TextInverter,
    z_ICHW: torch.Tensor,
    ids_EIT: Sequence[torch.Tensor],
    which_EIT: Sequence[torch.Tensor],
    start_VE: torch.Tensor,
    *,
    steps: int,
    lr: float,
) -> torch.Tensor:
    """Move new words until their prompts' text latents are near those that the pictures invert to; no U-Net is run.

    Args:
        encoders: The frozen text encoders.
        inverter: Trained on the same model.
        z_ICHW: Latents of a concept's training pictures.
        ids_EIT, which_EIT: Their prompts, as `stages.models.words.encode` takes them.
        start_VE: Where the words start.
        steps, lr: Of AdamW, without weight decay.

    Returns:
        The words' vectors, (V, E).
    """
    with torch.no_grad():
        wanted_ITK, _ = inverter(z_ICHW)
    v_VE = start_VE.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([v_VE], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        text_ITK, _ = encode(encoders, ids_EIT, which_EIT, v_VE.expand(len(z_ICHW), -1, -1))
        loss = ((text_ITK.float() - wanted_ITK) / inverter.std_TK).square().mean()
        (v_VE.grad,) = torch.autograd.grad(loss, v_VE)
        optimiser.step()
    return v_VE.detach()


# --- stages


class DrawPairs:
    """Stage: prompts -> pictures that the frozen model draws of them, with the latents an inverter is trained on.

    Args:
        model, revision, variant, dtype, device, size: As in `stages.concepts.stage.LearnConcepts`.
        steps, guidance: Of the sampler.
        batch: Pictures in one pass.
        seed: The job's seed; a picture's noise is drawn from (seed, id).
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
        steps: int = 30,
        guidance: float = 7.5,
        batch: int = 16,
        seed: int = 0,
    ) -> None:
        self.size = read_geometry(model, revision=revision, size=size).size
        self.model = LatentDiffusion.load(
            model, revision=revision, variant=variant, dtype=dtype, device=_device(device), size=size
        )
        self.steps, self.guidance, self.batch, self.seed = steps, guidance, batch, seed

    @staticmethod
    def describe(model: str, *, revision: str | None = None, size: int | None = None, **others: Any) -> StageInfo:
        geometry = read_geometry(model, revision=revision, size=size)
        return StageInfo(
            columns=(
                Column("prompt", "string", doc="what the picture was drawn from"),
                Column("image", "image"),
                Column("latent", "tensor", geometry.latent_shape, "float16", doc="the picture encoded again, scaled"),
            ),
            models=describe_stable_diffusion(model, geometry.kind, revision),
            metadata={"vae_scaling_factor": str(geometry.scaling_factor)},
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batches(rows, self.batch):
            good = []
            for row in batch:
                if isinstance(row.get("prompt"), str) and row["prompt"].strip():
                    good.append(row)
                else:
                    yield failed(row, "the prompt is empty; give one in the column 'prompt'")
            if good:
                yield from self._draw(good)

    def shrink(self) -> bool:
        """Half the batch, after the device ran out of memory."""
        if self.batch == 1:
            return False
        self.batch //= 2
        return True

    @torch.no_grad()
    def _draw(self, rows: list[Row]) -> Iterator[Row]:
        latents = self.model.pipeline(
            [row["prompt"] for row in rows],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            height=self.size,
            width=self.size,
            generator=[row_generator(self.seed, row["id"], "picture") for row in rows],
            output_type="latent",
        ).images
        pictures = self.model.pipeline.image_processor.postprocess(self.model.decode(latents), output_type="pil")
        encoded = encode_pictures(self.model, pictures).cpu().numpy()
        for row, picture, latent in zip(rows, pictures, encoded, strict=True):
            yield ok(row, image=picture, latent=latent)


class InvertText:
    """Stage: pictures -> text latents, one pass of a trained inverter each.

    Args:
        inverter: Folder of a trained inverter.
        model, revision, variant, dtype, device, size: The model whose VAE and text space it was trained for.
        batch: Pictures in one pass.
        image: Column with the picture.
    """

    def __init__(
        self,
        inverter: str,
        model: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        size: int | None = None,
        batch: int = 16,
        image: str = "image",
    ) -> None:
        self.size = read_geometry(model, revision=revision, size=size).size
        self.model = LatentDiffusion.load(
            model, revision=revision, variant=variant, dtype=dtype, device=_device(device), size=size
        )
        self.inverter = TextInverter.load(inverter, self.model.device)
        self.batch, self.image = batch, image

    @staticmethod
    def describe(inverter: str, model: str, *, revision: str | None = None, **others: Any) -> StageInfo:
        """Columns of the text latents.

        Raises:
            ValueError: There is no inverter in the folder, or it was trained for pictures of another size.
        """
        shape = TextInverter.load(inverter).shape
        geometry = read_geometry(model, revision=revision, size=others.get("size"))
        if tuple(geometry.latent_shape) != tuple(shape.latent):
            raise ValueError(
                f"the inverter in {inverter} reads latents of {shape.latent}, this model and size give "
                f"{geometry.latent_shape}: train one for it, or set size"
            )
        pooled = [Column("pooled", "tensor", (shape.pooled,), doc="SDXL's pooled condition")] if shape.pooled else []
        return StageInfo(
            columns=(
                Column("text_latent", "tensor", shape.text, "float16", doc="the text encoder's output, inverted"),
                *pooled,
            ),
            models=describe_stable_diffusion(model, geometry.kind, revision),
            metadata={"inverter": inverter},
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batches(rows, self.batch):
            good = []
            for row in batch:
                if row.get(self.image) is not None:
                    good.append(row)
                else:
                    yield failed(row, f"no picture in the column {self.image!r}")
            if not good:
                continue
            with torch.no_grad():
                z = encode_pictures(self.model, [row[self.image] for row in good])
                text, pooled = self.inverter(z)
            for number, row in enumerate(good):
                extra = {} if pooled is None else {"pooled": pooled[number].cpu().numpy()}
                yield ok(row, text_latent=text[number].cpu().numpy(), **extra)

    def shrink(self) -> bool:
        """Half the batch, after the device ran out of memory."""
        if self.batch == 1:
            return False
        self.batch //= 2
        return True


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
