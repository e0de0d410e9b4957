"""Run a stage over a source on Ray, commit what comes out exactly once, and publish it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pipeline import access, machine
from pipeline.contract import Column
from pipeline.failures import described, passing
from pipeline.input.files import OWN
from pipeline.input.read import wanted_columns
from pipeline.input.source import Source
from pipeline.output.dataset import SUCCESS, Output, Tally
from pipeline.output.fold import Folding
from pipeline.output.lock import Lock, LockLost, Proxy
from pipeline.output.planfile import OutputError, load_plan, own_folder
from pipeline.output.products import problems as wrong_products
from pipeline.output.products import take_stock
from pipeline.output.progress import Progress
from pipeline.output.publish import publish
from pipeline.output.schema import encode_schema
from pipeline.run.cluster import ClusterError, connected, elsewhere, knock, spread
from pipeline.run.committed import Committed, committed
from pipeline.run.dispatch import Dispatcher, Stopped
from pipeline.run.draft import Draft, PlanError, RunSpec, draft
from pipeline.run.memory import Memory
from pipeline.run.meters import Meters
from pipeline.run.plan import (
    Plan,
    PlanMismatch,
    check_input,
    differences,
    grow_plan,
    make_plan,
    more_rows,
    write_plan,
)
from pipeline.run.pool import Pool
from pipeline.run.reporter import Reporter
from pipeline.run.scan import Scans, is_heavy, one_by_one, scan_elsewhere
from pipeline.run.survey import Survey, survey
from pipeline.run.tasks import Resources, Task, WorkerJob
from pipeline.run.versions import differing, told, versions
from pipeline.storage import Folder

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = [
    "Calibration", "Finished", "Plan", "PlanError", "PlanMismatch", "Progress", "Resources", "RunError", "RunResult",
    "RunSpec", "calibrate", "dry_plan", "make_plan", "run",
]  # fmt: skip


ROUNDS = 3
"""How often committed shards whose files have vanished in the meantime are done again."""


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do (no Ray, no workers ...)."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended. Exit code 0 belongs to ``state == "complete"`` only.

    Attributes:
        output: The output folder.
        state: ``complete``: every planned row is committed and published. ``interrupted``: Ctrl-C; run again to resume.
            ``failed``: too many failed rows, or shards that could not be committed.
        reason: Why it did not complete; None if it did.
        planned, ok, failed: Rows.
        shards: Planned shards; resumed: those that an earlier run had committed.
        seconds: Of this run.
        measures: Numeric stage column -> ``{"n", "mean", "min", "max"}``.
        errors: Commonest reasons of failed rows -> count.
        duplicates: Rows that hold what an earlier row holds; with those that are ok or failed, all that were planned.
        parts: What the names of the dataset's files match.
    """

    output: str
    state: Literal["complete", "interrupted", "failed"]
    reason: str | None
    planned: int
    ok: int
    failed: int
    shards: int
    resumed: int
    seconds: float
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    parts: str = "data/part-*.parquet"


@dataclass(frozen=True)
class Finished:
    """Handed to ``finish`` when all shards are committed, before the dataset is published.

    ``output.open_file(name, "wb")`` writes a further file into the output folder (never below ``data/``).

    Attributes:
        spread: Has a function of many items computed on the cluster (`pipeline.run.cluster.spread`); None: there is no
            other machine.
    """

    output: Output
    spread: Callable[..., Iterator[Any]] | None = None

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The committed shards' tables in shard order, one at a time."""
        return self.output.tables(columns)

    def summaries(self) -> Iterator[dict[str, np.ndarray]]:
        """What the stage's ``take_summary()`` returned, in shard order (a split shard gives several)."""
        return self.output.summaries()


@dataclass(frozen=True)
class Calibration:
    """A timed sample.

    Attributes:
        rows: Rows in the sample.
        build_seconds: To construct the stage.
        seconds: For the sample, after one warm-up row.
        seconds_per_row: On one worker.
        bytes_per_row: Of the encoded output.
        failed: Rows of the sample that failed.
        fits: Workers that the cluster holds at present.
    """

    rows: int
    build_seconds: float
    seconds: float
    seconds_per_row: float
    bytes_per_row: float
    failed: int
    fits: int


