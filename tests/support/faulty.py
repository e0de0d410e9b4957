"""A stage that does what a test's folder tells it to, and a plain loop over the same rows as the reference."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import Column, Row, StageInfo, StageSpec, failed, ok
from pipeline.input.source import Source
from pipeline.output import commit
from pipeline.output.dataset import Output, Tally
from pipeline.output.planfile import read_shards
from pipeline.output.publish import publish
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import Resources, _worker_job
from pipeline.run.plan import write_plan
from pipeline.run.tasks import Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder

STEPS = ("check_attempt", "write_summary", "write_record")


class Numbers:
    """Text -> length and a vector drawn from the id. Files in the folder ``orders`` make it misbehave."""

    def __init__(self, orders: str, delay: float = 0.0) -> None:
        self.orders, self.delay, self.count = Path(orders), delay, 0
        if self._take("fail-constructor"):
            raise RuntimeError("the constructor fails this once")
        if (self.orders / "kill-at").exists():
            self._arm(*(self.orders / "kill-at").read_text().split())

    @staticmethod
    def describe(orders: str, delay: float = 0.0) -> StageInfo:
        columns = (Column("length", "int64"), Column("vector", "tensor", (2, 3), "float16"), Column("upper", "string"))
        return StageInfo(columns, metadata={"scaling_factor": "0.18215"})

    def _take(self, name: str) -> bool:
        """Whether the order is there; it is carried out once."""
        try:
            (self.orders / name).rename(self.orders / f"{name}.done")
        except FileNotFoundError:
            return False
        return True

    def _arm(self, step: str, moment: str, driver: str) -> None:
        """Kill the driver, then this worker, at a step of the commit protocol."""

        def die() -> None:
            (self.orders / "killed").write_text(f"{step} {moment}")
            os.kill(int(driver), signal.SIGKILL)
            os._exit(1)

        if step == "open":
            whole = commit.Attempt.add

            def add(attempt: commit.Attempt, rows: pa.Table) -> None:
                whole(attempt, rows)
                die()

            commit.Attempt.add = add  # type: ignore[method-assign]
            return
        real = getattr(commit, step)

        def patched(*args: Any) -> Any:
            if moment == "before":
                die()
            result = real(*args)
            die()
            return result

        setattr(commit, step, patched)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            text = row["text"]
            time.sleep(self.delay)
            if "die always" in text or ("die once" in text and self._take("die-once")):
                os.kill(os.getpid(), signal.SIGKILL)
            if "stop once" in text and self._take("stop-once"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if "wait once" in text and self._take("wait-once"):
                threading.Event().wait()  # a read that never ends looks like that
            if "raise" in text:
                raise ValueError(f"cannot digest {text!r}")
            if "refuse" in text:
                yield failed(row, "refused")
                continue
            self.count += 1
            vector = np.random.default_rng(list(row["id"].encode())).standard_normal((2, 3))
            yield ok(row, length=len(text), vector=vector, upper=text.upper())

    def take_summary(self) -> dict[str, np.ndarray]:
        count, self.count = self.count, 0
        return {"count": np.array([count])}


def texts(folder: Path, lines: Iterable[str]) -> Source:
    """A text file as a source."""
    path = folder / "in.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Source((str(path),), columns={"text": "text"})


def spec_for(folder: Path, lines: Iterable[str], shard_rows: int = 10, delay: float = 0.0) -> RunSpec:
    """A run over lines of text; its orders lie in ``folder/orders``."""
    orders = folder / "orders"
    orders.mkdir(exist_ok=True)
    stage = StageSpec("tests.support.faulty:Numbers", {"orders": str(orders), "delay": delay})
    return RunSpec(stage, texts(folder, lines), str(folder / "out"), shard_rows=shard_rows, keep=("text",))


def commit_plain(spec: RunSpec) -> tuple[Output, Tally]:
    """Plan, and commit every shard in a plain loop in this process; nothing is published."""
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill", spec.storage_options), 0.0)
    output = Output.open(spec.output, spec.storage_options)
    worker = Worker(_worker_job(spec, output, Resources()))
    tally = Tally()
    for shard in read_shards(output.own):
        record = worker.process(Task.of(shard))
        assert isinstance(record, commit.Record)
        tally.add(record)
    return output, tally


def run_plain(spec: RunSpec) -> Output:
    """The whole run in a plain loop in this process: what an undisturbed run gives."""
    output, tally = commit_plain(spec)
    publish(output, tally, "test", "")
    assert output.folder.exists("_SUCCESS")
    return output


def data(path: str) -> pa.Table:
    """A published output as one table."""
    parts = sorted(Path(path).glob("data/part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts]).combine_chunks()
