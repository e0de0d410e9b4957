"""How new seeds are grown from the seeds of a concept's pictures: the settings of every method. Plain models; nothing
heavy is imported.

`stages.rare.noise` and `stages.rare.seed_select` hold the formulas, `stages.rare.stage` applies them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.engine.methods import Method


class RandomMethod(Method):
    """Plain Gaussian seeds: what the model draws of the prompt alone. The baseline; needs no pictures."""

    method: Literal["random"] = "random"


class SlerpMethod(Method):
    """Spherical interpolation between two of the concept's seeds, drawn at random."""

    method: Literal["slerp"] = "slerp"
    margin: float = Field(0.2, ge=0, lt=0.5)
    """Positions are drawn from (margin, 1 - margin): at an end the picture is one of the concept's own again."""


class LinearMethod(Method):
    """Linear combinations of all the concept's seeds, weights uniform on the simplex, made Gaussian again in closed
    form (COG)."""

    method: Literal["linear"] = "linear"


class NaoMethod(Method):
    """Points on norm-aware paths from the concept's norm-aware centroid to its seeds (NAO)."""

    method: Literal["nao"] = "nao"
    points: int = Field(50, ge=3)
    """Points a path."""
    updates: int = Field(2000, ge=1)
    """Most Adam updates of centroid and paths; they end earlier when the objective stands still."""
    margin: float = Field(0.2, ge=0, lt=0.5)
    """Positions are drawn from (0, 1 - margin), 0 being the centroid and 1 a seed of the concept: near a seed that is
    shorter or longer than a Gaussian one a path swings about the shell."""


class SeedSelectMethod(Method):
    """Seeds optimised through the whole sampler until their picture is near the concept's pictures (SeedSelect)."""

    method: Literal["seed-select"] = "seed-select"
    start: Literal["random", "slerp", "linear", "nao"] = "random"
    """Where the seed starts: a method with its default settings."""
    iterations: int | None = Field(None, ge=1)
    """AdamW updates. Left out: 30 from a random seed, 5 from another, as published."""
    rate: float | None = Field(None, gt=0)
    """AdamW's rate, a tenth of it after three updates. Left out: 0.1 from a random seed, 0.05 from another."""
    steps: int | None = Field(None, ge=3)
    """Sampling steps while optimising; fewer are cheaper. Left out: the job's."""

    @property
    def budget(self) -> tuple[int, float]:
        """Updates and rate."""
        fresh = self.start == "random"
        return self.iterations or (30 if fresh else 5), self.rate or (0.1 if fresh else 0.05)


AnySeedMethod = Annotated[
    RandomMethod | SlerpMethod | LinearMethod | NaoMethod | SeedSelectMethod, Field(discriminator="method")
]
