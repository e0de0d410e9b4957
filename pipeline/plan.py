"""The plan of a run: which rows form which shard, and the fingerprint that a rerun has to match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.source import Source
from pipeline.spec import StageSpec


class PlanError(ValueError):
    """The run cannot be planned; the message says what to change."""


class PlanMismatch(PlanError):
    """The output folder holds a run that was planned differently.

    Attributes:
        fields: Differing field -> (value in the output folder, value now).
    """

    def __init__(self, output: str, fields: Mapping[str, tuple[Any, Any]]) -> None:
        self.output, self.fields = output, dict(fields)
        lines = "\n".join(f"  {name}: was {old!r}, is {new!r}" for name, (old, new) in self.fields.items())
        super().__init__(
            f"{output} holds a run that was planned differently:\n{lines}\n"
            "Change it back to resume, or name another output folder."
        )


@dataclass(frozen=True)
class RunSpec:
    """All that decides which bytes a run writes, and where.

    Attributes:
        stage: The stage that maps the rows.
        source: The input.
        output: Output folder; local, or any fsspec address.
        config: The settings that change the output's bytes (JSON-able). Part of the run fingerprint; the fields
            that differ on a resume are named by their dotted keys. Leave resources and the output folder out.
        seed: Recorded, part of the fingerprint.
        shard_rows: Rows a shard: what one worker takes at a time.
        keep: Columns of a row (names after mapping, else the input's names) copied to the output.
        limit: Only the first so many rows of the input.
        storage_options: fsspec's, for the output. Not recorded.
    """

    stage: StageSpec
    source: Source
    output: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    shard_rows: int = 1000
    keep: tuple[str, ...] = ()
    limit: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. Small: shards are listed lazily from the input's file table.

    Attributes:
        rows: Planned rows.
        shards: Number of shards.
        files: Number of input files.
        input_bytes: Their size (0 for generated rows).
        format: The input's format, found or given.
        columns: Columns that the output will have, in order.
        models: Role -> path, revision, fingerprint (from the stage's description).
        fingerprint: Hex digest over all that changes the bytes.
        estimated_bytes: Rough size of the output, from the columns' types and a sample of the kept columns.
    """

    rows: int
    shards: int
    files: int
    input_bytes: int
    format: str
    columns: tuple[str, ...]
    models: Mapping[str, Mapping[str, str]]
    fingerprint: str
    estimated_bytes: int


def make_plan(spec: RunSpec) -> Plan:
    """Plan a run without writing anything (``--dry-run``).

    Raises:
        SourceError: The input cannot be read as described, or two rows share an id (both named).
        PlanError: Columns clash or are missing.
    """
    raise NotImplementedError
