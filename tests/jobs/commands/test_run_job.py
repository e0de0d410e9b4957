"""``run-job`` and its neighbours end to end: exit codes, plans, interruption; no traceback for what a user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.errors import EXIT_INCOMPLETE, EXIT_INTERRUPTED, EXIT_USAGE
from jobs.schema.base import RowJob
from tests.support import ROOT

runner = CliRunner()


def job_file(folder: Path, text: str = "", rows: int = 6) -> Path:
    lines = [json.dumps({"text": "please fail" if n == 2 else f"row {n}"}) for n in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    path = folder / "job.yaml"
    resources = "" if "resources" in text else "resources: {cpus: 0.5}\n"
    common = f"job: toy\ninput: {folder / 'rows.jsonl'}\nshard_rows: 3\nmax_failed_fraction: 1\n"
    path.write_text(common + text + resources)
    return path


def test_every_command_has_help_that_fits_a_terminal() -> None:
    """80 columns: the list has each command's sentence whole; no markup, no path of this machine."""
    listing = runner.invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {"run-job", "status", "verify", "report", "schema", "view"} <= set(commands)
    assert "--install-completion" in listing
    shown = {" ".join(line.split()) for line in listing.splitlines()}
    for name, command in commands.items():
        assert f"{name} {command.help.splitlines()[0]}" in shown
        told = runner.invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
        assert max(map(len, told.splitlines())) <= 80
        assert "[bold]" not in told
        assert str(ROOT) not in told


def test_the_app_runs_under_the_typer_command_and_as_a_module() -> None:
    for start in (["-m", "jobs"], ["-m", "typer", "jobs.commands.cli", "run"]):
        done = subprocess.run(
            [sys.executable, *start, "run-job", "nowhere.yaml"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == EXIT_USAGE
        assert "nowhere.yaml: no such job file" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("run-job jo", "job.yaml"), ("ver", "verify"), ("run-job --ou", "--output"), ("run-job a --dry", "--dry-run")],
)
def test_the_shell_completes(tmp_path: Path, typed: str, offered: str) -> None:
    (tmp_path / "job.yaml").write_text("job: reference\n")
    words = f"latentmill {typed}"
    asked = {"_LATENTMILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "from jobs.cli import main; main()"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **asked}, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "where should the dataset go?"),
        (["-o", "{out}", "--set", "input=nowhere/*.jsonl"], "nowhere/*.jsonl: matches no file"),
        (["-o", "{out}", "--set", "keep=[txet]"], "txet"),
        (["-o", "{out}", "--calibrate"], "--calibrate belongs to --dry-run"),
        (["-o", "{out}", "--set", "seed"], "write it as key=value"),
    ],
)
def test_unusable_requests(tmp_path: Path, toy_job: type[RowJob], arguments: list[str], said: str) -> None:
    given = [argument.format(out=tmp_path / "out") for argument in arguments]
    done = runner.invoke(app, ["run-job", str(job_file(tmp_path)), *given])
    assert done.exit_code == EXIT_USAGE
    assert said in done.stderr


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_a_folder_without_a_run(tmp_path: Path, command: str) -> None:
    done = runner.invoke(app, [command, str(tmp_path)])
    assert done.exit_code == EXIT_USAGE
    assert "there is no run in this folder" in done.stderr


