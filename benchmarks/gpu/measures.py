"""The measures, most important first. Each gives plain numbers; `jobs` in them are lines of the table.

Legend: B rows or slots; `z_BCHW` latents; `x_BCHW` pictures in [-1, 1].
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from benchmarks.gpu.instruments import Bench, Found, Unavailable, operations
from benchmarks.gpu.networks import FLOWS, VISION, condition_of, drawn_vision, folder_of, latent_model
from pipeline.contract import Row
from stages.engine.device import exact_float32
from stages.engine.solver import Occupancy, capture
from stages.models.compiled import compile_blocks
from stages.models.latent import LatentModel

ROOT = Path(__file__).parents[2]
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def card(bench: Bench) -> Found:
    """Matrix products by type, and copies within the device: what the shares below are shares of."""
    side, numbers = bench.sized(8192, 256), bench.sized(1 << 30, 1 << 20)
    found: Found = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"), ("fp16", torch.float16, "highest"), ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):  # fmt: skip
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in "ab")
        torch.set_float32_matmul_precision(precision)
        found[name] = 2 * side**3 / bench.timed(partial(torch.matmul, a, b), 0.5)
    torch.set_float32_matmul_precision("highest")
    source, target = (torch.zeros(numbers, dtype=torch.uint8, device=bench.device) for _ in "st")
    found["copy_bytes_a_second"] = 2 * numbers / bench.timed(lambda: target.copy_(source), 0.3)
    if bench.cuda:
        pinned = torch.zeros(numbers // 4, dtype=torch.uint8).pin_memory()
        part = target[: numbers // 4]
        found["upload_bytes_a_second"] = len(pinned) / bench.timed(lambda: part.copy_(pinned, non_blocking=True), 0.3)
    return found


def marked_files() -> list[Path]:
    """The files of tests that hold some marked ``gpu``: the others may need what a plain machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "@pytest.mark.gpu" in file.read_text() and file.parent.name != "gpu"]


