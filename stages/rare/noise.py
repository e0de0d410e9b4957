"""New noise from a few latents: interpolation, linear combination and norm-aware paths.

Pure functions on flattened noise latents (z_T), each naming its source. N numbers from a standard Gaussian have a norm
that follows the chi distribution with N degrees of freedom: for large N all such latents lie in a thin shell of radius
sqrt(N), and samplers do badly on what lies elsewhere. Each method below keeps its results near the shell in a way of
its own.

Legend: B new latents, K reference latents, N numbers a latent, P points a path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PARALLEL = 0.9995
"""Cosine above which two latents are interpolated along their chord: the sphere's formula divides by the sine."""


def slerp(t_B: torch.Tensor, a_BN: torch.Tensor, b_BN: torch.Tensor) -> torch.Tensor:
    """Spherical linear interpolation (Shoemake, 1985): ``(sin((1-t) w) a + sin(t w) b) / sin(w)``, w the angle.

    Two latents of one norm give latents of that norm. Nearly parallel ones are interpolated along their chord.

    Args:
        t_B: Positions, 0 at a and 1 at b.
        a_BN, b_BN: The two ends of each row.

    Raises:
        ValueError: Two ends are opposite, so that no arc between them is the shortest, or one of them is zero.
    """
    a_BD, b_BD = a_BN.double(), b_BN.double()
    size_B = a_BD.norm(dim=1) * b_BD.norm(dim=1)
    cosine_B = (a_BD * b_BD).sum(1) / size_B
    if not bool((cosine_B > -PARALLEL).all()):
        raise ValueError("two seeds are opposite, or one is zero: there is no arc between them")
    t_B = t_B.double()
    angle_B = cosine_B.clamp(max=1).acos()
    near_B = cosine_B > PARALLEL
    sine_B = torch.where(near_B, torch.ones_like(angle_B), angle_B.sin())
    first_B = torch.where(near_B, 1 - t_B, ((1 - t_B) * angle_B).sin() / sine_B)
    second_B = torch.where(near_B, t_B, (t_B * angle_B).sin() / sine_B)
    return (first_B[:, None] * a_BD + second_B[:, None] * b_BD).to(a_BN.dtype)


def combine(w_BK: torch.Tensor, z_KN: torch.Tensor) -> torch.Tensor:
    """Linear combinations that are Gaussian again: ``w z / sqrt(sum w^2)``.

    The closed form of Bodin et al. (2024; named COG, later LOL) for a standard Gaussian. It is exact for independent
    latents; latents that agree (inverted pictures of one thing) come out longer than sqrt(N).

    Raises:
        ValueError: All weights of a row are zero.
    """
    length_B = w_BK.double().square().sum(1).sqrt()
    if not bool((length_B > 0).all()):
        raise ValueError("all weights of a combination are zero")
    return ((w_BK.double() @ z_KN.double()) / length_B[:, None]).to(z_KN.dtype)


def log_chi(norm: torch.Tensor, dimension: int) -> torch.Tensor:
    """Log density of the chi distribution at some norms, float64: how likely Gaussian noise of that norm is.

    ``(N-1) log r - r^2/2 - (N/2-1) log 2 - log Gamma(N/2)``; in float64, because it is a small difference of terms that
    are as large as N log N.
    """
    r = norm.double()
    constant = (dimension / 2 - 1) * math.log(2) + math.lgamma(dimension / 2)
    return (dimension - 1) * r.log() - r.square() / 2 - constant


def path_cost(path_KPN: torch.Tensor, cap: float) -> torch.Tensor:
    """cost_K of paths: minus the line integral of the log chi density, plus how far steps are longer than `cap`.

    The integral takes the density at the middle of each step times the step's length (Samuel et al., 2023, as their
    code discretises it). The density of a norm is below 1, so every step costs something, and more off the shell.
    """
    step_KP = (path_KPN[:, 1:] - path_KPN[:, :-1]).norm(dim=2).double()
    middle_KP = ((path_KPN[:, 1:] + path_KPN[:, :-1]) / 2).norm(dim=2)
    integral_K = (step_KP * log_chi(middle_KP, path_KPN.shape[2])).sum(1)
    return (step_KP - cap).relu().sum(1) - integral_K


@dataclass(frozen=True)
class Centroid:
    """What `norm_aware_centroid` found.

    Attributes:
        centroid_N: The centroid.
        path_KPN: A path a reference: the centroid first, the reference last.
        cost, start_cost: The objective at the end and at the start.
        updates: Adam updates made.
    """

    centroid_N: torch.Tensor
    path_KPN: torch.Tensor
    cost: float
    start_cost: float
    updates: int


