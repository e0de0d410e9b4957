"""``run_job``: a job model, a dict or a file in; a finished dataset, its counts and its report out.

The command line does nothing that this module, `jobs.dry_run` and `jobs.report` do not offer to Python.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.kinds.chain import CHAIN_FILE, Chain, write_listing
from jobs.report import write_report
from jobs.schema import reading
from jobs.schema.base import Job, RowJob
from jobs.schema.reading import JobFileError
from pipeline.access import granted
from pipeline.contract import Settings, renamed_in, speed_names
from pipeline.output.progress import Progress
from pipeline.storage import Folder
from stages.models import hub
from stages.models.settings import LatentModelSettings

if TYPE_CHECKING:
    from pipeline.run.driver import Finished, RunSpec

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        job: Kind of the job.
        output: Folder of the dataset; ``data`` is the glob of its Parquet files, ``report`` the page.
        state: ``complete``, ``interrupted`` (run again to resume) or ``failed``; ``reason`` says why not complete.
        planned, ok, failed, duplicates: Rows. Of a chain: of all its steps.
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
    duplicates: int = 0
    parts: str = "data/part-*.parquet"

    @property
    def data(self) -> str:
        """The dataset's files, as a pattern."""
        return f"{self.output.rstrip('/')}/{self.parts}"


def run_job(
    config: Job | Mapping[str, Any] | str | os.PathLike[str],
    *,
    output: str | None = None,
    address: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    progress: OnProgress | None = None,
    retry_failed: bool = False,
) -> JobResult:
    """Run a job to its end, or resume it.

    Args:
        config: A job model, a mapping with a job file's content, or the path of a YAML file.
        output: Folder of the dataset; replaces the job's own ``output``.
        address: A running Ray (``auto``, ``host:port``, ``ray://host:port``). None: the Ray that this process is
            connected to, else a local one that starts and stops with this call.
        limit: Only the first so many rows.
        overrides: ``key=value`` settings that replace what `config` says; not for a job model.
        progress: Called with a `pipeline.output.progress.Progress` about twice a second.
        retry_failed: Do the rows again that failed in earlier starts; the others stay as they are.

    Raises:
        JobFileError: The job cannot be used; the message names the key.
        ValueError: The input, the output folder or the models do not fit; the message says which.
        pipeline.run.driver.RunError: No Ray, no workers, or the stage cannot be built.
    """
    job = described(config, overrides)
    target = output or job.output
    if not target:
        raise JobFileError("output: where should the dataset go? Set `output:` in the job file, or give --output DIR")
    return _run(job, target, _Circumstances(address, limit, progress, retry_failed))


def described(config: Job | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()) -> Job:
    """The job that Python users describe as it suits them: see `run_job`.

    Raises:
        JobFileError: It cannot be used, or `overrides` are given for a job model.
    """
    if isinstance(config, Job):
        if overrides:
            raise JobFileError(f"overrides ({', '.join(overrides)}) change a file or a mapping; change the job model")
        return config
    return reading.load(config if isinstance(config, Mapping) else Path(config), overrides)


@dataclass(frozen=True)
class _Circumstances:
    """What `run_job` was told beside the job and its output."""

    address: str | None
    limit: int | None
    progress: OnProgress | None
    retry_failed: bool

    def say(self, message: str) -> None:
        """One line for the user."""
        if self.progress:
            self.progress(Progress(phase="planning", message=message))


def _run(job: Job, output: str, given: _Circumstances) -> JobResult:
    if isinstance(job, Chain):
        return _run_chain(job, output, given)
    if isinstance(job, RowJob):
        with job.access(output), hub.asked(job):
            return _run_rows(job, output, given)
    raise TypeError(f"{type(job).__name__} is neither a chain nor a job that maps rows")


def _run_rows(job: RowJob, output: str, given: _Circumstances) -> JobResult:
    """Map the job's rows through its stage; then its own finish, and the report."""
    from pipeline.run.driver import run

    ended = run(
        run_spec(job, output, given.limit),
        resources=job.resources.pool(),
        max_failed_fraction=job.max_failed_fraction,
        address=given.address,
        finish=job.finish,
        finish_apart=job.finish_apart,
        products=job.products,
        progress=given.progress,
        title=f"{Path(output.rstrip('/')).name} ({job.job})",
        description=lambda finished: description(job, finished),
        retry_failed=given.retry_failed,
    )
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
        duplicates=ended.duplicates,
        parts=ended.parts,
        report=_report(given, ended.output, job),
    )


def _report(given: _Circumstances, output: str, job: RowJob | None) -> str | None:
    """Write the page; what goes wrong with it is said, and is not the job's failure."""
    try:
        return write_report(output, job)
    except Exception as error:
        given.say(f"{output}/report.html could not be written ({type(error).__name__}: {error}); "
                  f"`latentmill report {output}` tries again")  # fmt: skip
        return None


