"""What travels between the driver and its workers: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.access import Grant
from pipeline.contract import Column, Fits, Form, StageSpec
from pipeline.failures import Fault
from pipeline.input.rows import Span, Wanted
from pipeline.input.shards import Shard
from pipeline.input.source import Source
from pipeline.output.commit import Record


@dataclass(frozen=True)
class Resources:
    """What a worker gets, and how many workers there may be. No part of the fingerprint.

    Attributes:
        min_workers: The run starts work as soon as one worker is ready, and says so while fewer than this are.
        max_workers: Upper bound of the pool; None: as many as the cluster holds.
        cpus, gpus, memory: Reserved with Ray for each worker (memory in bytes).
        decode_threads: Threads that read and decode beside the device.
        encode_threads: Threads that encode pictures of the output.
        sole_run: The user sees to it that one run at a time writes to the output folder, where its store cannot.
    """

    min_workers: int = 1
    max_workers: int | None = 1
    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    decode_threads: int = 2
    encode_threads: int = 2
    sole_run: bool = False


@dataclass(frozen=True)
class WorkerJob:
    """All a worker has to know, once.

    Attributes:
        granted: Options of stores, for what the stage opens there.
        run: Id of the run that it works for; epoch: of the driver that gives the work out.
        schema: The output's, encoded by `pipeline.output.schema.encode_schema`.
        reads: Which columns the stage takes, and in which form; None: all, as they are found.
        gpus: What a worker gets of them; below 1 it shares one with others.
        measured: Numeric columns of the stage.
    """

    stage: StageSpec
    source: Source
    wanted: Wanted
    kept: tuple[str, ...]
    schema: str
    columns: tuple[Column, ...]
    output: str
    storage_options: Mapping[str, Any]
    granted: tuple[Grant, ...] = field(default=(), repr=False)
    run: str = ""
    epoch: int = 0
    reads: Mapping[str, Form] | None = None
    decode_threads: int = 2
    encode_threads: int = 2
    gpus: float = 0

    @property
    def measured(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.columns if c.kind in ("int64", "float32", "float64", "bool"))


@dataclass(frozen=True)
class Piece:
    """Some rows of a shard that were written by themselves, because the shard as a whole killed its workers."""

    start: int
    stop: int
    file: str
    size: int
    checksum: str
    ok: int
    failed: int
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    summary_bytes: tuple[int, ...] = ()
    duplicates: int = 0


@dataclass(frozen=True)
class Again:
    """A shard as it was committed, whose failed rows are to be done anew, or all of them if it was lost.

    Attributes:
        file: Where it lies in the output folder; empty if it is lost. size: its bytes, or 0.
        generation: That its successor will have.
        summary, summary_bytes: Of the rows that were well.
    """

    file: str
    size: int
    generation: int
    summary: tuple[str, ...]
    summary_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Rows ``start`` to ``stop`` of a shard.

    Attributes:
        spans: The whole shard's.
        whole: Commit the shard; else write a piece.
        condemned: Why this (single) row must not be given to the stage any more.
        pieces: Put these together and commit the shard.
        twins: The shard's rows that are duplicates: place -> id of the row that holds the same.
        avoid: Nodes whose workers died on these rows: one of another node takes them if there is any.
        again: The shard was committed before.
        alone: A worker that has it gets no other beside it: should it die, one knows of what.
        fits: What running out of memory taught the run's workers so far.
        part: The shard's final name, if the file of the whole is to be written under it, unless it is taken; None: it
            is an attempt's, and gets its name when it is published.
        tried: A worker has had it before: a file may have its final name.
    """

    shard: int
    spans: tuple[Span, ...]
    start: int
    stop: int
    whole: bool = True
    condemned: str | None = None
    pieces: tuple[Piece, ...] = ()
    twins: Mapping[int, str] = field(default_factory=dict)
    avoid: tuple[str, ...] = ()
    again: Again | None = None
    alone: bool = False
    fits: Fits = field(default_factory=dict)
    part: str | None = None
    tried: bool = False

    @staticmethod
    def of(shard: Shard, again: Again | None = None, part: str | None = None) -> Task:
        """A whole shard."""
        return Task(shard.index, shard.spans, 0, shard.rows, twins=shard.twins, again=again, part=part)

    def rows(self) -> str:
        """Which, for a message."""
        return f"rows {self.start} to {self.stop - 1} of shard {self.shard}"


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        kind: ``done``, or whose fault it is that it is not.
        result: The record or piece of a task that is done.
        reason: Why it is not done.
        away: A store or the network is, which may take minutes.
        node: That the worker was on; nodes: living ones that hold workers. Empty where no one asked.
        halvings: How often the worker's process ran out of memory since its last outcome (`contract.halvings`).
        fits: What that taught it so far.
    """

    kind: Literal["done"] | Fault
    result: Record | Piece | None = None
    reason: str = ""
    away: bool = False
    node: str = ""
    nodes: frozenset[str] = frozenset()
    halvings: int = 0
    fits: Fits = field(default_factory=dict)
