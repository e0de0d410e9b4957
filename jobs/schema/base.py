"""What every job file has in common, and what a job has to offer to be run.

A job is a pydantic model: its fields are the keys of the job file, its methods say which stage maps the rows,
what happens when all shards are committed, and what the report shows. It knows no runner: `jobs.run` goes by whether
it is a chain or maps rows. Nothing here imports Ray, torch or datasets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from jobs.schema.panel import Panel
from pipeline.access import granted
from pipeline.addresses import has_password, problem_with, shown
from pipeline.contract import Settings, added, as_job_file
from pipeline.input.source import Format, Source

if TYPE_CHECKING:
    import pipeline.run.driver
    from pipeline.contract import StageSpec


_SIGNED = re.compile(r"https?://\S+\?\S+", re.IGNORECASE)


class Input(Settings):
    """Where the rows come from. A plain path, or a list of paths, stands for ``{path: ...}``."""

    path: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs; local, or any fsspec address such as ``s3://bucket/*.parquet``; or the output of another
    job. ``micro-world://train?rows=1000&seed=0`` generates pictures of the miniature world."""
    format: Format | None = None
    """How to read them. Left out: found from the names and, for a folder, from what is in it."""
    columns: dict[str, str] = {}
    """Name that the job uses -> name in the input, for instance ``{prompt: caption}``. ``json.caption`` is what the
    objects in ``json`` have under ``caption``, unless a column is called so."""
    id: str | None = None
    """The input's column with a unique id for each row. Left out: ids come from file and row number."""
    images: tuple[str, ...] = ()
    """Columns that hold pictures as encoded bytes or as paths, where the input does not say so itself."""
    storage_options: dict[str, Any] = {}
    """For fsspec: endpoint, keys, ... Never written to the output. Left out: what the job's own `storage_options` say,
    where the input lies in the same bucket or an earlier step of the chain wrote it."""
    max_pixels: int = Field(100_000_000, ge=1)
    """A picture with more pixels fails its row before it is decoded."""
    allow: tuple[str, ...] | None = added()
    """Where rows may point, beside the folder of their own file: absolute folders and beginnings of addresses, for
    instance ``[/data/pictures, "https://images.example.org/", "s3://bucket/"]``. ``https://`` stands for every public
    host; one of an inner network has to be named."""
    draft: int | None = added(ge=1)
    """JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, as far as both sides keep so many pixels: in a fraction of
    time and memory where pictures are far larger than the model's. Values change a little (docs/jobs.md says how much);
    twice the model's side is a good choice. Left out: all pixels are decoded. Kept pictures are copied as they are."""
    dedupe: Literal["content"] | None = added()
    """``content``: rows that hold the same (the bytes of their pictures, their texts) are processed once, whatever
    files and shards they lie in. The first in the input's order is; the others get the status ``duplicate`` and its id
    in ``duplicate_of``. Planning reads the input as a whole for it."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            value = {"path": value}
        if isinstance(value, Mapping) and isinstance(value.get("path"), str):
            value = {**value, "path": (value["path"],)}
        return value

    @field_validator("path")
    @classmethod
    def _without_passwords(cls, path: tuple[str, ...]) -> tuple[str, ...]:
        for entry in path:
            _refuse_password(entry)
        return path

    @field_validator("allow")
    @classmethod
    def _places(cls, allow: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for entry in allow or ():
            if problem := problem_with(entry):
                raise ValueError(f"{shown(entry)!r} {problem}")
        return allow

    def source(self) -> Source:
        """The same as the plain description that the pipeline reads."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return Source(**{**given, "allow": self.allow or ()})


