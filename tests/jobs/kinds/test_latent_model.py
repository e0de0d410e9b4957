"""Job files that name another scheduler or autoencoder than the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.schema.base import RowJob
from jobs.schema.reading import JobFileError, load
from stages.models.settings import LatentModelSettings
from tests.support.tiny_stable_diffusion import build

JOBS: dict[str, dict[str, Any]] = {
    "invert-images": {},
    "invert-text": {"inverter": "<folder>"},
    "learn-concepts": {},
    "rare-concepts": {"methods": ["random"]},
    "train-inverter": {},
}


FINISHED: Any = SimpleNamespace(output=SimpleNamespace(path="OUT"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, which has a trained inverter in it, and another one of the same latent space."""
    from stages.inverter.model import InverterShape, TextInverter

    root = tmp_path_factory.mktemp("models")
    folder = build(root / "sd")
    TextInverter(InverterShape(latent=(4, 8, 8), text=(16, 32), patch=4, width=32, layers=1, heads=4)).save(folder)
    return folder, build(root / "other", seed=1)


def written(path: Path, kind: str, model: str, *lines: str) -> str:
    text = [f"job: {kind}", "input: rows.jsonl", f"model: {model}", *lines]
    text += [f"{key}: {json.dumps(value)}".replace("<folder>", model) for key, value in JOBS[kind].items()]
    path.write_text("\n".join(text) + "\n")
    return str(path)


def read(path: Path, kind: str, model: str, *lines: str) -> RowJob:
    job = load(written(path, kind, model, *lines))
    assert isinstance(job, RowJob)
    return job


@pytest.mark.parametrize("kind", JOBS)
def test_every_job_of_a_latent_model_takes_both(folders: tuple[str, str], tmp_path: Path, kind: str) -> None:
    folder, other = folders
    plain = read(tmp_path / "plain.yaml", kind, folder)
    changed = read(
        tmp_path / "changed.yaml", kind, folder,
        "scheduler:", "  class: EulerDiscreteScheduler", "  timestep_spacing: trailing", f"vae: {other}",
    )  # fmt: skip
    assert isinstance(plain, LatentModelSettings)
    before, after = plain.stage(), changed.stage()
    assert (before.params.get("scheduler"), before.params.get("vae")) == (None, None)
    assert after.params["scheduler"] == {"class": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    described, again = before.describe(), after.describe()
    assert described.columns == again.columns
    assert {part for part in described.models if described.models[part] != again.models[part]} == {"vae"}
    if "scheduler" in again.metadata:
        shown = json.loads(again.metadata["scheduler"])
        assert (shown["_class_name"], shown["timestep_spacing"]) == ("EulerDiscreteScheduler", "trailing")
        assert json.loads(described.metadata["scheduler"])["_class_name"] == "DDIMScheduler"
    if kind in ("invert-images", "rare-concepts"):
        card = changed.card(FINISHED)
        assert "from_config(pipe.scheduler.config, timestep_spacing='trailing', clip_sample=False)" in card
        assert f'AutoencoderKL.from_pretrained("{other}", subfolder="vae"' in card
        assert "vae" not in plain.card(FINISHED)


def test_a_scheduler_that_is_not_understood_is_an_error_of_the_file(folders: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    with pytest.raises(JobFileError, match=r"job.yaml, line 4: scheduler: class 'EDMEulerScheduler' is none of"):
        read(file, "learn-concepts", folders[0], "scheduler: {class: EDMEulerScheduler}")
    with pytest.raises(ValueError, match="DDIMScheduler has no parameter 'spacing'"):
        read(file, "learn-concepts", folders[0], "scheduler: {spacing: trailing}").stage().describe()
    with pytest.raises(ValueError, match="no folder or hub id of an autoencoder"):
        read(file, "learn-concepts", folders[0], f"vae: {tmp_path}/nothing").stage().describe()
