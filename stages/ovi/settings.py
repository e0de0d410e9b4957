"""How a prompt becomes an image embedding: the settings of every method. Plain models; nothing heavy is imported.

Each method's own text says which of it is published and which is ours. `stages.ovi.methods` does what they say.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.contract import Settings, added, renamed, speed
from stages.engine.methods import Method, Methods
from stages.models.decoding import Decode
from stages.models.names import FolderName, ModelName


class PromptMethod(Method):
    """What every method may be told."""

    rescale: bool = False
    """Scale the embedding to the mean norm of the reference's images. The decoder is sensitive to the norm; the cosine
    leaves it free."""

    @property
    def needs_reference(self) -> bool:
        """Whether it cannot do without the embeddings of real images."""
        return self.rescale

    @property
    def needed_rows(self) -> int:
        """How many of them it asks for at once."""
        return 1

    @property
    def needed_captions(self) -> int:
        """How many captioned ones it asks for; 0: it can do without captions."""
        return 0


class Stop(Settings):
    """When a row stops before its last step. Nothing set: never."""

    watch: Literal["loss", "cosine", "mahalanobis"] = "cosine"
    """What is looked at: the loss, the cosine to the text embedding, or the squared Mahalanobis distance over its mean
    (which sees the drift towards the text embedding: it rises when the embedding leaves the images)."""
    target: float | None = None
    """Stop once the cosine is at or above it (``watch: cosine``), or the loss or distance at or below it."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many steps in a row without progress."""
    relative: float = Field(0.0, ge=0)
    """The gain that counts as progress, as a share of the value."""
    minimum: int = Field(0, ge=0)
    """Steps before a row may stop."""
    best: bool = False
    """Return the embedding at the best watched value instead of the last one."""


class Constraint(Settings):
    """What keeps an embedding among those of real images: OVI's constraints. Their formulas and weights are ours."""

    mahalanobis: float = Field(0.0, ge=0)
    """Weight of the squared Mahalanobis distance to the reference's images, over its mean."""
    neighbours: float = Field(0.0, ge=0)
    """Weight of one minus the mean cosine to the k nearest images of the reference."""
    k: int = Field(8, ge=1)
    """Neighbours."""
    interval: int = Field(0, ge=0)
    """Steps between two searches for the neighbours, each with the embedding as it is; 0 searches once, with the text
    embedding, and is clearly the better one on the miniature world (docs/ovi.md)."""
    nearest_by: Literal["caption"] | None = added(**renamed("by", to="nearest_by"))
    """``caption``: the neighbours are the pictures whose captions are nearest to the prompt. Left out: the pictures
    that are so themselves."""
    around: Literal["prompt", "kernel"] | None = added()
    """``prompt``: the distance is to the prompt's own Gaussian, the one that `linear` draws from; ``kernel``: the one
    that `kernel` draws from, at its defaults. Left out: to that of all images."""
    units: Literal["balanced"] | None = added()
    """``balanced``: of `mahalanobis`, such that with 1 the pull of the text carries an embedding as far as a typical
    image lies from the mean, and with w to 1 / w^2 of that (squared) distance, whatever the encoder and its width."""
    floor: float | None = added(gt=0, le=1)
    """Axes along which images vary less than this share of the mean count as varying so much: of ill-conditioned
    statistics the thinnest axes would rule all. Left out: as the reference is shrunk; for ``around: prompt`` 1e-3."""

    @model_validator(mode="after")
    def _of_what_is_on(self) -> Constraint:
        of_distance = [name for name in ("around", "units", "floor") if getattr(self, name) is not None]
        if of_distance and not self.mahalanobis:
            raise ValueError(f"`{of_distance[0]}` belongs to `mahalanobis`, whose weight is 0: give it one")
        if self.nearest_by and (not self.neighbours or self.interval):
            belongs = "`nearest_by: caption` belongs to `neighbours`, searched once"
            raise ValueError(f"{belongs}: give a weight, and no `interval`")
        return self

    @property
    def needed_captions(self) -> int:
        """How many captioned images it asks for; 0: it can do without captions."""
        return self.k if self.nearest_by else 1 if self.around else 0