def tests(bench: Bench) -> Found:
    """The tests marked ``gpu``, in processes of their own."""
    files = [str(file) for file in marked_files()]
    if bench.toy:
        files = [file for file in files if file.endswith("engine/test_solver.py")]
    report = bench.scratch / "gpu-tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    if find_spec("xdist") is not None:
        command += ["-n", bench.sized("4", "1")]
    run = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest gave no report:\n{run.stdout[-1500:]}{run.stderr[-1500:]}")
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        problem = next(
            (case.find(kind) for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None
        )
        told = "passed" if problem is None else f"{problem.tag}: {problem.get('message')} {problem.text}"
        found[name] = told.replace(f"{ROOT}/", "")[:1500]
    return {"exit_code": run.returncode, "tests": found}


# --- latent models


@dataclass(frozen=True)
class Size:
    """How a latent model is measured.

    Attributes:
        batches: Rows of a network call.
        slots: Of the engine.
        steps: Of the whole job.
    """

    name: str
    kind: str
    batches: tuple[int, ...]
    slots: int
    steps: int = 50


SD15 = Size("SD1.5, 512 px", "sd15", (1, 8, 32), 32)
SDXL = Size("SDXL, 1024 px", "sdxl", (1, 4, 8), 4)
FLUX = Size("FLUX.1-dev, 1024 px", "FLUX.1-dev", (1, 2), 2, 28)
ROUND_TRIP = 4
"""Steps in which the other families invert a picture and draw it again."""


def opened(bench: Bench, size: Size, **options: Any) -> tuple[Any, LatentModel]:
    """Settings of an inversion job, and its model."""
    from stages.inversion.settings import InvertImagesSettings

    given = {
        "model": str(folder_of(size.kind, bench.scratch, toy=bench.toy)), "device": bench.device, "dtype": "bfloat16",
        "methods": ["euler" if size.kind in FLOWS else "ddim"], "steps": bench.sized(size.steps, 3), "pictures": False,
        "reconstruct": False, "slots": bench.sized(size.slots, 2),
    }  # fmt: skip
    if size.kind in FLOWS:
        given["size"] = bench.sized(1024, 32)
    settings = InvertImagesSettings.model_validate(given | options)
    return settings, latent_model(settings)


def latents(bench: Bench, model: LatentModel, rows: int) -> torch.Tensor:
    return torch.randn(rows, *model.geometry.latent_shape, device=bench.device)


def denoiser_of(model: LatentModel) -> Any:
    return getattr(model, next(iter(model.geometry.parts)))


def network(bench: Bench, size: Size, model: LatentModel, dtype: str = "bf16") -> Found:
    """Passes a second of the denoiser alone, by batch; at the largest, in other layouts and as one recorded graph."""
    denoiser, predict = denoiser_of(model), model.predictor()
    found: Found = {"parameters": sum(parameter.numel() for parameter in denoiser.parameters())}

    def call(rows: int) -> Callable[[], torch.Tensor]:
        z_BCHW, condition = latents(bench, model, rows), condition_of(model, rows)
        t_B = torch.full((rows,), 500, device=bench.device)
        return torch.no_grad()(lambda: predict(z_BCHW, t_B, condition))

    found["operations_a_pass"] = operations(call(1))

    def measured(rows: int, run: Callable[[], Any]) -> Found:
        seconds = bench.timed(run) / rows
        return {
            "passes_a_second": 1 / seconds,
            "share_of_peak": bench.share(found["operations_a_pass"], seconds, dtype),
        }

    def graph(rows: int) -> Found:
        one = call(rows)  # what a graph reads has to outlive it
        return measured(rows, recorded(one))

    for rows in bench.sized(size.batches, (1, 2)):
        bench.tried(found, f"batch {rows}", lambda rows=rows: measured(rows, call(rows)))
    for rows in {1, bench.sized(size.batches, (1, 2))[-1]}:
        bench.tried(found, f"graph, batch {rows}", partial(graph, rows))
    rows = bench.sized(size.batches, (1, 2))[-1]

    def channels_last() -> Found:
        denoiser.to(memory_format=torch.channels_last)
        try:
            return measured(rows, call(rows))
        finally:
            denoiser.to(memory_format=torch.contiguous_format)

    if size.kind not in FLOWS:
        bench.tried(found, f"channels last, batch {rows}", channels_last)
    return found


def recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """A call as one CUDA graph."""
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need a CUDA device")
    return capture(call)


def engine(
    bench: Bench, model: LatentModel, method: Any, steps: int, slots: int, passes_a_second: float | None,
    *, recorded: bool = False,
) -> Found:  # fmt: skip
    """A step of the solver with all slots full: against the network alone, and how often it waits for the device.

    Args:
        recorded: Each step is one graph (``accelerate: graph``).
    """
    from stages.inversion.schemes import scheme_of

    if recorded and not bench.cuda:
        raise Unavailable("CUDA graphs need a CUDA device")
    scheme = scheme_of(method, model, steps=steps, guidance=1.0)
    scheme.recorded = recorded
    problem = scheme.problem(slots)
    z_BCHW, condition = latents(bench, model, slots), condition_of(model, slots)
    rows = [
        {"id": str(b), "z": z_BCHW[b], "condition": {name: value[b] for name, value in condition.items()}}
        for b in range(slots)
    ]

    def load() -> None:
        problem.load(range(slots), rows)

    syncs_of_loading = bench.syncs(load)
    counted = bench.sized(6, 2)
    for _ in range(2):
        problem.step()
    syncs = bench.syncs(lambda: [problem.step() for _ in range(counted)]) / counted
    load()
    bench.wait()
    began = time.perf_counter()
    for _ in range(counted):
        problem.step()
    bench.wait()
    seconds = (time.perf_counter() - began) / counted
    passes = problem.forwards_B.sum().item() / counted
    return {
        "slots": slots, "seconds_a_step": seconds, "passes_a_second": passes / seconds,
        "share_of_the_network": passes_a_second and passes / seconds / passes_a_second, "syncs_a_step": syncs,
        "syncs_of_loading": syncs_of_loading,
    }  # fmt: skip


def pictures_of(count: int, width: int, height: int) -> list[Any]:
    """Pictures of smooth noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in coarse]


def whole_job(bench: Bench, settings: Any, model: LatentModel) -> Found:
    """The stage of ``invert-images`` on as many pictures as it has slots: from PIL pictures to stored latents."""
    from stages.inversion.stage import InvertImages

    stage = InvertImages(settings, model)
    (method,) = settings.methods
    width, height = model.geometry.picture_size
    rows = [
        {"id": str(number), "image": picture, "prompt": "photo of a robot", "method": method.label}
        for number, picture in enumerate(pictures_of(stage.slots, width + 64, height + 64))
    ]
    tell_rooms(model)
    list(stage.prepared(stage.schemes[method.label], rows[:1], {}))  # warm
    took: Found = {}

    def run() -> None:
        bench.wait()
        began = time.perf_counter()
        done = list(stage(rows))
        bench.wait()
        took["seconds"] = time.perf_counter() - began
        took["ok"] = sum(row["status"] == "ok" for row in done)
        took["first_error"] = next((row["error"] for row in done if row["status"] != "ok"), None)

    peak = bench.memory(run)
    if peak is None:
        run()
    return {**took, "rows": len(rows), "slots": stage.slots, "peak_bytes": peak}


def images(bench: Bench, size: Size) -> Found:
    """A latent model: its network alone, a step of the engine by method, and the whole job."""
    from stages.inversion.settings import DdimMethod, FixedPointMethod, LboMethod

    settings, model = opened(bench, size)
    found: Found = {"network": network(bench, size, model)}
    speeds = [part["passes_a_second"] for part in found["network"].values() if "passes_a_second" in _fields(part)]
    best = max(speeds, default=None)
    slots, steps = bench.sized(size.slots, 2), bench.sized(size.steps, 8)
    for method in (DdimMethod(), FixedPointMethod(iterations=3), LboMethod()):
        bench.tried(
            found, f"engine, {method.label}", partial(engine, bench, model, method, max(steps, 8), slots, best)
        )  # fmt: skip
    for way, options in {"": {}, ", graph": {"recorded": True}}.items():
        one = partial(engine, bench, model, LboMethod(), max(steps, 8), 1, None, **options)
        bench.tried(found, f"engine, lbo, one slot{way}", one)
    for method in (DdimMethod(), LboMethod()):
        full = partial(engine, bench, model, method, max(steps, 8), slots, best, recorded=True)
        bench.tried(found, f"engine, {method.label}, graph", full)
    bench.tried(found, "job", lambda: whole_job(bench, settings, model))
    if "seconds" in found["job"]:
        seconds = found["job"]["seconds"] / found["job"]["rows"]
        work = settings.steps * found["network"]["operations_a_pass"]
        found["jobs"] = [{
            "job": f"invert-images, {size.name}, DDIM, {settings.steps} steps, bf16", "seconds_a_row": seconds,
            "limit": "operations", "share_of_peak": bench.share(work, seconds, "bf16"),
        }]  # fmt: skip
    return found


def _fields(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def one_picture(bench: Bench, model: LatentModel, method: Any, steps: int) -> Found:
    """A picture encoded, its latent inverted without guidance, and drawn again by the model's own sampler: seconds of
    each, and the mean square by which the latent that comes back is off. The latent is brought to mean 0 and variance
    1, which trained autoencoders are made to give and random ones do not."""
    from stages.inversion.schemes import scheme_of

    scheme = scheme_of(method, model, steps=steps, guidance=1.0)
    condition = condition_of(model, 1)
    width, height = model.geometry.picture_size
    x_BCHW = torch.rand(1, 3, height, width, device=bench.device) * 2 - 1
    found: Found = {"steps": steps}
    tell_rooms(model)
    with torch.no_grad():
        model.encode(x_BCHW)  # convolutions choose their kernels

    def run() -> None:
        bench.wait()
        times = [time.perf_counter()]
        with torch.no_grad():
            z_BCHW = model.encode(x_BCHW)
            z_BCHW = (z_BCHW - z_BCHW.mean()) / z_BCHW.std()
        times.append(finished(bench))
        given = {"id": "0", "z": z_BCHW[0], "condition": {name: value[0] for name, value in condition.items()}}
        (row,) = scheme.invert([given], 1, Occupancy())
        times.append(finished(bench))
        again_BCHW = scheme.generate(row["noise"][None].to(bench.device), condition, None)
        times.append(finished(bench))
        for name, began, ended in zip(("to_encode", "to_invert", "to_draw"), times, times[1:], strict=False):
            found[f"seconds_{name}"] = ended - began
        found["seconds"] = times[2] - times[0]
        found["error_of_row"] = row.get("error")
        found["forwards"] = row["forwards"]
        found["mse"] = (again_BCHW - z_BCHW).square().mean().item()

    found["peak_bytes"] = bench.memory(run)
    if found["peak_bytes"] is None:
        run()
    return found


def tell_rooms(model: LatentModel) -> None:
    """What a row takes is counted once a model, on the host, for seconds: before a clock runs."""
    for work in ("encode", "predict"):
        model.rooms[work]


def finished(bench: Bench) -> float:
    """The time when the device has done all that it was given."""
    bench.wait()
    return time.perf_counter()


def line_of(bench: Bench, name: str, method: str, picture: Found, operations_a_pass: float) -> list[Found]:
    """The line of the table that one picture is; none where it failed."""
    if "seconds" not in picture:
        return []
    work = picture["forwards"] * operations_a_pass
    return [{
        "job": f"invert-images, {name}, {method}, {picture['steps']} steps, bf16, without reading prompts",
        "limit": "operations", "seconds_a_row": picture["seconds"],
        "share_of_peak": bench.share(work, picture["seconds"], "bf16"),
    }]  # fmt: skip


def flux(bench: Bench) -> Found:
    """FLUX.1 at its depth of 19 + 38 blocks, text given as numbers: passes a second, and one picture there and back, by
    Euler's steps and by LBO."""
    from stages.inversion.settings import EulerMethod, LboMethod

    settings, model = opened(bench, FLUX)
    found: Found = {"network": network(bench, FLUX, model)}
    if "passes_a_second" not in _fields(found["network"].get("batch 1")):
        return found
    bench.tried(found, "one picture", partial(one_picture, bench, model, EulerMethod(), settings.steps))
    bench.tried(found, "one picture, lbo", partial(one_picture, bench, model, LboMethod(), bench.sized(ROUND_TRIP, 3)))
    work = found["network"]["operations_a_pass"]
    found["jobs"] = [
        *line_of(bench, FLUX.name, "Euler", found["one picture"], work),
        *line_of(bench, FLUX.name, "LBO", found["one picture, lbo"], work),
    ]
    return found


def families(bench: Bench) -> Found:
    """The other rectified flows at their published sizes, text given as numbers: a pass, one picture there and back by
    LBO in a few steps, what a gradient takes. Weights are as the classes draw them; none of these begins with an output
    of nought, and `velocity` says how long it is."""
    found: Found = {}
    for name in FLOWS:
        if name != FLUX.kind:
            bench.tried(found, name, partial(family, bench, name))
    found["jobs"] = [
        line
        for name, part in found.items()
        if "one picture" in part
        for line in line_of(bench, f"{name}, 1024 px", "LBO", part["one picture"], part["operations_a_pass"])
    ]
    return found


def family(bench: Bench, name: str) -> Found:
    """One of `families`."""
    from stages.inversion.settings import LboMethod

    settings, model = opened(bench, Size(name, name, (1,), 1, ROUND_TRIP))
    transformer: Any = model.transformer  # type: ignore[attr-defined]
    z_BCHW, condition, predict = latents(bench, model, 1), condition_of(model, 1), model.predictor()
    t_B = torch.full((1,), 500.0, device=bench.device)
    run = torch.no_grad()(lambda: predict(z_BCHW, t_B, condition))
    work, seconds = operations(run), bench.timed(run, 0.3)
    found: Found = {
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()), "operations_a_pass": work,
        "seconds_a_pass": seconds, "passes_a_second": 1 / seconds, "share_of_peak": bench.share(work, seconds, "bf16"),
        "velocity": run().square().mean().sqrt().item(),
        "weights_bytes": torch.cuda.memory_allocated() if bench.cuda else None, "peak_bytes": bench.memory(run),
    }  # fmt: skip
    bench.tried(found, "one picture", partial(one_picture, bench, model, LboMethod(), settings.steps))
    bench.tried(found, "gradient", partial(_row_bytes, bench, model, "predict", True))
    return found