def run(
    spec: RunSpec,
    *,
    resources: Resources = Resources(),
    max_failed_fraction: float = 0.1,
    address: str | None = None,
    finish: Callable[[Finished], None] | None = None,
    finish_apart: bool = False,
    products: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
    title: str = "latentmill output",
    description: Callable[[Finished], str] = lambda finished: "",
    retry_failed: bool = False,
) -> RunResult:
    """Plan or resume, dispatch, commit, finish, publish.

    Args:
        spec: What to compute, and where it goes.
        address: A running Ray (``auto``, ``host:port``, ``ray://...``). None: the Ray this process is already
            connected to, else a local one that starts and stops with this call.
        max_failed_fraction: The run stops as soon as more than this share of all planned rows has failed.
        finish: Called once when all shards are committed, before publication. May be called again if it raises.
        finish_apart: On a cluster it runs there, with what a worker gets; else it runs in this process.
        products: Files and folders that it makes, below the output folder; one that is lost is made again.
        progress: Called from this thread only.
        title, description: For the dataset card (Markdown); the description is asked for when all rows are there.
        retry_failed: Do the rows again that failed in earlier starts; the others stay as they are.

    Raises:
        SourceError, PlanError, PlanMismatch: Before anything is written.
        OutputError: The folder holds something else.
        OutputLocked: Another run holds the folder.
        RunError: No Ray, no worker could be had, or the stage cannot be constructed.
    """
    reporter = Reporter(None, progress, resources.max_workers)
    reporter.phase("planning")
    try:
        knock(address)
    except ClusterError as error:
        raise RunError(str(error)) from None
    drafted = draft(spec)
    folder = Folder.at(spec.output, spec.storage_options)
    held = _check_folder(spec, drafted, folder)
    lock = Lock(folder, lambda message: reporter.phase("planning", message=message), resources.sole_run)
    try:
        if held != "this run":  # again: another run may have just ended here
            held = _check_folder(spec, drafted, folder)
        if held != "this run":
            own = own_folder(folder)
            with _scanning(drafted.source, spec.limit, address, resources.cpus) as scans:
                if held == "nothing":
                    early = folder.ends_once(f"{OWN}/{machine.here.token()}.probe")
                    plan = write_plan(spec, drafted, own, machine.here.wall(), lock.check, scans, early)
                else:
                    goal = "all" if spec.limit is None else f"{spec.limit:,}"
                    reporter.phase("planning", message=f"{spec.output} grows from {held['rows']:,} rows to {goal}")
                    plan = grow_plan(spec, drafted, own, held, lock.check, scans)
            for note in plan["notes"]:
                reporter.phase("planning", message=note)
        output = replace(Output.open(spec.output, spec.storage_options), lock=lock)
        if (reached := output.plan["fields"].get("limit")) != spec.limit:  # another run has let it grow meanwhile
            raise PlanMismatch(spec.output, {"limit": (reached, spec.limit)}, spec.renamed)
        reporter.output = output
        if finish is not None and finish_apart and address is not None:
            finish = partial(_finish_apart, finish, resources, address, spec.storage_options)
        return _resumed(
            spec,
            output,
            lock,
            reporter,
            resources,
            max_failed_fraction,
            address,
            finish,
            products,
            title,
            description,
            retry_failed,
        )
    except LockLost as lost:
        raise RunError(str(lost)) from None
    finally:
        with suppress(OSError):  # of a store that is away: the lease runs out
            lock.release()


def dry_plan(spec: RunSpec, address: str | None = None) -> Plan:
    """`make_plan`; an input that takes long to scan is scanned on the cluster.

    Raises:
        SourceError, PlanError: As `make_plan` does.
        RunError: No Ray.
    """
    drafted = draft(spec)
    with _scanning(drafted.source, spec.limit, address, 1) as scans:
        return make_plan(spec, drafted, scans)


@contextmanager
def _scanning(source: Source, limit: int | None, address: str | None, cpus: float) -> Iterator[Scans]:
    """How the files of a resolved source are scanned."""
    if not is_heavy(source, limit):
        yield one_by_one
        return
    try:
        with connected(address, cpus):
            yield partial(spread, scan_elsewhere)
    except ClusterError as error:
        raise RunError(f"the input cannot be scanned: {error}") from None


