"""From text embeddings to image embeddings: one function a method, rows in, rows out.

Rows carry `id`, `prompt` and `text` (E,), the raw text embedding. They come back with `embedding` (E,), and where a
method optimises, with `loss`, `steps`, `passes`, `stopped` and `variable`.

Legend: B rows, E embedding width, M bank rows, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.contract import Row, batches, failed, ok
from stages.engine.randomness import row_generator, row_normal
from stages.engine.solver import Occupancy, solve
from stages.engine.stopping import StoppingRule
from stages.ovi.problem import ExactSearch, Inversion, Search, Settings, Space, VisionTower, Whitening
from stages.ovi.settings import OVI, Direct, Recipe, Retrieval, Stop, TextEmbedding, TrainedPrior

if TYPE_CHECKING:
    from index.reference import Reference

START_NEIGHBOURS = 8
"""Images whose mean `direct` starts from when the neighbour constraint is on."""

Method = Callable[[Iterable[Row]], Iterator[Row]]
"""Maps rows to rows in any order, one out for each in; rows that arrive failed pass through."""


@dataclass
class Bench:
    """What the methods draw on. Everything is loaded once and shared by all of them.

    Attributes:
        model: Folder or hub id of the encoders (the default of `trained-prior`).
        vision: The image encoder's network; loaded when a method asks.
        text: Prompts -> text embeddings, for warm starts.
        reference: Real image embeddings.
        occupancy: Method label -> how full its slots were.
    """

    model: str
    revision: str | None
    device: str
    seed: int
    vision: Callable[[], nn.Module]
    text: Callable[[list[str]], torch.Tensor]
    reference: Reference | None
    occupancy: dict[str, Occupancy]

    def need_reference(self, recipe: Recipe) -> Reference:
        if self.reference is None:
            raise ValueError(f"method {recipe.label!r} needs `reference:`, the output of a `job: reference`")
        return self.reference

    def whitening(self) -> Whitening | None:
        if self.reference is None:
            return None
        return Whitening.of(self.reference.mean, self.reference.cholesky, self.device)


def build(recipe: Recipe, bench: Bench) -> Method:
    """The method that a recipe describes.

    Raises:
        ValueError: It needs a reference and there is none, or a setting does not fit the model.
    """
    method: Method
    if isinstance(recipe, TextEmbedding):
        method = text_embedding
    elif isinstance(recipe, Retrieval):
        method = retrieval(bench.need_reference(recipe), recipe.k)
    elif isinstance(recipe, TrainedPrior):
        method = trained_prior(recipe, bench)
    elif isinstance(recipe, Direct):
        method = direct(recipe, bench)
    elif isinstance(recipe, OVI):
        method = ovi(recipe, bench)
    else:
        raise TypeError(f"no method for {type(recipe).__name__}")
    if recipe.rescale:
        return rescaled(method, bench.need_reference(recipe).mean_norm)
    return method


def _failed(row: Row) -> bool:
    return row.get("status") == "failed"


def text_embedding(rows: Iterable[Row]) -> Iterator[Row]:
    """The text embedding in the image embedding's place."""
    for row in rows:
        yield row if _failed(row) else ok(row, embedding=np.asarray(row["text"], np.float32), passes=0)


def rescaled(method: Method, norm: float) -> Method:
    """Another method, its embeddings scaled to a norm; the direction stays."""

    def run(rows: Iterable[Row]) -> Iterator[Row]:
        for row in method(rows):
            if _failed(row):
                yield row
                continue
            length = float(np.linalg.norm(row["embedding"]))
            if not length > 0:
                yield failed(row, "the embedding is zero and cannot be rescaled")
                continue
            yield {**row, "embedding": (row["embedding"] * (norm / length)).astype(np.float32)}

    return run


def enough(reference: Reference, k: int) -> None:
    """Raises ValueError where a reference has fewer than k rows."""
    if k > reference.rows:
        raise ValueError(f"k is {k}, the reference has {reference.rows} rows: lower k, or use a larger reference")


