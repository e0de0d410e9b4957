"""How a picture becomes a noise latent: the settings of every method, and of the stage. Plain models; nothing heavy is
imported.

Each method's own text says which of it is published and which is ours. A method without extra state is a `Rule` of
`stages.inversion.engine`, which its settings know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.contract import Settings, added, renamed, speed
from stages.engine.methods import Method, Methods
from stages.models.names import FolderName
from stages.models.settings import SamplingSettings

if TYPE_CHECKING:
    from stages.inversion.engine import Rule


Extra = Literal["latent_2", "bias", "input_bias", "null_text", "picture_latent"]
"""Columns of what a picture needs beside its seed."""
_FEW_STEPS = 8


class Boost(Settings):
    """ILB (idea: Chen et al., 2026): move the image latent so that it decodes to the picture, then invert that.
    `decoder` is the decoder inversion of Hong et al. ("On Exact Inversion of DPM-Solvers", 2024), by default with half
    their updates (theirs: `iterations: 100, warmup: 10`); `joint` is ours."""

    form: Literal["decoder", "joint"] = "decoder"
    """``decoder`` (Hong et al., 2024): fit the latent to the picture through the decoder. ``joint`` (ours): fit what
    comes back from inversion and generation; the round trip is repeated every `every` updates."""
    iterations: int = Field(50, ge=1, **renamed("steps", to="iterations"))
    """Adam updates."""
    lr: float = Field(0.1, gt=0, **renamed("rate", to="lr"))
    """Adam's rate at its highest (Hong et al.'s); it rises over `warmup` updates and falls to zero along a cosine."""
    warmup: int = Field(5, ge=0)
    """Updates of the rise."""
    every: int = Field(25, ge=1)
    """Updates between two round trips (``joint``)."""


class InversionMethod(Method):
    """What every method of inversion may be told."""

    ilb: Boost | None = None
    """Boost the image latent first. Left out: the encoder's latent is inverted."""

    inverts: ClassVar[frozenset[str]] = frozenset({"diffusion", "flow"})
    """Models that it inverts: ``diffusion``, variance-preserving (Stable Diffusion 1.x, 2.x, XL), and ``flow``,
    rectified (SD3, FLUX.1, ...)."""
    walks: ClassVar[bool] = True
    """It goes from the picture to the noise by latents that the sampler's way back passes too."""

    @property
    def extra(self) -> Extra | None:
        """The column that a picture needs to come back beside its `latent`; None: the noise alone brings it back."""
        return None

    @property
    def sweeps(self) -> bool:
        """It also inverts samplers whose steps hang together (`stages.inversion.sweeps`)."""
        return False

    def within(self, steps: int) -> InversionMethod:
        """The method in a sampler of so many steps: what it was not told and depends on them is filled in."""
        return self

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        """The rule under a guidance scale, for a network whose numbers are spaced `eps` apart at 1.

        Raises:
            TypeError: The method does not solve one equation a step.
        """
        raise TypeError(f"{self.label} is no method of one equation a step")


class DdimMethod(InversionMethod):
    """DDIM inversion: one network pass a step, the noise at the cleaner latent stands in for the noisier one's."""

    method: Literal["ddim"] = "ddim"
    inverts: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.explicit import Ddim

        return Ddim()


class EulerMethod(InversionMethod):
    """Euler's method backwards, for rectified flows: one network pass a step, the velocity at the cleaner latent and
    its own time."""

    method: Literal["euler"] = "euler"
    inverts: ClassVar[frozenset[str]] = frozenset({"flow"})

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.flows import Euler

        return Euler()


class RfSolverMethod(InversionMethod):
    """RF-Solver, which is the midpoint rule, for rectified flows: two network passes a step."""

    method: Literal["rf-solver"] = "rf-solver"
    inverts: ClassVar[frozenset[str]] = frozenset({"flow"})

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.flows import RfSolver

        return RfSolver()


class FireFlowMethod(InversionMethod):
    """FireFlow, for rectified flows: the midpoint rule at one network pass a step, started with the last step's
    velocity."""

    method: Literal["fireflow"] = "fireflow"
    inverts: ClassVar[frozenset[str]] = frozenset({"flow"})

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.flows import FireFlow

        return FireFlow()


class UniInvMethod(InversionMethod):
    """Uni-Inv: one network pass a step, at the point that the last step's output predicts."""

    method: Literal["uni-inv"] = "uni-inv"

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.explicit import UniInv

        return UniInv()


