"""What a job would do: its plan, and with a timed sample how long it would take and what it would cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.kinds.chain import Chain
from jobs.kinds.invert_prompts import InvertPrompts
from jobs.page.amounts import size
from jobs.run import described, run_spec
from jobs.schema.base import Job, Resources, RowJob
from jobs.schema.defaults import unnamed
from jobs.schema.reading import JobFileError
from pipeline.storage import Folder
from stages.models import hub
from stages.models.settings import LatentModelSettings

if TYPE_CHECKING:
    from pipeline.run.driver import Calibration, Plan


@dataclass(frozen=True)
class DryRun:
    """What a job would do. `plan` is None for a step whose input does not exist yet; `why` says so."""

    name: str
    job: RowJob
    output: str
    plan: Plan | None
    why: str = ""
    calibration: Calibration | None = None
    lacking: str = ""
    """What a worker asks for and this machine does not have; empty where a cluster is named."""
    memory: str = ""
    """What a row of a latent model takes on a GPU, and how many of them fit; empty for other jobs, and without GPUs."""

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
            "lacking": self.lacking,
            "memory": self.memory,
            "resources": self.job.resources.model_dump(mode="json"),
            "defaults": unnamed(self.job)[0],
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


def plan(
    config: Job | Mapping[str, Any] | str | os.PathLike[str],
    *,
    output: str | None = None,
    address: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    calibrate_rows: int = 0,
) -> list[DryRun]:
    """What `jobs.run.run_job` would do with the same arguments: one entry, or one a step of a chain. Writes nothing.

    Args:
        calibrate_rows: Time so many rows on one worker, for `DryRun.seconds` and `DryRun.cost`; 0 for none.

    Raises:
        JobFileError: The job cannot be used; the message names the key.
        ValueError: The input, the output folder or the models do not fit; the message says which.
    """
    job = described(config, overrides)
    target = output or job.output or "out"
    return list(plan_job(job, target, address=address, limit=limit, calibrate_rows=calibrate_rows))


def plan_job(
    job: Job, output: str, *, address: str | None = None, limit: int | None = None, calibrate_rows: int = 0
) -> Iterator[DryRun]:
    """Plan a job, or each step of a chain, without writing anything.

    Args:
        calibrate_rows: Time so many rows on one worker; 0 for none.
    """
    from pipeline.input.source import SourceError
    from pipeline.run.driver import calibrate, dry_plan

    steps = list(job.named_steps(output)) if isinstance(job, Chain) else [(job.job, job)]
    with ExitStack() as stack:
        for number, (name, step) in enumerate(steps):
            if not isinstance(step, RowJob):
                continue
            target = step.output or output
            lacking = "" if address else lacking_here(step.resources)
            stack.enter_context(step.access(target))  # later ones read what earlier ones wrote
            earlier = [str(before.output) for _, before in steps[:number]]
            if waits := pending(step, earlier):
                yield DryRun(name, step, target, None, f"reads {waits}, which is not there yet", None, lacking)
                continue
            try:
                spec = run_spec(step.model_copy(update={"output": target}), target, limit)
                with hub.asked(step):
                    plan = dry_plan(spec, address)
            except SourceError as error:
                raise JobFileError(f"{name}: {error}") from error
            timing = None
            if calibrate_rows:
                timing = calibrate(spec, rows=calibrate_rows, resources=step.resources.pool(), address=address)
            yield DryRun(name, step, target, plan, "", timing, lacking, memory_of(step))


def pending(job: RowJob, earlier: Sequence[str]) -> str | None:
    """The first of the earlier steps' outputs that a step reads and that is not finished."""
    missing = (path for path in earlier if not Folder.at(path).exists("_SUCCESS"))
    return next((path for path in missing if _mentions(job, path)), None)


CARDS = (24, 40, 80)
"""Gigabytes of the cards that slots are told for."""