EARLY = Stop(watch="cosine", relative=0.02, patience=3, minimum=5)
"""Stop when three steps in a row have not brought the cosine 2 % of its distance to 1 nearer (ours). On the miniature
world this ends near the step of greatest fidelity, where the steep rise turns into the slow drift towards the text's
embedding, and needs neither a true picture nor a calibration (docs/ovi.md)."""


class TextEmbedding(PromptMethod):
    """The text embedding, used as if it were an image's. The baseline that scores surprisingly high in the paper."""

    method: Literal["text-embedding"] = "text-embedding"


class Retrieval(PromptMethod):
    """The mean of the k nearest image embeddings of the reference, by cosine to the text."""

    method: Literal["retrieval"] = "retrieval"
    k: int = Field(1, ge=1)
    """Images whose mean is taken; 1 is the nearest image itself."""
    nearest_by: Literal["caption"] | None = added(**renamed("by", to="nearest_by"))
    """``caption``: the pictures whose captions are nearest. Left out: the pictures that are."""

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needed_rows(self) -> int:
        return self.k

    @property
    def needed_captions(self) -> int:
        return self.k if self.nearest_by else 0


class Captioned(PromptMethod):
    """Base of the priors that need captioned images and no training."""

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needed_captions(self) -> int:
        return 1


class MeanShift(Captioned):
    """The text embedding, moved by the difference of the means of images and their captions."""

    method: Literal["mean-shift"] = "mean-shift"


class Regressed(Captioned):
    """Base of the priors that are the conditional mean of a Gaussian, or draws from it."""

    ridge: float | None = Field(None, gt=0)
    """In units of the mean variance of what is regressed on. Left out: chosen by generalised cross-validation."""
    sample: bool = False
    """Draw from the prompt's own Gaussian, by seed and id, instead of taking its mean, which is no picture where the
    prompt leaves something open, but an average of several."""
    residual: float | None = Field(None, gt=0, le=1)
    """Add so much of what the picture with the nearest caption differs from its own caption's mean, as regression
    kriging does: one typical picture instead of an average. With `sample`, of one of the k nearest, drawn by seed and
    id."""
    k: int = Field(8, ge=1)
    """Captions that such a draw chooses from."""

    @property
    def needed_captions(self) -> int:
        return self.k if self.residual and self.sample else 1


class Linear(Regressed):
    """The conditional mean of images in the joint Gaussian of text and image embeddings (ours)."""

    method: Literal["linear"] = "linear"


class Kernel(Regressed):
    """The same, on Nystroem features of the kernel exp(a (cos - 1)) of two texts (ours)."""

    method: Literal["kernel"] = "kernel"
    sharpness: float = Field(0.1, gt=0)
    """a, in units of the inverse of what two captions' cosine lacks to 1 on average."""
    centres: int = Field(2000, ge=2)
    """Captions that the features are made of, at most."""


class Procrustes(Captioned):
    """The text, turned by the orthogonal map that fits the k nearest captions to their pictures (after CLIP^-1)."""

    method: Literal["procrustes"] = "procrustes"
    k: int = Field(64, ge=1)
    """Captions that the map is fitted to."""

    @property
    def needed_captions(self) -> int:
        return self.k


class TrainedPrior(PromptMethod):
    """A trained diffusion prior (Kandinsky 2.2's pipeline), or an ECLIPSE-style prior that needs one pass."""

    method: Literal["trained-prior"] = "trained-prior"
    model: ModelName | None = None
    """Prior pipeline, folder or hub id. Left out: the job's ``encoder``."""
    prior: ModelName | None = None
    """Another `PriorTransformer` for that pipeline, folder or hub id. One without a time embedding
    (``additional_embeddings: 3``, as ECLIPSE's) is run in one pass, without guidance and without un-whitening."""
    steps: int = Field(25, ge=2)
    """Denoising steps."""
    guidance: float = Field(4.0, ge=0)
    """Guidance scale."""
    batch_size: int = Field(32, ge=1, **renamed("batch", to="batch_size"))
    """Rows at once."""


