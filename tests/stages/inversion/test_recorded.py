"""Steps that go as one recorded graph: the same rows, whatever comes between them, and what cannot be recorded is said.
A tape (`tests.support.tape`) stands for CUDA's graphs where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.engine.solver import Occupancy, solve
from stages.inversion import recorded
from stages.inversion.engine import Evaluation, InversionProblem, Rule
from stages.inversion.exact import Exact
from stages.inversion.explicit import Ddim, UniInv
from stages.inversion.fixed_point import Anderson, Averaged, FixedPoint
from stages.inversion.flows import Euler, FireFlow, RfSolver
from stages.inversion.lbo import LatentBias
from stages.inversion.newton import Newton
from stages.inversion.renoise import ReNoise
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model, read_geometry
from stages.models.schedule import Step
from stages.models.settings import SamplingSettings
from stages.rare.settings import RareConceptsSettings
from tests.stages.inversion.plain import SHAPE, rows_of
from tests.support import tape, tiny_stable_diffusion
from tests.support.rare import picture
from tests.support.tiny_families import KINDS, build


class Remembering(Rule[tuple[torch.Tensor, torch.Tensor]]):
    """Hands one tensor of its state on as the other."""

    limit = 3

    def blank(self, z_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(z_BCHW), torch.zeros_like(z_BCHW)

    def begin(self, prev_BCHW: torch.Tensor, step: Step, state: Any) -> tuple[torch.Tensor, Any]:
        return prev_BCHW, state

    def update(self, point: Evaluation, state: Any) -> tuple[torch.Tensor, Any]:
        last_BCHW, before_BCHW = state
        return point.g_BCHW + 0.1 * last_BCHW - 0.3 * before_BCHW, (point.g_BCHW, last_BCHW)


RULES = [
    Ddim(), UniInv(), FixedPoint(2), Averaged(2), Anderson(6, tolerance=1e-3), ReNoise(1), Exact(6), Newton(2),
    LatentBias(tolerance=1e-5), LatentBias("output", tolerance=1e-3), LatentBias(warm_start="fitted", passes=3),
    LatentBias(warm_start="last", told=True), Remembering(),
]  # fmt: skip


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs are tapes; what happens to them, in order."""
    happened: list[str] = []

    def capture(step: Any) -> Any:
        replay = tape.capture(step)
        happened.append("recorded")
        return lambda: (happened.append("replayed"), replay())

    monkeypatch.setattr(recorded, "capture", capture)
    monkeypatch.setattr("stages.inversion.stage.check_card", lambda settings: None)
    return happened


def solved(problem: InversionProblem[Any], rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], Occupancy]:
    occupancy = Occupancy()
    return {row["id"]: row for row in solve(problem, [dict(row) for row in rows], occupancy=occupancy)}, occupancy


