"""Rows out: put back into the input's order, made into tables, and written, in a thread beside the stage's."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contract import Row, Tally, failed
from pipeline.input.rows import Encoded
from pipeline.output import commit
from pipeline.output.schema import measures, merge_measures, picture_columns, table
from pipeline.pictures import encode_picture
from pipeline.run.guard import ContractError
from pipeline.run.tasks import Piece, Task, WorkerJob
from pipeline.storage import Folder

T = TypeVar("T")
GROUP_ROWS = 4096
GROUP_PICTURES = 256
UNWRITTEN = 2
"""Groups of rows that may wait for the writer before the stage is held back."""


class Done(NamedTuple):
    """A row that is through.

    Attributes:
        row: What is written.
        out: What the stage gave back, less its pictures; None: it never had the row.
    """

    row: Row
    out: Row | None = None


class Named(NamedTuple):
    """A file is written under its shard's final name.

    Attributes:
        token: Tells it from all other attempts.
        check: Asked before it is there for all; raises if it is not to be any more.
    """

    token: str
    check: Callable[[], None]


class Writer:
    """Writes the rows of one task after another.

    Args:
        schema: The output's.
    """

    def __init__(self, job: WorkerJob, folder: Folder, schema: pa.Schema) -> None:
        self._folder, self._schema, self._kept = folder, schema, frozenset(job.kept)
        self._measured = job.measured
        self.group_rows = GROUP_PICTURES if picture_columns(schema) else GROUP_ROWS
        self._encoders = ThreadPoolExecutor(max(1, job.encode_threads), "latentmill-encode")
        self._thread = ThreadPoolExecutor(1, "latentmill-write")

    def encoded(self, value: Any) -> Any:
        """A picture on its way to PNG, in another thread."""
        if value is None or isinstance(value, (bytes, bytearray, Encoded)) or not hasattr(value, "save"):
            return value
        return self._encoders.submit(encode_picture, value)

    def table(self, rows: Sequence[Done], tally: Tally | None = None) -> pa.Table:
        """Finished rows as a table; waits for their pictures.

        Args:
            tally: Told of each row that the stage had as it is written: one with a value that does not fit has failed.
        """
        for row, _ in rows:
            for name, value in row.items():
                if isinstance(value, Future):
                    row[name] = value.result()
        made = table([row for row, _ in rows], self._schema, self._kept)
        if tally is not None:
            ends = zip(made["status"].to_pylist(), made["error"].to_pylist(), strict=True)
            for (_, out), (status, error) in zip(rows, ends, strict=True):
                if out is not None:
                    tally.add(out if status == out["status"] else failed(out, error))
        return made

    def tables(self, groups: Iterator[list[Done]], tally: Tally | None) -> Iterator[Future[pa.Table]]:
        """Arrow tables on their way, built in the writer's thread; the stage runs in the caller's."""
        for group in groups:
            yield self._thread.submit(self.table, group, tally)

    def write(
        self, task: Task, path: str, tables: Iterator[pa.Table | Future[pa.Table]], named: Named | None = None
    ) -> Piece:
        """Write a task's rows as an attempt's file, and read it back.

        Args:
            path: Where to, in the output folder.
            named: That is the shard's final name.

        Raises:
            OSError: It could not be written, or is not what was written.
            Taken: Another file has the final name.
            Superseded: `Named.check` does.
        """
        attempt = commit.Attempt(self._folder, path, self._schema, named and named.token)
        statuses: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        measured: dict[str, dict[str, float]] = {}

        def write(rows: pa.Table | Future[pa.Table]) -> None:
            rows = rows.result() if isinstance(rows, Future) else rows
            attempt.add(rows)
            statuses.update(rows["status"].to_pylist())
            errors.update(pc.drop_null(rows["error"]).to_pylist())
            merge_measures(measured, measures(rows, self._measured))

        writing: deque[Future[None]] = deque()
        try:
            for rows in tables:
                writing.append(self._thread.submit(write, rows))
                while len(writing) > UNWRITTEN:
                    writing.popleft().result()
            while writing:
                writing.popleft().result()
            if named is not None:
                named.check()
            size, checksum = attempt.close()
        except BaseException:
            wait(writing)
            attempt.abandon()
            raise
        commit.check_attempt(self._folder, path, size, task.stop - task.start)
        found = commit.fold_errors(errors)
        return Piece(
            task.start, task.stop, path.rpartition("/")[2], size, checksum, statuses["ok"], statuses["failed"],
            measured, found, duplicates=statuses["duplicate"],
        )  # fmt: skip


def in_order(rows: Iterator[tuple[int, T]], task: Task, size: int) -> Iterator[list[T]]:
    """A task's rows, which come with their positions in any order, in the input's order and in groups of ``size``.

    Raises:
        ContractError: There are more or fewer than were planned.
    """
    early: dict[int, T] = {}
    group: list[T] = []
    position = task.start
    for found, row in rows:
        early[found] = row
        while position in early:
            group.append(early.pop(position))
            position += 1
            if len(group) == size:
                yield group
                group = []
    if position != task.stop or early:
        planned, done = task.stop - task.start, position - task.start
        raise ContractError(f"shard {task.shard}: {planned} rows planned, {done} done")
    if group:
        yield group