def test_a_plan_for_people(tmp_path: Path, toy_job: type[RowJob]) -> None:
    done = runner.invoke(app, ["run-job", str(job_file(tmp_path)), "-o", str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 0, done.output
    words = done.output.split()
    assert words[words.index("rows") + 1] == "6"
    assert "2 of 3 rows" in done.output
    assert "changed, length, vector, grey" in " ".join(words)


def test_a_plan_says_what_the_file_does_not(tmp_path: Path, toy_job: type[RowJob]) -> None:
    """Its lines, written into the file, change nothing: the fingerprint is the same."""
    path = job_file(tmp_path)
    arguments = ["run-job", str(path), "-o", str(tmp_path / "out"), "--dry-run"]
    (planned,) = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    lines = runner.invoke(app, arguments).output.partition("# in force, ")[2].partition("\n")[2]
    told = yaml.safe_load(lines)
    assert told == planned["defaults"]
    assert (told["factor"], told["mode"], told["seed"], told.get("shard_rows")) == (1.0, "upper", 0, None)
    content = yaml.safe_load(path.read_text())
    content["input"] = {"path": content["input"], **told.pop("input")}
    content["resources"] |= told.pop("resources")
    content |= told
    path.write_text(yaml.safe_dump(content))
    (again,) = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert again["plan"] == planned["plan"]
    assert again["defaults"] == {}


def test_calibration_gives_time_and_cost(tmp_path: Path, toy_job: type[RowJob], local_ray: str) -> None:
    path = job_file(tmp_path, "resources: {workers: 2, price_per_worker_hour: 3600, cpus: 0.5}\n", rows=60)
    arguments = ["run-job", str(path), "-o", str(tmp_path / "out"), "--dry-run", "--calibrate", "--sample", "8"]
    (plan,) = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    timed = plan["calibration"]
    assert timed["rows"] == 8
    expected = timed["build_seconds"] + 60 * timed["seconds_per_row"] / 2
    assert plan["seconds"] == pytest.approx(expected)
    assert plan["cost"] == pytest.approx(2 * expected)  # two workers at one a second
    shown = runner.invoke(app, arguments).output
    assert "on 2 workers" in shown
    assert "worker-hours" in shown
    assert "cost" in shown
    assert "going by the sample" in shown
    assert not (tmp_path / "out").exists()


def test_a_plan_says_when_workers_will_idle(tmp_path: Path, toy_job: type[RowJob]) -> None:
    path = str(job_file(tmp_path, "resources: {workers: {min: 1, max: 4}, cpus: 0.5}\n"))
    arguments = ["run-job", path, "-o", str(tmp_path / "out"), "--dry-run"]
    shown = " ".join(runner.invoke(app, arguments).output.split())
    assert "workers 1 to 4, each 0.5 CPU note 2 shards give work to 2 workers only; a smaller `shard_rows`" in shown
    assert "work to" not in runner.invoke(app, [*arguments, "--set", "shard_rows=1"]).output


def test_run_again_change_and_report(tmp_path: Path, toy_job: type[RowJob], local_ray: str) -> None:
    out = str(tmp_path / "out")
    arguments = ["run-job", str(job_file(tmp_path)), "-o", out]
    result = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert (result["state"], result["planned"], result["ok"], result["failed"]) == ("complete", 6, 5, 1)
    again = runner.invoke(app, arguments)  # nothing is left to do
    assert again.exit_code == 0
    assert "report: " in again.stdout
    assert "1 x refused: please fail" in runner.invoke(app, ["status", out]).output
    assert runner.invoke(app, ["report", out]).output.strip() == f"{out}/report.html"
    changed = runner.invoke(app, [*arguments, "--set", "mode=lower"])
    assert changed.exit_code == EXIT_USAGE
    assert "mode: was 'upper', is 'lower'" in changed.stderr
    next((tmp_path / "out/data").glob("*.parquet")).write_bytes(b"gone")
    broken = runner.invoke(app, ["verify", out])
    assert broken.exit_code == EXIT_INCOMPLETE
    assert broken.output.startswith("NOT OK")


def test_too_many_failed_rows_end_with_1(tmp_path: Path, toy_job: type[RowJob], local_ray: str) -> None:
    arguments = ["run-job", str(job_file(tmp_path)), "-o", str(tmp_path / "out")]
    done = runner.invoke(app, [*arguments, "--set", "max_failed_fraction=0.01"])
    assert done.exit_code == EXIT_INCOMPLETE
    assert "failed" in done.stderr


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, toy_job: type[RowJob], local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes when the first shard would be handed out; the second run finishes the job."""
    from pipeline.run import dispatch

    arguments = ["run-job", str(job_file(tmp_path)), "-o", str(tmp_path / "out")]

    def interrupt(self: dispatch.Dispatcher) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dispatch.Dispatcher, "run", interrupt)
        patch.setattr(sys, "argv", ["latentmill", *arguments])
        done = runner.invoke(app, arguments)
    assert done.exit_code == EXIT_INTERRUPTED
    assert f"To go on: latentmill run-job {arguments[1]}" in done.stderr
    assert runner.invoke(app, arguments).exit_code == 0


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, toy_job: type[RowJob], local_ray: str) -> None:
    path = job_file(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "fail \x1b[31m red"}) + "\n" + json.dumps({"text": "ok"}))
    done = runner.invoke(app, ["run-job", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "\x1b[31m red" not in done.output
    assert "\\x1b" in done.output
