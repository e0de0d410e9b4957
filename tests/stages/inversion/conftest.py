"""A tiny Stable Diffusion model, and three of its latents to invert."""

from __future__ import annotations

import pytest
import torch

from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.schedule import ddim_schedule
from stages.models.settings import LatentModelSettings
from tests.stages.inversion.plain import CONFIG, SHAPE, STEPS
from tests.support import tiny_stable_diffusion


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentModel:
    folder = tiny_stable_diffusion.build(tmp_path_factory.mktemp("sd"))
    return open_latent_model(LatentModelSettings(model=folder, device="cpu"))


@pytest.fixture(scope="session")
def work(model: LatentModel):
    """Three latents with their conditions, and the schedule."""
    z = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(1)) * 0.8
    condition = model.condition(["red star", "blue circle", ""], guided=True)
    return z, condition, ddim_schedule(CONFIG, STEPS)
