"""``latentmill submit``: hand a job to a scheduler, which runs it, and again when it was interrupted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.errors import errors, note, stderr, stop
from jobs.commands.options import Output, Overrides

if TYPE_CHECKING:
    from jobs.commands.slurm import Allocation
    from jobs.schema.base import Job, RowJob


def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)],
    output: Output = None,
    settings: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do the rows again that failed in earlier starts.")
    ] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="To Slurm, by sbatch.")] = False,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, metavar="N", help="GPUs of each.")] = 0,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPUs of each; else whole nodes.", show_default=False)
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Slurm's account.")] = None,
    time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time limit, 12:00:00; three minutes before it the job is queued again."),
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="--X=Y", help="A further option of sbatch; may be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the batch script, and submit nothing.")] = False,
) -> None:
    """Submit a job to Slurm, with a Ray of its own.

    latentmill submit JOB.yaml -o OUT --slurm --nodes 4 --gpus-per-node 8

    Preempted or near its time limit, the job is queued again and resumes, unless three starts in a row added nothing.
    `latentmill status OUT` says how far it is.
    """
    with errors():
        from jobs.commands.slurm import Allocation, Run, script
        from jobs.schema import reading

        if not slurm:
            stop("submit to what? --slurm is what there is; to a running Ray: ray job submit (docs/clusters.md)")
        described = reading.load(job, settings or (), note)
        target = output or described.output
        if not target:
            stop("where should the dataset go? Set `output:` in the job file, or give --output DIR")
        named = {"--partition": partition, "--account": account, "--time": time}
        options = [f"{option}={value}" for option, value in named.items() if value] + _options(sbatch or [])
        allocation = Allocation(nodes, gpus_per_node, cpus_per_node, options)
        for step in _row_jobs(described, target):
            _check(step, allocation)
        run = Run(str(job.resolve()), _everywhere(target), settings or (), retry_failed)
        written = script(f"latentmill-{job.stem}", run, allocation)
        if show:
            typer.echo(written, nl=False)
            return
        typer.echo(_sbatch(written))
        stderr().print(f"latentmill status {target} --watch", highlight=False, soft_wrap=True)


def _options(given: list[str]) -> list[str]:
    for option in given:
        if not option.startswith("-") or "\n" in option:
            stop(f"--sbatch takes an option of sbatch, --sbatch=--qos=high, not {option!r}")
    return given


def _everywhere(target: str) -> str:
    """An output as every node names it."""
    return target if "://" in target else str(Path(target).resolve())


def _row_jobs(job: Job, target: str) -> list[RowJob]:
    from jobs.kinds.chain import Chain
    from jobs.schema.base import RowJob

    jobs = [step for _, step in job.named_steps(target)] if isinstance(job, Chain) else [job]
    return [step for step in jobs if isinstance(step, RowJob)]


def _check(step: RowJob, allocation: Allocation) -> None:
    """What the job asks for against what Slurm is asked for."""
    asked, has = step.resources, allocation
    for what, wants, there in (("gpus", asked.gpus, has.gpus_per_node), ("cpus", asked.cpus, has.cpus_per_node)):
        if there is not None and wants > there:
            stop(f"a worker asks for {wants:g} {what} (`resources.{what}`), a node has {there}: --{what}-per-node")
    room = int(has.nodes * has.gpus_per_node / asked.gpus) if asked.gpus else has.nodes
    most = asked.workers.max
    if most is not None and most < room:
        stderr().print(
            f"note: the job runs at most {most} workers (`resources.workers`), there is room for {room}: "
            f"--set resources.workers.max={room}",
            soft_wrap=True,
        )


def _sbatch(script: str) -> str:
    """Submit a script; what sbatch says."""
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        stop("there is no sbatch here: submit from a machine of the cluster, or --print the script")
    if done.returncode:
        stop(f"sbatch: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()
