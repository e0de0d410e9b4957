"""A planned run and one worker, without Ray, which may have any number of its tasks in hand at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contract import Row
from pipeline.output.commit import ATTEMPTS, Record
from pipeline.output.dataset import Output
from pipeline.output.planfile import read_shards
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import _worker_job
from pipeline.run.plan import write_plan
from pipeline.run.tasks import Resources, Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder


class Planned:
    """Plans a run and builds its worker.

    Args:
        apart: The stage takes one task after the other, whatever it says.
    """

    def __init__(self, spec: RunSpec, *, apart: bool = False) -> None:
        write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
        self.output = Output.open(spec.output)
        self.worker = Worker(_worker_job(spec, self.output, Resources()))
        self.tasks = [Task.of(shard) for shard in read_shards(self.output.own)]
        if apart:
            self.worker._stream._joins = False

    def all(self, tasks: Sequence[Task] = ()) -> list[Record | BaseException]:
        """What becomes of tasks that are all in hand at once, in their order."""
        tasks, stream, begin = tasks or self.tasks, self.worker._stream, threading.Event()
        stream._thread.submit(begin.wait)  # the stage waits until all are there, in this order
        with ThreadPoolExecutor(len(tasks)) as threads:
            done = []
            for task in tasks:
                done.append(threads.submit(self.worker.process, task))
                while len(stream._open) < sum(not one.done() for one in done):
                    time.sleep(0.001)
            begin.set()
            return [one.exception() or one.result() for one in done]  # type: ignore[misc]

    def table(self, record: Record | BaseException) -> pa.Table:
        assert isinstance(record, Record), record
        return pq.read_table(f"{self.output.path}/{ATTEMPTS}/{record.file}")

    def rows(self, record: Record | BaseException) -> list[Row]:
        rows: list[Row] = self.table(record).to_pylist()
        return rows