def same(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]], *, close: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        assert ours[key].keys() == row.keys()
        for name, value in row.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(ours[key][name], value, rtol=close, atol=close, equal_nan=True)
            elif name not in ("z", "condition"):
                assert ours[key][name] == value, (key, name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rows_are_what_they_are_step_by_step(model, work, taped: list[str], rule: Rule) -> None:
    """Five rows through two slots, the last of them alone, so that recorded steps and others take turns."""
    z, condition, schedule = work
    which = [0, 1, 2, 1, 0]
    longer = torch.linspace(0.6, 1.4, 5).view(-1, 1, 1, 1)
    rows = rows_of(z[which] * longer, {name: value[which] for name, value in condition.items()})
    options: dict[str, Any] = {"slots": 2, "latent_shape": SHAPE, "keep_path": True, "keep_shown": True}
    found = [
        solved(InversionProblem(model.predictor(2.0), schedule, rule, recorded=way, **options), rows)
        for way in (False, True)
    ]
    same(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    assert taped.count("recorded") == 1
    alone = found[1][1].steps - taped.count("replayed")
    assert taped.count("replayed") >= 10
    assert alone > 4


@pytest.mark.parametrize("rule", [Euler(), RfSolver(), FireFlow()], ids=lambda rule: type(rule).__name__)
def test_rules_of_flows(tmp_path: Path, taped: list[str], rule: Rule) -> None:
    model = open_latent_model(SamplingSettings(model=build(tmp_path, "flux-dev"), device="cpu")).at(16, 16)
    z = torch.randn(4, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(1))
    rows = rows_of(z, model.condition(["a star", "a hill", "", "red"]))
    options: dict[str, Any] = {"slots": 2, "latent_shape": model.geometry.latent_shape}
    found = [
        solved(InversionProblem(model.predictor(), model.schedule(4), rule, recorded=way, **options), rows)[0]
        for way in (False, True)
    ]
    same(found[1], found[0])
    assert taped.count("replayed") >= 4


def test_a_row_that_diverges_leaves_the_others_what_they_are(work, taped: list[str]) -> None:
    z, _, schedule = work

    def explode(x: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(c["bad_B"].view(-1, 1, 1, 1), torch.inf, 0.1 * x)

    rows = [{"id": str(i), "z": z[i % 3], "condition": {"bad_B": torch.tensor(i == 1)}} for i in range(6)]
    options: dict[str, Any] = {"slots": 2, "latent_shape": SHAPE}
    found = [
        solved(InversionProblem(explode, schedule, Anderson(5), recorded=way, **options), rows)[0]
        for way in (False, True)
    ]
    same(found[1], found[0])
    assert [row.get("status") for _, row in sorted(found[1].items())] == [None, "failed", None, None, None, None]
    assert taped.count("recorded") == 1


def test_what_does_not_fit_is_recorded_for_half_the_slots(
    work, taped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, condition, schedule = work
    plenty = recorded.capture

    def tight(step: Any) -> Any:
        if not taped:
            taped.append("out of memory")
            raise torch.OutOfMemoryError("pretend")
        return plenty(step)

    monkeypatch.setattr(recorded, "capture", tight)
    rows = rows_of(torch.cat([z, z])[:4], {k: torch.cat([v, v])[:4] for k, v in condition.items()})

    def predict(x: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.3 * x.tanh()

    plain = solved(InversionProblem(predict, schedule, Ddim(), slots=2, latent_shape=SHAPE), rows)[0]
    problem = InversionProblem(predict, schedule, Ddim(), slots=4, latent_shape=SHAPE, recorded=True)
    found, occupancy = solved(problem, rows)
    same(found, plain)
    assert (problem.slots, occupancy.restarts) == (2, 1)
    assert taped[:3] == ["out of memory", "recorded", "replayed"]


def test_a_step_that_cannot_be_recorded_ends_the_run_and_no_row(work, taped: list[str]) -> None:
    z, condition, schedule = work

    def waits(x: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        return x * float(t.float().mean() > 0)

    problem = InversionProblem(waits, schedule, Ddim(), slots=2, latent_shape=SHAPE, recorded=True)
    said = r"accelerate: graph: a step cannot be recorded .*not permitted when stream is capturing\): leave"
    with pytest.raises(recorded.Unrecordable, match=said):
        list(solve(problem, rows_of(z, condition)))


METHODS: list[Any] = [
    "ddim", "belm", {"method": "null-text", "iterations": 1}, {"method": "lbo", "retries": 1, "passes": 2},
    {"method": "lbo", "name": "replayed", "replay": True, "passes": 2},
]  # fmt: skip


def test_a_job_finds_the_same_seeds(tmp_path: Path, taped: list[str]) -> None:
    folder = tiny_stable_diffusion.build(tmp_path)
    found = []
    for accelerate in (None, "graph"):
        settings = InvertImagesSettings(
            model=folder, device="cpu", accelerate=accelerate, steps=2, methods=METHODS, slots=2
        )
        given = [
            {"id": f"{i}/{method.label}", "image": picture(i), "prompt": "red star", "method": method.label}
            for method in settings.methods
            for i in range(3)
        ]
        found.append({row["id"]: row for row in InvertImages(settings)(given)})
    for key, row in found[0].items():
        assert row["status"] == "ok", row["error"]
        for name in ("latent", "residual", "bias", "null_text", "psnr", "forwards"):
            np.testing.assert_array_equal(found[1][key].get(name), row.get(name), err_msg=f"{key} {name}")
    assert taped.count("recorded") >= 4  # one for each method that walks, and its retries
    assert taped.count("replayed") >= 10


class OnDevice(TorchDispatchMode):
    """Refuses what brings numbers from the host, or waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        lie = {one.device.type for one in tree_leaves((args, kwargs, made)) if isinstance(one, torch.Tensor)}
        if lie - {"meta"}:
            raise RuntimeError(f"{func} is of {lie}")
        return made


def record(folder: str) -> None:
    """A pass on tape, and the second of two where every tensor lies on a device that has no numbers."""
    model: Any = open_latent_model(SamplingSettings(model=folder, device="cpu")).at(32, 32)
    condition = model.condition(["a star", "a red hill"], guided=model.geometry.guiding == "classifier-free")
    guidance = 1.0 if model.geometry.guiding == "none" else 3.0
    z_BCHW, t_B = torch.zeros(2, *model.geometry.latent_shape), torch.tensor([500, 20])
    with torch.no_grad(), tape.Tape():
        model.predictor(guidance)(z_BCHW, t_B, condition)
    model = open_latent_model(SamplingSettings(model=folder, device="cpu")).at(32, 32)
    getattr(model, next(iter(model.geometry.parts))).to("meta")
    model.device = torch.device("meta")
    given = {name: value.to("meta") for name, value in condition.items()}
    z_BCHW, t_B = z_BCHW.to("meta"), t_B.to("meta")
    with torch.no_grad():
        model.predictor(guidance)(z_BCHW, t_B, given)
        with OnDevice():
            model.predictor(guidance)(z_BCHW, t_B, given)


@pytest.mark.parametrize("kind", [*KINDS, "lcm"])
def test_what_is_said_of_a_family_is_so(tmp_path: Path, kind: str) -> None:
    folder = tiny_stable_diffusion.build(tmp_path, time_cond_proj_dim=8) if kind == "lcm" else build(tmp_path, kind)
    if read_geometry(SamplingSettings(model=folder)).recordable:
        record(folder)
    else:
        with pytest.raises(RuntimeError, match=r"capturing|meta|is of"):
            record(folder)


def test_what_cannot_be_recorded_is_said_while_planning(tmp_path: Path) -> None:
    def described(folder: str, **options: Any) -> None:
        InvertImages.describe(InvertImagesSettings(model=folder, accelerate="graph", **options))

    with pytest.raises(ValueError, match=r"accelerate: graph: .*z-image.* sends to the device.* set `accelerate: comp"):
        described(build(tmp_path / "z-image", "z-image"))
    folder = tiny_stable_diffusion.build(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"accelerate: graph: the steps of the model's sampler hang together"):
        described(folder, sampler="model", scheduler={"class": "UniPCMultistepScheduler"}, steps=4, methods=["lbo"])
    flux = build(tmp_path / "flux-dev", "flux-dev")
    quantised = {"transformer": {"quant_method": "torchao", "quant_type": "int8wo"}}
    with pytest.raises(ValueError, match=r"accelerate: graph takes no `quantization_config`"):
        recorded.check_recordable(
            InvertImagesSettings(model=flux, accelerate="graph", quantization_config=quantised),
            InvertImages(InvertImagesSettings(model=flux, device="cpu", steps=4)).geometry, None,  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(ValueError, match="accelerate: graph records steps of inverting"):
        RareConceptsSettings(methods=("random",), accelerate="graph")


@pytest.mark.parametrize("device", ["cpu", "cuda:0,cuda:1"])
def test_it_takes_one_cuda_device(tmp_path: Path, device: str) -> None:
    settings = InvertImagesSettings(model=str(tmp_path / "nothing"), device=device, accelerate="graph")
    named = device.replace(",", ", ")
    with pytest.raises(ValueError, match=f"for one CUDA device a worker, and this one works on {named}: leave"):
        InvertImages(settings)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sd", "flux-dev", "sd3"])
@pytest.mark.parametrize("slots", [1, 3])
def test_recorded_steps_equal_others_on_a_gpu(tmp_path: Path, kind: str, slots: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = open_latent_model(SamplingSettings(model=build(tmp_path, kind), device="cuda")).at(32, 32)
    z = torch.randn(7, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(1)) * 0.5
    rows = rows_of(z, model.condition(["a star"] * 7))
    shape = model.geometry.latent_shape
    for rule in (UniInv(), Anderson(3), LatentBias(passes=4, tolerance=0.0), LatentBias(tolerance=1e-3)):
        options: dict[str, Any] = {"slots": slots, "latent_shape": shape, "device": "cuda", "keep_path": True}
        found = [
            solved(InversionProblem(model.predictor(), model.schedule(4), rule, recorded=way, **options), rows)[0]
            for way in (False, True)
        ]
        for key, row in found[0].items():
            torch.testing.assert_close(found[1][key]["noise"], row["noise"], rtol=1e-2, atol=1e-2)
            assert row.get("status") is None
