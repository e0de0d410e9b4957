"""An output folder: its plan, its commit records, its state, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa


class OutputError(ValueError):
    """The folder is not a run's output, or is damaged; the message says what to do."""


@dataclass(frozen=True)
class Record:
    """A shard's commit record. The shard exists exactly when this does and the file matches it.

    Attributes:
        shard: Number of the shard.
        attempt: Token of the attempt that won.
        file: Name of the winning attempt's file.
        bytes: Its size.
        checksum: Its BLAKE2b digest, hex.
        rows_ok, rows_failed: Rows in it by status.
        started, seconds: When work on it began (Unix time), and how long it took.
        worker: Host and process that did it.
        measures: Numeric stage column -> ``{"n", "sum", "min", "max"}`` over rows with status ok.
        errors: The commonest reasons of failed rows (digits folded) -> count; at most 20.
        summary: Names of the stage's summary files (npz), in row order; empty without.
    """

    shard: int
    attempt: str
    file: str
    bytes: int
    checksum: str
    rows_ok: int
    rows_failed: int
    started: float
    seconds: float
    worker: str
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    summary: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """What another shell may ask at any time.

    Attributes:
        state: ``running`` (a live lock), ``complete`` (``_SUCCESS`` is there), else ``incomplete``.
        progress: The last snapshot a run left; counts of committed shards are fresh, read from the records.
        holder: Who holds the lock: host, pid, seconds since its last sign of life. None: nobody.
        errors: Commonest reasons of failed rows -> count.
        measures: Column -> ``{"n", "mean", "min", "max"}`` over committed rows.
    """

    state: str
    progress: Progress
    holder: Mapping[str, Any] | None
    errors: Mapping[str, int]
    measures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class VerifyReport:
    """Whether an output holds every planned id exactly once, in files that match their records.

    Attributes:
        ok: Nothing is wrong and everything is there.
        planned: Planned rows; found: rows read; rows_ok, rows_failed: by status.
        problems: What is wrong, one sentence each, naming file or id and what to do; at most 100.
        foreign: Files in ``data/`` that no record names.
    """

    ok: bool
    planned: int
    found: int
    rows_ok: int
    rows_failed: int
    problems: tuple[str, ...]
    foreign: tuple[str, ...]


class Output:
    """An output folder opened for reading (``Output.open``); `pipeline.run` opens it for writing.

    Attributes:
        path: As the user gave it.
        plan: The stored plan (``rows``, ``shards``, ``columns``, ``config``, ``models``, ``created`` ...).
    """

    path: str
    plan: Mapping[str, Any]

    @staticmethod
    def open(path: str, storage_options: Mapping[str, Any] | None = None) -> Output:
        """Open an existing output folder.

        Raises:
            OutputError: There is no run in it.
        """
        raise NotImplementedError

    def records(self) -> Iterator[Record]:
        """The commit records, in shard order, read lazily."""
        raise NotImplementedError

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The committed shards' tables, in order, one at a time."""
        raise NotImplementedError

    def status(self) -> Status:
        """The state of the run, from any shell or machine that can read the folder."""
        raise NotImplementedError

    def open_file(self, name: str, mode: str = "rb") -> Any:
        """Open a file below the folder, for instance ``report.html``; parents are made when writing."""
        raise NotImplementedError


def verify(path: str, storage_options: Mapping[str, Any] | None = None, checksums: bool = True) -> VerifyReport:
    """Read the whole output and check it: records, files, sizes, checksums, and every planned id exactly once.

    Args:
        checksums: Also compare each file's digest with its record (reads all bytes; otherwise only ids are read).
    """
    raise NotImplementedError
