"""Candidates for a picture: new noise grown from a concept's by the job's methods.

Legend: B latents, K pictures of the concept, M candidates of a row, N numbers of a latent, E embedding width; C H W
latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.contract import Row
from stages.rare import noise
from stages.rare.guides import Texts
from stages.rare.references import References
from stages.rare.settings import GrownMethod, Guide, LinearMethod, NaoMethod, NoiseMethod, RandomMethod, SlerpMethod


@dataclass(frozen=True)
class Candidates:
    """A row and the latents that its picture may be drawn from.

    Attributes:
        centre_E: Mean direction of the concept's pictures in CLIP space, where it is needed.
        method: That made them.
        guide: By which its picture is drawn, of `texts`.
        number: Of the row among those of its concept, method and guide.
        z_MCHW: Float32, as they will be stored.
        weight_MK: What each of the concept's pictures counted for in each candidate.
        losses_M2: Of `seed-select`: loss at the start and at the end of each candidate; NaN otherwise.
    """

    row: Row
    concept: References
    centre_E: torch.Tensor | None
    method: NoiseMethod
    guide: Guide
    texts: Texts
    number: str
    z_MCHW: torch.Tensor
    weight_MK: torch.Tensor
    losses_M2: torch.Tensor

    @property
    def finite(self) -> bool:
        return bool(self.z_MCHW.isfinite().all())


@dataclass(frozen=True)
class Draws:
    """The random numbers of B new latents, the same for every method.

    Attributes:
        z_BCHW: Gaussian noise.
        place_B: A place on an arc or a path, in [0, 1).
        order_BK: An order of the concept's pictures.
        generators: For what a method draws beyond that.
    """

    z_BCHW: torch.Tensor
    place_B: torch.Tensor
    order_BK: torch.Tensor
    generators: Sequence[torch.Generator]

    @staticmethod
    def of(generators: Sequence[torch.Generator], pictures: int, shape: Sequence[int]) -> Draws:
        z_BCHW = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
        place_B = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        order_BK = torch.stack([torch.randperm(pictures, generator=generator) for generator in generators])
        return Draws(z_BCHW, place_B, order_BK, generators)


def new_noise(
    method: NoiseMethod, z_KCHW: torch.Tensor, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """New latents (B, C, H, W) by one method, and what each picture counted for in each (B, K); both on the CPU.

    The weight of a picture: in `slerp` its share of the arc, in `linear` its weight before the sum is made Gaussian,
    in `nao` how far from the centroid (0) the latent lies towards it (1).

    Args:
        method: One that grows noise by itself (`NoiseMethod.start_method`).
        z_KCHW: The latents of the concept's pictures, at least two but for `random`; on the device that computes.
        generators: One a latent, on the CPU.
    """
    draws = Draws.of(generators, len(z_KCHW), z_KCHW.shape[1:])
    z_BN, weight_BK = _GROW[type(method)](method, z_KCHW.flatten(1), draws)
    z_BCHW = z_BN.view_as(draws.z_BCHW).cpu()
    if isinstance(method, GrownMethod) and method.blend is not None:
        z_BCHW = noise.low_frequencies(z_BCHW, draws.z_BCHW, method.blend.low)
    return z_BCHW, weight_BK


def _random(method: RandomMethod, z_KN: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    return draws.z_BCHW.flatten(1), torch.zeros(draws.order_BK.shape)


def _slerp(method: SlerpMethod, z_KN: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    first_B, second_B = draws.order_BK[:, 0], draws.order_BK[:, 1]
    t_B = method.margin + (1 - 2 * method.margin) * draws.place_B
    weight_BK, rows = torch.zeros(draws.order_BK.shape), torch.arange(len(t_B))
    weight_BK[rows, first_B], weight_BK[rows, second_B] = 1 - t_B, t_B
    device = z_KN.device
    return noise.slerp(t_B.to(device), z_KN[first_B.to(device)], z_KN[second_B.to(device)]), weight_BK


def _linear(method: LinearMethod, z_KN: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    # Normalised exponential numbers are uniform on the simplex.
    weight_BK = torch.stack([torch.empty(len(z_KN)).exponential_(generator=one) for one in draws.generators])
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    return noise.combine(weight_BK.to(z_KN.device), z_KN), weight_BK


def _nao(method: NaoMethod, z_KN: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    towards_B = draws.order_BK[:, 0]
    t_B = (1 - method.margin) * draws.place_B
    weight_BK = torch.zeros(draws.order_BK.shape)
    weight_BK[torch.arange(len(t_B)), towards_B] = t_B
    paths = noise.norm_aware_centroid(z_KN, points=method.points, limit=method.iterations)
    return noise.along(paths.path_KPN, towards_B.to(z_KN.device), t_B.to(z_KN.device)), weight_BK


_GROW: dict[type[NoiseMethod], Callable[[Any, torch.Tensor, Draws], tuple[torch.Tensor, torch.Tensor]]] = {
    RandomMethod: _random,
    SlerpMethod: _slerp,
    LinearMethod: _linear,
    NaoMethod: _nao,
}
"""z_BN and weight_BK by each method that grows noise by itself."""