def _refuse_secrets(settings: Any, key: str = "") -> None:
    """What a job names besides input and output is written into its plan and card as it stands."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            _refuse_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            _refuse_secrets(value, key)
    elif isinstance(settings, str) and (has_password(settings) or _SIGNED.fullmatch(settings)):
        raise ValueError(
            f"{key}: {shown(settings)} has a password or a query (?...), which plan and card would show; "
            "fetch it first, and name the file, or its folder on a store"
        )


def _refuse_password(address: str) -> None:
    """Addresses go into plans, cards and messages."""
    if has_password(address):
        raise ValueError(f"{shown(address)}: holds a password; write it into `storage_options`")


class Workers(Settings):
    """Bounds of the pool of workers. A plain number stands for ``{min: n, max: n}``."""

    min: int = Field(1, ge=1)
    max: int | None = Field(1, ge=1)
    """None (``null``): as many as the cluster holds."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class Resources(Settings):
    """What one worker gets, and how many workers there are."""

    workers: Workers = Workers(min=1, max=1)
    """Size of the pool: a number, or ``{min: 1, max: 8}`` to let it grow with the cluster."""
    cpus: float = Field(1, gt=0)
    """CPUs a worker."""
    gpus: float = Field(0, ge=0)
    """GPUs a worker; a fraction shares one GPU between workers, and over several the transformer of a rectified flow is
    laid."""
    memory: ByteSize | None = None
    """Memory a worker reserves, for instance ``8GB``."""
    decode_threads: int = Field(2, ge=1)
    """Threads a worker that read and decode beside the device."""
    encode_threads: int = Field(2, ge=1)
    """Threads a worker that encode pictures of the output."""
    sole_run: bool = False
    """You see to it that one run at a time writes to the output folder. Only for stores that cannot (no conditional
    writes); a run that needs this says so."""
    price_per_worker_hour: float | None = Field(None, ge=0)
    """What one worker costs an hour, in any currency; ``--dry-run --calibrate`` multiplies with it."""

    @field_validator("gpus")
    @classmethod
    def _whole_beyond_one(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} will not do: should be a share of one GPU, below 1, or a whole number of them.")
        return gpus

    def pool(self) -> pipeline.run.driver.Resources:
        """The same as the plain description that the pipeline takes."""
        from pipeline.run.driver import Resources as Pool

        return Pool(
            min_workers=self.workers.min,
            max_workers=self.workers.max,
            cpus=self.cpus,
            gpus=self.gpus,
            memory=None if self.memory is None else int(self.memory),
            decode_threads=self.decode_threads,
            encode_threads=self.encode_threads,
            sole_run=self.sole_run,
        )


class Job(Settings):
    """Anything that a job file can describe. ``chain`` derives from it directly, row jobs from `RowJob`."""

    job: str
    output: str | None = None
    """Folder, local or fsspec address, that the dataset is written to. ``--output`` sets it too."""
    storage_options: dict[str, Any] = {}
    """For fsspec: endpoint, keys, ... of the store that the output lies on, and of whatever the job names there beside
    it (a reference, an inverter, an input in the same bucket without options of its own). Never written to the output.
    Steps of a chain that have none take the chain's."""

    @field_validator("output")
    @classmethod
    def _without_password(cls, output: str | None) -> str | None:
        _refuse_password(output or "")
        return output


class RowJob(Job):
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

    @contextmanager
    def access(self, output: str) -> Iterator[None]:
        """While it lasts, the job's stores are opened with its options: `storage_options` for the output and for what
        its settings name beside it, those of the input for the input's buckets.
        """
        with ExitStack() as stack:
            for path in self.input.path:
                stack.enter_context(granted(path, self.input.storage_options, "store"))
            stack.enter_context(granted(output, self.storage_options))
            yield

    def source(self) -> Source:
        """What the pipeline reads: the input, unless the job makes several rows of one (``variants``)."""
        return self.input.source()

    def stage(self) -> StageSpec:
        """The stage that maps the rows: an import path and JSON-able parameters. Loads no weights."""
        raise NotImplementedError(f"{type(self).__name__} does not name a stage")

    offered: ClassVar[tuple[str, ...]] = ()
    """Columns that are kept as well, where an earlier run wrote them into the input."""

    @property
    def asked(self) -> dict[str, str]:
        """Kept column -> the key that it stands for, where a key beside ``keep`` names it."""
        return {}

    products: ClassVar[tuple[str, ...]] = ()
    """Files and folders that `finish` makes in the output; `verify` checks them, and a lost one is made again."""

    finish_apart: ClassVar[bool] = False
    """`finish` needs the memory or the device of a worker: on a cluster it runs on one."""

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Called once when all shards are committed, before the dataset is published: build what spans shards."""

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        """More for the dataset card, in Markdown: how to use what this job wrote. Its Python runs as it stands."""
        return ""

    def redraws(self, row: Mapping[str, Any]) -> bool:
        """Whether the card has lines that draw a row's picture again, and they hold for this row with status ok."""
        return False

    def panels(self) -> list[Panel]:
        """The job's own panels of the report page, below the general ones."""
        return []

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        _refuse_secrets(self.own_settings())
        return self

    def own_settings(self) -> dict[str, Any]:
        """The job's own fields: with stage, source, seed, shard_rows and keep they decide what is written."""
        return self.model_dump(mode="json", exclude=COMMON)

    def own_keys(self) -> dict[str, Any]:
        """The same under the names that a job file has for them now."""
        return {key: value for key, value in as_job_file(self).items() if key not in COMMON}


COMMON = set(RowJob.model_fields) - {"job"} | {"name"}
"""Keys that every job has."""
