"""Kernel ridge regression of images on texts, on Nystroem features (ours); fitted once on each machine, by the first
worker that asks, and found there by the others.

Legend: B rows, T width of the text embeddings, E of the image embeddings, M captioned rows, C centres, F features;
unit vectors are called u. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn.functional import normalize

from index import fits, joint
from index.captions import Captions
from index.reference import Reference
from stages.ovi.context import BATCH
from stages.ovi.settings import Kernel

SEED = 20_240_117  # of the choice of centres, and of the rows that are fitted
FIT_ROWS = 100_000  # captioned rows that a kernel is fitted to, at most: 2,000 centres know no more of them
NEGLIGIBLE = 1e-10  # of the centres' largest eigenvalue
FORM = 1
"""Of a fit that is kept: one more when another is fitted to the same captions, or it is written otherwise."""


@dataclass(frozen=True)
class Nystroem:
    """Features of unit texts whose products are ``exp(a (cos - 1))``, as far as the centres span them (Williams and
    Seeger, 2001).

    Attributes:
        centres_CT: Unit texts.
        root_CF: ``K^-1/2`` of the centres, without its negligible axes.
        a: Sharpness of the kernel.
    """

    centres_CT: torch.Tensor
    root_CF: torch.Tensor
    a: float

    @staticmethod
    def of(centres_CT: torch.Tensor, a: float) -> Nystroem:
        kernel_CC = (a * (centres_CT @ centres_CT.mT - 1)).exp()
        values_C, axes_CC = torch.linalg.eigh(kernel_CC)
        kept_C = values_C > NEGLIGIBLE * values_C[-1]
        return Nystroem(centres_CT, axes_CC[:, kept_C] / values_C[kept_C].sqrt(), a)

    def to(self, device: str) -> Nystroem:
        """The same, on a device that has float64."""
        return replace(self, centres_CT=self.centres_CT.to(device), root_CF=self.root_CF.to(device))

    def __call__(self, t_BT: torch.Tensor) -> torch.Tensor:
        """Features (B, F) of raw texts on its device."""
        kernel_BC = (self.a * (normalize(t_BT.double(), dim=-1) @ self.centres_CT.mT - 1)).exp()
        return kernel_BC @ self.root_CF


Fitted = tuple[Nystroem, joint.Regression]
"""Features of texts, and the regression of images on them."""


def kept(reference: Reference, captions: Captions, method: Kernel) -> Fitted:
    """This machine's fit to these captions under these settings.

    Raises:
        index.joint.TooFewRows: There are too few captioned rows for the ridge.
        OSError: There is no room for it among temporary files.
    """
    asked = {"form": FORM, "centres": method.centres, "sharpness": method.sharpness, "ridge": method.ridge}
    held = fits.kept(reference.path, asked, lambda: _arrays(*fit(reference, captions, method)))
    tensors = {name: torch.from_numpy(array) for name, array in held.items()}
    scalars = {name: tensors.pop(name).item() for name in ("a", "ridge")}
    features = Nystroem(tensors.pop("centres_CT"), tensors.pop("root_CF"), scalars["a"])
    return features, joint.Regression(**tensors, ridge=scalars["ridge"])


def _arrays(features: Nystroem, regression: joint.Regression) -> dict[str, np.ndarray]:
    every = {field.name: getattr(part, field.name) for part in (features, regression) for field in fields(part)}
    return {name: np.asarray(value, dtype=np.float64) for name, value in every.items()}


def fit(reference: Reference, captions: Captions, method: Kernel) -> Fitted:
    """Kernel ridge regression.

    Raises:
        index.joint.TooFewRows: There are too few captioned rows for the ridge.
    """
    features, fitted = features_and_fit(reference, captions, method)
    return features, fitted.under(method.ridge)


def features_and_fit(reference: Reference, captions: Captions, method: Kernel) -> tuple[Nystroem, joint.Fit]:
    """The features, and the joint Gaussian of them and the images, to be conditioned under any ridge; the sharpness is
    in units of the texts' spread, one minus the mean cosine of two captions.

    Raises:
        index.joint.TooFewRows: There are hardly any captioned rows.
    """
    count = captions.pairs.rows
    order_M = np.random.default_rng(SEED).permutation(count)
    fitted_M = np.sort(order_M[:FIT_ROWS])
    centre_C = np.sort(order_M[: method.centres])
    spread = 1 - float(np.square(captions.pairs.unit_J[: captions.pairs.texts] / count).sum())
    u_CT = normalize(torch.from_numpy(captions.index.gather(centre_C)).double(), dim=-1)
    features = Nystroem.of(u_CT, method.sharpness / max(spread, 1e-6))
    sums = joint.Accumulator(features.root_CF.shape[1], reference.dim)
    for start in range(0, len(fitted_M), BATCH):
        part_M = fitted_M[start : start + BATCH]
        t_BT = torch.from_numpy(captions.index.gather(part_M))
        sums.add(features(t_BT).numpy(), reference.index.gather(captions.rows_M[part_M]))
    return features, joint.Fit.of(sums.pairs())
