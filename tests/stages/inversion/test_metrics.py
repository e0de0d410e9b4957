"""What is measured of noise, against scipy."""

from __future__ import annotations

import numpy as np
import torch

from stages.inversion.metrics import noise_statistics


def test_noise_statistics_against_scipy() -> None:
    from scipy.stats import kurtosis

    z = torch.randn((2, 4, 32, 32), generator=torch.Generator().manual_seed(0))
    z[1] = z[1].cumsum(-1)
    found = noise_statistics(z)
    flat = z.flatten(1).double().numpy()
    np.testing.assert_allclose(found["seed_kurtosis"], kurtosis(flat, axis=1), atol=1e-9)
    np.testing.assert_allclose(found["seed_std"], flat.std(1), rtol=1e-9)
    assert abs(found["seed_autocorrelation"][0]) < 0.05 < found["seed_autocorrelation"][1]