class RfInversionMethod(InversionMethod):
    """RF-Inversion, for rectified flows: one network pass a step, steered towards fixed noise, and on the way back
    towards the picture. Extra state: the picture's latent. The authors invert under the empty caption."""

    method: Literal["rf-inversion"] = "rf-inversion"
    inverts: ClassVar[frozenset[str]] = frozenset({"flow"})
    walks: ClassVar[bool] = False
    gamma: float = Field(0.5, ge=0, le=1)
    """Weight of the straight line to the noise, which is drawn from the row's id."""
    eta: float = Field(0.9, ge=0, le=1)
    """Weight of the straight line to the picture."""
    steered: float = Field(0.25, ge=0, le=1)
    """Share of the sampling steps under `eta`, the first ones, rounded; the authors take 7 of 28."""

    @property
    def extra(self) -> Literal["picture_latent"]:
        return "picture_latent"


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

    @property
    def sweeps(self) -> bool:
        return self.tolerance > 0

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.fixed_point import Anderson, Averaged, FixedPoint

        if self.acceleration == "anderson":
            return Anderson(self.iterations, self.tolerance, self.window)
        kind: type[FixedPoint[Any]] = Averaged if self.acceleration == "averaged" else FixedPoint
        return kind(self.iterations, self.tolerance)


class RenoiseMethod(InversionMethod):
    """ReNoise: fixed-point iterates, averaged at times below 250."""

    method: Literal["renoise"] = "renoise"
    renoises: int = Field(1, ge=1)
    """Passes a step beyond the first: 1 for 50 steps, 9 for a turbo model's 4."""

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.renoise import ReNoise

        return ReNoise(self.renoises)


class ExactMethod(InversionMethod):
    """Exact inversion's forward step method: small steps against the residual until it is gone."""

    method: Literal["exact"] = "exact"
    iterations: int = Field(500, ge=1)
    """Most updates a step."""
    lr: float = Field(0.5, gt=0, **renamed("rate", to="lr"))
    """Step size, reached after `warmup` updates and halved after 20 without gain."""
    warmup: int = Field(20, ge=0)
    """Updates over which the step size rises."""
    tolerance: float = Field(1e-3, ge=0)
    """Summed squared error at which a step is done."""

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.exact import Exact

        return Exact(self.iterations, self.lr, self.warmup, self.tolerance)


class NewtonMethod(InversionMethod):
    """Guided Newton-Raphson inversion (RNRI, GNRI), as its authors' code has it."""

    method: Literal["newton"] = "newton"
    iterations: int = Field(2, ge=1)
    """Network passes at each timestep; the authors' notebook takes 2."""
    prior_weight: float = Field(0.1, ge=0, **renamed("prior", to="prior_weight"))
    """Weight of the pull towards the likely latents."""

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.newton import Newton

        return Newton(self.iterations, self.prior_weight)


