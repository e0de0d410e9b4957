"""`latentmill doctor`: what stands in a run's way is found before it, with what to do; nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from jobs.commands import checks
from jobs.commands.cli import app
from jobs.schema.base import RowJob
from pipeline.storage import Folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def doctor(*words: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit code, and findings by name."""
    done = CliRunner().invoke(app, ["doctor", *words, "--json"])
    found: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(done.stdout):
        found.setdefault(finding["name"], []).append(finding)
    return done.exit_code, found


@pytest.fixture
def job(tmp_path: Path, toy_job: type[RowJob]) -> Iterator[Any]:
    (tmp_path / "rows.txt").write_text("one\ntwo\n")

    def write(**changes: Any) -> str:
        path = tmp_path / "toy.yaml"
        path.write_text(json.dumps({"job": "toy", "input": str(tmp_path / "rows.txt"), **changes}))
        return str(path)

    return write  # type: ignore[return-value]


def test_an_environment_that_runs_the_tests_is_well() -> None:
    code, found = doctor()
    assert code == 0
    assert {"latentmill", "packages", "GPU", "memory", "disk", "hub", "Ray"} <= set(found)
    assert found["packages"][0]["state"] == "ok"
    assert "torch 2" in found["packages"][0]["found"]
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "✓  latentmill" in shown.stdout


def test_a_package_out_of_range_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata as metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.13.0" if name == "torch" else real(name))
    (finding,) = checks._packages()
    assert finding.state == "fail"
    assert finding.found == "torch 1.13.0 (needs >=2.6)"
    assert finding.todo == "pip install 'torch>=2.6'"


def test_a_job_that_can_run(job: Any, tmp_path: Path) -> None:
    code, found = doctor(job(), "-o", str(tmp_path / "new/out"))
    assert code == 0
    assert [one["state"] for one in found["output"] + found["resources"]] == ["ok", "ok"]
    assert found["input and models"][0]["found"].startswith("text, ")
    assert sorted(os.listdir(tmp_path)) == ["rows.txt", "toy.yaml"]  # no folder, no probe


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"resources": {"gpus": 64}}, "resources", "a worker asks for 64 GPU"),
        ({"input": "gone.txt"}, "input and models", "gone.txt"),
        ({"sead": 3}, "job file", "Did you mean 'seed'?"),
        ({"output": "nosuch://bucket/out"}, "output", "nosuch"),
    ],
)
def test_what_stands_in_the_way(job: Any, tmp_path: Path, changes: dict[str, Any], name: str, said: str) -> None:
    code, found = doctor(job(**{"output": str(tmp_path / "out"), **changes}))
    assert code == 1
    (finding,) = found[name]
    assert finding["state"] == "fail"
    assert said in finding["found"]
    assert finding["todo"]
    failed = [one["name"] for group in found.values() for one in group if one["state"] == "fail"]
    assert failed == [name]


def test_a_folder_that_cannot_be_written(job: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, found = doctor(job(), "-o", str(tmp_path / "file/out"))
    assert code == 0  # the nearest folder above can
    assert found["output"][0]["state"] == "ok"


def test_a_chain_is_looked_at_step_by_step(job: Any, tmp_path: Path) -> None:
    job()
    chain = {"job": "chain", "steps": [{"job": "toy", "name": "one", "input": str(tmp_path / "rows.txt")},
                                       {"job": "toy", "name": "two"}]}  # fmt: skip
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps(chain))
    code, found = doctor(str(path), "-o", str(tmp_path / "out"))
    assert code == 0
    assert found["one: input and models"][0]["state"] == "ok"
    assert found["two: input"][0]["found"] == f"reads {tmp_path}/out/one, which an earlier step will write"


def test_a_store_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's memory filesystem replaces what it should only create; and a clock may be off."""
    folder = Folder.at("memory://doctor/out")
    monkeypatch.setattr(Folder, "is_exclusive", lambda self, name: False)
    monkeypatch.setattr(checks, "_written", lambda info: checks.time.time() - 600)
    found = list(checks.store(folder))
    assert [state for state, _, _ in found] == ["ok", "warn", "warn"]
    assert "conditional writes" in found[1][2]
    assert "600 s behind this machine's" in found[2][1]
    assert not [name for name in fsspec.filesystem("memory").find("/doctor") if "doctor-" in name]


def test_no_ray_at_the_address() -> None:
    """In a process of its own: one that is connected to a Ray goes on with that."""
    words = [sys.executable, "-m", "jobs", "doctor", "--address", "127.0.0.1:9", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert [finding["state"] for finding in json.loads(done.stdout) if finding["name"] == "Ray"] == ["fail"]


def test_a_cluster_is_told_with_what_it_has(local_ray: str) -> None:
    finding = checks.cluster(local_ray)
    assert finding.state == "ok"
    assert "1 node, 6 CPU, 0 GPU" in finding.found
