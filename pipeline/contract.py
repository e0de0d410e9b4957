"""The contract between a stage and the runtime: rows in, rows out, columns and models declared beforehand.

Everything here is plain, picklable and JSON-serialisable, so that it can be hashed into the run
fingerprint, written into the plan, and sent to an actor. Nothing here imports Ray or torch.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, runtime_checkable

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Row = dict[str, Any]
"""One row. Always has ``id`` (str). Rows that leave a stage also have ``status`` and ``error``."""

Form = Literal["text", "text?", "picture", "value"]
"""How a stage takes an input's column. ``text``: a str, or None where the cell is empty; anything else fails its row.
``text?``: the same, but None for anything else (one of several columns that may hold the text). ``picture``: decoded,
from whatever form the input has it in. ``value``: as it is found."""
Kind = Literal["string", "int64", "float32", "float64", "bool", "json", "image", "tensor"]


@dataclass(frozen=True)
class Column:
    """One output column.

    ``tensor`` columns hold arrays of a fixed ``shape`` and are stored as ``fixed_size_list<dtype>``
    of ``prod(shape)`` values with shape and dtype in the field's metadata; where extents are -1, which differ from row
    to row, as ``list<dtype>``. ``image`` columns take a
    PIL image, or encoded bytes, and are stored as ``struct<bytes, path>``. All columns are nullable.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...] = ()
    dtype: Literal["float16", "float32"] = "float32"
    doc: str = ""


@dataclass(frozen=True)
class StageInfo:
    """What a stage declares before any model is loaded (only configs are read).

    Attributes:
        columns: The columns the stage adds to a row, beside ``id``, ``status`` and ``error``.
        models: Role -> ``{"path": ..., "revision": ..., "fingerprint": ...}``; part of the run fingerprint.
        metadata: File-level key-value metadata (scheduler config, VAE scaling factor, ...).
        reads: The columns that the stage takes of a row, and in which form. Others are neither handed on nor decoded,
            and the plan can say what an input lacks. None: everything is handed on as it is found.
        notes: What the user should know before the run: a column that will stay null, and why.
        bodily: Kept columns that have to hold pictures themselves, because what is built at the end takes them from
            the output; the addresses of pictures are no use there.
        needs: Columns of which every row has to have one, and what for: an input that has none of them anywhere is
            refused while it is planned, instead of failing row by row.
    """

    columns: tuple[Column, ...]
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, Form] | None = None
    notes: tuple[str, ...] = ()
    bodily: tuple[str, ...] = ()
    needs: Mapping[tuple[str, ...], str] = field(default_factory=dict)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows; of a `Literal` those of its values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(parts[0])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _kinds(part)
    elif origin is Literal:
        yield from map(type, parts)
    else:
        yield annotation


