"""The command line, as a user's shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import micro
from jobs.commands.cli import app
from jobs.kinds.reference import Reference
from jobs.schema import reading
from jobs.schema.base import RowJob
from jobs.schema.reading import JobFileError
from tests.support import ROOT


@pytest.fixture
def toy_file(tmp_path: Path, toy_job: type[RowJob]) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(20)))
    path = tmp_path / "toy.yaml"
    path.write_text(f"job: toy\ninput: {tmp_path / 'rows.jsonl'}\nshard_rows: 8\n")
    return path


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom jobs.commands.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'ray', 'diffusers', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "run-job" in done.stdout
    assert "HEAVY []" in done.stdout


def test_schema_is_json() -> None:
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    assert "invert-prompts" in json.dumps(json.loads(done.stdout))


def test_a_misspelt_key_names_file_key_and_the_nearest(toy_file: Path) -> None:
    toy_file.write_text(toy_file.read_text() + "shard_row: 3\n")
    done = CliRunner().invoke(app, ["run-job", str(toy_file)])
    assert done.exit_code == 2
    for part in ("toy.yaml", "shard_row", "shard_rows"):
        assert part in done.output


def test_a_dry_run_plans_and_writes_nothing(toy_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["run-job", str(toy_file), "-o", str(out), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    (plan,) = json.loads(done.stdout)
    assert (plan["plan"]["rows"], plan["plan"]["shards"]) == (20, 3)
    assert not out.exists()


def test_a_run_is_complete_verified_and_described(toy_file: Path, tmp_path: Path, local_ray: str) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["run-job", str(toy_file), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (result["state"], result["ok"]) == ("complete", 20)
    assert Path(result["report"]).is_file()
    checked = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert checked.exit_code == 0
    assert json.loads(checked.stdout)["ok"]
    assert "complete" in CliRunner().invoke(app, ["status", str(out)]).output
    next((out / "data").glob("part-*.parquet")).unlink()
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 1


def test_a_folder_without_a_run_is_a_usage_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["status", str(tmp_path)]).exit_code == 2


def test_shipped_models_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = {"job": "reference", "input": "x", "encoder": "micro:prior"}
    job = reading.load(raw)
    assert isinstance(job, Reference)
    assert job.encoder == str(micro.MODELS / "prior")
    with pytest.raises(JobFileError, match="stable-diffusion"):
        reading.load({**raw, "encoder": "micro:priors"})