def retrieval(reference: Reference, k: int) -> Method:
    """The mean of the k image embeddings that are nearest to the text by cosine.

    Raises:
        ValueError: The reference has fewer than k rows.
    """
    enough(reference, k)

    def run(rows: Iterable[Row]) -> Iterator[Row]:
        for chunk in batches(rows, 512):
            good = [row for row in chunk if not _failed(row)]
            yield from (row for row in chunk if _failed(row))
            if good:
                t_BE = torch.from_numpy(np.stack([row["text"] for row in good])).float()
                mean_BE = reference.index.gather(reference.positions(t_BE, k)).mean(1)
                yield from (ok(row, embedding=z, passes=0) for row, z in zip(good, mean_BE, strict=True))

    return run


# --- trained priors -----------------------------------------------------------------------------------------------


def trained_prior(recipe: TrainedPrior, bench: Bench) -> Method:
    """Kandinsky 2.2's prior pipeline, or a one-pass prior in its place.

    The diffusion prior's output is un-whitened with the prior's own mean and deviation (that is part of the pipeline);
    a one-pass prior's is not.
    """
    from diffusers import KandinskyV22PriorPipeline

    path = recipe.model or bench.model
    dtype = torch.float16 if torch.device(bench.device).type == "cuda" else torch.float32
    given = {"prior": load_prior(recipe.prior, dtype)} if recipe.prior else {}
    try:
        pipe = KandinskyV22PriorPipeline.from_pretrained(path, torch_dtype=dtype, revision=bench.revision, **given)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no Kandinsky 2.2 prior pipeline can be loaded: {error}") from None
    pipe = pipe.to(bench.device)
    pipe.set_progress_bar_config(disable=True)
    one_pass = pipe.prior.additional_embeddings == 3
    infer: Any = one_pass_prior if one_pass else diffusion_prior

    def run(rows: Iterable[Row]) -> Iterator[Row]:
        for chunk in batches(rows, recipe.batch):
            good = [row for row in chunk if not _failed(row)]
            yield from (row for row in chunk if _failed(row))
            if good:
                z_BE = infer(pipe, [row["prompt"] for row in good], [row["id"] for row in good], recipe, bench.seed)
                passes = 1 if one_pass else recipe.steps
                for row, z in zip(good, z_BE.float().cpu(), strict=True):
                    yield ok(row, embedding=z.numpy(), steps=passes, passes=passes)

    return run


def diffusion_prior(pipe: Any, prompts: list[str], ids: list[str], recipe: TrainedPrior, seed: int) -> torch.Tensor:
    """z_BE of Kandinsky 2.2's prior; each row's noise from its own generator."""
    out = pipe(
        prompts, num_inference_steps=recipe.steps, guidance_scale=recipe.guidance,
        generator=[row_generator(seed, row_id, "prior") for row_id in ids],
    )  # fmt: skip
    embeddings: torch.Tensor = out.image_embeds
    return embeddings


def load_prior(path: str, dtype: torch.dtype) -> nn.Module:
    """A `PriorTransformer`; one that was trained without a time embedding loads too (its weights have none)."""
    from diffusers import PriorTransformer

    try:
        return PriorTransformer.from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no PriorTransformer can be loaded: {error}") from None


