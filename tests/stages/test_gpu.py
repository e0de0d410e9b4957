"""Every job on a GPU against the same on the CPU, on networks of a few thousand random numbers.

The two devices add in another order: in float32 latents agree to about 1e-3 after a few steps, in bfloat16 rows only
have to come out. Where there is no GPU, a card of `tests.support.cards` stands for it: what is not brought along to the
device fails there too, but nothing is learned of what only CUDA has (kernels, streams, graphs, memory).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.engine.room import Room
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from tests.support import tiny_captioners, tiny_decoders, tiny_flows, tiny_kandinsky, tiny_stable_diffusion
from tests.support.captioned import build_captioned
from tests.support.cards import card
from tests.support.concepts import concept_row, stage_of
from tests.support.rare import picture, rows, settings

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_devices = pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=(pytest.mark.gpu, needs_gpu)), pytest.param("card", marks=pytest.mark.card)],
    indirect=True,
)
METHODS: list[dict[str, Any]] = [
    {"method": "ddim"},
    {"method": "fixed-point", "iterations": 3},
    {"method": "lbo", "tolerance": 1e-5, "passes": 6},
    {"method": "lbo", "name": "boosted", "passes": 6, "ilb": {"iterations": 2, "warmup": 1}},
    {"method": "belm"},
    {"method": "null-text", "iterations": 2},
]
LABELS = [method.get("name", method["method"]) for method in METHODS]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr("stages.engine.device.HALVED_ON", frozenset({"cuda", "card"}))
    return card()


@pytest.fixture(scope="module", autouse=True)
def exact() -> Any:
    """No TF32: ten bits of a product are not enough to compare."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def inverted(folder: str, device: str, methods: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    told = InvertImagesSettings(model=folder, methods=methods, device=device, steps=2, **options)
    given = [
        {"id": f"{i}/{method.label}", "image": picture(i), "prompt": "red star", "method": method.label}
        for method in told.methods
        for i in range(2)
    ]
    return {row["id"]: row for row in InvertImages(told)(given)}


