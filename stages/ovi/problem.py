"""OVI: the CLIP image embedding of a prompt, found by optimising visual tokens through the frozen image encoder.

After "Training-Free Diffusion Priors for Text-to-Image Generation via Optimization-based Visual Inversion" (Dell'Erba
and Bagdanov, arXiv 2511.20821); the base algorithm is the one of "Cross the Gap" (Mistretta et al., ICLR 2025). The
formulas and weights of the two constraints, `direct`, `compact` tokens, warm starts and the stopping rules are ours.

Legend: B slots, P pseudo-tokens, N patches of the encoder, D its width, E embedding width, K neighbours, M bank rows.
`w_BPD` pseudo-tokens; `z_BE` image embedding, not normalised; `t_BE` text embedding of unit norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from pipeline.contract import Row, failed, ok
from stages.engine.adamw import RowAdamW
from stages.engine.randomness import row_normal
from stages.engine.slots import per_row, slot_mask
from stages.engine.solver import capture
from stages.engine.stopping import REASONS, StoppingRule

Accelerate = Literal["none", "compile", "graph"]
Watch = Literal["loss", "cosine", "mahalanobis"]


class Search(Protocol):
    """z_BE -> unit-norm neighbours_BKE, nearest first. `on_device`: pure tensor work, which a step may capture."""

    on_device: bool

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor: ...


def token_of_patch(patches: int, tokens: int) -> torch.Tensor:
    """Which pseudo-token each patch takes, (N,): floor(n P / N), nearest interpolation along the token axis."""
    return torch.arange(patches) * tokens // patches


class VisionTower:
    """A frozen image encoder of transformers, entered behind its patch embedding.

    Takes the towers of CLIP, OpenCLIP (converted) and SigLIP: `CLIPVisionModelWithProjection`, `CLIPModel`,
    `SiglipVisionModel`, `SiglipModel`.

    Args:
        model: The model; its weights are frozen here.
        tokens: P, the pseudo-tokens a row, at most the number of patches.
        compact: Keep P tokens instead of stretching them to N; each takes the mean of the position embeddings of the
            patches it would have filled (ours: N / P times less work, another embedding).

    Raises:
        TypeError: The model is none of these.
        ValueError: P does not fit.
    """

    def __init__(self, model: nn.Module, tokens: int, compact: bool = False) -> None:
        model.eval().requires_grad_(False)
        vision: Any = getattr(model, "vision_model", model)
        embeddings = getattr(vision, "embeddings", None)
        if embeddings is None or not hasattr(embeddings, "patch_embedding") or not hasattr(vision, "encoder"):
            raise TypeError(f"{type(model).__name__} is no image encoder of CLIP or SigLIP")
        self.patches = embeddings.num_patches
        if not 1 <= tokens <= self.patches:
            raise ValueError(f"tokens is {tokens}: the encoder has {self.patches} patches, give 1 to {self.patches}")
        self.tokens, self.compact = tokens, compact
        self.layers = vision.encoder.layers
        self.width: int = embeddings.embed_dim
        self.pre: Any = getattr(vision, "pre_layrnorm", None) or nn.Identity()
        self.post = vision.post_layernorm
        positions_ND = embeddings.position_embedding.weight
        self.class_D = getattr(embeddings, "class_embedding", None)
        if self.class_D is not None:
            self.class_D = self.class_D + positions_ND[0]
            positions_ND = positions_ND[1:]
        self.head = None if self.class_D is not None else vision.head
        self.projection: Any = getattr(model, "visual_projection", None) or nn.Identity()
        take_N = token_of_patch(self.patches, tokens).to(positions_ND.device)
        if compact:
            sums_PD = torch.zeros(tokens, self.width, dtype=positions_ND.dtype, device=positions_ND.device)
            counts_P = torch.bincount(take_N, minlength=tokens).to(positions_ND.dtype)
            self.positions_ND = sums_PD.index_add_(0, take_N, positions_ND) / counts_P[:, None]
            take_N = torch.arange(tokens, device=positions_ND.device)
        else:
            self.positions_ND = positions_ND
        self.take_N = take_N
        if isinstance(self.projection, nn.Linear):
            self.embedding_width: int = self.projection.out_features
        else:
            self.embedding_width = self.width

    def __call__(self, w_BPD: torch.Tensor) -> torch.Tensor:
        """z_BE, the unnormalised projected embedding of the pseudo-tokens."""
        h_BND = w_BPD[:, self.take_N] + self.positions_ND
        if self.class_D is not None:
            h_BND = torch.cat([self.class_D.expand(len(h_BND), 1, -1), h_BND], dim=1)
        h_BND = self.pre(h_BND)
        for layer in self.layers:
            h_BND = layer(h_BND, attention_mask=None)
        if self.head is not None:  # SigLIP: attention pooling over all tokens
            return self.projection(self.head(self.post(h_BND)))
        return self.projection(self.post(h_BND[:, 0]))


@dataclass(frozen=True)
class Whitening:
    """A Gaussian of image embeddings, ready for float32 work on the device: R = |(z - mean) W'|^2 / E, W = L^-1."""

    mean_E: torch.Tensor
    inverse_EE: torch.Tensor
    cholesky_EE: torch.Tensor

    @staticmethod
    def of(mean_E: torch.Tensor, cholesky_EE: torch.Tensor, device: torch.device | str = "cpu") -> Whitening:
        """From the mean and the lower Cholesky factor; inverted in float64."""
        eye_EE = torch.eye(len(mean_E), dtype=torch.float64)
        inverse_EE = torch.linalg.solve_triangular(cholesky_EE.detach().double().cpu(), eye_EE, upper=False)
        return Whitening(*(m.float().to(device) for m in (mean_E, inverse_EE, cholesky_EE)))

    def distance(self, z_BE: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distance over E, (B,): 1 on average for embeddings that follow the Gaussian."""
        return ((z_BE - self.mean_E) @ self.inverse_EE.mT).square().mean(-1)


@dataclass(frozen=True)
class Settings:
    """How a prompt is inverted. The defaults are the published base recipe (`PUBLISHED`), but for `slots`.

    Attributes:
        slots: B.
        lr, weight_decay, init_std: AdamW and the first tokens.
        mahalanobis, neighbours: Weights lambda of the constraints; 0 leaves one out.
        k: Neighbours whose mean cosine the constraint raises.
        interval: Steps between two searches of a row's neighbours; 0 searches once, with the text embedding.
        watch: What the stopping rule looks at: the loss, 1 - cosine to the text, or the Mahalanobis distance over E.
        stop: The rule; `limit` counts updates.
        best: Return the embedding at the best watched value instead of the last one.
        precision: Autocast of the encoder; variables stay float32.
        accelerate: `compile` compiles the encoder, `graph` captures the whole step as a CUDA graph.
    """

    slots: int = 64
    lr: float = 2e-2
    weight_decay: float = 0.01
    init_std: float = 0.02
    mahalanobis: float = 0.0
    neighbours: float = 0.0
    k: int = 1
    interval: int = 1
    watch: Watch = "loss"
    stop: StoppingRule = field(default_factory=lambda: StoppingRule(limit=1000))
    best: bool = False
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accelerate: Accelerate = "none"


PUBLISHED = Settings()
"""Cross the Gap: AdamW 2e-2, weight decay 0.01, tokens from N(0, 0.02^2), 1000 steps, the last iterate."""


class Space:
    """Where the variable of a row lives, and how it becomes an embedding: through the encoder (`tokens`) or directly.

    Attributes:
        shape: The variable's shape without B.
        encode: variable (B, *shape) -> z_BE.
        width: E.
        device: Where the encoder lives.
        passes: Encoder passes (forward and backward) that one step costs a row: 1, or 0 without an encoder.
    """

    def __init__(
        self, shape: tuple[int, ...], encode: Callable[[torch.Tensor], torch.Tensor], width: int, device: torch.device,
        passes: int,
    ) -> None:  # fmt: skip
        self.shape, self.encode, self.width, self.device, self.passes = shape, encode, width, device, passes

    @staticmethod
    def tokens(tower: VisionTower) -> Space:
        shape = (tower.tokens, tower.width)
        return Space(shape, tower, tower.embedding_width, tower.positions_ND.device, 1)

    @staticmethod
    def direct(whitening: Whitening) -> Space:
        """The embedding itself, in whitened coordinates u: z = mean + L u (ours). Starts near the mean image."""
        width = len(whitening.mean_E)
        return Space(
            (width,), lambda u_BE: whitening.mean_E + u_BE @ whitening.cholesky_EE.mT, width, whitening.mean_E.device, 0
        )


class Inversion:
    """The `Problem` of OVI: minimise (1 - cos(z, t)) + lambda_m R_m(z) + lambda_n R_n(z) over each row's variable.

    R_m is the squared Mahalanobis distance over E, R_n one minus the mean cosine to the bank's k nearest embeddings.
    Rows carry `text` (E,), the text embedding, and may carry `start`, the first value of the variable; the others start
    from N(0, init_std^2) drawn from (seed, id). A row comes back with `embedding`, `text_cosine`, `mahalanobis`,
    `neighbour_cosine`, `loss`, `steps`, `passes`, `stopped`, and `variable`.

    Args:
        space: The variable and its encoder.
        settings: Recipe, constraints, stopping.
        seed: The job's seed.
        whitening: Needed by the Mahalanobis constraint and by `watch: mahalanobis`; else only reported.
        search: Needed by the neighbour constraint.

    Raises:
        ValueError: A constraint lacks what it needs.
    """

    def __init__(
        self, space: Space, settings: Settings, *, seed: int = 0, whitening: Whitening | None = None,
        search: Search | None = None,
    ) -> None:  # fmt: skip
        if whitening is None and (settings.mahalanobis or settings.watch == "mahalanobis"):
            raise ValueError("the Mahalanobis distance needs a reference with statistics of image embeddings")
        if search is None and settings.neighbours:
            raise ValueError("the neighbour constraint needs a reference with an index")
        self.space, self.settings, self.seed = space, settings, seed
        self.whitening, self.search = whitening, search if settings.neighbours else None
        self.resize(settings.slots)

    def resize(self, slots: int) -> None:
        """Allocate the state of `slots` rows; rows in flight are forgotten."""
        device, settings = self.space.device, self.settings
        self.slots = slots
        self.rows: list[Row | None] = [None] * slots
        self.x_B = torch.zeros(slots, *self.space.shape, device=device)
        self.t_BE = torch.zeros(slots, self.space.width, device=device)
        self.near_BKE = torch.zeros(slots, settings.k if self.search else 0, self.space.width, device=device)
        self.z_BE = torch.zeros(slots, self.space.width, device=device)
        self.report_B4 = torch.zeros(slots, 4, device=device)  # loss, cosine, mahalanobis, neighbour cosine
        self.active_B = torch.zeros(slots, dtype=torch.bool, device=device)
        # Gradients of fp16 activations underflow unless the loss is scaled; a row whose gradient overflows skips the
        # update and halves its own scale.
        scale = 2.0**16 if settings.precision == "float16" else 1.0
        self.scale_B = torch.full((slots,), scale, device=device)
        self.adam = RowAdamW(self.x_B, settings.lr, weight_decay=settings.weight_decay)
        # The value of the start is looked at too, before the first update.
        stop = settings.stop
        self.stopper = StoppingRule(
            stop.limit + 1, stop.absolute, stop.relative, stop.patience, stop.minimum + 1
        ).start(slots, device)
        self._encoder = self.space.encode
        if settings.accelerate == "compile":
            self._encoder = torch.compile(self.space.encode, dynamic=False)
        self._advance: Callable[[], None] = self._eager
        if settings.accelerate == "graph":
            if self.search is not None and settings.interval and not self.search.on_device:
                raise ValueError("`accelerate: graph` needs the bank in device memory, or `interval: 0`")
            self._advance = capture(self._eager)

    def load(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        settings = self.settings
        which_B = slot_mask(self.slots, slots, self.space.device)
        index_b = torch.as_tensor(slots, device=self.space.device)
        text_bE = torch.stack([torch.as_tensor(row["text"], dtype=torch.float32) for row in rows]).to(self.space.device)
        drawn = row_normal(self.space.shape, self.seed, [row["id"] for row in rows], "tokens") * settings.init_std
        for i, row in enumerate(rows):
            self.rows[slots[i]] = row
            if row.get("start") is not None:
                drawn[i] = torch.tensor(row["start"], dtype=torch.float32).view(self.space.shape)
        self.x_B[index_b] = drawn.to(self.space.device)
        self.t_BE[index_b] = nn.functional.normalize(text_bE, dim=-1)
        if self.search is not None and settings.interval == 0:
            self.near_BKE[index_b] = self.search(text_bE)
        self.scale_B[index_b] = 2.0**16 if settings.precision == "float16" else 1.0
        self.adam.reset(which_B)
        self.stopper.reset(which_B)
        self.active_B |= which_B

    def step(self) -> torch.Tensor:
        self._advance()
        return ~self.active_B

    def _encode(self, x_B: torch.Tensor) -> torch.Tensor:
        precision = self.settings.precision
        context: Any = nullcontext()
        if precision != "float32":
            context = torch.autocast(self.space.device.type, dtype=getattr(torch, precision))
        with context:
            return self._encoder(x_B).float()

    @torch.no_grad()
    def _neighbours(self, z_BE: torch.Tensor) -> None:
        """Search again where a row's interval is over. On the device all rows are searched, which keeps the shapes."""
        assert self.search is not None
        due_B = self.active_B & (self.stopper.steps_B % self.settings.interval == 0)
        if self.search.on_device:
            self.near_BKE.copy_(torch.where(due_B[:, None, None], self.search(z_BE), self.near_BKE))
        elif (due_b := due_B.nonzero().flatten()).numel():
            self.near_BKE[due_b] = self.search(z_BE[due_b])

    def _eager(self) -> None:
        """One step of every slot: look at the value of the variable as it is, then, unless the row stops, update it."""
        settings = self.settings
        with torch.enable_grad():
            x_B = self.x_B.detach().requires_grad_()
            z_BE = self._encode(x_B)
            if self.search is not None and settings.interval:
                self._neighbours(z_BE.detach())
            cosine_B = nn.functional.cosine_similarity(z_BE, self.t_BE, dim=-1)
            loss_B = 1 - cosine_B
            mahalanobis_B = near_B = torch.zeros_like(cosine_B)
            if self.whitening is not None:
                mahalanobis_B = self.whitening.distance(z_BE)
            if settings.mahalanobis:
                loss_B = loss_B + settings.mahalanobis * mahalanobis_B
            if self.search is not None:
                near_B = nn.functional.cosine_similarity(z_BE[:, None], self.near_BKE, dim=-1).mean(1)
                loss_B = loss_B + settings.neighbours * (1 - near_B)
            (grad,) = torch.autograd.grad((loss_B * self.scale_B).sum(), x_B)
        with torch.no_grad():
            grad = grad / per_row(self.scale_B, grad)
            overflow_B = torch.zeros_like(self.active_B)
            if settings.precision == "float16":
                overflow_B = ~grad.flatten(1).isfinite().all(1)
                self.scale_B.copy_(torch.where(overflow_B & self.active_B, self.scale_B / 2, self.scale_B))
                grad = torch.where(per_row(overflow_B, grad), 0.0, grad)
            value_B = {"loss": loss_B, "cosine": 1 - cosine_B, "mahalanobis": mahalanobis_B}[settings.watch].detach()
            was_B = self.active_B.clone()
            done_B = self.stopper.update(value_B, was_B)
            shown_B = was_B & self.stopper.improved_B if settings.best else was_B
            report_B4 = torch.stack([loss_B, cosine_B, mahalanobis_B, near_B], dim=1).detach()
            self.z_BE.copy_(torch.where(shown_B[:, None], z_BE.detach(), self.z_BE))
            self.report_B4.copy_(torch.where(shown_B[:, None], report_B4, self.report_B4))
            self.active_B.copy_(was_B & ~done_B)
            self.adam.step(grad, self.active_B & ~overflow_B)

    def unload(self, slots: Sequence[int]) -> list[Row]:
        index_b = torch.as_tensor(slots, device=self.space.device)
        z_bE, report_b4, x_b = self.z_BE[index_b].cpu(), self.report_B4[index_b].cpu(), self.x_B[index_b].cpu()
        looks_b = self.stopper.steps_B[index_b].tolist()
        reasons_b = self.stopper.reason_B[index_b].tolist()
        out = []
        for i, slot in enumerate(slots):
            row = self.rows[slot]
            assert row is not None
            self.rows[slot] = None
            if REASONS[reasons_b[i]] == "diverged" or not z_bE[i].isfinite().all():
                where = f"the optimisation diverged after {looks_b[i] - 1} steps"
                out.append(failed(row, f"{where}: lower `lr` or the weights of the constraints"))
                continue
            loss, cosine, mahalanobis, near = report_b4[i].tolist()
            out.append(
                ok(
                    row, embedding=z_bE[i].numpy(), text_cosine=cosine, loss=loss, steps=looks_b[i] - 1,
                    mahalanobis=mahalanobis if self.whitening is not None else None,
                    neighbour_cosine=near if self.search is not None else None,
                    passes=looks_b[i] * self.space.passes, stopped=REASONS[reasons_b[i]], variable=x_b[i].numpy(),
                )
            )  # fmt: skip
        return out


class ExactSearch:
    """The k nearest rows of a bank in device memory, by cosine: a matrix product, which a step can capture.

    Args:
        bank_ME: Embeddings, any norm.
        k: Neighbours a query.
    """

    on_device = True

    def __init__(self, bank_ME: torch.Tensor, k: int) -> None:
        if not 1 <= k <= len(bank_ME):
            raise ValueError(f"k is {k}, the bank has {len(bank_ME)} rows")
        self.bank_ME = nn.functional.normalize(bank_ME.float(), dim=-1)
        self.k = k

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor:
        nearest_BK = (nn.functional.normalize(z_BE, dim=-1) @ self.bank_ME.mT).topk(self.k, dim=1).indices
        return self.bank_ME[nearest_BK]
