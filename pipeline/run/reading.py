"""Rows in: one thread reads them, some decode their pictures, ahead of the stage."""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.contract import Row
from pipeline.failures import Away
from pipeline.input.fetch import UntrustedError, picture_bytes
from pipeline.input.forms import FormError, as_picture, short
from pipeline.input.pins import Pins
from pipeline.input.read import prepare, read_rows
from pipeline.input.rows import Encoded, Raw
from pipeline.output.schema import as_json, json_columns, misfits, picture_columns
from pipeline.pictures import PictureError, decode_picture
from pipeline.run.tasks import Task, WorkerJob

T = TypeVar("T")
CHUNK_ROWS = 256
CHUNK_PICTURES = 4
AHEAD = 4
"""Chunks read and decoded ahead of the stage, for each decoding thread."""
AHEAD_BYTES = 256 << 20
"""What is decoded ahead of the stage may take of memory, beside the chunk that it gets next."""


@dataclass
class Found:
    """A row of the input on its way to the stage.

    Attributes:
        position: Its place in the shard.
        raw: As it was read.
        folder: Of its file; the paths of its pictures are relative to it.
        row: As the stage gets it. None: it cannot be had, and `problem` says why.
        kept: The columns that are copied.
        twin: Id of the row that it is a duplicate of; its pictures are not fetched then.
    """

    position: int
    raw: Raw
    folder: str
    row: Row | None = None
    problem: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    twin: str | None = None


@dataclass(eq=False)
class Reading:
    """A task whose rows are to be read.

    Attributes:
        only: Rows at these places of the shard; None: all.
        closed: Nobody waits for them any more.
    """

    task: Task
    only: Container[int] | None = None
    closed: bool = False


Wish = TypeVar("Wish", bound=Reading)
Item = tuple[Wish, list[Found] | Exception | None]
"""Some rows of a task, decoded; why it cannot be read; or None: that was all of it, whatever was wrong."""


