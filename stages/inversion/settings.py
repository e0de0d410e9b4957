"""How a picture becomes a noise latent: the settings of every method. Plain models; nothing heavy is imported.

Each method's own text says which of it is published and which is ours. `stages.inversion.stage` does what is described
here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.contract import Settings
from stages.engine.methods import Method


class Boost(Settings):
    """ILB: move the image latent so that it decodes to the picture, then invert that. The form is ours."""

    form: Literal["decoder", "joint"] = "decoder"
    """``decoder``: fit the latent to the picture through the decoder. ``joint``: fit what comes back from inversion and
    generation; the round trip is repeated every `every` updates."""
    steps: int = Field(50, ge=1)
    """Adam updates."""
    rate: float = Field(0.1, gt=0)
    """Adam's rate at its highest; it rises over `warmup` updates and falls to zero along a cosine."""
    warmup: int = Field(5, ge=0)
    """Updates of the rise."""
    every: int = Field(25, ge=1)
    """Updates between two round trips (``joint``)."""


class InversionMethod(Method):
    """What every method of inversion may be told."""

    ilb: Boost | None = None
    """Boost the image latent first. Left out: the encoder's latent is inverted."""


class DdimMethod(InversionMethod):
    """DDIM inversion: one network pass a step, the noise at the cleaner latent stands in for the noisier one's."""

    method: Literal["ddim"] = "ddim"


class FixedPointMethod(InversionMethod):
    """Fixed-point inversion (AIDI, FPI), with AIDI's averaging or Anderson acceleration."""

    method: Literal["fixed-point"] = "fixed-point"
    iterations: int = Field(5, ge=1)
    """Passes a step beyond the first. AIDI uses 5, FPI 20."""
    acceleration: Literal["plain", "averaged", "anderson"] = "plain"
    """``averaged`` takes the mean over two successive iterates, ``anderson`` combines `window` of them."""
    window: int = Field(3, ge=1)
    """Past iterates of ``anderson``."""
    tolerance: float = Field(0.0, ge=0)
    """Go on to the next step at this relative residual (ours); 0: never before the last iteration."""


class RenoiseMethod(InversionMethod):
    """ReNoise: fixed-point iterates, averaged at times below 250."""

    method: Literal["renoise"] = "renoise"
    renoises: int = Field(1, ge=1)
    """Passes a step beyond the first: 1 for 50 steps, 9 for a turbo model's 4."""


class ExactMethod(InversionMethod):
    """Exact inversion's forward step method: small steps against the residual until it is gone."""

    method: Literal["exact"] = "exact"
    iterations: int = Field(500, ge=1)
    """Most updates a step."""
    rate: float = Field(0.5, gt=0)
    """Step size, reached after `warmup` updates and halved after 20 without gain."""
    warmup: int = Field(20, ge=0)
    """Updates over which the step size rises."""
    tolerance: float = Field(1e-3, ge=0)
    """Summed squared error at which a step is done."""


class NewtonMethod(InversionMethod):
    """Guided Newton-Raphson inversion (RNRI, GNRI), with the gradient that its formula asks for."""

    method: Literal["newton"] = "newton"
    iterations: int = Field(2, ge=1)
    """Newton steps at each timestep; each costs a forward and a backward pass."""
    prior: float = Field(0.1, ge=0)
    """Weight of the pull towards the likely latents."""


class LboMethod(InversionMethod):
    """Latent Bias Optimization: a bias a step, fitted until the step's residual is at the tolerance.

    The idea of a learned latent bias is published; loss, updates, warm start and stopping rule are ours.
    """

    method: Literal["lbo"] = "lbo"
    bias: Literal["output", "input"] = "input"
    """Added to the inversion step's result, or to what the network is shown."""
    update: Literal["safeguarded", "anderson", "gauss-newton", "adam", "jacobian-free"] = "safeguarded"
    """How the bias is fitted. ``safeguarded``: Anderson acceleration, and a gradient step where a row stalls."""
    warm_start: Literal["none", "last", "linear"] = "linear"
    """Start a step's bias from the last step's, or from the line through the last two."""
    passes: int = Field(10, ge=1)
    """Most network passes a step; a gradient counts as one more."""
    tolerance: float | None = Field(None, ge=0)
    """Relative residual |D(z) - z_prev| / |z_prev| at which a step is done. Left out: 1e-3, and 1e-5 under guidance,
    where generation magnifies what is left (docs/inversion.md)."""
    rate: float | None = Field(None, gt=0)
    """Step size of ``adam`` (0.01 when left out) and ``jacobian-free`` (1)."""
    window: int = Field(3, ge=1)
    """Past iterates of Anderson."""
    replay: bool = False
    """Store each step's remaining bias and add it in generation: nearly perfect by construction, but extra state
    (``steps`` more latents a row), and plain diffusers cannot replay it."""

    def tolerance_at(self, guidance: float) -> float:
        """The tolerance under a guidance scale."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-5 if guidance > 1 else 1e-3

    @model_validator(mode="after")
    def _enough(self) -> LboMethod:
        least = (1 if self.bias == "output" else 0) + (2 if self.update in ("adam", "gauss-newton") else 1)
        if self.passes < least:
            raise ValueError(f"update {self.update} with an {self.bias} bias needs `passes` of at least {least}")
        return self


class BelmMethod(InversionMethod):
    """O-BELM: an exact two-step scheme. Extra state: two latents a row, and its own sampler."""

    method: Literal["belm"] = "belm"


class EdictMethod(InversionMethod):
    """EDICT: two coupled latents, exact. Extra state: two latents a row, and its own sampler with twice the passes."""

    method: Literal["edict"] = "edict"
    mixing: float = Field(0.93, gt=0.5, le=1)
    """The paper's p."""


class NullTextMethod(InversionMethod):
    """Null-text inversion: DDIM inversion, then a negative embedding learned for every step. Extra state: these."""

    method: Literal["null-text"] = "null-text"
    guidance: float = Field(7.5, gt=1)
    """Guidance scale of the generation that the embeddings are learned for."""
    iterations: int = Field(10, ge=1)
    """Most Adam updates a step."""


AnyInversionMethod = Annotated[
    DdimMethod
    | FixedPointMethod
    | RenoiseMethod
    | ExactMethod
    | NewtonMethod
    | LboMethod
    | BelmMethod
    | EdictMethod
    | NullTextMethod,
    Field(discriminator="method"),
]
