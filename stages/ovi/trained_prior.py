"""Trained priors: Kandinsky 2.2's diffusion prior, or a one-pass prior in its place.

Legend: B rows, L positions of the text, D width of the prior, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from pipeline.contract import Row, ok
from stages.engine.device import unasked_dtype
from stages.engine.passthrough import in_batches
from stages.engine.randomness import row_generator, row_normal
from stages.models import kandinsky
from stages.models.copies import here
from stages.models.weights import weights_of
from stages.ovi.context import Context, RowMap
from stages.ovi.settings import TrainedPrior


def trained_prior(method: TrainedPrior, context: Context) -> RowMap:
    """Kandinsky 2.2's prior pipeline, or a one-pass prior in its place.

    The diffusion prior's output is un-whitened with the prior's own mean and deviation (that is part of the pipeline);
    a one-pass prior's is not.
    """
    pipe = load_pipeline(method, context)
    one_pass = pipe.prior.additional_embeddings == 3
    infer: Any = one_pass_prior if one_pass else diffusion_prior
    passes = 1 if one_pass else method.steps

    def part_of(rows: list[Row]) -> torch.Tensor:
        z_BE = infer(pipe, [row["prompt"] for row in rows], [row["id"] for row in rows], method, context.seed)
        return z_BE.float().cpu()

    def inferred(rows: list[Row]) -> Iterator[Row]:
        parts = context.rooms[method.label].parts(len(rows), lambda part: part_of(rows[part]))
        for row, z_E in zip(rows, chain.from_iterable(parts), strict=True):
            yield ok(row, embedding=z_E.numpy(), steps=passes, passes=passes)

    return lambda rows: in_batches(rows, method.batch_size, inferred)


def load_pipeline(method: TrainedPrior, context: Context) -> Any:
    """The prior pipeline, float16 on a GPU; its text encoder is the stage's, where both are of one folder.

    Raises:
        ValueError: It, or the prior that is to take its prior's place, cannot be loaded.
    """
    path = method.model or context.model
    revision = context.revision if path == context.model else None
    dtype = unasked_dtype(context.device)
    prior = load_prior(method.prior, dtype, context.allow_pickle) if method.prior else None
    try:
        shared = context.text.model if path == context.model else None
        pipe = kandinsky.load_prior_pipeline(path, revision, dtype, context.allow_pickle, prior, shared)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no Kandinsky 2.2 prior pipeline can be loaded: {error}") from None
    pipe = pipe.to(context.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_prior(path: str, dtype: torch.dtype, allow_pickle: bool | None = None) -> nn.Module:
    """A `PriorTransformer`; one that was trained without a time embedding loads too (its weights have none)."""
    from diffusers import PriorTransformer

    try:
        weights = weights_of(path, allow_pickle=bool(allow_pickle))
        return PriorTransformer.from_pretrained(here(path), dtype=dtype, low_cpu_mem_usage=False, **weights.options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no PriorTransformer can be loaded: {error}") from None


def diffusion_prior(pipe: Any, prompts: list[str], ids: list[str], method: TrainedPrior, seed: int) -> torch.Tensor:
    """z_BE of Kandinsky 2.2's prior; each row's noise from its own generator."""
    out = pipe(
        prompts, num_inference_steps=method.steps, guidance_scale=method.guidance,
        generator=[row_generator(seed, row_id, "prior") for row_id in ids],
    )  # fmt: skip
    embeddings: torch.Tensor = out.image_embeds
    return embeddings


@torch.no_grad()
def one_pass_prior(pipe: Any, prompts: list[str], ids: list[str], method: TrainedPrior, seed: int) -> torch.Tensor:
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