@torch.no_grad()
def one_pass_prior(pipe: Any, prompts: list[str], ids: list[str], recipe: TrainedPrior, seed: int) -> torch.Tensor:
    """z_BE of a prior in the manner of ECLIPSE (Patel et al., CVPR 2024): noise in, embedding out, no timestep.

    The sequence is (text states, text embedding, noise, read-out token), causal, with padding masked.
    """
    prior = pipe.prior
    t_BE, states_BLE, mask_BL = pipe._encode_prompt(prompts, pipe.device, 1, False)
    noise_BE = row_normal((prior.config.embedding_dim,), seed, ids, "prior").to(t_BE)
    if prior.embedding_proj_norm is not None:
        t_BE = prior.embedding_proj_norm(t_BE)
    parts = [prior.encoder_hidden_states_proj(states_BLE)] if prior.encoder_hidden_states_proj is not None else []
    parts += [prior.embedding_proj(t_BE)[:, None], prior.proj_in(noise_BE)[:, None]]
    if prior.prd_embedding is not None:
        parts.append(prior.prd_embedding.to(t_BE).expand(len(t_BE), -1, -1))
    h_BLD = torch.cat(parts, dim=1)
    h_BLD = h_BLD + prior.positional_embedding.to(h_BLD)[:, : h_BLD.shape[1]]
    length = h_BLD.shape[1]
    hidden_BL = nn.functional.pad((~mask_BL).to(h_BLD) * -10000.0, (0, length - mask_BL.shape[1]))
    bias_BLL = hidden_BL[:, None] + prior.causal_attention_mask[:, :length, :length].to(h_BLD)
    bias_BLL = bias_BLL.repeat_interleave(prior.config.num_attention_heads, dim=0)
    if prior.norm_in is not None:
        h_BLD = prior.norm_in(h_BLD)
    for block in prior.transformer_blocks:
        h_BLD = block(h_BLD, attention_mask=bias_BLL)
    out: torch.Tensor = prior.proj_to_clip_embeddings(prior.norm_out(h_BLD)[:, -1])
    return out


# --- optimisation -------------------------------------------------------------------------------------------------


class ReferenceSearch:
    """Neighbours by the reference's index: as large as the index may be, outside the device's graph."""

    on_device = False

    def __init__(self, reference: Reference, k: int) -> None:
        self.reference, self.k = reference, k

    def __call__(self, z_BE: torch.Tensor) -> torch.Tensor:
        positions_BK = self.reference.positions(z_BE, self.k)
        vectors_BKE = torch.from_numpy(self.reference.index.gather(positions_BK)).to(z_BE)
        return nn.functional.normalize(vectors_BKE, dim=-1)


def search_of(reference: Reference, k: int, device: str) -> Search:
    """Exact search on a GPU where the bank fits into a quarter of its free memory, else the reference's index.

    Raises:
        ValueError: The reference has fewer than k rows.
    """
    enough(reference, k)
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if reference.rows * reference.dim * 4 <= free // 4:
            return ExactSearch(torch.from_numpy(np.array(reference.index.vectors_NE)).to(device), k)
    return ReferenceSearch(reference, k)


def rule(stop: Stop, limit: int) -> StoppingRule:
    """The solver's rule: it watches a value that falls, so a target cosine becomes a distance."""
    absolute = stop.target
    if absolute is not None and stop.watch == "cosine":
        absolute = 1 - absolute
    return StoppingRule(limit, absolute, stop.relative, stop.patience, stop.minimum)


def _optimised(recipe: Direct | OVI, bench: Bench, space: Space, settings: Settings) -> Method:
    constraint = recipe.constraint
    reference = bench.reference
    if constraint.mahalanobis or constraint.neighbours or settings.watch == "mahalanobis":
        reference = bench.need_reference(recipe)
    search = search_of(reference, constraint.k, bench.device) if constraint.neighbours and reference else None
    problem = Inversion(space, settings, seed=bench.seed, whitening=bench.whitening(), search=search)
    occupancy = bench.occupancy.setdefault(recipe.label, Occupancy())
    # On a GPU, asking after every step whether a row is done makes the host wait for the device each time.
    poll = 4 if torch.device(bench.device).type == "cuda" else 1
    return lambda rows: solve(problem, rows, occupancy=occupancy, poll=poll)


