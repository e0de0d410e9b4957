"""A stage under guard: it gets every row, gives each back once, and no row that it raises on costs another.

Rows that were inside when it raised are tried in halves until the culprits are alone; out of memory, it is asked to get
smaller first.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.contract import Row, Stage, failed, halvings
from pipeline.failures import Fault, described


class ContractError(RuntimeError):
    """The stage broke its contract (an id it was not given, a row given back twice): no data can be trusted."""

    fault = Fault.BUG


class Poisoned(RuntimeError):
    """The device refuses all further work in this process; only a new process helps."""

    fault = Fault.POISON


@dataclass
class Waiting:
    """A row on its way through the stage, and the kept columns that join it when it comes out.

    Attributes:
        row: As the stage gets it; None once it has it: a decoded picture is the stage's alone, to drop when it has seen
            enough of it.
        again: Makes it anew.
    """

    position: int
    id: str
    row: Row | None
    kept: dict[str, Any]
    again: Callable[[], Row]

    def taken(self) -> Row:
        """The row, for the stage to keep."""
        row, self.row = self.row, None
        return self.again() if row is None else row


class Feed:
    """What the stage iterates over: decoded rows, remembered until they come back. Its errors are not the stage's."""

    def __init__(self, chunks: Iterator[list[Waiting]]) -> None:
        self._chunks, self._ready = chunks, list[Waiting]()
        self.inside: dict[str, Waiting] = {}
        self.error: BaseException | None = None
        self.exhausted = False

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Row:
        while not self._ready:
            try:
                chunk = next(self._chunks)
            except StopIteration:
                self.exhausted = True
                raise
            except BaseException as error:
                self.error = error
                raise
            self._ready = chunk[::-1]
        waiting = self._ready.pop()
        own = waiting.id
        if own in self.inside:
            problem = f"two rows of one shard have the id {own!r}; the input changed during the run"
            self.error = ContractError(problem)
            raise self.error
        self.inside[own] = waiting
        return waiting.taken()

    def returned(self, out: Row) -> Waiting:
        """The row that the stage gives back.

        Raises:
            ContractError: It was not given, is back already, or has no status.
        """
        waiting = self.inside.pop(out.get("id", ""), None)
        if waiting is None:
            raise ContractError(f"the stage returned id {out.get('id')!r}, which it was not given, or returned twice")
        if out.get("status") not in ("ok", "failed"):
            raise ContractError(f"the stage returned id {out['id']!r} with status {out.get('status')!r}")
        return waiting


class Guard:
    """Puts rows through a stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def through(self, chunks: Iterator[list[Waiting]]) -> Iterator[tuple[Waiting, Row]]:
        """Every row, and what the stage made of it, in any order.

        Raises:
            ContractError: The stage broke its contract.
            Poisoned: The device is lost to this process.
        """
        feed = Feed(chunks)
        while not feed.exhausted:
            for out in self._called(feed):
                yield feed.returned(out), out
        for own, waiting in feed.inside.items():
            yield waiting, failed({"id": own}, "the stage returned nothing for this row")

    def _called(self, feed: Feed) -> Iterator[Row]:
        """One call of the stage. If it raises, the rows inside are tried in halves until the culprits are alone."""
        try:
            yield from self._stage(feed)
        except Exception as error:
            if feed.error is not None:
                raise feed.error from None
            _raise_if_fatal(error)
            if not feed.inside:  # it raised before it took a row: give it one, so that the next call is another
                next(feed, None)
            rows = list(feed.inside.values())
            shrunk = _out_of_memory(error) and self._shrink()
            text = described(error)
        else:
            if feed.error is not None:
                raise feed.error
            if not feed.exhausted:
                raise ContractError("the stage stopped before it had taken all rows")
            return
        if rows:
            yield from self._isolate(rows, None if shrunk else text)

    def _isolate(self, rows: list[Waiting], reason: str | None) -> Iterator[Row]:
        """Rows that were inside when the stage raised, in halves until each has passed or is alone and to blame.

        Args:
            reason: Why it raised. None: out of memory, and the stage has shrunk; the rows may pass as they are.
        """
        half = len(rows) // 2
        for group in [rows] if reason is None or not half else [rows[:half], rows[half:]]:
            tried = self._attempt(group)
            yield from tried.rows
            if len(tried.left) == 1 and tried.reason is not None:
                yield failed({"id": tried.left[0].id}, tried.reason)
            elif tried.left:
                yield from self._isolate(tried.left, tried.reason)

    def _attempt(self, rows: list[Waiting]) -> _Tried:
        """Give some rows to the stage by themselves."""
        out: list[Row] = []
        try:
            for row in self._stage(waiting.taken() for waiting in rows):
                out.append(row)
        except Exception as error:
            _raise_if_fatal(error)
            given = {row.get("id") for row in out}
            left = [waiting for waiting in rows if waiting.id not in given]
            shrunk = _out_of_memory(error) and self._shrink()
            return _Tried(out, left, None if shrunk else described(error))
        return _Tried(out, [], None)

    def _shrink(self) -> bool:
        """Free what the failed call held, and ask the stage to get smaller."""
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        shrink = getattr(self._stage, "shrink", None)
        if shrink is None or not shrink():
            return False
        halvings.count()
        return True


@dataclass(frozen=True)
class _Tried:
    """What came out of the stage, what did not, and why (None: it may pass in a smaller batch)."""

    rows: list[Row]
    left: list[Waiting]
    reason: str | None


def _out_of_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "CUDA out of memory" in str(error)


def _raise_if_fatal(error: Exception) -> None:
    """Errors that are not about a row: a broken contract, or what says so itself, or a device that is lost to this
    process."""
    if getattr(error, "fault", None) is Fault.BUG:
        raise error
    text = str(error)
    if not _out_of_memory(error) and ("CUDA error" in text or "device-side assert" in text):
        raise Poisoned(described(error)) from error
