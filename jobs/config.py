"""What every job file has in common, and what a job has to offer to be run.

A job is a pydantic model: its fields are the keys of the job file, its methods say which stage maps the rows,
what happens when all shards are committed, and what the report shows. Nothing here imports Ray, torch or datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from jobs.report import Panel
    from jobs.run import JobResult, Session
    from pipeline.run import Finished
    from pipeline.spec import StageSpec

InputFormat = Literal["parquet", "jsonl", "csv", "text", "images", "webdataset", "datasets"]


class Settings(BaseModel):
    """Base of every block of a job file: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class Input(Settings):
    """Where the rows come from. A plain path, or a list of paths, stands for ``{path: ...}``."""

    path: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs; local, or any fsspec address such as ``s3://bucket/*.parquet``."""
    format: InputFormat | None = None
    """How to read them. Left out: found from the names (and, for a folder, from what is in it)."""
    columns: dict[str, str] = {}
    """Name that the job uses -> name in the input, for instance ``{prompt: caption}``."""
    id: str | None = None
    """The input's column with a unique id for each row. Left out: ids come from file and row number."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            value = {"path": value}
        if isinstance(value, Mapping) and isinstance(value.get("path"), str):
            value = {**value, "path": (value["path"],)}
        return value


class Workers(Settings):
    """Bounds of the pool of workers. A plain number stands for ``{min: n, max: n}``."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class Resources(Settings):
    """What one worker gets, and how many workers there are."""

    workers: Workers = Workers(min=1, max=1)
    """Size of the pool: a number, or ``{min: 1, max: 8}`` to let it grow with the cluster."""
    cpus: float = Field(1, gt=0)
    """CPUs a worker."""
    gpus: float = Field(0, ge=0)
    """GPUs a worker; a fraction shares one GPU between workers."""
    memory: ByteSize | None = None
    """Memory a worker reserves, for instance ``8GB``."""
    price_per_worker_hour: float | None = Field(None, ge=0)
    """What one worker costs an hour, in any currency; ``--dry-run --calibrate`` multiplies with it."""


class Job(Settings):
    """Anything that a job file can describe. ``chain`` derives from it directly, row jobs from `JobBase`."""

    job: str
    output: str | None = None
    """Folder, local or fsspec address, that the dataset is written to. ``--output`` sets it too."""

    def execute(self, session: Session) -> JobResult:
        """Run the job to its end; called by `jobs.run.run_job`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it runs")


class JobBase(Job):
    """A job that maps the rows of one dataset through a stage into another dataset.

    A job module subclasses it, adds its own fields, narrows ``job`` to a `Literal`, and implements `stage`.
    """

    input: Input
    seed: int = Field(0, ge=0)
    """Everything random about a row is drawn from (seed, id)."""
    shard_rows: int = Field(1000, ge=1)
    """Rows a shard: what one worker takes at a time, and what is lost when it dies."""
    keep: tuple[str, ...] = ()
    """Input columns that are copied to the output."""
    resources: Resources = Resources()
    max_failed_fraction: float = Field(0.1, ge=0, le=1)
    """The job stops when more than this share of the rows has failed."""

    def stage(self) -> StageSpec:
        """The stage that maps the rows: an import path and JSON-able parameters. Loads no weights."""
        raise NotImplementedError(f"{type(self).__name__} does not name a stage")

    def finish(self, finished: Finished) -> None:
        """Called once when all shards are committed, before the dataset is published: build what spans shards."""

    def panels(self) -> list[Panel]:
        """The job's own panels of the report page, below the general ones."""
        return []

    def fingerprint_config(self) -> dict[str, Any]:
        """The settings that change the output's bytes: all but where it is written and what it runs on."""
        return self.model_dump(mode="json", exclude={"output", "resources", "max_failed_fraction", "name"})

    def execute(self, session: Session) -> JobResult:
        return session.run_rows(self)