def direct(recipe: Direct, bench: Bench) -> Method:
    """OVI's objective over the embedding itself (ours), in the reference's whitened coordinates.

    A row starts from the mean image; with the neighbour constraint, which holds a row where it starts, from the mean of
    the images nearest to the text.
    """
    reference = bench.need_reference(recipe)
    whitening = bench.whitening()
    assert whitening is not None
    constraint, stop = recipe.constraint, recipe.stop
    settings = Settings(
        slots=recipe.slots, lr=recipe.lr, weight_decay=0.0, init_std=0.0, mahalanobis=constraint.mahalanobis,
        neighbours=constraint.neighbours, k=constraint.k, interval=constraint.interval, watch=stop.watch,
        stop=rule(stop, recipe.steps), best=stop.best,
    )  # fmt: skip
    method = _optimised(recipe, bench, Space.direct(whitening), settings)
    if not constraint.neighbours:
        return method
    nearest = retrieval(reference, min(START_NEIGHBOURS, reference.rows))

    def started(rows: Iterable[Row]) -> Iterator[Row]:
        for row in nearest(rows):
            if _failed(row):
                yield row
                continue
            offset_E = torch.from_numpy(row["embedding"]) - whitening.mean_E.cpu()
            kept = {name: value for name, value in row.items() if name not in ("embedding", "status", "error")}
            yield {**kept, "start": (whitening.inverse_EE.cpu() @ offset_E).numpy()}

    return lambda rows: method(started(rows))


def ovi(recipe: OVI, bench: Bench) -> Method:
    """OVI through the image encoder."""
    tower = VisionTower(bench.vision(), recipe.tokens, recipe.compact)
    constraint, stop = recipe.constraint, recipe.stopping
    settings = Settings(
        slots=recipe.slots, lr=recipe.lr, weight_decay=recipe.weight_decay, init_std=recipe.init_std,
        mahalanobis=constraint.mahalanobis, neighbours=constraint.neighbours, k=constraint.k,
        interval=constraint.interval, watch=stop.watch, stop=rule(stop, recipe.limit), best=stop.best,
        precision=recipe.precision, accelerate=recipe.accelerate,
    )  # fmt: skip
    method = _optimised(recipe, bench, Space.tokens(tower), settings)
    if recipe.warm_start is None:
        return method
    starts = WarmStarts.open(recipe.warm_start, (recipe.tokens, tower.width), bench.text)
    return lambda rows: method(starts(rows))


@dataclass(frozen=True)
class WarmStarts:
    """Tokens of prompts that are solved already, to start from the ones of the nearest prompt (ours)."""

    t_ME: torch.Tensor
    tokens_MPD: np.ndarray

    @staticmethod
    def open(path: str, shape: tuple[int, int], text: Callable[[list[str]], torch.Tensor]) -> WarmStarts:
        """Read an earlier job's output.

        Raises:
            ValueError: It stores no tokens, or tokens of another shape.
        """
        import pyarrow.compute as pc
        import pyarrow.dataset as ds

        data = ds.dataset(f"{path.rstrip('/')}/data", format="parquet")
        if "tokens" not in data.schema.names:
            raise ValueError(f"{path}: holds no tokens to start from; run its job with `store_tokens: true`")
        kept = (pc.field("status") == "ok") & pc.field("tokens").is_valid()
        table = data.to_table(["prompt", "tokens"], filter=kept)
        size = data.schema.field("tokens").type.list_size
        if not len(table) or size != shape[0] * shape[1]:
            raise ValueError(f"{path}: holds tokens of {size} numbers, {shape[0]} x {shape[1]} are needed")
        flat = table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        t_ME = nn.functional.normalize(text(table["prompt"].to_pylist()), dim=-1)
        return WarmStarts(t_ME, flat.reshape(-1, *shape))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for chunk in batches(rows, 512):
            good = [row for row in chunk if not _failed(row)]
            yield from (row for row in chunk if _failed(row))
            if good:
                t_BE = torch.from_numpy(np.stack([row["text"] for row in good])).float()
                nearest_B = (t_BE @ self.t_ME.mT).argmax(1).tolist()
                yield from ({**row, "start": self.tokens_MPD[m]} for row, m in zip(good, nearest_B, strict=True))