class Settings(BaseModel):
    """Base of what a stage is told, and of every block of a job file: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, defer_build=True,
        serialize_by_alias=True, allow_inf_nan=False,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        """``steps: true`` is a slip, and would be one step: as the word it is refused like any other."""
        truths = [key for key, value in given.items() if isinstance(value, bool)] if isinstance(given, dict) else []
        if not truths:
            return given
        numbers = {
            key
            for name, info in cls.model_fields.items()
            if (kinds := set(_kinds(info.annotation))) & {int, float} and not kinds & {bool, Any}
            for key in (name, info.alias, *getattr(info.validation_alias, "choices", ()))
        }
        return {**given, **{key: str(given[key]).lower() for key in truths if key in numbers}}

    def part(self, kind: type[S], **others: Any) -> S:
        """The settings of another kind: `others`, and one's own values for the rest of its fields. So a job that *is* a
        stage's settings hands that part on to the stage.
        """
        own = {name: getattr(self, name) for name in kind.model_fields if name not in others}
        return kind.model_validate(own | others)


S = TypeVar("S", bound=Settings)


def added(**options: Any) -> Any:
    """A field that is newer than some plans: null unless it is asked for, and then left out of what is written, so that
    the fingerprints of jobs that do without it stay what they were.

    Args:
        options: As `pydantic.Field` takes them.
    """
    return Field(default=None, exclude_if=_is_null, **options)


def speed(default: Any, **options: Any) -> Any:
    """A field that changes how fast a run goes, where and in how much memory, but no byte of what it writes: a run that
    is resumed may have another value.

    Args:
        options: As `pydantic.Field` takes them.
    """
    return Field(default, json_schema_extra={"affects": "speed"}, **options)


def renamed(was: str, *, to: str) -> dict[str, Any]:
    """Options of a field that used to be called otherwise: job files may go on with the old name, and what is written
    (plans, fingerprints) goes on with it, so that old outputs resume.

    Args:
        was: The old name.
        to: The field's own name, which job files are told.
    """
    return {"validation_alias": AliasChoices(to, was), "serialization_alias": was}


def keys_of(kind: type[BaseModel]) -> dict[str, str]:
    """Field -> the key that a job file has for it."""
    return {name: _names(name, option)[0] for name, option in kind.model_fields.items()}


def old_keys_of(kind: type[BaseModel]) -> dict[str, str]:
    """Key that a job file may still have -> what it is called now; see `renamed`."""
    return {old: names[0] for names in map(_names, kind.model_fields, kind.model_fields.values()) for old in names[1:]}


def _names(name: str, option: FieldInfo) -> list[str]:
    """The key of a field, and those that it had before."""
    alias = option.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [alias if isinstance(alias, str) else name]


def given(kind: type[BaseModel], raw: Mapping[str, Any], name: str) -> Any:
    """What unread settings say of a field, under its key or an old one; else its default."""
    option = kind.model_fields[name]
    return next((raw[key] for key in _names(name, option) if key in raw), option.default)


def as_job_file(settings: BaseModel) -> dict[str, Any]:
    """Settings as plain data under the keys of a job file, where `model_dump` has those of plans."""
    keyed: dict[str, Any] = _keyed(settings, settings.model_dump(mode="json"))
    return keyed


def _keyed(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        keys, written = keys_of(type(value)), _written(type(value))
        return {keys[name]: _keyed(getattr(value, name), dumped[key]) for name, key in written.items() if key in dumped}
    if isinstance(value, (list, tuple)):
        return [_keyed(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {key: _keyed(value[key], part) for key, part in dumped.items()}
    return dumped


def _written(kind: type[BaseModel]) -> dict[str, str]:
    """Field -> its name in plans."""
    return {name: option.serialization_alias or option.alias or name for name, option in kind.model_fields.items()}


def renamed_in(settings: BaseModel) -> dict[str, str]:
    """Dotted name in a plan -> dotted key in a job file, where they differ."""
    found: dict[str, str] = {}
    keys = keys_of(type(settings))
    for name, own in _written(type(settings)).items():
        if own != keys[name]:
            found[own] = keys[name]
        if isinstance(value := getattr(settings, name), BaseModel):
            found |= {f"{own}.{old}": f"{keys[name]}.{now}" for old, now in renamed_in(value).items()}
    return found


def speed_names(kind: type[BaseModel]) -> frozenset[str]:
    """Names of the fields made with `speed`, of a model and of the blocks in it."""
    names, seen, left = set[str](), set[type[BaseModel]](), [kind]
    while left:
        model = left.pop()
        seen.add(model)
        for name, option in model.model_fields.items():
            extra = option.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects") == "speed":
                names.add(_written(model)[name])
            left += [found for found in _models(option.annotation) if found not in seen]
    return frozenset(names)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(getattr(annotation, "__value__", annotation)):
        yield from _models(part)


def _is_null(value: Any) -> bool:
    return value is None


@runtime_checkable
class Stage(Protocol):
    """Maps rows to rows: in any order, exactly one out for each one in, the id kept.

    A stage catches what is wrong with a single row itself and yields it with ``status="failed"`` and
    ``error`` set. It knows no Ray, no files, no shards.
    """

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Fit:
    """What running out of memory taught of one kind of work.

    Attributes:
        rows: As many at once go through.
        relieved: How often something was done that makes a row take less, because not one went through.
    """

    rows: int
    relieved: int = 0

    def __or__(self, other: Fit) -> Fit:
        """What goes through wherever one of the two was learned."""
        return Fit(min(self.rows, other.rows), max(self.relieved, other.relieved))


Fits = Mapping[str, Fit]
"""Kind of work, with the kind of device that it ran out on -> what was learned."""


@runtime_checkable
class Lessons(Protocol):
    """What running out of memory teaches a stage, and what others were taught. Used from any thread."""

    def learned(self) -> dict[str, Fit]:
        """What has run out so far, here or elsewhere."""

    def heed(self, fits: Fits) -> None:
        """Take from now on no more at once than others found to go through, on devices of the same kind."""


class Tally(Protocol):
    """Counts the rows of one task, as the stage gives them back; of none but those, and of each once."""

    def add(self, row: Row) -> None:
        """A row of the task, well or failed, in any order; with whatever the stage put into it beside its columns."""

    def summary(self) -> dict[str, Any]:
        """Name -> numpy array, when all rows have come."""


@dataclass(frozen=True)
class StageSpec:
    """How to build a stage: an import path ``package.module:Class`` and the JSON form of its settings.

    The class names the class of its settings in its attribute ``Settings``, is built as ``Class(settings)`` and offers
    ``describe(settings) -> StageInfo`` as a static or class method, cheap and without loading weights. A class without
    the attribute takes ``params`` as keyword arguments in both places. A class that was moved says in ``known_as``
    under which import path plans and fingerprints go on to know it.

    It may offer ``tally() -> Tally | None``, called before each shard, whose summary is kept beside the shard's commit
    record: of its rows, whatever others came between them, and however often it was begun. And ``take_summary() ->
    dict[str, numpy.ndarray]``, called after each shard: it returns, and resets, what else is to be kept there. It may
    offer ``shrink() -> bool``, called after an
    out-of-memory error: it halves its slots (its batch) and returns True, or False when it cannot get smaller; the
    rows that were inside are then given to it again. It may have ``rooms`` (`Lessons`): what running out taught it is
    asked for after each task, told to other workers of the run, and told to those that come later, before their first
    task. It may say in ``holds`` how many rows it works on or keeps at a
    time: then rows of one shard after another come in one call, for as long as there are any, and at least so many at a
    time, so that no place in it stays empty. ``take_summary`` is then called while it works, in other threads, one at a
    time, and may only count work, whosever it was. After any exception the stage is called anew, so a call must not
    depend on how the last one ended.
    """

    target: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(target: str, settings: Settings) -> StageSpec:
        """The stage at an import path under these settings."""
        return StageSpec(target, settings.model_dump(mode="json"))

    def load_class(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)

    def build(self) -> Stage:
        """Construct the stage (loads models; done once an actor)."""
        return self._called(self.load_class())

    def describe(self) -> StageInfo:
        return self._called(self.load_class().describe)

    @property
    def name(self) -> str:
        """What plans and fingerprints call the stage, wherever it lies now."""
        return str(getattr(self.load_class(), "known_as", self.target))

    def _called(self, function: Any) -> Any:
        kind = getattr(self.load_class(), "Settings", None)
        return function(**self.params) if kind is None else function(kind(**self.params))


class Halvings:
    """How often this process ran out of memory and went on with half as much at once. Whoever halves counts."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def count(self) -> None:
        with self._lock:
            self._count += 1

    def taken(self) -> int:
        """Those since it was last asked."""
        with self._lock:
            count, self._count = self._count, 0
        return count


halvings = Halvings()
"""Of this process; the runtime adds them up for Prometheus."""


def ok(row: Row, **outputs: Any) -> Row:
    """The row with its outputs, marked as processed."""
    return {**row, **outputs, "status": "ok", "error": None}


def failed(row: Row, error: str) -> Row:
    """The row marked as failed for a reason a user can act on; its outputs stay null."""
    return {**row, "status": "failed", "error": error}


def batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of at most `size` rows, in order; rows are read as they are asked for."""
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch
