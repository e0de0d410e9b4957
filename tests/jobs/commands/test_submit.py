"""A job for Slurm: what sbatch is given, and what the script does when it runs, with stand-ins for Ray and Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.slurm import Allocation, Run, kept, script
from jobs.run import run_job
from jobs.schema.base import RowJob

Tools = Callable[..., Path]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Makes a command: a few lines of bash on a PATH of its own. Each call of it is a line in ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name: str, body: str = "") -> Path:
        file = folder / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n')
        file.chmod(0o755)
        return folder

    return make


@pytest.fixture
def job(tmp_path: Path, toy_job: type[RowJob]) -> str:
    (tmp_path / "rows.txt").write_text("one\n")
    path = tmp_path / "toy.yaml"
    path.write_text(f"job: toy\ninput: {tmp_path / 'rows.txt'}\n")
    return str(path)


def submit(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["submit", *arguments])
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


def test_the_script_is_handed_to_sbatch(
    job: str, tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tools("sbatch", f"cat > {tmp_path}/given; echo Submitted batch job 7")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    code, said, _ = submit(
        job, "-o", "out put", "--slurm", "--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu",
        "--time", "1:00:00", "--sbatch=--qos=high", "--set", "resources.workers.max=8",
    )  # fmt: skip
    assert (code, said) == (0, "Submitted batch job 7\n")
    given = (tmp_path / "given").read_text()
    asked = [line.removeprefix("#SBATCH ") for line in given.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=2", "--gpus-per-node=4", "--partition=gpu", "--time=1:00:00", "--qos=high", "--requeue"} <= {
        *asked
    }
    assert "--exclusive" in asked
    line = f"latentmill run-job {job} --output '{tmp_path}/out put' --set resources.workers.max=8"
    assert f'{line} --address "$ip:$port" &' in given


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "submit to what?"),
        (("--slurm",), "where should the dataset go?"),
        (
            ("--slurm", "-o", "out", "--set", "resources.gpus=2"),
            "a worker asks for 2 gpus (`resources.gpus`), a node has 0",
        ),
        (("--slurm", "-o", "out", "--set", "resources.cpus=8", "--cpus-per-node", "4"), "a worker asks for 8 cpus"),
        (("--slurm", "-o", "out", "--set", "shard_row=8"), "shard_rows"),
        (("--slurm", "-o", "out", "--sbatch", "qos=high"), "--sbatch=--qos=high, not 'qos=high'"),
    ],
)
def test_what_cannot_run_is_not_submitted(
    job: str, tools: Tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("PATH", f"{tools('sbatch')}:{os.environ['PATH']}")
    code, _, told = submit(job, *arguments)
    assert code == 2
    assert said in told
    assert not (tmp_path / "calls").exists()


def test_a_machine_without_slurm_and_a_refusal(job: str, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tools("cat")
    monkeypatch.setenv("PATH", str(folder))
    assert "there is no sbatch here" in submit(job, "-o", "out", "--slurm")[2]
    tools("sbatch", "echo 'invalid partition specified: gpus' >&2; exit 1")
    assert submit(job, "-o", "out", "--slurm")[::2] == (2, "error: sbatch: invalid partition specified: gpus")


def test_room_that_the_job_would_not_use_is_told(job: str) -> None:
    _, _, told = submit(job, "-o", "out", "--slurm", "--print", "--nodes", "4", "--gpus-per-node", "8",
                        "--set", "resources.gpus=1")  # fmt: skip
    assert "there is room for 32: --set resources.workers.max=32" in told


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Tools, nodes: int = 1) -> Path:
    """A script that finds stand-ins first."""
    for name in ("srun", "scontrol"):
        tools(name)
    tools("python", "echo 127.0.0.1")
    folder = tools("ray")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    file = tmp_path / "job.sh"
    file.write_text(script("latentmill-toy", Run("a b.yaml", "out"), Allocation(nodes)))
    return file


def started(file: Path, nodes: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    slurm = {"SLURM_JOB_ID": "6001", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_CPUS_ON_NODE": "2"}
    slurm |= {"SLURM_JOB_NAME": "latentmill-toy", **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})}
    return subprocess.Popen(
        ["bash", str(file)], env={**os.environ, **slurm}, cwd=file.parent,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


@pytest.mark.parametrize("nodes", [1, 3])
def test_it_is_shell(nodes: int) -> None:
    text = script("latentmill-toy", Run("a b.yaml", "out"), Allocation(nodes, 8, 32, ["--qos=high"]))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", "-"], input=text, text=True, check=True)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_run_s_exit_code_is_the_job_s(
    code: int, tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The workers are started beside the job, which ends at once here: not before they have been.
    tools("latentmill", f"while ! grep -q ^srun {tmp_path}/calls; do sleep 0.05; done; exit {code}")
    process = started(written(tmp_path, monkeypatch, tools, nodes=3), nodes=3)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, "")
    done = calls(tmp_path)
    (head,) = [line for line in done if line.startswith("ray start")]
    assert "--node-ip-address=127.0.0.1 --port=20002 --ray-client-server-port=20003" in head
    (workers,) = [line for line in done if line.startswith("srun")]
    assert workers.startswith("srun --quiet --nodes=2 --relative=1 --ntasks=2")
    assert "latentmill run-job a b.yaml --output out --address 127.0.0.1:20002" in done
    assert not any(line.startswith("scontrol") for line in done)


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_near_the_limit_it_is_queued_again_and_a_cancelled_one_is_not(
    number: signal.Signals, again: bool, tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(
        "latentmill",
        f'trap "touch {tmp_path}/stopped; exit 130" TERM; touch {tmp_path}/runs; while :; do sleep 0.05; done',
    )
    process = started(written(tmp_path, monkeypatch, tools))
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "stopped").exists()
    assert ("scontrol requeue 6001" in calls(tmp_path)) is again


def test_starts_that_keep_nothing_new_come_to_an_end(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three in a row; progress begins the count anew, and so does another job with the number of an old one."""
    tools("latentmill", "exit 130")
    file = written(tmp_path, monkeypatch, tools)
    tools("python", f'[ "$1" = -m ] && {{ cat {tmp_path}/holds; exit; }}; echo 127.0.0.1')

    def starts(*holds: str) -> list[int]:
        codes = []
        for number, held in enumerate(holds):
            (tmp_path / "holds").write_text(held)
            process = started(file, restarts=number)
            said, _ = process.communicate(timeout=60)
            codes.append(process.returncode)
            assert ("not started again: the last 3 starts added neither" in said) is (process.returncode == 1)
        return codes

    assert starts("no plan", "0 shards", "0 shards", "1 shards", "1 shards", "1 shards", "1 shards") == [130] * 6 + [1]
    assert starts("1 shards", "1 shards", "1 shards") == [130] * 3
    (line,) = {line for line in calls(tmp_path) if line.startswith("python -m")}
    assert line == "python -m jobs.commands.slurm a b.yaml out"
    tools("python", '[ "$1" = -m ] && exit 1; echo 127.0.0.1')  # a store that cannot be asked
    process = started(file, restarts=7)
    process.communicate(timeout=60)
    assert process.returncode == 130
    tools("latentmill", "exit 0")
    started(file, restarts=8).communicate(timeout=60)
    assert not (tmp_path / "latentmill-toy-6001.starts").exists()