class LboMethod(InversionMethod):
    """Latent Bias Optimization: a bias a step, fitted until the step's residual is at the tolerance.

    The idea of a learned latent bias is published; loss, updates, warm start and stopping rule are ours.
    """

    method: Literal["lbo"] = "lbo"
    bias: Literal["output", "input"] = "input"
    """Added to the inversion step's result, or to what the network is shown."""
    update: Literal["safeguarded"] = "safeguarded"
    """How the bias is fitted: Anderson acceleration, and the best point of a step where its last one is not. What else
    was tried is measured in ``benchmarks/inversion``."""
    warm_start: Literal["none", "last", "linear", "fitted"] = "linear"
    """Start a step's bias from the last step's, from the line through the last two, or from as much of that line as
    would have fitted the last step, which is the best start where ``passes`` is 1."""
    passes: int | None = Field(None, ge=1)
    """Most network passes a step. Left out: 10, and 30 with 8 sampling steps or fewer, which are longer and need
    more."""
    tolerance: float | None = Field(None, ge=0)
    """Relative residual |D(z) - z_prev| / |z_prev| at which a step is done. Left out: 1e-3, and 1e-5 under
    classifier-free guidance, where generation magnifies what is left; never below half the spacing of the network's
    dtype, whose noise no pass takes away (docs/inversion.md)."""
    rate: None = None
    """Always null: the step size of updates that are no longer offered."""
    window: int = Field(3, ge=1)
    """Past iterates of Anderson."""
    replay: bool | Literal["shown"] = False
    """Store each step's remaining bias and add it in generation: nearly perfect by construction, but extra state
    (``steps`` more latents a row), and plain diffusers cannot replay it. ``true``: what has to be added to each step's
    result, for one more pass a step; ``shown``: what was added to the latent that the network was shown, for none."""
    retries: int | None = added(ge=1, le=5)
    """Times that a row which does not come back (its regenerated latent is off by more than 1 %) is solved again, each
    time with a tenth of the tolerance and twice the passes; the better seed is kept. Needs ``reconstruct``."""

    def within(self, steps: int) -> LboMethod:
        passes = self.limit if steps > _FEW_STEPS else self.passes or 30
        # What was left out stays so for whoever asks what was given.
        return type(self).model_construct(self.model_fields_set, **{**dict(self), "passes": passes})

    @property
    def limit(self) -> int:
        """`passes`; left out, what they are where steps are many."""
        return self.passes or 10

    def tightened(self, times: int, guidance: float, eps: float) -> LboMethod:
        """The method of a row's so-many-th retry."""
        stricter, passes = self.tolerance_at(guidance, eps) / 10**times, 2**times * self.limit
        return self.model_copy(update={"tolerance": stricter, "passes": passes, "retries": None})

    def tolerance_at(self, guidance: float, eps: float = 0.0) -> float:
        """The tolerance under a guidance scale, for a network whose numbers are spaced `eps` apart at 1."""
        if self.tolerance is not None:
            return self.tolerance
        return max(1e-5 if guidance > 1 else 1e-3, eps / 2)

    @field_validator("update", mode="before")
    @classmethod
    def _only_one_is_left(cls, value: Any) -> Any:
        if value in ("anderson", "gauss-newton", "adam", "jacobian-free"):
            raise ValueError(
                f"update {value} was measured to be inferior and is no longer offered: leave `update` out, or take "
                "fixed-point with `acceleration: anderson`"
            )
        return value

    @field_validator("rate", mode="before")
    @classmethod
    def _no_rate(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("a rate belonged to the updates adam and jacobian-free, which are no longer offered")
        return value

    @model_validator(mode="after")
    def _enough(self) -> LboMethod:
        least = 2 if self.bias == "output" else 1
        if self.passes is not None and self.passes < least:
            raise ValueError(f"update {self.update} with an {self.bias} bias needs `passes` of at least {least}")
        if self.retries and self.replay:
            raise ValueError("retries: rows of `replay` come back as they are; leave one of the two out")
        if self.retries and self.tolerance == 0:
            raise ValueError("retries: a tolerance of 0 cannot be lowered; raise `passes`, or give a tolerance")
        return self

    @property
    def extra(self) -> Literal["bias", "input_bias"] | None:
        if self.replay == "shown":
            return "input_bias"
        return "bias" if self.replay else None

    @property
    def sweeps(self) -> bool:
        return not self.replay and self.tolerance != 0

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        from stages.inversion.lbo import LatentBias

        return LatentBias(
            self.bias, self.warm_start, self.limit, self.tolerance_at(guidance, eps), self.window,
            told=self.replay == "shown",
        )  # fmt: skip


class BelmMethod(InversionMethod):
    """O-BELM: an exact two-step scheme. Extra state: two latents a row, and its own sampler."""

    method: Literal["belm"] = "belm"
    walks: ClassVar[bool] = False

    @property
    def extra(self) -> Literal["latent_2"]:
        return "latent_2"


class EdictMethod(InversionMethod):
    """EDICT: two coupled latents, exact. Extra state: two latents a row, and its own sampler with twice the passes."""

    method: Literal["edict"] = "edict"
    walks: ClassVar[bool] = False
    mixing: float = Field(0.93, gt=0.5, le=1)
    """The paper's p."""

    @property
    def extra(self) -> Literal["latent_2"]:
        return "latent_2"


class NullTextMethod(InversionMethod):
    """Null-text inversion: DDIM inversion, then a negative embedding learned for every step. Extra state: these."""

    method: Literal["null-text"] = "null-text"
    inverts: ClassVar[frozenset[str]] = frozenset({"diffusion"})
    guidance: float = Field(7.5, gt=1)
    """Guidance scale of the generation that the embeddings are learned for."""
    iterations: int = Field(10, ge=1)
    """Most Adam updates a step."""

    @property
    def extra(self) -> Literal["null_text"]:
        return "null_text"

    def rule(self, guidance: float, eps: float = 0.0) -> Rule[Any]:
        """The pivot's, which is DDIM inversion without guidance."""
        from stages.inversion.explicit import Ddim

        return Ddim()


AnyInversionMethod = Annotated[
    DdimMethod
    | EulerMethod
    | RfSolverMethod
    | FireFlowMethod
    | UniInvMethod
    | RfInversionMethod
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


class InvertImagesSettings(SamplingSettings):
    """What the stage `stages.inversion.stage` is told, and the job `invert-images` beside its input and output."""

    measures_pictures: ClassVar[bool] = True

    methods: Methods[AnyInversionMethod] = (LboMethod(),)
    """How pictures are inverted; a plain string stands for ``{method: ...}``. Each makes one row a picture."""
    steps: int = Field(50, ge=1)
    """Sampling steps; the picture is regenerated with as many."""
    guidance: float = Field(1.0, ge=1)
    """Guidance scale of inversion and regeneration alike. Above 1 every evaluation is two U-Net passes, and harder."""
    prompt: str | None = None
    """One prompt for every picture ("" for none). Left out: the row's own, empty where it has none."""
    inverter: FolderName | None = None
    """Output of a ``train-inverter`` job on the same model: what it reads out of each picture stands in for a caption,
    and is stored as ``text_latent``. Not together with `prompt`."""
    negative: str | None = None
    """Negative prompt, under guidance."""
    fit: Literal["crop", "pad", "stretch", "bucket"] = "crop"
    """Pictures of another shape: the middle square, white borders, or both sides resized. ``bucket``: no square, but
    the nearest shape of about that area that the model takes, so that hardly anything is cut off; rows then differ in
    the shape of their latents, which `width` and `height` tell."""
    reconstruct: bool | Annotated[float, Field(gt=0, lt=1)] = True
    """Regenerate each picture and measure it (`steps` more passes a row). A share, as 0.05: of so many pictures, drawn
    by their ids and the same ones for each method; the others' measures stay null."""
    pictures: bool = True
    """Keep the fitted picture and its reconstruction beside the latents."""
    max_residual: float | None = added(gt=0)
    """Fail a row whose relative residual is larger than this at any step: few-step and distilled models have steps that
    no method solves for every picture. Left out: rows only state their residuals."""
    edit_guidance: float | None = Field(None, ge=1)
    """Also regenerate under the input's column ``edit_prompt`` with this guidance, as ``edited``."""
    lpips: bool = False
    """Measure LPIPS too; needs ``latentmill[metrics]``, and is null without: the plan says so."""
    store: Literal["float32", "float16"] = "float32"
    """dtype of stored latents. What is measured is regenerated from the stored numbers."""
    store_path: Annotated[int, Field(ge=1)] | Literal["all"] | None = added()
    """Latents of the way from the picture to the noise that are kept beside the seed, as ``path_latents``, for
    trainings that take noisy latents of a picture: so many, evenly spread over the steps, the picture's own first;
    ``all``: that of every step."""
    slots: int | None = speed(None, ge=1)
    """Rows at once. Left out: as many as the GPU's free memory takes, 64 at most; 16 on a CPU."""

    def path_steps(self, steps: int) -> list[int]:
        """Which latents z_0 ... z_S of a way of so many steps are kept, 0 being the picture's; z_S is the seed."""
        if self.store_path is None:
            return []
        count = steps if self.store_path == "all" else self.store_path
        return [round(number * steps / count) for number in range(count)]

    @model_validator(mode="after")
    def _in_so_many_steps(self) -> InvertImagesSettings:
        object.__setattr__(self, "methods", tuple(method.within(self.steps) for method in self.methods))
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> InvertImagesSettings:
        if self.inverter is not None and self.prompt is not None:
            raise ValueError("inverter: it takes the place of captions; leave out `prompt`")
        if self.inverter is not None and self.fit == "bucket":
            raise ValueError("inverter: it reads squares; take another `fit` than bucket")
        if self.store_path is not None:
            if isinstance(self.store_path, int) and self.store_path > self.steps:
                raise ValueError(f"store_path: {self.store_path} are more than the {self.steps} steps; take all")
            if still := [method.label for method in self.methods if not method.walks]:
                raise ValueError(
                    f"store_path: method {still[0]} has no such way: what it passes is no latent of the sampler's; "
                    "leave it out of `methods`, or store_path"
                )
        retried = [m.label for m in self.methods if isinstance(m, LboMethod) and m.retries]
        if retried and self.reconstruct is not True:
            raise ValueError(f"method {retried[0]}: retries need `reconstruct: true`, which tells who comes back")
        return self
