"""`status --watch`: what it shows, when it ends, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.commands import status
from jobs.commands.cli import app
from jobs.run import run_job
from jobs.schema.base import RowJob
from pipeline.output.dataset import Status
from pipeline.output.planfile import OutputError
from pipeline.output.progress import Progress


def state(name: str, rows_ok: int = 0) -> Status:
    phase = "complete" if name == "complete" else "running"
    return Status(name, Progress(phase, rows=4, rows_ok=rows_ok, shards=1), None, {}, {})


RUNNING, COMPLETE, DEAD = state("running", 1), state("complete", 4), state("incomplete", 1)


def watched(
    monkeypatch: pytest.MonkeyPatch, looks: list[status.States | None], *options: str
) -> tuple[int, list[str], int]:
    """Exit code, lines and looks that were not needed, where one look after the other sees these."""
    left = iter(looks)

    def look(out: str) -> status.States:
        seen = next(left)
        if seen is None:
            raise OutputError("there is no run")
        return seen

    monkeypatch.setattr(status, "look", look)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    done = CliRunner().invoke(app, ["status", "out", "--watch", "--every", "100", *options])
    return done.exit_code, done.stdout.splitlines(), len(list(left))


def test_it_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines, left = watched(monkeypatch, [None, {"": RUNNING}, {"": RUNNING}, {"": COMPLETE}, {"": COMPLETE}])
    assert (code, left) == (0, 1)
    assert [line.split()[0] for line in lines] == ["no", "running", "complete"]


def test_a_run_that_ended_incomplete_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines, left = watched(monkeypatch, [{"": RUNNING}, {"": DEAD}, {"": DEAD}])
    assert (code, left) == (1, 1)
    assert lines[-1].startswith("incomplete")


def test_between_the_steps_of_a_chain_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    between: status.States = {"first": COMPLETE, "second": None}
    ran = [{"first": RUNNING, "second": None}, between, between, {"first": COMPLETE, "second": RUNNING}]
    code, lines, _ = watched(monkeypatch, [*ran, {"first": COMPLETE, "second": COMPLETE}])
    assert code == 0
    assert [line.split()[:2] for line in lines] == [
        ["first:", "running"], ["first:", "complete"], ["second:", "running"], ["second:", "complete"]
    ]  # fmt: skip
    code, _, left = watched(monkeypatch, [*ran[:1], *[between] * 9])
    assert (code, left) == (1, 5), "300 s with nobody at work"


def test_as_json_it_is_an_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines, _ = watched(monkeypatch, [{"": RUNNING}, {"": COMPLETE}], "--json")
    assert [json.loads(line)["state"] for line in lines] == ["running", "complete"]


def test_one_look_needs_a_run(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["status", str(tmp_path / "nowhere")]).exit_code == 2


@pytest.fixture
def finished(tmp_path: Path, toy_job: type[RowJob], in_process: None) -> str:
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    run_job({"job": "toy", "input": str(tmp_path / "rows.txt")}, output=str(tmp_path / "out"))
    return str(tmp_path / "out")


def test_a_finished_run(finished: str) -> None:
    once = CliRunner().invoke(app, ["status", finished])
    until = CliRunner().invoke(app, ["status", finished, "--watch"])
    assert (once.exit_code, until.exit_code) == (0, 0)
    assert until.stdout == once.stdout
    assert until.stdout.startswith("complete  100%  2/2 rows")
