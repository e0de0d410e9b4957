"""The measures of a GPU, on the CPU at toy sizes: the same code, and what becomes of a measure that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import measures, networks
from benchmarks.gpu.instruments import Bench, HostReads, Unavailable, operations
from benchmarks.gpu.record import Record, table
from tests.support import ROOT, full_size

RUN = ["--device", "cpu", "--toy", "--run", "1"]


def child(path: Path, *more: str, minutes: float = 10) -> int:
    """The child's work in this process."""
    deadline = str(time.time() + 60 * minutes)
    return gpu.measure_all(gpu.parsed(["--child", str(path), *RUN, "--deadline", deadline, *more]))


def test_a_measure_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> dict[str, Any]:
        raise RuntimeError("this card has no such thing")

    def absent(bench: Bench) -> dict[str, Any]:
        raise Unavailable("nothing to measure it with")

    for name, run in (("tests", broken), ("sd15", absent)):
        monkeypatch.setitem(measures.MEASURES, name, measures.Measure(run, 1, 10))
    record = Record(tmp_path / "card.json")
    assert child(record.path, "--only", "card,tests,sd15,pictures") == 0
    states = {name: entry["state"] for name, entry in record.read()["measures"].items()}
    assert states == {"card": "done", "tests": "failed", "sd15": "skipped", "pictures": "done"}
    assert "this card has no such thing" in record.entry("tests")["error"]
    assert record.entry("sd15")["why"] == "nothing to measure it with"
    assert record.entry("card")["found"]["fp32"] > 0
    told = table(record.read(), 2.5)
    assert "- tests: failed (RuntimeError: this card has no such thing)" in told


def test_it_goes_on_with_what_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in measures.MEASURES:
        run = lambda bench, name=name: {"number": made.append(name)}  # noqa: E731
        monkeypatch.setitem(measures.MEASURES, name, measures.Measure(run, 1, 10))
    path = tmp_path / "card.json"
    Record(path).write("card", state="done", found={"bf16": 1.0})
    Record(path).write("sd15", state="failed", error="an earlier run's", run="0")
    Record(path).write("sdxl", state="failed", error="this run's", run="1")
    assert child(path) == 0
    assert made == [name for name in measures.MEASURES if name not in ("card", "sdxl")]


def test_no_measure_begins_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "time", type("Clock", (), {"time": staticmethod(lambda: 1000.0)}))
    monkeypatch.setitem(measures.MEASURES, "card", measures.Measure(lambda bench: {}, 61, 100))
    path = tmp_path / "card.json"
    full = ["--child", str(path), "--device", "cpu", "--run", "1", "--only", "card", "--deadline", "1060"]
    assert gpu.measure_all(gpu.parsed(full)) == 0
    assert Record(path).entry("card")["state"] == "skipped"
    assert "60 s were left" in Record(path).entry("card")["why"]


@pytest.mark.parametrize(
    ("does", "limit", "error"),
    [("os.kill(os.getpid(), signal.SIGKILL)", 600, "ended with code -9"),
     ("time.sleep(600)", 0.5, "stopped: it took longer than its limit of 0.5 s")],
)  # fmt: skip
def test_a_child_that_dies_or_hangs_is_followed_by_another(tmp_path: Path, does: str, limit: float, error: str) -> None:
    """A stand-in for the child: it begins `first`, comes to grief, and does `second` when it is started again."""
    record = Record(tmp_path / "card.json")
    record.describe(card="none")
    program = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.gpu.record import Record
record = Record(Path({str(record.path)!r}))
if record.entry("first"):
    record.write("second", state="done", found={{}})
else:
    record.write("first", state="running", began=time.time(), limit={limit})
    {does}