def memory_of(job: RowJob) -> str:
    """What the job's latent model takes on a GPU: told of its configuration, without its weights. The text encoders,
    which are not counted, take 0.2 to 16 GB beside it. With what of its GPUs a worker cannot use, and what to do where
    nothing fits."""
    if not job.resources.gpus:
        return ""
    if isinstance(job, InvertPrompts):
        return _memory_of_prompts(job)
    if not isinstance(job, LatentModelSettings):
        return ""
    from stages.models.families import open_without_weights
    from stages.models.memory import power_of_two, rows_on, weight_bytes
    from stages.models.transformer import FlowTransformer

    model = open_without_weights(job)
    weights, guided = weight_bytes(model), getattr(job, "guidance", 1) > 1
    row = {
        (call, gradient): model.activation_bytes(call, gradient=gradient)
        for call, gradient in (("predict", False), ("predict", True), ("decode", False), ("decode", True))
    }
    each = row["predict", False] * (2 if guided else 1)
    gpus = job.resources.gpus
    shared_out = gpus >= 2 and isinstance(model, FlowTransformer)
    lies = {card: model.layout(int(gpus), card * 10**9) if shared_out else [weights] for card in CARDS}
    fits = [
        min((rows_on(int(min(gpus, 1) * 10**9 * card), own, each) for own in lies[card]), default=0) for card in CARDS
    ]
    room = getattr(job, "room_of_a_row", 1)
    slots = [str(power_of_two(rows // room)) if rows else "none" for rows in fits]
    told = {key: size(value) for key, value in row.items()}
    of = f"{CARDS[0]}, {CARDS[1]}, {CARDS[2]} GB" + ("" if gpus >= 1 else f", of which a worker has {gpus:g}")
    if shared_out:
        of = f"{int(gpus)} cards of {of} ({_lying(lies)})"
    return (
        f"weights {size(weights)} without text encoders; a row {told['predict', False]} in a pass "
        f"({told['predict', True]} with its gradient), {told['decode', False]} in decoding "
        f"({told['decode', True]}); slots where `slots` is left out: {', '.join(slots)} of {of}"
        + ("" if any(fits) else f"; {size(weights + each)} FIT NONE OF THEM: take more than {gpus:g} GPU a worker, "
           "a quantization_config, or a smaller size")
        + ("" if job.dtype != "float32" else "; in float32: dtype: bfloat16 would halve the denoiser's weights and "
           "passes (docs/performance.md says what it costs in quality)")
        + ("" if gpus <= 1 or shared_out else f"; this model runs on one GPU, and of its {gpus:g} the others WOULD BE "
           "IDLE: ask for gpus: 1 and more workers")
    )  # fmt: skip


def _memory_of_prompts(job: InvertPrompts) -> str:
    """The same of a job that inverts prompts: its encoders, priors and decoder, and a prompt in a step of OVI."""
    from stages.models.memory import power_of_two, rows_on
    from stages.ovi.memory import row_bytes, weight_bytes
    from stages.ovi.settings import InvertPromptsSettings

    settings = InvertPromptsSettings.model_validate(dict(job.stage().params))
    weights, share = weight_bytes(settings), min(job.resources.gpus, 1)
    rows = [
        f"a prompt {size(each)} in a step of {label}; slots where `slots` is left out: "
        + ", ".join(str(power_of_two(fit)) if fit else "NONE" for fit in
                    (rows_on(int(share * card * 10**9), weights, each) for card in CARDS))
        for label, each in row_bytes(settings).items()
    ]  # fmt: skip
    of = f" of {CARDS[0]}, {CARDS[1]}, {CARDS[2]} GB" + ("" if share == 1 else f", of which a worker has {share:g}")
    return "; ".join([f"weights {size(weights)}, each network once", *rows]) + (of if rows else "")


def _lying(lies: Mapping[int, Sequence[int]]) -> str:
    """What lies where, on the smallest cards that take it."""
    fitting = next((own for own in lies.values() if own), None)
    if fitting is None:
        return "the transformer fits none of them"
    return (
        f"the transformer over all, {' + '.join(size(own) for own in fitting)}; with the autoencoder on the first, "
        "text encoders on the last"
    )


def lacking_here(resources: Resources) -> str:
    """What a worker asks for and this machine does not have, however little else runs on it."""
    short = []
    if resources.gpus:
        from stages.engine.device import gpu_count

        if resources.gpus > (there := gpu_count()):
            short.append(f"{resources.gpus:g} GPU (of {there})")
    if resources.memory is not None:
        import psutil

        if resources.memory > (there := psutil.virtual_memory().total):
            short.append(f"{size(resources.memory)} of memory (of {size(there)})")
    return " and ".join(short)


def _mentions(job: Job, path: str) -> bool:
    said = json.dumps(job.model_dump(mode="json", exclude={"output"}))
    return path in said or ("://" not in path and os.path.abspath(path) in said)