class Budget:
    """Memory for what is decoded ahead; chunks are known by their numbers, in the order in which they are taken.

    Args:
        most: Bytes. The chunk that is waited for gets what it needs all the same.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held, self._next = most, dict[int, int](), 0
        self._changed = threading.Condition()
        self._open = True

    def take(self, chunk: int, size: int) -> None:
        """Wait until there is room for a picture of a chunk."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._open or chunk <= self._next or sum(self._held.values()) + size <= self._most
            )
            self._held[chunk] = self._held.get(chunk, 0) + size

    def wants(self, chunk: int) -> None:
        """The stage takes this chunk next, and has those before it."""
        with self._changed:
            self._next = chunk
            for done in [number for number in self._held if number < chunk]:
                del self._held[done]
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody takes anything any more: whoever waits goes on."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Reader:
    """Reads the rows of one task after another.

    Args:
        schema: The output's.
    """

    def __init__(self, job: WorkerJob, schema: pa.Schema) -> None:
        self._job, self._pictures = job, picture_columns(schema)
        self._jsoned = json_columns(schema)
        self._copied = [schema.field(name) for name in job.kept if name not in self._pictures]
        self._pins = Pins(job.source)
        self.read = 0
        self._threads = max(1, job.decode_threads)
        self._decoders = ThreadPoolExecutor(self._threads, "latentmill-decode")
        pictured = bool(job.source.images) or "picture" in (job.reads or {}).values()
        self._slow_rows = pictured or job.source.format in ("images", "webdataset", "micro-world")

    def rows(self, wishes: Iterable[Wish | None]) -> Generator[Item[Wish] | None, None, None]:
        """The rows of one task after another, each task's in order, decoded, in chunks. What is decoded ahead is
        bounded over all of them.

        Args:
            wishes: Asked in a thread of its own, as soon as the last one's rows are read. None is handed on in turn.
        """
        budget, begun = Budget(AHEAD_BYTES), 0
        try:
            for item in ahead(self._submitted(wishes, budget), AHEAD * self._threads):
                if item is None:
                    yield None
                    continue
                wish, chunk = item
                if not isinstance(chunk, Future):
                    yield wish, chunk
                    continue
                begun += 1
                try:
                    decoded = chunk.result()
                except Exception as error:
                    yield wish, error
                    continue
                budget.wants(begun)
                yield wish, decoded
        finally:
            budget.close()

    def _submitted(
        self, wishes: Iterable[Wish | None], budget: Budget
    ) -> Iterator[tuple[Wish, Future[list[Found]] | Exception | None] | None]:
        """As of `rows`, with chunks that are on their way."""
        numbers = count()
        for wish in wishes:
            if wish is None:
                yield None
                continue
            try:
                for chunk in takewhile(lambda chunk: not wish.closed, self._chunks(wish.task, wish.only)):  # noqa: B023
                    take = partial(budget.take, next(numbers))
                    yield wish, self._decoders.submit(self._decoded, chunk, take)
            except Exception as error:
                yield wish, error
            yield wish, None

    def again(self, found: Found) -> Row:
        """A row that could be had once, as the stage gets it."""
        row, problem = prepare(found.raw, self._job.source, found.folder, self._job.reads)
        if row is None:
            raise RuntimeError(f"{found.raw.id!r} could be read, and cannot be any more: {problem}")
        return row

    def undecoded(self, task: Task) -> Iterator[Raw]:
        """A task's rows as they were found.

        Raises:
            SourceError: The input is not the planned one any more.
        """
        count = task.stop - task.start
        return read_rows(self._job.source, task.spans, task.start, count, self._job.wanted, self._pins.check)

    def _chunks(self, task: Task, only: Container[int] | None) -> Iterator[list[Found]]:
        size = CHUNK_PICTURES if self._slow_rows else CHUNK_ROWS
        chunk: list[Found] = []
        folder_of = _folders(task)
        for position, raw in enumerate(self.undecoded(task), task.start):
            self.read += 1
            if only is not None and position not in only:
                continue
            if any(isinstance(value, Encoded) for value in raw.values.values()):
                size = CHUNK_PICTURES
            twin = task.twins.get(position, raw.twin)
            chunk.append(Found(position, raw, folder_of(position), twin=twin))
            if len(chunk) >= size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _decoded(self, chunk: list[Found], take: Callable[[int], None]) -> list[Found]:
        """A chunk with its pictures decoded, each when there is room for it."""
        for found in chunk:
            self._note_pictures(found.raw)
            if found.twin is not None:
                found.kept = self.kept(found.raw, found.folder, None)
                continue
            try:
                found.row, found.problem = prepare(found.raw, self._job.source, found.folder, self._job.reads, take)
            except Away:
                raise
            except Exception as error:  # whatever a decoder throws is this row's trouble alone
                found.row, found.problem = None, f"cannot be decoded: {type(error).__name__}: {error}"
            try:
                found.kept = self.kept(found.raw, found.folder, found.row)
            except UntrustedError as error:
                found.row, found.problem = None, str(error)
                found.kept = self.kept(found.raw, found.folder, None)
            found.problem = found.problem and short(found.problem)
        self._refuse_misfits(chunk)
        return chunk

    def _refuse_misfits(self, chunk: list[Found]) -> None:
        """A row with a value that does not fit the column that it is copied to fails before the stage works on it."""
        for found, wrong in zip(chunk, misfits([found.kept for found in chunk], self._copied), strict=True):
            if wrong and found.twin is None:
                found.row, found.problem = None, found.problem or short(next(iter(wrong.values())))
                found.kept = {name: value for name, value in found.kept.items() if name not in wrong}

    def _note_pictures(self, raw: Raw) -> None:
        """Paths of kept pictures become `Encoded`, so that what the stage and the output need is fetched once."""
        for name in self._pictures:
            if (self._job.reads or {}).get(name) not in ("text", "text?") and raw.values.get(name) is not None:
                with suppress(FormError):
                    raw.values[name] = as_picture(raw.values[name])

    def kept(self, raw: Raw, folder: str, row: Row | None) -> dict[str, Any]:
        """The columns that are copied. A picture that cannot be read stays null: readers would stumble over it, and
        what is no picture is none of the output's.

        Args:
            row: As the stage gets it; what is in it has been decoded. None: pictures are not read.

        Raises:
            UntrustedError: A picture lies where the job file does not allow rows to point.
        """
        kept: dict[str, Any] = {}
        for name in self._job.kept:
            value = raw.values.get(name)
            if name not in self._pictures:
                kept[name] = as_json(value) if name in self._jsoned else value
                continue
            kept[name] = None
            if row is not None and value is not None:
                with suppress(FormError):
                    kept[name] = self._picture(name, as_picture(value), folder, row.get(name) is not None)
        return kept

    def _picture(self, name: str, value: Encoded, folder: str, decoded: bool) -> Encoded | None:
        """A picture as it is copied: its bytes, which must be a picture's."""
        try:
            data = picture_bytes(value, self._job.source, folder)
            if not decoded:
                decode_picture(data, self._job.source.max_pixels)
        except UntrustedError as error:
            raise UntrustedError(f"{name}: {error}") from None
        except PictureError:
            return None
        return Encoded(data)


def _folders(task: Task) -> Callable[[int], str]:
    """Position in the shard -> folder of the file that the row comes from."""
    edges, folders, at = list[int](), list[str](), 0
    for span in task.spans:
        at += span.stop - span.start
        edges.append(at)
        folders.append(span.path.rpartition("/")[0])
    if len(set(folders)) == 1:
        return lambda position: folders[0]
    return lambda position: folders[bisect_right(edges, position)]


def ahead(items: Iterable[T], limit: int) -> Iterator[T]:
    """Iterate in a thread of its own, up to ``limit`` items ahead of the consumer."""
    buffer: queue.Queue[Any] = queue.Queue(limit)
    end, stopped = object(), threading.Event()
    problem: list[BaseException] = []

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                buffer.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            problem.append(error)
        put(end)

    thread = threading.Thread(target=work, daemon=True, name="latentmill-read")
    thread.start()
    try:
        while (item := buffer.get()) is not end:
            yield item
        if problem:
            raise problem[0]
    finally:
        stopped.set()
        thread.join()