class Direct(PromptMethod):
    """OVI's objective minimised over the embedding itself, without the encoder (ours): seconds for 100,000 prompts."""

    method: Literal["direct"] = "direct"
    constraint: Constraint = Constraint(mahalanobis=1.0)
    """Without a constraint the text embedding itself is the minimum."""
    steps: int = Field(200, ge=1)
    """Most steps a row makes."""
    lr: float = Field(5e-2, gt=0)
    """AdamW's rate, in units of the whitened embedding."""
    stop: Stop = Stop(watch="loss", relative=1e-4, patience=5)
    """When a row stops earlier."""
    slots: int = speed(256, ge=1)
    """Rows at once."""
    # What OVI lets one choose and `direct` does not.
    weight_decay: ClassVar[float] = 0.0
    eps: ClassVar[float] = 1e-8
    init_std: ClassVar[float] = 0.0
    precision: ClassVar[Literal["float32"]] = "float32"
    accelerate: ClassVar[Literal["none"]] = "none"

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needed_rows(self) -> int:
        return self.constraint.k if self.constraint.neighbours else 1

    @property
    def needed_captions(self) -> int:
        return self.constraint.needed_captions

    @property
    def stopping(self) -> Stop:
        return self.stop

    @property
    def limit(self) -> int:
        return self.steps


class OVI(PromptMethod):
    """Optimisation-based visual inversion (Dell'Erba and Bagdanov): visual tokens optimised through the encoder."""

    method: Literal["ovi"] = "ovi"
    recipe: Literal["published", "early"] = "early"
    """``published``: the base algorithm as in Cross the Gap, 1000 AdamW steps at 2e-2 and no stopping; ``early``: the
    same steps, stopped before the embedding drifts to the text's (ours)."""
    tokens: int = Field(4, ge=1)
    """Pseudo-tokens P. Published: B/32 1, CLIP L/14 4, OpenCLIP L/14 2, SigLIP B/16 4; none for bigG."""
    compact: bool = False
    """Run the encoder on the P tokens alone instead of stretching them to all patches (ours; N / P times less work)."""
    constraint: Constraint = Constraint()
    """What keeps the embedding among the images."""
    steps: int | None = Field(None, ge=1)
    """Most steps a row makes. Left out: 1000 as published, else 60."""
    lr: float = Field(2e-2, gt=0)
    """AdamW's rate."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decay."""
    init_std: float = Field(0.02, ge=0)
    """Standard deviation of the first tokens."""
    stop: Stop | None = None
    """When a row stops earlier. Left out: ``early`` stops when the cosine's rise turns into drift (less than 2 % of the
    remaining distance a step, three steps in a row); with a constraint, which rises slowly and doesn't drift, with
    ``{}``, and as published, all steps are made."""
    warm_start: FolderName | None = None
    """Output of an earlier job with ``store_tokens: true`` and as many tokens: a row starts from the tokens of the
    prompt there that is nearest to it."""
    slots: int | None = speed(None, ge=1)
    """Rows at once. Left out: what a GPU's memory takes, 64 at most; 32 on a CPU."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast of the encoder; the tokens stay float32."""
    accelerate: Literal["none", "compile", "graph"] = "none"
    """``compile``: torch.compile for the encoder; ``graph``: the whole step as a CUDA graph (needs a GPU). That of
    ``compact`` tokens is one on a GPU anyway where the bank is in its memory."""

    @property
    def needs_reference(self) -> bool:
        constraint = self.constraint
        watches = self.stopping.watch == "mahalanobis"
        return self.rescale or bool(constraint.mahalanobis or constraint.neighbours) or watches

    @property
    def needed_rows(self) -> int:
        return self.constraint.k if self.constraint.neighbours else 1

    @property
    def needed_captions(self) -> int:
        return self.constraint.needed_captions

    @property
    def stopping(self) -> Stop:
        """`stop`, or what stands for it when it is left out."""
        drifts = self.recipe == "early" and not (self.constraint.mahalanobis or self.constraint.neighbours)
        return self.stop or (EARLY if drifts else Stop())

    @property
    def eps(self) -> float:
        """AdamW's eps. The published 1e-8 stands beside the gradient of a mean over a batch of 64; a row's own gradient
        is 64 times as large, and so is what makes the same step of it."""
        return 64e-8 if self.recipe == "published" else 1e-8

    @property
    def limit(self) -> int:
        """`steps`, or what stands for it when it is left out."""
        return self.steps or (1000 if self.recipe == "published" else 60)

    @model_validator(mode="after")
    def _published_is_published(self) -> OVI:
        if self.recipe == "published":
            fixed = {"steps": 1000, "lr": 2e-2, "weight_decay": 0.01, "init_std": 0.02}
            other = [key for key, value in fixed.items() if getattr(self, key) not in (None, value)]
            if self.stopping != Stop():
                other.append("stop")
            if other:
                raise ValueError(
                    f"`recipe: published` fixes {', '.join(other)}: leave them out, or use `recipe: early`"
                )
        return self