def memory(bench: Bench) -> Found:
    """What a row takes, as `activation_bytes` says, and as the device tells it, from one row to two."""
    found: Found = {}
    for size in (SD15, SDXL):
        _, model = opened(bench, size)
        found[size.name] = own = {"weights_bytes": None if not bench.cuda else torch.cuda.memory_allocated()}
        for call, gradient in (
            ("predict", False), ("predict", True), ("encode", False), ("decode", False), ("decode", True),
        ):  # fmt: skip
            name = f"{call}{', gradient' if gradient else ''}"
            bench.tried(own, name, partial(_row_bytes, bench, model, call, gradient))
        for call in ("predict", "decode"):
            bench.tried(own, f"{call}, gradient, computed again", partial(_computed_again, bench, model, call))
        del model
        bench.clear()
    return found


def _row_bytes(bench: Bench, model: LatentModel, call: Any, gradient: bool) -> Found:
    def run(rows: int) -> None:
        width, height = model.geometry.picture_size
        with torch.set_grad_enabled(gradient):
            if call == "predict":
                z_BCHW = latents(bench, model, rows).requires_grad_(gradient)
                out = model.predictor()(
                    z_BCHW, torch.full((rows,), 500, device=bench.device), condition_of(model, rows)
                )
            elif call == "encode":
                out = model.encode(torch.zeros(rows, 3, height, width, device=bench.device))
            else:
                z_BCHW = latents(bench, model, rows).requires_grad_(gradient)
                out = model.decode(z_BCHW)
            if gradient:
                torch.autograd.grad(out.sum(), z_BCHW)

    said = model.activation_bytes(call, gradient=gradient)
    run(1)  # convolutions choose their kernels
    one, two = bench.memory(lambda: run(1)), bench.memory(lambda: run(2))
    if one is None or two is None:
        run(2)
        return {"said": said}
    return {"said": said, "one_row": one, "second_row": two - one, "measured_over_said": (two - one) / max(said, 1)}


