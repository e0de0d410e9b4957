"""What a user meets first: the version, names of commands in messages, a machine that is too small, noise, Ctrl-C."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer
from typer.testing import CliRunner

from jobs import __main__ as entry
from jobs.commands.cli import app
from jobs.commands.plan_table import facts
from jobs.commands.progress_line import plain
from jobs.commands.search import print_table
from jobs.dry_run import DryRun, memory_of
from jobs.kinds.invert_images import InvertImages
from jobs.kinds.invert_prompts import InvertPrompts
from jobs.page.amounts import size
from jobs.page.hits import Hit
from jobs.schema.base import RowJob
from pipeline.output.progress import Progress
from pipeline.run.driver import Resources, RunError, _check_room
from pipeline.run.pool import Pool
from stages.models.families import open_without_weights
from stages.models.vision_tower import VisionTower
from stages.ovi.stage import InvertPrompts as PromptStage
from tests.support import ROOT, tiny_kandinsky
from tests.support.imports import PACKAGES


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"latentmill {version('latentmill')}\n")


def test_every_command_that_is_named_exists() -> None:
    """In messages, docstrings, job files and pages: ``latentmill WORD``."""
    commands = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}  # type: ignore[union-attr]
    named: dict[str, str] = {}
    files = [
        *(file for room in PACKAGES for file in (ROOT / room).rglob("*.py")),
        *(ROOT / "jobs/examples").glob("*.yaml"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile",
    ]  # fmt: skip
    said = re.compile(r"(?:`|^ *|# *|\$ |bin/)latentmill ([a-z][a-z-]+)", re.MULTILINE)
    for file in files:
        for word in said.findall(file.read_text(encoding="utf-8")):
            named.setdefault(word, str(file.relative_to(ROOT)))
    assert {"run-job", "status", "verify", "search"} <= set(named)
    assert {word: file for word, file in named.items() if word not in commands} == {}


def test_a_dry_run_says_what_this_machine_lacks(tmp_path: Path, toy_job: type[RowJob]) -> None:
    (tmp_path / "rows.txt").write_text("one\n")
    path = tmp_path / "toy.yaml"
    path.write_text(f"job: toy\ninput: {tmp_path / 'rows.txt'}\nresources: {{gpus: 64, memory: 400TB}}\n")
    (plan,) = json.loads(CliRunner().invoke(app, ["run-job", str(path), "--dry-run", "--json"]).stdout)
    assert re.fullmatch(r"64 GPU \(of \d\) and 400\.0 TB of memory \(of .*B\)", plan["lacking"])
    told = " ".join(CliRunner().invoke(app, ["run-job", str(path), "--dry-run"]).output.split())
    assert "does not fit a worker asks for 64 GPU" in told
    path.write_text(f"job: toy\ninput: {tmp_path / 'rows.txt'}\n")
    (plan,) = json.loads(CliRunner().invoke(app, ["run-job", str(path), "--dry-run", "--json"]).stdout)
    assert plan["lacking"] == ""


def test_a_dry_run_says_what_a_row_takes_on_a_gpu() -> None:
    job = InvertImages(input="pictures", guidance=2.0, resources={"gpus": 1})  # type: ignore[arg-type]
    told = memory_of(job)
    model = open_without_weights(job)
    for gradient in (False, True):
        assert size(model.activation_bytes("predict", gradient=gradient)) in told
    assert "64, 64, 64 of 24, 40, 80 GB" in told
    assert "in float32: dtype: bfloat16 would halve" in told
    assert "in float32" not in memory_of(job.model_copy(update={"dtype": "bfloat16"}))
    dry = DryRun("invert-images", job, "out", None, "not planned", memory=told)
    assert dict(facts(dry))["GPU memory"] == dry.to_json()["memory"] == told
    assert memory_of(InvertImages(input="pictures")) == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.models.memory.weight_bytes", lambda model: 39 * 10**9)
        assert "none, none, 64 of 24, 40, 80 GB" in memory_of(job)
        assert "FIT" not in memory_of(job)
        half = job.model_copy(update={"resources": job.resources.model_copy(update={"gpus": 0.5})})
        assert "none, none, none of 24, 40, 80 GB, of which a worker has 0.5; " in memory_of(half)
        assert "39.0 GB FIT NONE OF THEM: take more than 0.5 GPU" in memory_of(half)
        patch.setattr("stages.models.memory.rows_on", lambda card, weights, each: 20)
        assert "16, 16, 16 of 24" in memory_of(job)
        assert "8, 8, 8 of 24" in memory_of(job.model_copy(update={"accelerate": "graph"}))
    two = job.model_copy(update={"resources": job.resources.model_copy(update={"gpus": 2})})
    assert "of its 2 the others WOULD BE IDLE" in memory_of(two)
    assert "IDLE" not in told


def test_a_dry_run_says_what_prompts_take_on_a_gpu(tmp_path: Path) -> None:
    """Against the networks of a stage, each counted once: encoders in float32, prior and decoder in half precision."""
    prior, decoder = tiny_kandinsky.build_prior(tmp_path / "prior"), tiny_kandinsky.build_decoder(tmp_path / "decoder")
    methods = [{"method": "ovi", "steps": 2}, {"method": "trained-prior", "steps": 2}]
    job = InvertPrompts.model_validate(
        {"input": "x", "encoder": prior, "methods": methods, "decode": {"model": decoder}, "resources": {"gpus": 1}}
    )
    stage: Any = PromptStage(PromptStage.Settings(**job.stage().params), device="cpu")
    own = PriorTransformer.from_pretrained(prior, subfolder="prior")
    networks = [stage.text.model, stage.image_encoder.model], [own, stage.decoder.pipe.unet, stage.decoder.pipe.movq]
    whole, half = (sum(w.numel() for one in some for w in one.parameters()) for some in networks)
    told = memory_of(job)
    assert told.startswith(f"weights {size(4 * whole + 2 * half)}, each network once; a prompt ")
    each = VisionTower(stage.image_encoder.model, 4).row_bytes()
    assert f"a prompt {size(each)} in a step of ovi; slots where `slots` is left out: 64, 64, 64 of 24, 40" in told
    halved = [{"method": "ovi", "name": name, "precision": "bfloat16"} for name in ("one", "two")]
    for decode in (None, {"model": decoder}):  # what is decoded needs the encoder in float32 too
        given = job.model_dump(exclude={"decode", "methods"}) | {"methods": halved, "decode": decode}
        other = InvertPrompts.model_validate(given)
        stage = PromptStage(PromptStage.Settings(**other.stage().params), device="cpu")
        held = [*stage.text.model.parameters(), *stage.image_encoder.model.parameters()]
        own_bytes = sum(weight.numel() * weight.element_size() for weight in held)
        if decode is not None:
            linear = [one for one in stage.image_encoder.model.modules() if isinstance(one, torch.nn.Linear)]
            beside = [stage.decoder.pipe.unet, stage.decoder.pipe.movq, *linear]
            own_bytes += sum(2 * weight.numel() for one in beside for weight in one.parameters())
        assert memory_of(other).startswith(f"weights {size(own_bytes)}, each network once; ")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Resources(gpus=1), "1 GPU (of 0)"),
        (Resources(memory=4 << 40), "4,096.0 GiB of memory (of 8.0)"),
        (Resources(cpus=3, gpus=0.5), "3 CPU (of 2) and 0.5 GPU (of 0)"),
        (Resources(cpus=2, memory=8 << 30), ""),
    ],
)
def test_a_ray_of_our_own_is_not_waited_for(asked: Resources, said: str) -> None:
    class Ray:
        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {"CPU": 2.0, "memory": 8.0 * 2**30}

    pool: Any = Pool.__new__(Pool)
    pool._ray, pool._resources = Ray, asked
    assert pool.lacking() == said
    _check_room(pool, ours=False)  # a cluster may grow
    if said:
        with pytest.raises(RunError, match=re.escape(said)):
            _check_room(pool, ours=True)
    else:
        _check_room(pool, ours=True)


def test_noise_goes_into_the_runs_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys, subprocess; from jobs.commands.noise import quiet\n"
        "with quiet(sys.argv[1]) as shown:\n"
        "    os.write(2, b'(raylet) a worker died\\n'); print('a bar', file=sys.stderr)\n"
        "    subprocess.run(['sh', '-c', 'echo a child >&2'])\n"
        "    print('50 %', file=shown)\n"
        "print('after', file=sys.stderr)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stderr == "50 %\nafter\n"
    log = (out / "_latentmill/log.txt").read_text()
    assert log == "(raylet) a worker died\na bar\na child\n" * 2


def test_noise_makes_no_folder(tmp_path: Path) -> None:
    """A run that was refused leaves nothing behind, in nobody's folder."""
    code = "import os, sys; from jobs.commands.noise import quiet\nwith quiet(sys.argv[1]): os.write(2, b'x')"
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True)
    assert not out.exists()


def test_ctrl_c_while_commands_are_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.commands.cli.main", press)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_words_of_a_row_are_neither_markup_nor_control_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Before: an id with ``[/]`` in it ended `search` with a traceback, and one with a link was a link."""
    evil = "[/b] [link=https://evil.example]click[/link] \x1b]0;mine\x07"
    print_table(evil, [Hit(evil, 0.5, {"caption": evil}, None)])
    plain()(Progress("running", message=evil))
    written = capsys.readouterr().out
    assert written.count("[/b]") >= 3  # the table cuts what is too long
    assert "\x1b" not in written
    assert "\x07" not in written