AnyPromptMethod = Annotated[
    TextEmbedding | Retrieval | MeanShift | Linear | Kernel | Procrustes | TrainedPrior | Direct | OVI,
    Field(discriminator="method"),
]


class PromptInversion(Settings):
    """What the job `invert-prompts` hands on to its stage as it is."""

    encoder: ModelName = Field("micro:prior", **renamed("model", to="encoder"))
    """Folder or hub id of the encoders: a Kandinsky 2.2 prior pipeline, or a CLIP, OpenCLIP or SigLIP model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    allow_pickle: bool | None = added()
    """Read weights of encoders, priors and decoder that are there as pickles (``.bin``) alone. A pickle can run
    anything on the machine that reads it."""
    methods: Methods[AnyPromptMethod]
    """How the prompts are inverted; a plain string stands for ``{method: ...}``. Each makes one row a prompt."""
    reference: FolderName | None = None
    """Output of a ``reference`` job made with the same image encoder: real image embeddings for retrieval, for the
    constraints, and for measuring."""
    oracle: ModelName | None = None
    """Folder of the oracle. Left out: the shipped one."""
    store_tokens: bool = False
    """Keep OVI's tokens, so that a later job can start from them (``warm_start``)."""
    store_states: Literal["last", "penultimate"] | None = added()
    """Keep the image encoder's hidden states of all of OVI's tokens, for decoders that take a sequence: ``last`` as
    FLUX.1 Redux takes them, ``penultimate`` as an IP-Adapter Plus does. float16; 0.7 MB a row of ViT-H/14."""

    @model_validator(mode="after")
    def _reference_where_it_is_needed(self) -> PromptInversion:
        needing = next((method for method in self.methods if method.needs_reference), None)
        if needing is not None and self.reference is None:
            raise ValueError(f"method {needing.label!r} needs `reference:`, the output of a `job: reference`")
        return self


Score = Literal["clip", "oracle", "frechet"]


class InvertPromptsSettings(PromptInversion):
    """What the stage is told: the job's `decode` and `score` go by the names of what they make."""

    decoder: Decode | None = None
    """Make pictures. Left out: embeddings only."""
    scores: tuple[Score, ...] = ()
    """What judges them."""
    seed: int = 0
    """Everything random about a row is drawn from (seed, id)."""

    @property
    def encoder_of_one_precision(self) -> bool:
        """Whether nothing needs the image encoder but OVI methods of one precision."""
        precisions = {method.precision for method in self.methods if isinstance(method, OVI)}
        return len(precisions) == 1 and self.decoder is None and self.store_states is None