def _computed_again(bench: Bench, model: LatentModel, call: Any) -> Found:
    """The same with blocks that are computed again on the way back, and what that costs in time."""
    z_BCHW, condition = latents(bench, model, 1).requires_grad_(), condition_of(model, 1)
    t_B = torch.full((1,), 500, device=bench.device)

    def run() -> None:
        with torch.enable_grad():
            out = model.decode(z_BCHW) if call == "decode" else model.predictor()(z_BCHW, t_B, condition)
            torch.autograd.grad(out.sum(), z_BCHW)

    kept = bench.timed(run, 0.3)
    model.recompute(call)
    return {**_row_bytes(bench, model, call, True), "seconds_kept": kept, "seconds_again": bench.timed(run, 0.3)}


def autoencoder(bench: Bench) -> Found:
    """Pictures a second of encoding and decoding, by size and type."""
    found: Found = {}
    for kind, size in (("sd15", 512), ("sdxl", 1024)):
        for dtype in ("float32", "bfloat16"):
            for precision in ("highest", "high") if dtype == "float32" else ("highest",):
                name = f"{size} px, {SHORT[dtype]}{', tf32' if precision == 'high' else ''}"
                bench.tried(found, name, partial(_autoencoder, bench, kind, dtype, precision))
    return found


def _autoencoder(bench: Bench, kind: str, dtype: str, precision: str) -> Found:
    from diffusers import AutoencoderKL

    from benchmarks.gpu.networks import Drawn

    folder = folder_of(kind, bench.scratch, toy=bench.toy)
    vae = Drawn(folder / "vae", bench.device).load(AutoencoderKL, getattr(torch, dtype))
    side = bench.sized({"sd15": 512, "sdxl": 1024}[kind], 16)
    rows, factor = 2, 2 ** (len(vae.config.block_out_channels) - 1)
    x_BCHW = torch.zeros(rows, 3, side, side, device=bench.device, dtype=getattr(torch, dtype))
    z_BCHW = torch.randn(rows, 4, side // factor, side // factor, device=bench.device, dtype=getattr(torch, dtype))
    found: Found = {}
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    try:
        for name, call in (
            ("encode", lambda: vae.encode(x_BCHW).latent_dist.mean), ("decode", lambda: vae.decode(z_BCHW).sample),
        ):  # fmt: skip
            run = torch.no_grad()(call)
            work = operations(run) / rows
            seconds = bench.timed(run, 0.3) / rows
            peak = {"float32": "tf32" if precision == "high" else "fp32"}.get(dtype, SHORT[dtype])
            found[name] = {"pictures_a_second": 1 / seconds, "share_of_peak": bench.share(work, seconds, peak)}
            found[name]["peak_bytes"] = bench.memory(run)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
    return found


def compiled(bench: Bench, size: Size) -> Found:
    """Passes a second of a denoiser as it is, and with its repeated blocks compiled."""
    if bench.toy:
        raise Unavailable("compiling takes longer than the toys are worth")
    _, model = opened(bench, size)
    rows = size.batches[-1]
    z_BCHW, condition = latents(bench, model, rows), condition_of(model, rows)
    t_B = torch.full((rows,), 500, device=bench.device)
    predict = torch.no_grad()(lambda: model.predictor()(z_BCHW, t_B, condition))
    plain_BCHW, before = predict(), rows / bench.timed(predict)
    began = time.perf_counter()
    compile_blocks(denoiser_of(model))
    differs_BCHW = predict() - plain_BCHW
    bench.wait()
    seconds = time.perf_counter() - began
    after = rows / bench.timed(predict)
    return {
        "batch": rows, "seconds_to_compile": seconds, "passes_a_second": after, "uncompiled": before,
        "times_as_fast": after / before, "relative_difference": float(differs_BCHW.norm() / plain_BCHW.norm()),
    }  # fmt: skip


def profile(bench: Bench) -> Found:
    """The 25 kernels in which a step of the engine on SD1.5 spends most, and what it launches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from stages.inversion.schemes import scheme_of
    from stages.inversion.settings import LboMethod

    _, model = opened(bench, SD15)
    slots = bench.sized(16, 2)
    problem = scheme_of(LboMethod(), model, steps=bench.sized(50, 8), guidance=1.0).problem(slots)
    z_BCHW, condition = latents(bench, model, slots), condition_of(model, slots)
    problem.load(range(slots), [
        {"id": str(b), "z": z_BCHW[b], "condition": {name: value[b] for name, value in condition.items()}}
        for b in range(slots)
    ])  # fmt: skip
    for _ in range(2):
        problem.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profiled(activities=activities) as told:
        for _ in range(3):
            problem.step()
        bench.wait()
    events = told.key_averages()
    order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    return {
        "steps": 3, "table": events.table(sort_by=order, row_limit=25, max_name_column_width=60),
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
        "operators": sum(event.count for event in events if event.key.startswith("aten::")),
    }  # fmt: skip


# --- prompts, embeddings, words


def ovi(bench: Bench, name: str, slots: int) -> Found:
    """OVI through an image encoder: prompts a second at 50 steps, by precision, tokens, and way of running."""
    from stages.models.vision_tower import VisionTower
    from stages.ovi.problem import OviProblem, Parametrization
    from stages.ovi.settings import OVI, Stop

    exact_float32(True)  # as the stage has it
    steps, slots = 50, bench.sized(slots, 2)
    found: Found = {"slots": slots, "steps": steps}
    ways: tuple[tuple[str, str, str, bool], ...] = (
        # label, precision, accelerate, whether the weights are in that type
        ("fp32", "float32", "none", False),
        ("bf16", "bfloat16", "none", False),
        ("bf16, graph", "bfloat16", "graph", False),
        ("bf16 without autocast", "bfloat16", "none", True),
        ("bf16 without autocast, graph", "bfloat16", "graph", True),
    )
    for compact in (False, True):
        for label, precision, accelerate, native in ways:

            def measured(
                precision: str = precision, accelerate: str = accelerate, native: bool = native, compact: bool = compact
            ) -> Found:
                if accelerate == "graph" and not bench.cuda:
                    raise Unavailable("CUDA graphs need a CUDA device")
                dtype = getattr(torch, precision) if native else torch.float32
                network = drawn_vision(name, bench.device, dtype, toy=bench.toy)
                tower = VisionTower(network, bench.sized(4, 2), compact)
                method = OVI(
                    slots=slots,
                    steps=1000,
                    stop=Stop(),
                    accelerate=accelerate,
                    compact=compact,
                    precision="float32" if native else precision,
                )
                parametrization = Parametrization.tokens(tower)
                if native:
                    parametrization = replace(parametrization, encode=lambda w_BPD: tower(w_BPD.to(dtype)).float())
                problem = OviProblem(parametrization, method)
                rng = np.random.default_rng(0)
                rows: list[Row] = [
                    {"id": str(b), "text": rng.standard_normal(tower.embedding_width, dtype=np.float32)}
                    for b in range(slots)
                ]
                problem.load(range(slots), rows)
                work = None if accelerate == "graph" else operations(problem.step)
                seconds = bench.timed(problem.step)
                out: Found = {
                    "seconds_a_step": seconds, "prompts_a_second": slots / (seconds * steps),
                    "syncs_a_step": bench.syncs(problem.step), "peak_bytes": bench.memory(problem.step),
                }  # fmt: skip
                if work is not None:
                    out |= {"operations": work, "share_of_peak": bench.share(work, seconds, SHORT[precision])}
                return out

            bench.tried(found, f"{label}{', compact' if compact else ''}", measured)
    found["jobs"] = [
        {
            "job": f"invert-prompts, {name}, {label}, {steps} steps", "limit": "operations",
            "seconds_a_row": 1 / part["prompts_a_second"], "share_of_peak": part.get("share_of_peak"),
        }
        for label, part in found.items()
        if "prompts_a_second" in _fields(part)
    ]  # fmt: skip
    return found


def ovi_compiled(bench: Bench) -> Found:
    """OVI on ViT-L/14 with the encoder compiled."""
    from stages.models.vision_tower import VisionTower
    from stages.ovi.problem import OviProblem, Parametrization
    from stages.ovi.settings import OVI, Stop

    if bench.toy:
        raise Unavailable("compiling takes longer than the toys are worth")
    tower = VisionTower(drawn_vision("ViT-L/14", bench.device, torch.bfloat16), 4)
    slots, began = 64, time.perf_counter()
    method = OVI(slots=slots, steps=1000, stop=Stop(), precision="bfloat16", accelerate="compile")
    problem = OviProblem(Parametrization.tokens(tower), method)
    rng = np.random.default_rng(0)
    width = tower.embedding_width
    problem.load(
        range(slots), [{"id": str(b), "text": rng.standard_normal(width, dtype=np.float32)} for b in range(slots)]
    )  # fmt: skip
    problem.step()
    bench.wait()
    to_compile = time.perf_counter() - began
    return {"seconds_to_compile": to_compile, "prompts_a_second": slots / (50 * bench.timed(problem.step))}


def embeddings(bench: Bench) -> Found:
    """``embed-images``: from PIL pictures to embeddings, the batch chosen by the stage."""
    from transformers import CLIPImageProcessor

    from stages.embed.settings import EmbedSettings
    from stages.embed.stage import Embed

    found: Found = {}
    for name in VISION:
        folder = bench.scratch / f"{name.replace('/', '-')}{'-toy' if bench.toy else ''}"
        if not (folder / "config.json").exists():
            drawn_vision(name, bench.device, torch.bfloat16, toy=bench.toy).save_pretrained(folder)
            side = bench.sized(VISION[name]["image_size"], TOY_SIDE)
            CLIPImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ).save_pretrained(folder)  # fmt: skip
        pictures = pictures_of(bench.sized(64, 4), 320, 240)

        def measured(folder: Path = folder, pictures: list[Any] = pictures, name: str = name) -> Found:
            stage = Embed(
                EmbedSettings(encoder=str(folder), precision="bfloat16", threads=bench.sized(12, 1)), bench.device
            )  # fmt: skip
            count = bench.sized({"ViT-L/14": 2048}.get(name, 1024), 8)
            rows = [{"id": str(i), "image": pictures[i % len(pictures)]} for i in range(count)]
            list(stage(rows[: min(count, 256)]))
            bench.wait()
            began = time.perf_counter()
            done = list(stage(rows))
            bench.wait()
            seconds = time.perf_counter() - began
            side = stage.encoder.model.config.image_size
            x_BCHW = torch.zeros(stage.batch_size, 3, side, side, device=bench.device)
            alone = torch.inference_mode()(lambda: stage.encoder.embed(x_BCHW))
            work = operations(alone)
            each = bench.timed(alone)
            return {
                "pictures_a_second": count / seconds, "ok": sum(row["status"] == "ok" for row in done),
                "batch": stage.batch_size, "encoder_alone_a_second": stage.batch_size / each,
                "encoder_share_of_peak": bench.share(work, each, "bf16"),
            }  # fmt: skip

        bench.tried(found, name, measured)
    found["jobs"] = [
        {"job": f"reference (embedding), {name}, bf16", "limit": "preparing pictures, then operations",
         "seconds_a_row": 1 / part["pictures_a_second"]}
        for name, part in found.items() if "pictures_a_second" in _fields(part)
    ]  # fmt: skip
    return found


TOY_SIDE = 28


def lego(bench: Bench) -> Found:
    """``learn-concepts`` on SD1.5: a step of 8 concepts, 4 pictures each."""
    from stages.concepts.prepare import prepare
    from stages.concepts.problem import LegoProblem
    from stages.concepts.settings import LegoSettings, Templates

    _, model = opened(bench, SD15)
    settings = LegoSettings(steps=3000)
    slots = bench.sized(8, 2)
    shots = pictures_of(4, *model.geometry.picture_size)
    row: Row = {
        "id": "frozen", "name": "frozen", "concept": "frozen", "subject": "robot", "with": shots[:2],
        "without": shots[2:], "positive": ["ice", "cold"], "negative": ["warm", "melted"],
    }  # fmt: skip
    prepared = prepare(row, model, settings, Templates(), max_words=4, root="")
    problem = LegoProblem(model, settings, slots=slots, max_words=4, seed=0)
    problem.load(range(slots), [{**row, "id": str(b), "prepared": prepared} for b in range(slots)])
    seconds = bench.timed(problem.step)
    work = operations(problem.step)
    return {
        "slots": slots, "seconds_a_step": seconds, "syncs_a_step": bench.syncs(problem.step),
        "peak_bytes": bench.memory(problem.step), "operations_a_step": work,
        "share_of_peak": bench.share(work, seconds, "bf16"),
        "jobs": [{
            "job": "learn-concepts, SD1.5, bf16, 3000 steps of 4 pictures", "limit": "operations",
            "seconds_a_row": seconds * 3000 / slots, "share_of_peak": bench.share(work, seconds, "bf16"),
        }],
    }  # fmt: skip


# --- the host, and search


def pictures(bench: Bench) -> Found:
    """Pictures a second of the host: decoding, fitting, encoding, with one thread and with many."""
    from pipeline.pictures import decode_picture, encode_picture
    from stages.models.pictures import fit_picture

    side = bench.sized(1024, 64)
    (picture,) = pictures_of(1, side, side * 3 // 4)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    data, count = buffer.getvalue(), bench.sized(64, 4)
    works: dict[str, Callable[[], Any]] = {
        "decode a JPEG": lambda: decode_picture(data, 1 << 30),
        "fit to 512": lambda: fit_picture(picture, bench.sized(512, 32)),
        "encode": lambda: encode_picture(picture),
    }
    found: Found = {"side": side}
    for threads in bench.sized((1, 16), (1, 2)):
        with ThreadPoolExecutor(threads) as pool:
            for name, work in works.items():
                began = time.perf_counter()
                list(pool.map(lambda _, work=work: work(), range(count if threads > 1 else count // 4)))
                made = count if threads > 1 else count // 4
                found[f"{name}, {threads} threads"] = made / (time.perf_counter() - began)
    return found


def search(bench: Bench) -> Found:
    """Nearest neighbours: an index on the device against the same on the host."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise Unavailable("faiss is not installed: pip install faiss-gpu") from None
    from index import neighbours

    rows, width = bench.sized((1_000_000, 768), (2_000, 16))
    rng = np.random.default_rng(0)
    found: Found = {"rows": rows, "width": width}
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        np.save(Path(folder) / "vectors.npy", rng.standard_normal((rows, width), dtype=np.float32))
        x_NE = np.load(Path(folder) / "vectors.npy", mmap_mode="r")
        factory = bench.sized("IVF1024,Flat", "IVF16,Flat")
        began = time.perf_counter()
        neighbours.build(x_NE, [rows], Path(folder), neighbours.Plan(factory=factory), {"vectors": "drawn"})
        found["seconds_to_build"] = time.perf_counter() - began
        index = neighbours.Index.open(Path(folder))
        queries = x_NE[: bench.sized(4096, 64)]
        held = {"host": index}
        if neighbours.gpus() and bench.cuda:
            held["device"] = index.on_gpu(0, 8 << 30)
        for name, one in held.items():
            seconds = bench.timed(lambda one=one: one.search(queries, 8), 0.5)
            found[f"{name}, queries a second"] = len(queries) / seconds
    return found


@dataclass(frozen=True)
class Measure:
    """A measure.

    Attributes:
        needs: Seconds that it is expected to take on an H100 at most; it is not begun with less left.
        limit: Seconds after which it is stopped.
    """

    run: Callable[[Bench], Found]
    needs: float
    limit: float


MEASURES: dict[str, Measure] = {
    "card": Measure(card, 10, 60),
    "tests": Measure(tests, 50, 120),
    "sd15": Measure(partial(images, size=SD15), 30, 90),
    "ovi-l14": Measure(partial(ovi, name="ViT-L/14", slots=64), 18, 60),
    "sdxl": Measure(partial(images, size=SDXL), 45, 120),
    "ovi-bigg": Measure(partial(ovi, name="ViT-bigG/14", slots=32), 30, 90),
    "memory": Measure(memory, 25, 80),
    "autoencoder": Measure(autoencoder, 18, 60),
    "profile": Measure(profile, 12, 60),
    "flux": Measure(flux, 30, 90),
    "families": Measure(families, 75, 180),
    "lego": Measure(lego, 12, 60),
    "embeddings": Measure(embeddings, 30, 80),
    "pictures": Measure(pictures, 8, 40),
    "search": Measure(search, 45, 120),
    "ovi-compiled": Measure(ovi_compiled, 60, 150),
    "sd15-compiled": Measure(partial(compiled, size=SD15), 60, 150),
    "sdxl-compiled": Measure(partial(compiled, size=SDXL), 90, 200),
    "flux-compiled": Measure(partial(compiled, size=FLUX), 90, 200),
}


def chosen(names: Iterable[str] | None) -> dict[str, Measure]:
    """Some measures by their names, in their order.

    Raises:
        ValueError: There is no measure of a name.
    """
    asked = list(names or MEASURES)
    if unknown := [name for name in asked if name not in MEASURES]:
        raise ValueError(f"there is no measure {unknown[0]!r}: {', '.join(MEASURES)}")
    return {name: measure for name, measure in MEASURES.items() if name in asked}
