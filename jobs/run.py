"""``run_job``: a job model, a dict or a file in; a finished dataset, its counts and its report out.

The command line does nothing that this module does not offer to Python.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.schema import reading as jobfile
from jobs.schema.base import Job, JobBase
from jobs.schema.reading import JobFileError
from pipeline.run.progress import Progress

if TYPE_CHECKING:
    from jobs.kinds.chain import Chain
    from pipeline.run.driver import Calibration, Plan, RunSpec

OnProgress = Callable[[Progress], None]
CHAIN_FILE = "chain.json"


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        job: Kind of the job.
        output: Folder of the dataset; ``data`` is the glob of its Parquet files, ``report`` the page.
        state: ``complete``, ``interrupted`` (run again to resume) or ``failed``; ``reason`` says why not complete.
        planned, ok, failed: Rows. Of a chain: of all its steps.
        shards, resumed: Planned shards, and those an earlier run had committed.
        seconds: Of this run.
        measures: Numeric column -> ``{"n", "mean", "min", "max"}``; of a chain, those of its last step.
        errors: Commonest reasons of failed rows -> count.
        steps: Of a chain: name -> result.
    """

    job: str
    output: str
    state: str
    reason: str | None
    planned: int
    ok: int
    failed: int
    shards: int
    resumed: int
    seconds: float
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    report: str | None = None
    steps: Mapping[str, JobResult] = field(default_factory=dict)

    @property
    def data(self) -> str:
        return f"{self.output}/data/part-*.parquet"


@dataclass(frozen=True)
class Session:
    """What a running job may use; handed to `jobs.schema.base.Job.execute`."""

    output: str
    address: str | None = None
    limit: int | None = None
    progress: OnProgress | None = None

    def say(self, message: str) -> None:
        """One line for the user."""
        if self.progress:
            self.progress(Progress(phase="planning", message=message))

    def run_rows(self, job: JobBase) -> JobResult:
        """Map the job's rows through its stage; then its own finish, and the report."""
        from pipeline.run.driver import run

        ended = run(
            run_spec(job, self.output, self.limit),
            resources=job.resources.pool(),
            max_failed_fraction=job.max_failed_fraction,
            address=self.address,
            finish=job.finish,
            progress=self.progress,
            title=f"{Path(self.output.rstrip('/')).name} ({job.job})",
            description=description(job),
        )
        from jobs.page.report import write_report

        return JobResult(
            job=job.job,
            output=ended.output,
            state=ended.state,
            reason=ended.reason,
            planned=ended.planned,
            ok=ended.ok,
            failed=ended.failed,
            shards=ended.shards,
            resumed=ended.resumed,
            seconds=ended.seconds,
            measures=ended.measures,
            errors=ended.errors,
            report=write_report(ended.output, job=job),
        )

    def run_chain(self, chain: Chain) -> JobResult:
        """Run the steps in order; stop at the first that does not complete."""
        from jobs.page.report import write_chain_report

        started = time.monotonic()
        steps = list(chain.named_steps(self.output))
        listing = {"steps": [{"name": name, "job": step.job, "output": step.output} for name, step in steps]}
        with open_at(self.output, CHAIN_FILE, "w", chain.storage_options) as file:
            json.dump(listing, file, indent=2)
        done: dict[str, JobResult] = {}
        with _one_ray(self.address, [step for _, step in steps]):
            for number, (name, step) in enumerate(steps, start=1):
                self.say(f"step {number} of {len(steps)}: {name} ({step.job}) -> {step.output}")
                try:
                    done[name] = step.execute(replace(self, output=str(step.output)))
                except Exception as error:
                    error.add_note(f"in step {name!r} of the chain")
                    raise
                if done[name].state != "complete":
                    break
        last = next(reversed(done.values()))
        stopped = f"step {next(reversed(done))!r}: {last.reason}" if last.state != "complete" else None
        return JobResult(
            job=chain.job,
            output=self.output,
            state=last.state,
            reason=stopped,
            planned=sum(result.planned for result in done.values()),
            ok=sum(result.ok for result in done.values()),
            failed=sum(result.failed for result in done.values()),
            shards=sum(result.shards for result in done.values()),
            resumed=sum(result.resumed for result in done.values()),
            seconds=time.monotonic() - started,
            measures=last.measures,
            report=write_chain_report(self.output),
            steps=done,
        )


@contextmanager
def _one_ray(address: str | None, steps: Sequence[Job]) -> Iterator[None]:
    """One Ray for all steps of a chain; none where every step is complete already."""
    from pipeline.run.cluster import ClusterError, connected
    from pipeline.run.driver import RunError

    cpus = max((step.resources.cpus for step in steps if isinstance(step, JobBase)), default=1.0)
    with ExitStack() as stack:
        if not all(exists_at(str(step.output), "_SUCCESS", step.storage_options) for step in steps):
            try:
                stack.enter_context(connected(address, cpus))
            except ClusterError as error:
                raise RunError(str(error)) from None
        yield


def run_job(
    config: Job | Mapping[str, Any] | str | os.PathLike[str],
    *,
    output: str | None = None,
    address: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    progress: OnProgress | None = None,
) -> JobResult:
    """Run a job to its end, or resume it.

    Args:
        config: A job model, a mapping with a job file's content, or the path of a YAML file.
        output: Folder of the dataset; replaces the job's own ``output``.
        address: A running Ray (``auto``, ``host:port``, ``ray://host:port``). None: the Ray that this process is
            connected to, else a local one that starts and stops with this call.
        limit: Only the first so many rows.
        overrides: ``key=value`` settings that replace what `config` says; not for a job model.
        progress: Called with a `pipeline.run.progress.Progress` about twice a second.

    Raises:
        JobFileError: The job cannot be used; the message names the key.
        ValueError: The input, the output folder or the models do not fit; the message says which.
        pipeline.run.driver.RunError: No Ray, no workers, or the stage cannot be built.
    """
    job = config if isinstance(config, Job) else jobfile.load(_readable(config), overrides)
    target = output or job.output
    if not target:
        raise JobFileError("output: where should the dataset go? Set `output:` in the job file, or give --output DIR")
    return job.execute(Session(target, address, limit, progress))