"""
    assert gpu.supervise([sys.executable, "-c", program], record, tick=0.05) == 0
    assert record.entry("first")["state"] == "failed"
    assert error in record.entry("first")["error"]
    assert record.entry("second")["state"] == "done"


def test_a_child_that_cannot_begin_ends_the_run(tmp_path: Path) -> None:
    record = Record(tmp_path / "card.json")
    assert gpu.supervise([sys.executable, "-c", "raise SystemExit(1)"], record, tick=0.05) == 1


def test_the_table_says_hours_and_dollars_a_million_rows() -> None:
    note = {"card": "A card", "measures": {"a": {"state": "done", "found": {"jobs": [
        {"job": "a job", "limit": "operations", "seconds_a_row": 0.036, "share_of_peak": 0.5}]}}}}  # fmt: skip
    assert "| a job | operations | 27.78 | 50% | 10 | 30 |" in table(note, 3.0)


# --- the measures themselves


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("cpu", True, tmp_path_factory.mktemp("scratch"))


def test_a_latent_model_is_measured(bench: Bench) -> None:
    found = measures.images(bench, measures.SDXL)
    assert found["job"]["ok"] == found["job"]["rows"] == 2
    assert found["engine, lbo"]["passes_a_second"] > 0
    assert found["network"]["operations_a_pass"] > 1e6
    (job,) = found["jobs"]
    assert job["seconds_a_row"] > 0
    errors = [part for part in (*found.values(), *found["network"].values()) if "error" in measures._fields(part)]
    assert not errors


def test_every_family_of_flows_comes_there_and_back(bench: Bench) -> None:
    found = measures.families(bench)
    jobs = found.pop("jobs")
    assert set(found) == networks.FLOWS.keys() - {"FLUX.1-dev"}
    assert len(jobs) == len(found)
    for name, part in found.items():
        assert part["velocity"] > 1e-2, name
        assert part["operations_a_pass"] > 1e4, name
        picture = part["one picture"]
        assert picture["error_of_row"] is None, name
        assert picture["forwards"] >= picture["steps"], name
        assert 0 <= picture["mse"] < 1e-3, name


def test_ovi_is_measured_in_every_way_that_needs_no_gpu(bench: Bench) -> None:
    found = measures.ovi(bench, "ViT-L/14", 64)
    ways = {name: part for name, part in found.items() if isinstance(part, dict)}
    assert not [part for part in ways.values() if "error" in part]
    assert {name for name, part in ways.items() if "unavailable" in part} == {name for name in ways if "graph" in name}
    assert len(found["jobs"]) == 6


def test_the_published_networks_are_those_that_are_built(tmp_path: Path) -> None:
    """Counted on the meta device, where nothing is allocated."""
    for kind in ("sd15", "sdxl"):
        folder = networks.folder_of(kind, tmp_path)
        import diffusers

        unet = networks.Drawn(folder / "unet", "meta").load(diffusers.UNet2DConditionModel, torch.bfloat16)
        assert sum(parameter.numel() for parameter in unet.parameters()) == full_size.PARAMETERS[kind]["unet"]
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    tower = networks.drawn_vision("ViT-bigG/14", "meta", torch.bfloat16)
    assert 1.84e9 < sum(parameter.numel() for parameter in tower.parameters()) < 1.85e9
    flux = networks.Drawn(networks.folder_of("FLUX.1-dev", tmp_path) / "transformer", "meta")
    transformer = flux.load(diffusers.FluxTransformer2DModel, torch.bfloat16)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320


def test_what_only_the_first_call_does_is_not_among_its_operations() -> None:
    sizes = [64, 4, 4]
    square = lambda: (lambda x: x @ x)(torch.ones(2 * (sizes.pop(0),)))  # noqa: E731
    assert operations(square) == 2 * 4**3


def test_reads_by_the_host_are_counted() -> None:
    x = torch.arange(4.0)
    with HostReads() as reads:
        bool((x > 1).any())
        x[x > 1]
        x[torch.tensor([1, 2], device="cpu")]
        x.sum().item(), x.tolist(), x.nonzero()
        x + 1
    assert dict(reads.counts) == {"__bool__": 1, "__getitem__": 1, "tensor": 1, "item": 1, "tolist": 1, "nonzero": 1}


def test_neither_ray_nor_datasets_nor_faiss_is_needed(tmp_path: Path) -> None:
    """A machine with a GPU is often a plain one: the measures run, and the tests marked `gpu` are collected."""
    path = tmp_path / "card.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    absent = [sys.executable, "-m", "tests.support.without", "ray,datasets,faiss"]
    run = ["benchmarks.gpu", "--child", str(path), *RUN, "--deadline", str(time.time() + 600), "--only", "lego,search"]
    told = subprocess.run([*absent, *run], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    found = json.loads(path.read_text())["measures"]
    assert found["lego"]["state"] == "done", found["lego"]
    assert found["search"] == {**found["search"], "state": "skipped"}
    assert "faiss is not installed" in found["search"]["why"]

    marked = [str(file) for file in measures.marked_files()]
    assert marked
    collect = ["pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *marked]
    told = subprocess.run([*absent, *collect], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