def _check_folder(
    spec: RunSpec, drafted: Draft, folder: Folder
) -> Literal["nothing", "this run"] | Mapping[str, Any]:  # fmt: skip
    """What the folder holds: the plan of this run, where that goes less far and is to grow. All else is refused."""
    plan = load_plan(folder)
    if plan is None:
        stranger = next((name for name in folder.names() if name != OWN), None)
        if stranger is not None:
            raise OutputError(
                f"{spec.output} is not empty and holds no run (there is {stranger!r}); name another output folder"
            )
        return "nothing"
    models = [model["path"] for model in drafted.info.models.values() if model.get("fingerprint")]
    found = differences(plan["fields"], json.loads(json.dumps(dict(drafted.fields))), spec.speed, models)
    grows = more_rows(found) and bool(plan.get("run"))
    if not found or grows:
        found = check_input(drafted.source, own_folder(folder), plan.get("limit"))
    if found:
        raise PlanMismatch(spec.output, found, spec.renamed)
    return plan if grows else "this run"


def _resumed(
    spec: RunSpec, output: Output, lock: Lock, reporter: Reporter, resources: Resources, max_failed_fraction: float,
    address: str | None, finish: Callable[[Finished], None] | None, products: Sequence[str], title: str,
    description: Callable[[Finished], str], retry_failed: bool,
) -> RunResult:  # fmt: skip
    """Under the lock: what is left is computed; then finish and publish, unless that is done too."""
    tally, resumed, planned = Tally(), 0, int(output.plan["shards"])
    state: Literal["complete", "interrupted", "failed"] = "complete"
    reason = None
    try:
        found = committed(output, reporter, retry_failed)
        tally = found.tally
        resumed, published = tally.shards, output.folder.exists(SUCCESS)
        if 0 < resumed < planned:
            for message in _other_versions(tally):
                reporter.phase("planning", tally, message)
        wrong = wrong_products(output, checksums=False) if published else []
        for problem in wrong:
            reporter.phase("planning", tally, f"{problem}; it is made again")
        complete = published and found.placed and not wrong and resumed == planned
        if published and not complete:  # what is not there is not deleted: by then it could be another's, if one slept
            output.check()
            output.folder.remove(SUCCESS)
        for _ in range(ROUNDS):
            if tally.shards == planned:
                break
            reporter.phase("starting", tally)
            _compute(spec, output, lock, reporter, resources, max_failed_fraction, address, found)
            found = committed(output, reporter)  # what was committed may be gone again
            tally = found.tally
        if tally.shards < planned:
            raise Stopped(f"committed files keep vanishing from {output.path}; does something clean up there?")
        if not complete:
            if changed := check_input(_source(spec, output), output.own, spec.limit):
                what = "; ".join(f"{name}: {then} then, {now} now" for name, (then, now) in changed.items())
                raise Stopped(f"the input changed during the run; put it back, or name another output folder: {what}")
            reporter.phase("finishing", tally)
            finished = Finished(output)
            if finish is not None:
                output.check()
                finish(finished)
                take_stock(output, products)
            reporter.phase("publishing", tally)
            publish(output, tally, title, description(finished))
    except (Stopped, LockLost) as stopped:
        state, reason = "failed", str(stopped)
    except OSError as error:
        if not passing(error):
            raise
        state, reason = "failed", f"{output.path} is away: {described(error)}; once back, the same command goes on"
    except KeyboardInterrupt:
        state, reason = "interrupted", "stopped by Ctrl-C or SIGTERM; run the same command again to resume"
    if lock.lost:
        reporter.output = None  # it is another's to write in
    reporter.phase(state, None if lock.lost else tally)
    return RunResult(
        output=spec.output, state=state, reason=reason, planned=int(output.plan["rows"]), ok=tally.ok,
        failed=tally.failed, shards=int(output.plan["shards"]), resumed=resumed, seconds=reporter.seconds,
        measures=tally.measures, errors=tally.errors, duplicates=tally.duplicates,
        parts=output.parts,
    )  # fmt: skip


def _other_versions(tally: Tally) -> Iterator[str]:
    """What to say when what is left will be made with other packages than what is there."""
    now = told(versions())
    for then, shards in tally.made_with.items():
        if then != now:
            old, new = differing(then, now)
            yield (f"{shards} shards were made with {old}, the others will be with {new}: rows may differ by what "
                   "these compute otherwise; the card names both")  # fmt: skip


def _finish_apart(
    finish: Callable[[Finished], None], resources: Resources, address: str, storage_options: Mapping[str, Any],
    finished: Finished,
) -> None:  # fmt: skip
    """``finish`` as a task of the cluster: with a worker's memory and device, which the driver's machine may lack."""
    output = finished.output
    where = output.folder.root if output.folder.local else output.path
    task = partial(_finish_at, finish, where, dict(storage_options), output.epoch, access.held())
    try:
        with connected(address, resources.cpus):
            elsewhere(task, resources)
    except ClusterError as error:
        raise RunError(f"what follows the last shard could not be done: {error}") from None