def _readable(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any] | Path:
    return config if isinstance(config, Mapping) else Path(config)


def run_spec(job: JobBase, output: str, limit: int | None = None) -> RunSpec:
    """All that decides which bytes the job writes."""
    from pipeline.run.driver import RunSpec

    return RunSpec(
        stage=job.stage(),
        source=job.source(),
        output=output,
        config=job.own_settings(),
        seed=job.seed,
        shard_rows=job.shard_rows,
        keep=job.keep,
        limit=limit,
        storage_options=job.storage_options,
    )


def description(job: JobBase) -> str:
    """What the dataset card says: the first paragraph of the model's docstring, the job's own words, its settings."""
    import yaml

    text = (type(job).__doc__ or "").strip().split("\n\n")[0]
    settings = yaml.safe_dump(
        {"job": job.job, **job.own_settings(), "seed": job.seed}, sort_keys=False, allow_unicode=True
    )
    return f"{text}\n\n{job.card()}## Settings\n\n```yaml\n{settings}```\n"


@dataclass(frozen=True)
class DryRun:
    """What a job would do. `plan` is None for a step whose input does not exist yet; `why` says so."""

    name: str
    job: JobBase
    output: str
    plan: Plan | None
    why: str = ""
    calibration: Calibration | None = None

    @property
    def workers(self) -> int | None:
        """Workers that have something to do: the largest pool that was asked for (or fits), or one a shard."""
        if self.plan is None or self.calibration is None:
            return None
        return min(self.job.resources.workers.max or self.calibration.fits, max(1, self.plan.shards))

    @property
    def seconds(self) -> float | None:
        """Estimated time of the whole job on so many workers."""
        if self.plan is None or self.calibration is None or self.workers is None:
            return None
        return self.calibration.build_seconds + self.plan.rows * self.calibration.seconds_per_row / self.workers

    @property
    def worker_hours(self) -> float | None:
        return None if self.seconds is None or self.workers is None else self.seconds * self.workers / 3600

    def to_json(self) -> dict[str, Any]:
        """All of it, for ``--json``."""
        return {
            "name": self.name,
            "job": self.job.job,
            "output": self.output,
            "plan": self.plan and asdict(self.plan),
            "why": self.why,
            "resources": self.job.resources.model_dump(mode="json"),
            "calibration": self.calibration and asdict(self.calibration),
            "workers": self.workers,
            "seconds": self.seconds,
            "worker_hours": self.worker_hours,
            "cost": self.cost,
        }

    @property
    def cost(self) -> float | None:
        """In the currency of ``resources.price_per_worker_hour``; None without a price or a calibration."""
        price, hours = self.job.resources.price_per_worker_hour, self.worker_hours
        return None if price is None or hours is None else price * hours


def plan_job(
    job: Job, output: str, *, address: str | None = None, limit: int | None = None, calibrate_rows: int = 0
) -> Iterator[DryRun]:
    """Plan a job, or each step of a chain, without writing anything.

    Args:
        calibrate_rows: Time so many rows on one worker; 0 for none.
    """
    from jobs.kinds.chain import Chain
    from pipeline.input.source import SourceError
    from pipeline.run.driver import calibrate, make_plan

    steps = list(job.named_steps(output)) if isinstance(job, Chain) else [(job.job, job)]
    for number, (name, step) in enumerate(steps):
        if not isinstance(step, JobBase):
            continue
        target = step.output or output
        earlier = [str(before.output) for _, before in steps[:number]]
        pending = next((path for path in earlier if _mentions(step, path) and not exists_at(path, "_SUCCESS")), None)
        if pending:
            yield DryRun(name, step, target, None, f"reads {pending}, which is not there yet")
            continue
        try:
            spec = run_spec(step, target, limit)
            plan = make_plan(spec)
        except SourceError as error:
            raise JobFileError(f"{name}: {error}") from error
        timing = None
        if calibrate_rows:
            timing = calibrate(spec, rows=calibrate_rows, resources=step.resources.pool(), address=address)
        yield DryRun(name, step, target, plan, "", timing)


def _mentions(job: Job, path: str) -> bool:
    return path in json.dumps(job.model_dump(mode="json", exclude={"output"}))


@contextmanager
def open_at(folder: str, name: str, mode: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Open a file of an output folder, local or remote; folders are made when writing."""
    import fsspec

    path = f"{folder.rstrip('/')}/{name}"
    with fsspec.open(path, mode, **dict(storage_options or {})) as file:
        yield file


def exists_at(folder: str, name: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a file of an output folder exists."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(f"{folder.rstrip('/')}/{name}", **dict(storage_options or {}))
    found: bool = filesystem.exists(path)
    return found


def chain_steps(output: str, storage_options: Mapping[str, Any] | None = None) -> list[dict[str, str]] | None:
    """Names, kinds and folders of a chain's steps; None where the folder holds no chain."""
    if not exists_at(output, CHAIN_FILE, storage_options):
        return None
    with open_at(output, CHAIN_FILE, "r", storage_options) as file:
        steps: list[dict[str, str]] = json.load(file)["steps"]
    return steps
