"""The device runs out of memory in every phase once: no row is lost or changed, and the next shard runs through."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.contract import Fit
from stages.caption.settings import CaptionSettings as Captioning
from stages.caption.stage import CaptionPictures
from stages.decode.settings import DecodeSettings
from stages.decode.stage import DecodeEmbeddings
from stages.embed.settings import CaptionSettings, EmbedSettings
from stages.embed.stage import Embed
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.inverter.model import InverterShape
from stages.inverter.settings import Training
from stages.inverter.training import Pairs, train_inverter
from stages.models.families import open_latent_model
from stages.ovi.settings import InvertPromptsSettings
from stages.ovi.stage import InvertPrompts
from stages.selection.settings import EmbedCandidatesSettings
from stages.selection.stage import EmbedCandidates
from tests.support import tiny_captioners, tiny_kandinsky, tiny_stable_diffusion
from tests.support.capped import Cap
from tests.support.concepts import concept_row, stage_of
from tests.support.rare import picture

SHARE = 0.6
"""Of what a phase takes at its peak, that it is given."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_stable_diffusion.build(tmp_path_factory.mktemp("model"))


def capped(monkeypatch: pytest.MonkeyPatch, where: str) -> Cap:
    """Put a cap on a function or method, named as ``module:name`` or ``module:Class.name``."""
    module, _, name = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    cap = Cap(getattr(owner, last))
    monkeypatch.setattr(owner, last, cap)
    return cap


def check(
    cap: Cap, make: Callable[[], Any], shard: Callable[[int], list[Any]], name: str, close: float,
    share: float = SHARE,
) -> None:  # fmt: skip
    """Run one shard without a limit; then two on a device that is too small for their batches."""
    wanted = {row["id"]: row for row in make()(shard(0))}
    assert all(row["status"] == "ok" for row in wanted.values())
    stage, cap.limit = make(), share * cap.peak
    first = {row["id"]: row for row in stage(shard(0))}
    assert cap.refused >= 1
    assert first.keys() == wanted.keys()
    for row in first.values():
        assert row["status"] == "ok", row["error"]
        _agree(row[name], wanted[row["id"]][name], close)
    refused = cap.refused
    assert all(row["status"] == "ok" for row in stage(shard(1)))
    assert cap.refused == refused
    other = make()  # another worker
    other.rooms.heed(stage.rooms.learned())
    assert all(row["status"] == "ok" for row in other(shard(1)))
    assert cap.refused == refused


def _agree(got: Any, wanted: Any, close: float) -> None:
    if isinstance(wanted, str):
        assert got == wanted
    else:
        np.testing.assert_allclose(np.asarray(got, float), np.asarray(wanted, float), atol=close, rtol=0)


HARD = {"method": "lbo", "tolerance": 1e-9, "passes": 12}
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "encode": ("stages.models.autoencoder:encode", {"method": "ddim"}),
    "decode": ("stages.models.autoencoder:decode", {"method": "ddim"}),
    "predict": ("stages.models.unet:StableDiffusion.forward", {"method": "ddim"}),
    "beside the network": ("stages.inversion.engine:InversionProblem.advance", {"method": "ddim"}),
    "boost": ("stages.inversion.ilb:BoostProblem.step", {"method": "ddim", "ilb": {"iterations": 3, "warmup": 1}}),
    "joint": (
        "stages.inversion.ilb:BoostProblem.step",
        {"method": "ddim", "ilb": {"form": "joint", "iterations": 2, "every": 1}},
    ),
    "null-text": ("stages.inversion.schemes:learn_null_text", {"method": "null-text", "iterations": 2}),
}


