"""Priors without training: from the joint statistics of a captioned reference, or from its nearest captions (ours, but
where a function names its source). All arithmetic in float64; what is fitted works on the job's device, the nearest
captions' pictures are put together on the CPU.

Legend: B rows, T width of the text embeddings, E of the image embeddings, K neighbours; unit vectors are called u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from index import joint
from index.captions import Captions
from index.reference import Reference
from pipeline.contract import Row, ok
from stages.engine.passthrough import in_batches
from stages.engine.randomness import row_generator, row_normal
from stages.ovi import kernel
from stages.ovi.constraints import nearest_pairs
from stages.ovi.context import BATCH, Context, RowMap
from stages.ovi.settings import Kernel, Linear, MeanShift, Procrustes, PromptMethod

PAIRS_AT_ONCE = 4096  # captions with their pictures, for maps of their own: 84 MB at a width of 1280

Prior = Callable[[torch.Tensor], torch.Tensor]
"""Raw text embeddings t_BT to image embeddings z_BE, both float64 on the CPU, wherever the work is done."""


@dataclass(frozen=True)
class Conditional:
    """A Gaussian of image embeddings for each text: its mean, and what is left around it.

    Attributes:
        features: Of raw text embeddings; the mean is linear in them.
        regression: From the features to images. Both on one device, which does the work.
    """

    features: Callable[[torch.Tensor], torch.Tensor]
    regression: joint.Regression

    def mean(self, t_BT: torch.Tensor) -> torch.Tensor:
        """E[z | t] (B, E), on the CPU."""
        return self._mean(t_BT).cpu()

    def _mean(self, t_BT: torch.Tensor) -> torch.Tensor:
        return self.regression(self.features(t_BT.double().to(self.regression.weights_ET.device)))

    def sample(self, t_BT: torch.Tensor, seed: int, ids: list[str]) -> torch.Tensor:
        """A draw for each row (B, E), by seed and row id, on the CPU."""
        root_EE = self.regression.root_EE
        noise_BE = row_normal((len(root_EE),), seed, ids, "prior").double().to(root_EE.device)
        return (self._mean(t_BT) + noise_BE @ root_EE).cpu()


def linear(method: PromptMethod, context: Context, ridge: float | None = None) -> Conditional:
    """The conditional Gaussian of the joint Gaussian of texts and images.

    Args:
        method: That asks for it.
        ridge: See `index.joint.Fit.under`.

    Raises:
        ValueError: The reference has no captions, or too few for the ridge.
    """
    _, captions = context.need_captions(method)
    with _told(method):
        return Conditional(lambda t_BT: t_BT, captions.fit.under(ridge).to(context.device))


def kernelled(method: PromptMethod, context: Context, settings: Kernel) -> Conditional:
    """The same on a kernel's features of the texts; fitted once on each machine.

    Args:
        method: That asks for it.

    Raises:
        ValueError: The reference has no captions, or too few for the ridge.
    """
    with _told(method):
        features, regression = kernel.kept(*context.need_captions(method), settings)
    return Conditional(features.to(context.device), regression.to(context.device))


@contextmanager
def _told(method: PromptMethod) -> Iterator[None]:
    """What there is too little of names the method."""
    try:
        yield
    except joint.TooFewRows as error:
        raise ValueError(f"method {method.label!r}: {error}") from None


def shifted(captions: Captions) -> Prior:
    """The text embedding, moved by the difference of the means of images and texts.

    Raises:
        ValueError: Texts and images have not one width.
    """
    pairs = captions.pairs
    if pairs.texts != pairs.images:
        raise ValueError(f"mean-shift: texts of width {pairs.texts} cannot be moved to images of width {pairs.images}")
    shift_E = torch.from_numpy(pairs.mean_image_E - pairs.mean_text_T)
    return lambda t_BT: t_BT.double() + shift_E


def procrustes(reference: Reference, captions: Captions, k: int) -> Prior:
    """Each text turned by the orthogonal map that takes its k nearest captions nearest to their pictures, all at unit
    length (after CLIP^-1, "Implicit Inversion turns CLIP into a Decoder", 2026), and made as long as those pictures.

    What of a text lies outside the span of its captions is left out.
    """

    def turned(t_BT: torch.Tensor) -> torch.Tensor:
        texts_BKT, images_BKE = nearest_pairs(reference, captions, t_BT, k)
        text_q, text_r = torch.linalg.qr(normalize(texts_BKT, dim=-1).mT)
        image_q, image_r = torch.linalg.qr(normalize(images_BKE, dim=-1).mT)
        left, _, right = torch.linalg.svd(text_r @ image_r.mT, full_matrices=False)
        u_BT = normalize(t_BT.double(), dim=-1)
        z_BE = (image_q @ (right.mT @ (left.mT @ (text_q.mT @ u_BT[..., None]))))[..., 0]
        return normalize(z_BE, dim=-1) * images_BKE.norm(dim=-1).mean(1, keepdim=True)

    return turned


def by_caption(reference: Reference, captions: Captions, k: int) -> Prior:
    """The mean of the pictures with the k nearest captions."""
    return lambda t_BT: nearest_pairs(reference, captions, t_BT, k)[1].mean(1)


def prior(method: MeanShift | Linear | Kernel | Procrustes, context: Context) -> RowMap:
    """One of the priors, for rows.

    Raises:
        ValueError: The reference has no captions, too few, or of another width.
    """
    reference, captions = context.need_captions(method)
    match method:
        case MeanShift():
            return mapped(shifted(captions))
        case Procrustes():
            return mapped(procrustes(reference, captions, method.k), PAIRS_AT_ONCE // method.k + 1)
        case Linear():
            conditional = linear(method, context, method.ridge)
        case Kernel():
            conditional = kernelled(method, context, method)
    if method.residual:
        return typical(conditional, reference, captions, method, context.seed)
    return drawn(conditional, context.seed) if method.sample else mapped(conditional.mean)


def typical(
    conditional: Conditional, reference: Reference, captions: Captions, method: Linear | Kernel, seed: int
) -> RowMap:
    """The conditional mean, and a share of what a picture with a near caption differs from its own: for the caption of
    a picture of the reference, with the whole share, that picture itself."""
    assert method.residual is not None
    share, k = method.residual, method.k if method.sample else 1

    def done(rows: list[Row]) -> Iterator[Row]:
        t_BT = _texts(rows)
        texts_BKT, images_BKE = nearest_pairs(reference, captions, t_BT, k)
        chosen_B = torch.cat(
            [torch.randint(k, (1,), generator=row_generator(seed, row["id"], "prior")) for row in rows]
        )
        each_B = torch.arange(len(rows))
        left_BE = images_BKE[each_B, chosen_B] - conditional.mean(texts_BKT[each_B, chosen_B])
        return _outputs(rows, conditional.mean(t_BT) + share * left_BE)

    return lambda rows: in_batches(rows, BATCH, done)


def mapped(prior: Prior, batch: int = BATCH) -> RowMap:
    """A prior that needs nothing of a row but its text, for so many rows at once."""

    def done(rows: list[Row]) -> Iterator[Row]:
        return _outputs(rows, prior(_texts(rows)))

    return lambda rows: in_batches(rows, batch, done)


def drawn(conditional: Conditional, seed: int) -> RowMap:
    """Draws from each text's Gaussian."""

    def done(rows: list[Row]) -> Iterator[Row]:
        return _outputs(rows, conditional.sample(_texts(rows), seed, [row["id"] for row in rows]))

    return lambda rows: in_batches(rows, BATCH, done)


def _texts(rows: list[Row]) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["text"] for row in rows])).double()


def _outputs(rows: list[Row], z_BE: torch.Tensor) -> Iterator[Row]:
    return (ok(row, embedding=z_E, passes=0) for row, z_E in zip(rows, z_BE.float().numpy(), strict=True))
