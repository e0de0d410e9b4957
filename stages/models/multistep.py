"""Samplers whose steps are made of several of the network's outputs, as one affine map that is read off diffusers.

A step of PNDM, UniPC or DPM-Solver++ 2M depends on outputs at noisier times, so no step can be undone by itself. But
every deterministic sampler of diffusers is affine in all that it is given: each point that the network is shown, and
the picture's latent at the end, are sums of the seed and of the outputs so far. The coefficients are had by running
diffusers' own sampler on unit vectors (ours): its first and last steps, correctors, repeated times and grids of noise
levels come with them, and none of its formulas stands here again.

Legend: N evaluations of the network a picture, index 0 next to the picture, N - 1 at the noise (`len(schedule)` may
differ from the steps that were asked for: PNDM makes one more); `seed` is what a pipeline is given as latents; B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Multistep:
    """One sampler at a number of steps; float32, computed in float64.

    With x_n the point that the network is shown at its evaluation n, and m_n what it answers:

        x_n = seed_N[n] seed + sum_j outputs_NN[n, j] m_j     (j > n: evaluated before)
        z_0 = last_seed seed + sum_j last_N[j] m_j

    and, with the seed taken from the second line,

        x_n = picture_N[n] z_0 + sum_j coupling_NN[n, j] m_j

    Attributes:
        t_S: What the network is told as the time at each evaluation.
    """

    t_S: torch.Tensor
    seed_N: torch.Tensor
    outputs_NN: torch.Tensor
    last_seed: torch.Tensor
    last_N: torch.Tensor
    picture_N: torch.Tensor
    coupling_NN: torch.Tensor

    def __len__(self) -> int:
        return len(self.t_S)

    def to(self, device: torch.device | str) -> Multistep:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})

    def point(self, n: int, seed_BCHW: torch.Tensor, m_BNCHW: torch.Tensor) -> torch.Tensor:
        """x_n from the seed and the outputs at all evaluations before, that is, from n + 1 on."""
        return self.seed_N[n] * seed_BCHW + torch.einsum("n,bnchw->bchw", self.outputs_NN[n, n + 1 :], m_BNCHW)

    def points(self, z_0_BCHW: torch.Tensor, m_BNCHW: torch.Tensor) -> torch.Tensor:
        """All x_n from the picture's latent (B, N, C, H, W)."""
        return self.picture_N.view(-1, 1, 1, 1) * z_0_BCHW[:, None] + torch.einsum(
            "nk,bkchw->bnchw", self.coupling_NN, m_BNCHW
        )

    def picture(self, seed_BCHW: torch.Tensor, m_BNCHW: torch.Tensor) -> torch.Tensor:
        """z_0 from the seed and all outputs."""
        return self.last_seed * seed_BCHW + torch.einsum("n,bnchw->bchw", self.last_N, m_BNCHW)

    def seed(self, z_0_BCHW: torch.Tensor, m_BNCHW: torch.Tensor) -> torch.Tensor:
        """The seed from z_0."""
        return (z_0_BCHW - torch.einsum("n,bnchw->bchw", self.last_N, m_BNCHW)) / self.last_seed


def read_multistep(config: Mapping[str, Any], steps: int) -> Multistep:
    """The sampler that a configuration is of, as diffusers runs it.

    Args:
        config: Of a deterministic sampler that neither clips nor thresholds.

    Raises:
        ValueError: It cannot make so many steps, overflows, or keeps nothing of its seed.
    """
    import diffusers

    name = config["_class_name"]
    sampler = getattr(diffusers, name).from_config(dict(config))
    try:
        sampler.set_timesteps(steps)
        latents_NN, outputs_NN, shown_N = _steps(sampler)
    except (ValueError, IndexError):
        raise ValueError(
            f"{name} cannot make {steps} steps of this model's times, nor can its pipeline: take another number of "
            "steps, or another spacing"
        ) from None
    # Latent n + 1 as a sum over the latents and outputs up to n becomes one over the seed and the outputs.
    N = len(shown_N)
    made = torch.zeros(N + 1, N + 1, dtype=torch.float64)
    made[0, 0] = float(sampler.init_noise_sigma)
    for n in range(N):
        made[n + 1] = latents_NN[n] @ made[:N]
        made[n + 1, 1:] += outputs_NN[n]
    shown_N1 = shown_N[:, None] * made[:N]
    (last_seed, last_N), (seed_N, outputs_NN) = made[N].split([1, N]), shown_N1.split([1, N], 1)
    if not bool(made.isfinite().all()):
        raise ValueError(
            f"{name} with these settings makes numbers that are not finite of {steps} steps, in its pipeline too: "
            "change them under scheduler, for instance final_sigmas_type: sigma_min"
        )
    if not bool(last_seed.abs() > 1e-12):
        raise ValueError(
            f"{name} of {steps} steps keeps nothing of the latent it starts from, and has no inverse: take another "
            "number of steps or spacing, or leave `sampler` out"
        )
    picture_N1 = seed_N / last_seed
    coupling_NN = outputs_NN - picture_N1 * last_N
    values = (seed_N[:, 0].flip(0), outputs_NN.flip(0, 1), last_seed[0], last_N.flip(0), picture_N1[:, 0].flip(0),
              coupling_NN.flip(0, 1))  # fmt: skip
    return Multistep(sampler.timesteps.flip(0), *(value.float() for value in values))


def _steps(sampler: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the sampler makes of its own latents and of the outputs, at each step from the noise on: latents_NN and
    outputs_NN; and shown_N, the factor under which the network sees a latent. float64.

    Each step is given unit vectors afresh, so that nothing large cancels in the float32 that diffusers computes in.
    """
    N = len(sampler.timesteps)
    unit = torch.eye(2 * N)[:, None]
    shown, rows = [], []
    for n, t in enumerate(sampler.timesteps):
        shown.append(sampler.scale_model_input(unit[n], t)[0, n])
        rows.append(sampler.step(unit[N + n], t, unit[n]).prev_sample[0])
    latents_NN, outputs_NN = torch.stack(rows).double().split(N, 1)
    return latents_NN, outputs_NN, torch.stack(shown).double()