def norm_aware_centroid(
    z_KN: torch.Tensor, *, points: int = 50, rate: float = 0.01, tolerance: float = 0.01, patience: int = 5,
    limit: int = 2000,
) -> Centroid:  # fmt: skip
    """The point nearest to all references along likely paths, and these paths (NAO).

    "Norm-guided latent space exploration for text-to-image generation" (Samuel et al., NeurIPS 2023): minimise the sum
    of `path_cost` over the references minus the log chi density of the centroid's norm, over the centroid and the
    paths' inner points. Theirs: the objective, 50 points a path, Adam with rate 0.01, steps of at most 2/P of the
    references' distance (penalty of weight 1), the end after 5 updates in a row that change the objective by less than
    0.01 (or 10,000 updates), the start of a centroid of two at their slerp. Ours: the start of a centroid of more (the
    mean's direction with the mean norm, which is the slerp for two of one norm), paths that start as arcs instead of
    chords with noise, the mean distance over all pairs in the cap, the limit of updates.

    Args:
        z_KN: At least two references.
        points: Points a path, both ends included.
        rate, tolerance, patience, limit: Of Adam and its end.

    Raises:
        ValueError: Fewer than two references, or references whose mean is zero.
    """
    if len(z_KN) < 2:
        raise ValueError(f"a centroid needs at least 2 seeds, there is {len(z_KN)}")
    if points < 3:
        raise ValueError(f"points is {points}: a path has two ends and at least one point between them")
    z_KN = z_KN.detach()
    mean_N = z_KN.mean(0)
    if not float(mean_N.norm()) > 0:
        raise ValueError("the mean of the seeds is zero: there is no centroid between them")
    cap = 2 * float(torch.pdist(z_KN.double()).mean()) / points
    centroid_N = (mean_N * (z_KN.norm(dim=1).mean() / mean_N.norm())).requires_grad_(True)
    count, size = z_KN.shape
    t_P = torch.linspace(0, 1, points, device=z_KN.device)[1:-1]
    start = slerp(
        t_P.repeat(count), centroid_N.detach().expand(count * len(t_P), -1), z_KN.repeat_interleave(len(t_P), 0)
    )
    inner_KPN = start.view(count, len(t_P), size).requires_grad_(True)

    def paths() -> torch.Tensor:
        return torch.cat([centroid_N.expand(count, 1, -1), inner_KPN, z_KN[:, None]], 1)

    adam = torch.optim.Adam([centroid_N, inner_KPN], lr=rate)
    costs: list[float] = []
    quiet = 0
    with torch.enable_grad():
        while len(costs) <= limit and quiet < patience:
            cost = path_cost(paths(), cap).sum() - log_chi(centroid_N.norm(), size)
            costs.append(float(cost.detach()))
            quiet = quiet + 1 if len(costs) > 1 and abs(costs[-1] - costs[-2]) < tolerance else 0
            if len(costs) <= limit and quiet < patience:
                adam.zero_grad()
                cost.backward()
                adam.step()
    return Centroid(centroid_N.detach(), paths().detach(), costs[-1], costs[0], len(costs) - 1)


def along(path_KPN: torch.Tensor, which_B: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Points of paths, straight between neighbouring points.

    Args:
        which_B: Number of the path, int64.
        t_B: Position by points, 0 at the path's first and 1 at its last.
    """
    place_B = t_B.to(path_KPN.dtype) * (path_KPN.shape[1] - 1)
    left_B = place_B.long().clamp(0, path_KPN.shape[1] - 2)
    share_B = (place_B - left_B)[:, None]
    return (1 - share_B) * path_KPN[which_B, left_B] + share_B * path_KPN[which_B, left_B + 1]


def low_frequencies(z_BCHW: torch.Tensor, fresh_BCHW: torch.Tensor, low: float) -> torch.Tensor:
    """The low frequencies of latents and the others of fresh noise (ours): what lies where is kept, detail is new.

    The low band is given the energy that Gaussian noise has there on the mean, a number of 1 each, so that the variance
    stays 1 where seeds that agree are mixed too long or too short.

    Args:
        z_BCHW: What the low frequencies are of.
        fresh_BCHW: Standard Gaussian, independent of it.
        low: Share of the highest frequency (half a cycle a number) up to which frequencies are low, along both axes.
    """
    H, W = z_BCHW.shape[-2:]
    in_rows_H = torch.fft.fftfreq(H, device=z_BCHW.device).abs() <= low / 2
    in_columns_F = torch.fft.rfftfreq(W, device=z_BCHW.device) <= low / 2
    band_HF = in_rows_H[:, None] & in_columns_F[None]

    def split(x_BCHW: torch.Tensor, kept_HF: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x_BCHW.double()) * kept_HF, s=(H, W))

    low_BCHW = split(z_BCHW, band_HF)
    waves = int((in_rows_H[:, None] & (torch.fft.fftfreq(W, device=z_BCHW.device).abs() <= low / 2)[None]).sum())
    length_B = low_BCHW.flatten(1).norm(dim=1)
    size_B = math.sqrt(z_BCHW.shape[1] * waves) / length_B.clamp_min(torch.finfo(torch.float64).tiny)
    return (low_BCHW * size_B[:, None, None, None] + split(fresh_BCHW, ~band_HF)).to(z_BCHW.dtype)