@pytest.mark.parametrize("phase", list(PHASES))
def test_every_phase_of_an_inversion_runs_out_once(folder: str, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    where, method = PHASES[phase]
    cap = capped(monkeypatch, where)
    settings = InvertImagesSettings(
        model=folder, methods=(method,), device="cpu", steps=3, slots=4,
        edit_guidance=2.0 if phase == "decode" else None,
    )  # fmt: skip

    def shard(number: int) -> list[Any]:
        return [
            {"id": f"{number}/{i}", "image": picture(i), "prompt": "red star", "edit_prompt": "blue star"}
            | {"method": settings.methods[0].label}
            for i in range(6)
        ]

    check(cap, lambda: InvertImages(settings), shard, "latent", close=2e-3)


def test_learning_words_runs_out_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cap = capped(monkeypatch, "stages.concepts.problem:LegoProblem.step")

    def make() -> Any:
        return stage_of(folder, settings={"steps": 4, "window": 2}, slots=4)

    check(cap, make, lambda number: [concept_row(4 * number + i) for i in range(4)], "embeddings", close=1e-4)


@pytest.mark.parametrize("phase", ["null-text", "boost"])
def test_one_row_that_does_not_fit_is_computed_again(folder: str, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """One slot: nothing can be halved."""
    where, method = PHASES[phase]
    cap = capped(monkeypatch, where)
    settings = InvertImagesSettings(model=folder, methods=(method,), device="cpu", steps=2, slots=1)

    def shard(number: int) -> list[Any]:
        row = {"image": picture(number), "prompt": "red star", "method": settings.methods[0].label}
        return [row | {"id": str(number)}]

    check(cap, lambda: InvertImages(settings), shard, "latent", close=0.0, share=0.8)


def test_one_concept_that_does_not_fit_is_computed_again(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cap = capped(monkeypatch, "stages.concepts.problem:LegoProblem.step")

    def make() -> Any:
        return stage_of(folder, settings={"steps": 2, "window": 2}, slots=1)

    check(cap, make, lambda number: [concept_row(number)], "embeddings", close=0.0, share=0.8)


def test_selecting_seeds_runs_out_once(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.support.rare import rows, stage

    cap = capped(monkeypatch, "stages.rare.stage:optimise_noise")
    method = {"method": "seed-select", "iterations": 2, "steps": 3}
    encoder = tiny_kandinsky.build_prior(tmp_path)

    def make() -> Any:
        return stage(folder, encoder, [method], slots=4)

    check(cap, make, lambda number: rows(["seed-select"], count=4), "latent", close=1e-3)


def test_what_a_draw_starts_from_does_not_change_when_it_is_done_in_parts(folder: str) -> None:
    model = open_latent_model(InvertImagesSettings(model=folder, device="cpu"))
    cap = Cap(type(model.pipeline).__call__)  # type: ignore[attr-defined]
    condition = model.condition(["a star"] * 5)

    def drawn() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
        return model.draw(condition, steps=2, guidance=1.0, generators=generators)

    wanted = drawn()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model.pipeline), "__call__", cap)  # type: ignore[attr-defined]
        drawn()
        cap.limit = SHARE * cap.peak
        for _ in "ab":
            torch.testing.assert_close(drawn(), wanted, atol=1e-4, rtol=0)
    assert 1 <= cap.refused <= 3


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_kandinsky.build_prior(tmp_path_factory.mktemp("prior"))


def pictured(number: int) -> list[Any]:
    return [{"id": f"{number}/{i}", "image": picture(i), "prompt": f"star {i}"} for i in range(8)]


@pytest.mark.parametrize(("where", "name"), [
    ("stages.models.clip:ImageEncoder.embed", "embedding"), ("stages.models.clip:TextEncoder._causal", "text_embedding")
])  # fmt: skip
def test_a_reference_runs_out_once(prior: str, monkeypatch: pytest.MonkeyPatch, where: str, name: str) -> None:
    """As does `select-corpus`, whose candidates the same stage embeds."""
    cap = capped(monkeypatch, where)
    settings = EmbedSettings(encoder=prior, batch_size=8, captions=CaptionSettings(encoder=prior))
    check(cap, lambda: Embed(settings, device="cpu"), pictured, name, close=1e-5)


def test_candidates_are_embedded_in_the_same_room(prior: str) -> None:
    stage = EmbedCandidates(EmbedCandidatesSettings(encoder=prior, batch_size=8))
    stage.rooms.heed({"pictures on cpu": Fit(2)})
    assert stage._embed.batch_size == 2


def test_captions_run_out_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cap = capped(monkeypatch, "stages.caption.captioner:Captioner._generate")
    settings = Captioning(model=tiny_captioners.build_blip(tmp_path), max_tokens=6, device="cpu", batch_size=8)
    check(cap, lambda: CaptionPictures(settings), pictured, "caption", close=0)


def test_decoding_runs_out_once(prior: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cap = capped(monkeypatch, "stages.models.kandinsky:Decoder.pictures")
    decode = {"model": tiny_kandinsky.build_decoder(tmp_path), "steps": 2, "batch_size": 8}
    settings = DecodeSettings(decode=decode, encoder=prior)  # type: ignore[arg-type]

    def shard(number: int) -> list[Any]:
        z_BE = np.random.default_rng(number).normal(size=(8, tiny_kandinsky.WIDTH))
        return [{"id": f"{number}/{i}", "embedding": z_E} for i, z_E in enumerate(z_BE)]

    check(cap, lambda: DecodeEmbeddings(settings, device="cpu"), shard, "image", close=1)


PROMPTED: dict[str, tuple[str, str, str, float]] = {
    "a step": ("stages.ovi.problem:OviProblem.step", "ovi", "embedding", 1e-4),
    "a prior": ("stages.ovi.trained_prior:diffusion_prior", "trained-prior", "embedding", 1e-4),
    "texts": ("stages.models.clip:TextEncoder._causal", "text-embedding", "embedding", 1e-5),
    "pictures": ("stages.models.kandinsky:Decoder.pictures", "text-embedding", "image", 1),
    "scores": ("stages.models.clip:ImageEncoder.embed", "text-embedding", "clip_score", 1e-2),
}


@pytest.fixture(scope="module")
def prompted(prior: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    decoder = {"model": tiny_kandinsky.build_decoder(tmp_path_factory.mktemp("decoder")), "steps": 2}
    return {"encoder": prior, "decoder": decoder | {"batch_size": 8}, "scores": ["clip"]}


@pytest.mark.parametrize("phase", list(PROMPTED))
def test_every_phase_of_a_prompt_runs_out_once(
    prompted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    where, method, name, close = PROMPTED[phase]
    cap = capped(monkeypatch, where)
    more = {"ovi": {"steps": 3, "slots": 8}, "trained-prior": {"steps": 2, "batch_size": 8}}
    drawn = prompted if name != "embedding" else {"encoder": prompted["encoder"]}
    settings = InvertPromptsSettings.model_validate(drawn | {"methods": [{"method": method} | more.get(method, {})]})

    def shard(number: int) -> list[Any]:
        return [{"id": f"{number}/{i}/{method}", "method": method, "prompt": f"star {number} {i}"} for i in range(8)]

    check(cap, lambda: InvertPrompts(settings, device="cpu"), shard, name, close)


def test_training_an_inverter_runs_out_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the whole batch."""
    z_MCHW = np.random.default_rng(0).normal(size=(12, 4, 8, 8)).astype(np.float16)
    data, shape = Pairs(z_MCHW, [f"star {i}" for i in range(12)]), InverterShape(
        latent=(4, 8, 8), text=(16, 32), patch=4, width=32, layers=2, heads=4
    )  # fmt: skip
    cap = capped(monkeypatch, "stages.inverter.model:TextInverter.forward")

    def trained() -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        model = open_latent_model(InvertImagesSettings(model=folder, device="cpu"))
        settings = Training(steps=3, batch_size=8, noise_rows=3, held_out=0.25)
        inverter, told = train_inverter(model, data, shape, settings, seed=0)
        return inverter.state_dict(), told["curve"]

    (wanted, curve), cap.limit = trained(), SHARE * cap.peak
    found, again = trained()
    assert cap.refused == 1
    for weight, value in wanted.items():
        torch.testing.assert_close(found[weight], value, atol=1e-4, rtol=0)
    for step, other in zip(curve, again, strict=True):
        assert step == pytest.approx(other, rel=1e-5)


def test_what_the_free_memory_tells_fits(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots, and rows a part of each kind of work, on a device with three megabytes: nothing is refused."""
    capacity = 3_000_000
    monkeypatch.setattr("stages.models.memory.free_bytes", lambda device: capacity)
    boosted = {**HARD, "ilb": {"iterations": 2, "warmup": 1}}
    settings = InvertImagesSettings(model=folder, methods=(boosted,), device="cpu", steps=2)
    caps = [capped(monkeypatch, PHASES[phase][0]) for phase in ("encode", "decode", "predict", "boost")]
    for cap in caps:
        cap.limit = capacity
    stage = InvertImages(settings)
    given = [{"id": str(i), "image": picture(i), "prompt": "red star", "method": "lbo"} for i in range(40)]
    assert {row["status"] for row in stage(given)} == {"ok"}
    assert stage.slots == 32
    assert [cap.refused for cap in caps] == [0] * len(caps)
    assert all(cap.peak > capacity / 4 for cap in caps), [cap.peak for cap in caps]  # nor is much left over
