"""What a run tells Prometheus, through Ray's metrics agent."""

from __future__ import annotations

from pipeline.run.tasks import Outcome


def label(path: str) -> str:
    """A path as the value of a Prometheus label: Ray takes ASCII alone, and says so by ending the run."""
    return path.encode("ascii", errors="backslashreplace").decode()


COUNTERS = {
    "rows": ("Rows in committed shards", "status"),
    "shards": ("Committed shards", None),
    "task_failures": ("Tasks that ended without a result, by whose fault it was", "fault"),
    "retries": ("Tasks that were handed out again, whole or in halves", None),
    "out_of_memory": ("Times that work ran out of memory and went on with half as much at once", None),
    "worker_deaths": ("Workers that died", None),
}
"""What is counted, and by which further label; Prometheus sees ``ray_latentmill_<name>_total``."""
GAUGES = {
    "workers": "Workers that are ready",
    "rows_planned": "Rows of the plan",
    "rows_done": "Rows in committed shards, those of earlier starts included",
}
"""What goes up and down: ``ray_latentmill_<name>``."""


class Meters:
    """Counts for Prometheus, through Ray's metrics agent. Each has the label ``output``."""

    def __init__(self, output: str, planned: int) -> None:
        from ray.util import metrics

        self._tags, self._deaths = {"output": label(output)}, 0
        self._counters = {
            name: metrics.Counter(f"latentmill_{name}", text, tag_keys=("output",) + ((by,) if by else ()))
            for name, (text, by) in COUNTERS.items()
        }
        self._gauges = {
            name: metrics.Gauge(f"latentmill_{name}", text, tag_keys=("output",)) for name, text in GAUGES.items()
        }
        self._gauges["rows_planned"].set(planned, self._tags)

    def _count(self, name: str, amount: int = 1, **by: str) -> None:
        if amount:
            self._counters[name].inc(amount, {**self._tags, **by})

    def committed(self, ok: int, failed: int, duplicates: int) -> None:
        for status, count in (("ok", ok), ("failed", failed), ("duplicate", duplicates)):
            self._count("rows", count, status=status)
        self._count("shards")

    def ended(self, outcome: Outcome) -> None:
        """A task has: with a result, or by somebody's fault."""
        self._count("out_of_memory", outcome.halvings)
        if outcome.kind != "done":
            self._count("task_failures", fault=str(outcome.kind))

    def retried(self, tasks: int = 1) -> None:
        self._count("retries", tasks)

    def turn(self, workers: int, deaths: int, done: int) -> None:
        """How it stands: workers that are ready, those that died so far, and rows in committed shards."""
        self._count("worker_deaths", deaths - self._deaths)
        self._deaths = deaths
        self._gauges["workers"].set(workers, self._tags)
        self._gauges["rows_done"].set(done, self._tags)
