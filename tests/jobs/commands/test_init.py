"""Job files to start from: every one that `init` writes and every example that is copied can be read, and runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.examples import copied, names
from jobs.commands.init import MODELS, TEMPLATES, template
from jobs.kinds.chain import Chain
from jobs.schema import reading, registry
from jobs.schema.base import Job
from jobs.schema.steps import step_kinds


def test_every_kind_has_a_template() -> None:
    assert set(TEMPLATES) == set(registry.kinds()) == {*step_kinds(), "chain"}


def test_a_kind_without_a_frozen_model_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "judge-corpus"]).exit_code == 0
    assert reading.load("job.yaml").job == "judge-corpus"
    refused = CliRunner().invoke(app, ["init", "judge-corpus", "-o", "other.yaml", "--model", "sdxl"])
    assert refused.exit_code == 2
    assert "judge-corpus works with no such model: leave out --model" in refused.stderr


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if kind != "judge-corpus"])
def test_what_init_writes_is_a_job_of_that_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kandinsky = kind in ("reference", "invert-prompts", "decode", "select-corpus", "chain")
    fitting = [] if kind == "caption" else ["kandinsky22"] if kandinsky else ["sd15", "sd21", "sdxl"]
    for model in (None, *MODELS, "mine/model: a", "./local"):
        words = ["init", kind, "-o", f"{model}.yaml".replace("/", "-"), *(("--model", model) if model else ())]
        done = CliRunner().invoke(app, words)
        if model in MODELS and model not in fitting:
            assert done.exit_code == 2
            assert f"takes no {model}: {', '.join(fitting)}" in done.stderr
            assert "a folder or hub id of such a model" in done.stderr
            continue
        assert done.exit_code == 0, done.output
        job = reading.load(words[3])
        assert job.job == kind
        text = Path(words[3]).read_text()
        assert "jobs/examples" not in text
        assert f"run-job {words[3]}" in text
        assert named(job) == {MODELS.get(model, model)} if model else named(job)
        if model == "sdxl":
            assert job.variant == "fp16"  # type: ignore[attr-defined]
        assert CliRunner().invoke(app, words).exit_code == 2  # nothing is overwritten
        assert Path(words[3]).read_text() == text


def assert_editors_find_the_schema(file: Path) -> None:
    """By the first line, relative to the file; and the schema takes what the file says."""
    head, _, rest = file.read_text().partition("\n")
    place = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", head)
    assert place
    assert "yaml-language-server" not in rest
    schema = json.loads((file.parent / place[1]).read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(rest))


def named(job: Job) -> set[str]:
    steps = job.steps if isinstance(job, Chain) else (job,)
    return {getattr(step, "model", None) or getattr(step, "encoder", None) for step in steps} - {None}


def test_a_template_keeps_the_names_of_other_files() -> None:
    assert "concepts/frozen-in-ice/concept.yaml" in template("learn-concepts", None, "mine.yaml")


def test_kinds_and_mistakes(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["init"]).output.splitlines()
    assert [line.split()[0] for line in listed] == list(TEMPLATES)
    assert all(len(line) < 120 for line in listed)
    assert "Did you mean 'invert-images'?" in CliRunner().invoke(app, ["init", "invert-image"]).stderr
    (tmp_path / "mine").mkdir()
    CliRunner().invoke(app, ["init", "reference", "-o", str(tmp_path / "mine/job.yaml")])
    assert_editors_find_the_schema(tmp_path / "mine/job.yaml")
    printed = CliRunner().invoke(app, ["init", "reference", "-o", "-"])
    assert yaml.safe_load(printed.output)["job"] == "reference"


@pytest.mark.parametrize("name", names())
def test_examples_are_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = copied(name, Path("a folder/here"))
    text = file.read_text()
    assert "jobs/examples" not in text
    monkeypatch.chdir("/")
    raw = yaml.safe_load(text)
    if not name.startswith("compbench"):  # whose input its own command writes
        reading.load(raw)
    if name in ("quickstart", "rare-concepts-micro", "rare-guides-micro"):
        for path in re.findall(rf"{re.escape(str(tmp_path))}[^\"\n]*(?=\")", text):
            assert Path(path).exists(), path


def test_an_example_is_listed_copied_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["examples"]).output.splitlines()
    assert listed[0].split()[0] == "quickstart"
    assert all(len(line) < 125 for line in listed)
    done = CliRunner().invoke(app, ["examples", "quickstart"])
    file = "quickstart/quickstart.yaml"
    assert done.output == f"{file}: latentmill run-job {file} -o quickstart/out\n"
    assert (tmp_path / "quickstart/quickstart/photographs/cat.jpg").is_file()
    assert_editors_find_the_schema(tmp_path / file)
    assert CliRunner().invoke(app, ["examples", "quickstart"]).exit_code == 0  # the same again
    Path("quickstart/quickstart.yaml").write_text("job: mine\n")
    assert "changed; name another folder" in CliRunner().invoke(app, ["examples", "quickstart"]).stderr
    assert "Did you mean 'quickstart'?" in CliRunner().invoke(app, ["examples", "quick"]).stderr


def test_a_copied_quickstart_can_be_planned(tmp_path: Path) -> None:
    file = copied("quickstart", tmp_path / "q")
    command = [sys.executable, "-m", "jobs", "run-job", str(file), "-o", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fingerprint") == 4  # all but the step that waits for the reference