def agree(ours: dict[str, Any], theirs: dict[str, Any], name: str, close: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row["status"] == "ok", (key, row["error"])
        size = np.abs(theirs[key][name]).max()
        assert np.abs(row[name] - theirs[key][name]).max() <= close * size, key


@pytest.mark.card
def test_a_card_refuses_what_lies_elsewhere() -> None:
    layer, x_BC = torch.nn.Linear(3, 2).to(card(0)), torch.ones(4, 3)
    for refused in (
        lambda: layer(x_BC), lambda: layer(x_BC.to(card(1))), lambda: x_BC.to(card(0)).numpy(),
        lambda: torch.randn(3, device=card(0), generator=torch.Generator()),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            refused()
    torch.testing.assert_close(layer(x_BC.to(card(0))).cpu(), layer.to("cpu")(x_BC), rtol=0, atol=0)


@on_devices
@pytest.mark.parametrize(("kind", "guidance", "methods"), [("sd", 2.0, METHODS), ("sdxl", 1.0, METHODS[:1])])
def test_inversion_gives_what_it_gives_on_the_cpu(
    tmp_path: Path, device: str, kind: str, guidance: float, methods: list[dict[str, Any]]
) -> None:
    folder = tiny_stable_diffusion.build(tmp_path, kind)
    both = [inverted(folder, where, methods, guidance=guidance, slots=2) for where in (device, "cpu")]
    agree(*both, "latent", 5e-3)


@on_devices
@pytest.mark.parametrize("kind", ["sd35-medium", "flux-dev", "flux2-klein"])
def test_a_rectified_flow_gives_what_it_gives_on_the_cpu(tmp_path: Path, device: str, kind: str) -> None:
    folder = tiny_flows.build(tmp_path, kind)
    both = [inverted(folder, where, [{"method": "lbo"}], size=16) for where in (device, "cpu")]
    agree(*both, "latent", 5e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_with_slots_that_memory_tells(tmp_path: Path, dtype: str) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    done = inverted(folder, "cuda", METHODS, dtype=dtype)
    assert {row["status"] for row in done.values()} == {"ok"}, [row["error"] for row in done.values()]


@on_devices
def test_words_are_learned_as_on_the_cpu(tmp_path: Path, device: str) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    given = [concept_row(i) for i in range(2)]
    both = []
    for where in (device, "cpu"):
        stage = stage_of(folder, settings={"steps": 4, "window": 2}, slots=2, device=where)
        both.append({row["id"]: row for row in stage(given)})
    agree(*both, "embeddings", 1e-2)


@on_devices
def test_seeds_are_selected_as_on_the_cpu(tmp_path: Path, device: str) -> None:
    from stages.rare.stage import RareConcepts

    folder = tiny_stable_diffusion.build(tmp_path / "model")
    clip = tiny_kandinsky.build_prior(tmp_path / "clip")
    method = {"method": "seed-select", "iterations": 1, "steps": 3}
    both = []
    for where in (device, "cpu"):
        told = settings(folder, clip, [method], device=where)
        both.append({row["id"]: row for row in RareConcepts(told)(rows(["seed-select"], ("star",)))})
    agree(*both, "latent", 2e-2)


PROMPT_METHODS: list[dict[str, Any]] = [
    {"method": "kernel"},
    {"method": "trained-prior", "steps": 2},
    {"method": "direct", "steps": 3},
    {
        "method": "ovi", "steps": 3, "slots": 1,
        "constraint": {"mahalanobis": 0.1, "around": "kernel", "neighbours": 1.0, "k": 2},
    },
]  # fmt: skip


@on_devices
@pytest.mark.parametrize("methods", [PROMPT_METHODS, [{"method": "ovi", "steps": 3}]], ids=["reference", "bare"])
def test_prompts_are_inverted_and_decoded_as_on_the_cpu(
    tmp_path: Path, device: str, methods: list[dict[str, Any]]
) -> None:
    """With a reference, whose index needs FAISS, and without one."""
    from stages.ovi.settings import InvertPromptsSettings
    from stages.ovi.stage import InvertPrompts

    prior, reference = tiny_kandinsky.build_prior(tmp_path / "prior"), None
    if methods is PROMPT_METHODS:
        pytest.importorskip("faiss")
        reference = build_captioned(tmp_path / "reference", prior, 200)
    told = InvertPromptsSettings(
        encoder=prior, methods=methods, reference=reference,
        decoder={"model": tiny_kandinsky.build_decoder(tmp_path / "decoder"), "steps": 2, "batch": 2},
    )  # fmt: skip
    given = [
        {"id": f"{word}/{method['method']}", "prompt": f"a {word} star", "method": method["method"]}
        for word in ("red", "blue")
        for method in methods
    ]
    both = [{row["id"]: row for row in InvertPrompts(told, where)(given)} for where in (device, "cpu")]
    for method in methods:
        ours, theirs = ({key: row for key, row in one.items() if key.endswith(method["method"])} for one in both)
        agree(ours, theirs, "embedding", 0.2 if method["method"] == "trained-prior" else 5e-3)  # in half precision


@on_devices
def test_pictures_are_embedded_and_captioned_and_embeddings_decoded(tmp_path: Path, device: str) -> None:
    from stages.caption.settings import CaptionSettings
    from stages.caption.stage import CaptionPictures
    from stages.decode.settings import DecodeSettings
    from stages.decode.stage import DecodeEmbeddings
    from stages.embed.settings import EmbedSettings
    from stages.embed.stage import Embed

    seen = [{"id": str(i), "image": picture(i, (32, 32))} for i in range(3)]
    encoder = EmbedSettings(encoder=tiny_kandinsky.build_prior(tmp_path / "prior"), batch_size=2)
    both = [{row["id"]: row for row in Embed(encoder, where)(seen)} for where in (device, "cpu")]
    agree(*both, "embedding", 5e-3)

    unclip = {"model": tiny_decoders.build_unclip(tmp_path / "unclip"), "steps": 2, "size": 16, "batch": 2}
    known = [{"id": key, "embedding": row["embedding"]} for key, row in both[1].items()]
    drawn = DecodeEmbeddings(DecodeSettings(decode=unclip), device)(known)
    assert {row["status"] for row in drawn} == {"ok"}

    folder = tiny_captioners.build_llava(tmp_path / "llava")
    for row in CaptionPictures(CaptionSettings(model=folder, max_tokens=4, device=device))(seen):
        assert row["status"] == "ok", row["error"]


@on_devices
def test_a_classifier_and_an_inverter_learn(tmp_path: Path, device: str) -> None:
    from stages.inverter.model import InverterShape
    from stages.inverter.settings import Training
    from stages.inverter.training import Pairs, train_inverter
    from stages.judging.network import build

    rng = np.random.default_rng(0)
    model = open_latent_model(InvertImagesSettings(model=tiny_stable_diffusion.build(tmp_path), device=device))
    data = Pairs(rng.normal(size=(8, 4, 8, 8)).astype(np.float16), ["red star", "blue heart"] * 4)
    shape = InverterShape(text=(16, 32), latent=(4, 8, 8), patch=4, width=32, layers=1, heads=4)
    learnt = train_inverter(model, data, shape, Training(steps=2, batch=2, noise_rows=1, held_out=0.25), seed=0)[1]
    assert np.isfinite(learnt["mse"])
    net = build("small", 2).to(device)
    net(torch.zeros(2, 3, 8, 8, device=device)).sum().backward()


@pytest.mark.gpu
@needs_gpu
def test_a_device_that_is_too_small_gets_a_batch_in_parts() -> None:
    """With the allocator's own limit: 256 MB beside what is held, for a batch that makes 1 GB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + (256 << 20)
    x_BC = torch.ones(64, 1 << 10, device="cuda")
    room, given = Room(), list[int]()

    def network(part_BC: torch.Tensor) -> torch.Tensor:
        given.append(len(part_BC))
        return part_BC.repeat(1, 1 << 12)[:, :8].contiguous()

    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        assert room(network, x_BC).shape == (64, 8)
        first = len(given)
        room(network, x_BC)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert given[0] == 64
    assert room.rows < 64
    assert max(given[first:]) == room.rows


@pytest.mark.gpu
@needs_gpu
def test_the_free_memory_of_the_device_tells_how_many_rows_fit(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    model = open_latent_model(InvertImagesSettings(model=folder, device="cuda"))
    told = {work: model.rooms[work].rows for work in ("predict", "gradient", "decode", "boost")}
    assert told["predict"] > told["gradient"] > 1000
    assert told["decode"] > told["boost"] > 1000
