"""``run-job --track``: a run's progress, and its measures at the end, in TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.addresses import unsigned
from pipeline.output.progress import Progress

if TYPE_CHECKING:
    from jobs.run import JobResult

INTERVAL = 10.0
FIGURES = ("rows_ok", "rows_failed", "rows_active", "rows_per_second", "shards_done", "workers")
"""Of a `Progress`: what has a curve."""


class Tracker(Protocol):
    """Takes figures by name; `step` counts seconds since the run started."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, place: str, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(place or "runs") / name))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for figure, value in figures.items():
            self.writer.add_scalar(figure, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, place: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project=place or "latentmill", name=name, config=dict(settings))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log({**figures, "seconds": step})

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, place: str, name: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        if place:
            mlflow.set_tracking_uri(place)
        mlflow.set_experiment("latentmill")
        mlflow.start_run(run_name=name)
        mlflow.log_dict(dict(settings), "job.json")
        self.mlflow = mlflow

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


KINDS: Mapping[str, Callable[[str, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow,
}  # fmt: skip


class Tracking:
    """Hands figures of a run to a tracker, now and then. A tracker that fails is left, and the run goes on.

    Args:
        say: Told once, in a line, that the tracker failed.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None], interval: float = INTERVAL) -> None:
        self._tracker, self._say, self._interval = tracker, say, interval
        self._time, self._phase, self._failed = float("-inf"), "", False

    def progress(self, snapshot: Progress) -> None:
        """At each change of phase, and every so many seconds."""
        now = time.monotonic()
        if snapshot.message is not None or (snapshot.phase == self._phase and now - self._time < self._interval):
            return
        self._time, self._phase = now, snapshot.phase
        figures = {name: float(getattr(snapshot, name)) for name in FIGURES}
        self._try(lambda: self._tracker.log(figures, int(snapshot.seconds)))

    def result(self, result: JobResult) -> None:
        """The means of the job's measures, at the end."""
        means = {f"{name}_mean": float(measure["mean"]) for name, measure in result.measures.items()}
        if means:
            self._try(lambda: self._tracker.log(means, int(result.seconds)))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            self._say(f"the tracker failed ({_line(error)}); the run goes on without it")


@contextmanager
def tracking(
    where: str | None, output: str, settings: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Tracking | None]:
    """A run in a tracker: ``tensorboard:DIR``, ``wandb:PROJECT`` or ``mlflow:URI``; what follows the name may be left.

    Args:
        output: Of the job; its last part is the run's name.
        settings: The job file's content; options of stores, which hold keys, and queries of web addresses are left out.
        say: Takes a line for the user.

    Raises:
        ValueError: There is no such tracker, its library is not installed, or it lets nobody in.
    """
    if where is None:
        yield None
        return
    kind, _, place = where.partition(":")
    if kind not in KINDS:
        raise ValueError(f"--track {where}: tensorboard:DIR, wandb:PROJECT or mlflow:URI")
    try:
        tracker = KINDS[kind](place, Path(output.rstrip("/")).name, _without_keys(settings))
    except ModuleNotFoundError as error:
        if error.name != kind:
            raise
        raise ValueError(f"--track {where}: {kind} is not installed: pip install {kind}") from None
    except Exception as error:
        raise ValueError(f"--track {where}: {_line(error)}") from error
    tracked = Tracking(tracker, say)
    try:
        yield tracked
    finally:
        tracked.close()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _without_keys(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {key: _without_keys(value) for key, value in settings.items() if key != "storage_options"}
    if isinstance(settings, list):
        return [_without_keys(value) for value in settings]
    return unsigned(settings) if isinstance(settings, str) else settings