def _run_chain(chain: Chain, output: str, given: _Circumstances) -> JobResult:
    """Run the steps in order; stop at the first that does not complete."""
    started = time.monotonic()
    steps = list(chain.named_steps(output))
    with ExitStack() as stack:
        stack.enter_context(granted(output, chain.storage_options))
        for _, step in steps:  # later ones read what earlier ones write
            stack.enter_context(granted(step.output, step.storage_options))
        stack.enter_context(hub.asked(*(step for _, step in steps)))  # before Ray takes over the environment
        done = _run_steps(steps, output, given)
        report = _report(given, output, None)
    last = next(reversed(done.values()))
    stopped = f"step {next(reversed(done))!r}: {last.reason}" if last.state != "complete" else None
    return JobResult(
        job=chain.job,
        output=output,
        state=last.state,
        reason=stopped,
        planned=sum(result.planned for result in done.values()),
        ok=sum(result.ok for result in done.values()),
        failed=sum(result.failed for result in done.values()),
        duplicates=sum(result.duplicates for result in done.values()),
        shards=sum(result.shards for result in done.values()),
        resumed=sum(result.resumed for result in done.values()),
        seconds=time.monotonic() - started,
        measures=last.measures,
        report=report,
        steps=done,
    )


def _run_steps(steps: Sequence[tuple[str, Job]], output: str, given: _Circumstances) -> dict[str, JobResult]:
    """Step -> how it ended, up to the first that did not complete."""
    done: dict[str, JobResult] = {}
    if not Folder.at(output).exists(CHAIN_FILE):  # another chain's is left in place until this one is not refused
        write_listing(output, steps)
    with _one_ray(given.address, [step for _, step in steps]):
        for number, (name, step) in enumerate(steps, start=1):
            given.say(f"step {number} of {len(steps)}: {name} ({step.job}) -> {step.output}")
            try:
                done[name] = _run(step, str(step.output), given)
            except Exception as error:
                error.add_note(f"in step {name!r} of the chain")
                raise
            if number == 1:
                write_listing(output, steps)
            if done[name].state != "complete":
                break
    return done


@contextmanager
def _one_ray(address: str | None, steps: Sequence[Job]) -> Iterator[None]:
    """One Ray for all steps of a chain; none where every step is complete already."""
    from pipeline.run.cluster import ClusterError, connected
    from pipeline.run.driver import RunError

    cpus = max((step.resources.cpus for step in steps if isinstance(step, RowJob)), default=1.0)
    with ExitStack() as stack:
        if not all(Folder.at(str(step.output), step.storage_options).exists("_SUCCESS") for step in steps):
            try:
                stack.enter_context(connected(address, cpus))
            except ClusterError as error:
                raise RunError(str(error)) from None
        yield


def run_spec(job: RowJob, output: str, limit: int | None = None) -> RunSpec:
    """All that decides which bytes the job writes to a folder.

    Raises:
        JobFileError: Its workers could not load its model.
    """
    from pipeline.run.driver import RunSpec

    _check_cards(job)
    stage = job.model_copy(update={"output": output}).stage()  # which may keep checkpoints there
    return RunSpec(
        stage=stage,
        source=job.source().reachable(),
        output=output,
        config=job.own_settings(),
        seed=job.seed,
        shard_rows=job.shard_rows,
        keep=job.keep,
        offered=job.offered,
        asked=job.asked,
        limit=limit,
        storage_options=job.storage_options,
        renamed=renamed_in(job),
        speed=speed_names(type(job)) | speed_names(getattr(stage.load_class(), "Settings", Settings)),
    )


def _check_cards(job: RowJob) -> None:
    """What the model itself refuses once it is loaded (`stages.models.transformer`), said while the job is planned."""
    if not isinstance(job, LatentModelSettings) or not job.loras or job.resources.gpus < 2:
        return
    if "transformer" in (job.quantization_config or {}):
        raise JobFileError(
            f"loras: the quantised transformer of model {job.model!r} takes none where it lies on several cards "
            f"(resources.gpus: {job.resources.gpus:g}): leave out loras or quantization_config, or set gpus: 1"
        )


def description(job: RowJob, finished: Finished) -> str:
    """What the dataset card says: the first paragraph of the model's docstring, the job's own words, its settings."""
    import yaml

    text = (type(job).__doc__ or "").strip().split("\n\n")[0]
    settings = yaml.safe_dump({"job": job.job, **job.own_keys(), "seed": job.seed}, sort_keys=False, allow_unicode=True)
    return f"{text}\n\n{job.card(finished)}## Settings\n\n```yaml\n{settings}```\n"
