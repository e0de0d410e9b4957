"""Rows that do not come back are solved again, the others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.settings import LatentModelSettings
from tests.stages.inversion.test_stage import picture
from tests.support import tiny_flows


def settings_of(**lbo: Any) -> InvertImagesSettings:
    method = {"method": "lbo", **lbo}
    return InvertImagesSettings(methods=(method,), steps=3, slots=2, device="cpu", pictures=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentModel:
    folder = tiny_flows.build(tmp_path_factory.mktemp("flux"), "flux-dev")
    return open_latent_model(LatentModelSettings(model=folder, device="cpu"))


def inverted(model: LatentModel, **lbo: Any) -> list[dict[str, Any]]:
    rows = [{"id": f"row-{i}", "image": picture(i), "prompt": "red star"} for i in range(3)]
    return sorted(InvertImages(settings_of(**lbo), model)(rows), key=lambda row: row["id"])


def test_a_row_that_does_not_come_back_is_solved_again(model) -> None:
    plain, retried = inverted(model, passes=1), inverted(model, passes=1, retries=5)
    for before, after in zip(plain, retried, strict=True):
        assert before["psnr_decoded"] < 50 < after["psnr_decoded"]
        assert after["latent_mse"] < before["latent_mse"] / 100
        assert after["residual_max"] < before["residual_max"] / 10
        assert after["forwards"] > before["forwards"] + 6  # its own, and at least those of one retry with two a step


def test_a_row_that_comes_back_is_left_alone(model) -> None:
    plain, retried = (inverted(model, passes=30, tolerance=1e-6, **more) for more in ({}, {"retries": 5}))
    for before, after in zip(plain, retried, strict=True):
        assert before["psnr_decoded"] > 60
        assert (before.pop("latent") == after.pop("latent")).all()
        assert (before.pop("residual") == after.pop("residual")).all()
        assert before == after


def test_retries_that_cannot_be_are_said() -> None:
    for share in (False, 0.5):
        with pytest.raises(ValidationError, match="method lbo: retries need `reconstruct: true`"):
            InvertImagesSettings(methods=({"method": "lbo", "retries": 1},), reconstruct=share)
    with pytest.raises(ValidationError, match="retries: rows of `replay` come back as they are"):
        settings_of(retries=1, replay=True)
    with pytest.raises(ValidationError, match="retries: a tolerance of 0 cannot be lowered"):
        settings_of(retries=1, tolerance=0)
