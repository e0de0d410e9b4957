"""CLIP-family image encoders entered behind their patch embedding: pseudo-tokens to image embeddings, no pixels.

Legend: B rows, P pseudo-tokens, N patches of the encoder, D its width, E embedding width.
`w_BPD` pseudo-tokens, `h_BND` hidden states, `z_BE` image embedding, not normalised.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from stages.models.memory import peak_of

States = Literal["last", "penultimate"]
"""Which hidden states of all tokens: what transformers calls `last_hidden_state`, or what enters the last layer
(`hidden_states[-2]`)."""


def token_of_patch(patches: int, tokens: int) -> torch.Tensor:
    """Which pseudo-token each patch takes, (N,): floor(n P / N), nearest interpolation along the token axis.

    As torch computes it, in float32: for some numbers (729 patches, 3 tokens) its rounding gives a patch on a border to
    the token before.
    """
    token_11P = torch.arange(tokens, dtype=torch.float32)[None, None]
    return nn.functional.interpolate(token_11P, size=patches, mode="nearest")[0, 0].long()


def sharing(network: nn.Module) -> nn.Module:
    """A copy of a network whose weights are the network's own."""
    return copy.deepcopy(network, {id(one): one for one in (*network.parameters(), *network.buffers())})


def halved_products(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network, from now on with the weights of its linear layers in half precision, which is how autocast has them:
    the same numbers under it, to the last bit, and nothing to cast in each step (autocast keeps no casts of frozen
    weights). All else stays float32."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            for name, weight in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
    return network


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
        self.model = model
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
        take_N = token_of_patch(self.patches, tokens)
        counts_P = torch.bincount(take_N, minlength=tokens).to(positions_ND)
        take_N = take_N.to(positions_ND.device)
        if compact:
            sums_PD = torch.zeros(tokens, self.width, dtype=positions_ND.dtype, device=positions_ND.device)
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
        h_BND = self._hidden(w_BPD, len(self.layers))
        if self.head is not None:  # SigLIP: attention pooling over all tokens
            return self.projection(self.head(self.post(h_BND)))
        return self.projection(self.post(h_BND[:, 0]))

    @torch.no_grad()
    def states(self, w_BPD: torch.Tensor, which: States) -> torch.Tensor:
        """Hidden states of the pseudo-tokens (B, T, D); T counts CLIP's class token, which comes first."""
        if which == "penultimate":
            return self._hidden(w_BPD, len(self.layers) - 1)
        h_BTD = self._hidden(w_BPD, len(self.layers))
        return h_BTD if self.head is None else self.post(h_BTD)

    def _hidden(self, w_BPD: torch.Tensor, layers: int) -> torch.Tensor:
        """What the first so many layers make of the pseudo-tokens."""
        h_BND = w_BPD[:, self.take_N] + self.positions_ND
        if self.class_D is not None:
            h_BND = torch.cat([self.class_D.expand(len(h_BND), 1, -1), h_BND], dim=1)
        h_BND = self.pre(h_BND)
        for layer in self.layers[:layers]:
            h_BND = layer(h_BND, attention_mask=None)
        return h_BND

    def row_bytes(self) -> int:
        """What a row adds to a device's memory at the peak of a forward and a backward pass, beside the weights: told
        in the weights' type, on the meta device."""
        kind: Any = type(self.model)
        with torch.device("meta"):
            blank = kind(self.model.config).to(self.positions_ND.dtype)
        tower = VisionTower(blank, self.tokens, self.compact)
        w_BPD = torch.empty(1, self.tokens, self.width, dtype=self.positions_ND.dtype, device="meta")
        given = (*blank.parameters(), *blank.buffers(), tower.positions_ND)
        return peak_of(tower, w_BPD, given, gradient=True)
