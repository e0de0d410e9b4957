"""What a run tells log collectors and trackers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.commands import track
from jobs.commands.cli import app
from jobs.schema.base import RowJob
from pipeline.output.progress import Progress


@pytest.fixture
def job(tmp_path: Path, toy_job: type[RowJob], in_process: None) -> list[str]:
    (tmp_path / "rows.txt").write_text("one\nto fail\nthree\n")
    path = tmp_path / "toy.yaml"
    secret = "storage_options: {key: none-of-yours}"
    path.write_text(
        f"job: toy\ninput: {{path: {tmp_path / 'rows.txt'}, {secret}}}\nmax_failed_fraction: 0.5\n{secret}\n"
    )
    return ["run-job", str(path), "-o", str(tmp_path / "out")]


def lines(job: list[str], *options: str) -> tuple[int, list[dict[str, Any]]]:
    done = CliRunner().invoke(app, [*job, "--log-format", "json", *options])
    return done.exit_code, [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_an_object_and_the_last_one_the_result(job: list[str]) -> None:
    code, told = lines(job)
    assert code == 0
    assert all({"time", "event"} <= set(line) for line in told)
    progress = [line for line in told if line["event"] == "progress"]
    assert progress[0]["phase"] == "planning"
    assert progress[-1]["phase"] == "complete"
    assert (progress[-1]["rows"], progress[-1]["rows_ok"], progress[-1]["rows_failed"]) == (3, 2, 1)
    assert told[-1]["event"] == "result"
    assert (told[-1]["state"], told[-1]["ok"], told[-1]["failed"]) == ("complete", 2, 1)


def test_events_and_errors_are_objects_too(job: list[str]) -> None:
    lines(job)
    (Path(job[-1]) / "data/stranger.parquet").write_bytes(b"")
    _, told = lines(job)
    assert any(line["event"] == "message" and "stranger.parquet" in line["message"] for line in told)
    code, told = lines(job, "--set", "shard_row=2")
    assert code == 2
    (error,) = told
    assert (error["event"], error["exit_code"]) == ("error", 2)
    assert "shard_rows" in error["message"]
    code, told = lines(job, "--calibrate")
    assert (code, [line["event"] for line in told]) == (2, ["error"])


class Fake:
    """A tracking library: it keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Fake:
            self.told.append((name, given, named))
            return self

        return call

    def of(self, name: str) -> list[tuple[Any, Any]]:
        return [(given, named) for called, given, named in self.told if called == name]


def test_tensorboard(job: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=fake.writer))
    done = CliRunner().invoke(app, [*job, "--track", f"tensorboard:{tmp_path}/runs"])
    assert done.exit_code == 0
    assert fake.of("writer") == [((f"{tmp_path}/runs/out",), {})]
    scalars = {given[0]: given[1] for given, _ in fake.of("add_scalar")}
    assert (scalars["rows_ok"], scalars["rows_failed"], scalars["shards_done"]) == (2, 1, 1)
    assert scalars["length_mean"] == (len("one") + len("three")) / 2
    assert len(fake.of("close")) == 1


def test_wandb_and_mlflow_get_the_job_without_its_keys(job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = Fake(), Fake()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    assert CliRunner().invoke(app, [*job, "--track", "wandb:mine"]).exit_code == 0
    ((_, started),) = wandb.of("init")
    assert (started["project"], started["name"], started["config"]["job"]) == ("mine", "out", "toy")
    assert any(given[0].get("rows_ok") == 2 for given, _ in wandb.of("log"))
    assert len(wandb.of("finish")) == 1
    assert CliRunner().invoke(app, [*job, "--track", "mlflow:http://127.0.0.1:5000"]).exit_code == 0
    assert mlflow.of("set_tracking_uri") == [(("http://127.0.0.1:5000",), {})]
    assert any(given[0].get("rows_failed") == 1 for given, _ in mlflow.of("log_metrics"))
    assert len(mlflow.of("end_run")) == 1
    assert "none-of-yours" not in str(wandb.told) + str(mlflow.told)


@pytest.mark.parametrize(
    ("where", "said"),
    [("wandb", "wandb is not installed: pip install wandb"), ("comet", "tensorboard:DIR, wandb:PROJECT or mlflow:URI")],
)
def test_a_tracker_that_is_not_there(job: list[str], monkeypatch: pytest.MonkeyPatch, where: str, said: str) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = CliRunner().invoke(app, [*job, "--track", where])
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_figures_are_told_now_and_then() -> None:
    fake = Fake()
    tracking = track.Tracking(fake, print, interval=1000)
    for number in range(5):
        tracking.progress(Progress("running", rows_ok=number, seconds=number))
    tracking.progress(Progress("running", message="a worker died"))
    tracking.progress(Progress("complete", rows_ok=9, seconds=60))
    assert [given[0]["rows_ok"] for given, _ in fake.of("log")] == [0, 9]
    assert [given[1] for given, _ in fake.of("log")] == [0, 60]


def test_a_tracker_that_fails_ends_no_run(job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Fake):
        def log(self, *figures: Any) -> None:
            raise ConnectionError("the server is away")

    monkeypatch.setitem(sys.modules, "wandb", Away())
    done = CliRunner().invoke(app, [*job, "--track", "wandb"])
    assert done.exit_code == 0
    assert (
        done.stderr.count("the tracker failed (ConnectionError: the server is away); the run goes on without it") == 1
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **named: 1 / 0))
    refused = CliRunner().invoke(app, [*job, "--track", "wandb"])
    assert refused.exit_code == 2
    assert "--track wandb: ZeroDivisionError: division by zero" in " ".join(refused.stderr.split())


def test_a_signature_is_told_to_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Fake()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = {"input": {"path": ["https://host/in.jsonl?X-Amz-Signature=hush"]}, "prompt": "why? because"}
    with track.tracking("wandb", "out", settings, print):
        pass
    ((_, started),) = wandb.of("init")
    assert started["config"] == {"input": {"path": ["https://host/in.jsonl"]}, "prompt": "why? because"}