def test_what_an_output_holds_changes_with_a_commit_and_with_a_checkpoint(
    job: str, tmp_path: Path, in_process: None
) -> None:
    run = Run(job, str(tmp_path / "out"), ["shard_rows=1"])
    assert kept(run) == "no plan"
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    first = run_job(job, output=run.output, overrides=run.settings, limit=1)
    assert first.state == "complete"
    held = [kept(run), kept(run)]
    (tmp_path / "out/_checkpoints").mkdir()
    for word in ("step 1", "step 2"):
        (tmp_path / "out/_checkpoints/inverter.safetensors").write_text(word)
        held.append(kept(run))
        time.sleep(0.02)
    assert held[0] == held[1]
    assert len(set(held)) == 3
    assert held[0].startswith("1 shards, 0 checkpoints")


def test_no_ray_of_an_earlier_start_is_in_the_way(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm kills whom it queues again: what the script left running then would hold the port of the next start. So it
    clears up before it asks for that, and what a start that was killed left is cleared up by the next."""
    tools("latentmill", f'trap "exit 130" TERM; touch {tmp_path}/runs; while :; do sleep 0.05; done')
    file = written(tmp_path, monkeypatch, tools)
    tools("pkill", "exit 0")
    process = started(file)
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    done = [line for line in calls(tmp_path) if line.startswith(("pkill", "ray", "scontrol"))]
    assert [line.partition(" ")[0] for line in done] == ["pkill", "ray", "pkill", "scontrol"]
    assert {line for line in done if line.startswith("pkill")} == {
        f"pkill {how}-f /tmp/ray-6001/session_" for how in ("", "-KILL ")
    }


def test_a_ray_that_does_not_start_ends_it(tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, monkeypatch, tools)
    tools("ray", "echo 'no room' >&2; exit 3")
    process = started(file)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (3, "no room\n")
    assert not any(line.startswith("latentmill") for line in calls(tmp_path))
