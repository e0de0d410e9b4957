"""The inverter: what it maps, and its files."""

from __future__ import annotations

import pytest
import torch

from stages.inverter.model import InverterShape, TextInverter
from stages.inverter.training import split
from tests.stages.inverter.test_training import SMALL


def test_saved_inverters_load_from_their_folder_or_the_jobs(tmp_path):
    inverter = TextInverter(InverterShape(text=(16, 32), **SMALL))
    inverter.save(str(tmp_path / "out" / "inverter"))
    z = torch.randn(1, 4, 8, 8)
    for place in ("out", "out/inverter"):
        assert torch.allclose(TextInverter.load(str(tmp_path / place))(z)[0], inverter.eval()(z)[0], atol=1e-6)
    with pytest.raises(ValueError, match="run a train-inverter job"):
        TextInverter.load(str(tmp_path))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        InverterShape(latent=(4, 9, 8), text=(16, 32))
    with pytest.raises(ValueError, match="no multiple of heads"):
        InverterShape(latent=(4, 8, 8), text=(16, 32), width=30, heads=4)
    with pytest.raises(ValueError, match="too few"):
        split(1, 0.05, 0)
