"""Names in settings mean the same wherever they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

import micro
from pipeline.run.plan import differences
from stages.models.settings import LatentModelSettings
from stages.ovi.settings import PromptInversion


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home/sd").mkdir(parents=True)
    (tmp_path / "here/sd").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def model(name: str) -> str:
    return LatentModelSettings(model=name).model


def test_paths_of_models_are_absolute_from_the_start(here: Path) -> None:
    assert model("sd") == model("./sd") == str(here / "here/sd")
    assert model("~/sd") == str(here / "home/sd")
    assert model("~/nothing") == str(here / "home/nothing")  # never a hub id
    assert model("org/sd") == "org/sd"
    assert model("micro:stable-diffusion") == str(micro.MODELS / "stable-diffusion")
    assert LatentModelSettings(vae="sd").vae == str(here / "here/sd")


def test_folders_of_other_jobs_are_absolute_before_they_are_there(here: Path) -> None:
    told = PromptInversion(methods=[{"method": "ovi", "warm_start": "out/a"}], reference="out/b")  # type: ignore[list-item]
    assert told.reference == str(here / "here/out/b")
    assert told.methods[0].warm_start == str(here / "here/out/a")  # type: ignore[union-attr]
    assert PromptInversion(methods=["direct"], reference="${step}").reference == "${step}"  # type: ignore[list-item]
    remote = PromptInversion(methods=["direct"], reference="s3://bucket/b")  # type: ignore[list-item]
    assert remote.reference == "s3://bucket/b"


def test_plans_with_short_paths_go_on(here: Path) -> None:
    old = {"config.model": "sd", "config.methods": [{"warm_start": "out/a"}], "stage.vae": "~/sd"}
    new = {"config.model": str(here / "here/sd"), "config.methods": [{"warm_start": str(here / "here/out/a")}]}
    new["stage.vae"] = str(here / "home/sd")
    assert differences(old, new) == {}
    assert differences(old | {"config.model": "other"}, new).keys() == {"config.model"}
    assert differences(new, old).keys() == new.keys()  # an absolute path is not written shorter again


def test_a_model_that_has_moved_goes_on_if_it_is_the_same(tmp_path: Path) -> None:
    """A checkout, a mount, a cache elsewhere: the fingerprint says what the model is."""
    now = str(tmp_path / "now/prior")
    old = {"config.model": "/then/prior", "config.methods": [{"prior": "/then/prior"}], "models.image.fingerprint": "a"}
    new = {"config.model": now, "config.methods": [{"prior": now}], "models.image.fingerprint": "a"}
    assert differences(old, new, models=[f"{now}/image_encoder"]) == {}
    assert differences(old, new).keys() == {"config.model", "config.methods"}  # of no known fingerprint
    assert differences(old, new, models=[f"{now}-other"]).keys() == {"config.model", "config.methods"}
    other = new | {"models.image.fingerprint": "b"}
    assert differences(old, other, models=[f"{now}/image_encoder"]) == {"models.image.fingerprint": ("a", "b")}
    hub = old | {"config.model": "org/prior"}
    assert differences(hub, new, models=[f"{now}/image_encoder"]).keys() == {"config.model"}