def _finish_at(
    finish: Callable[[Finished], None], path: str, storage_options: Mapping[str, Any], epoch: int,
    grants: Sequence[access.Grant],
) -> None:  # fmt: skip
    """Runs in a process of the cluster."""
    access.hold(grants)
    output = Output.open(path, storage_options)
    finish(Finished(replace(output, lock=Proxy(output.folder, epoch)), spread))


def _compute(
    spec: RunSpec, output: Output, lock: Lock, reporter: Reporter, resources: Resources, max_failed_fraction: float,
    address: str | None, found: Committed,
) -> None:  # fmt: skip
    """Dispatch the shards that are not done; ``found.tally`` follows."""
    left = int(output.plan["shards"]) - len(found.done)
    tasks = found.tasks(output)
    try:
        with connected(address, resources.cpus) as ours:
            pool = Pool(_worker_job(spec, output, resources), resources)
            try:
                _check_room(pool, ours)
                limit = max_failed_fraction * int(output.plan["rows"])
                meters = Meters(output.path, int(output.plan["rows"]))
                folding, few = Folding(output), resources.min_workers
                memory = Memory(output, spec.stage, resources.gpus)
                Dispatcher(pool, tasks, found.tally, lock, reporter, meters, limit, left, few, folding, memory).run()
            finally:
                pool.close()
    except ClusterError as error:
        raise RunError(str(error)) from None


def _check_room(pool: Pool, ours: bool) -> None:
    """A Ray of our own never grows: what it lacks now it lacks for good.

    Raises:
        RunError: No worker fits on this machine.
    """
    if ours and (short := pool.lacking()):
        raise RunError(
            f"a worker asks for {short} on this machine: lower `resources`, or name a cluster with --address"
        )


def _source(spec: RunSpec, output: Output) -> Source:
    """The planned source, resolved; under the limits of now."""
    source = Source.from_json(output.plan["source"], spec.source.storage_options, spec.source.signed)
    return replace(source, allow=spec.source.allow, max_pixels=spec.source.max_pixels)


def _worker_job(spec: RunSpec, output: Output, resources: Resources) -> WorkerJob:
    plan = output.plan
    source = _source(spec, output)
    return WorkerJob(
        stage=spec.stage,
        source=source,
        wanted=wanted_columns(source, tuple(plan["keep"])),
        kept=tuple(plan["keep"]),
        schema=plan["schema"],
        columns=tuple(Column(**{**column, "shape": tuple(column["shape"])}) for column in plan["stage_columns"]),
        output=output.folder.root if output.folder.local else spec.output,
        storage_options=spec.storage_options,
        granted=access.held(),
        run=output.run,
        epoch=output.epoch,
        reads=plan.get("reads"),
        decode_threads=resources.decode_threads,
        encode_threads=resources.encode_threads,
        gpus=resources.gpus,
    )


def calibrate(
    spec: RunSpec, *, rows: int = 64, resources: Resources = Resources(), address: str | None = None
) -> Calibration:
    """Time the first ``rows`` rows through the stage on one worker; writes nothing to the output folder.

    Where a row of the input stands for several (``Source.variants``), the sample holds all of each.

    Raises:
        RunError: No Ray, or the stage cannot be built.
    """
    every = prod(len(values) for values in spec.source.variants.values())
    rows = -(-rows // every) * every
    drafted = draft(replace(spec, limit=rows))
    shard = next(survey(drafted.source, rows, rows, Survey(), lambda file, scan: None))
    job = WorkerJob(
        stage=spec.stage, source=drafted.source, wanted=drafted.wanted, kept=tuple(drafted.kept),
        schema=encode_schema(drafted.schema), columns=drafted.info.columns, output=spec.output,
        storage_options=spec.storage_options, granted=access.held(), reads=drafted.info.reads,
        decode_threads=resources.decode_threads, encode_threads=resources.encode_threads, gpus=resources.gpus,
    )  # fmt: skip
    try:
        with connected(address, resources.cpus) as ours:
            pool = Pool(job, resources)
            try:
                _check_room(pool, ours)
                build, count, seconds, size, bad = pool.calibrate(Task(0, shard.spans, 0, shard.rows))
                fits = pool.fits()
            finally:
                pool.close()
    except ClusterError as error:
        raise RunError(str(error)) from None
    return Calibration(count, build, seconds, seconds / count, size / count, bad, fits)
