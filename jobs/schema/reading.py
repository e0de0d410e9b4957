"""From a YAML file (or a dict) to a validated job, or to an error that says where and what to change."""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jobs.schema import registry
from jobs.schema.base import Job
from jobs.schema.steps import step_kinds, step_model
from pipeline.contract import keys_of, old_keys_of

Where = tuple[str | int, ...]
_NOTHING = object()
_PLAIN = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of keys to values"),
    "string_type": "text",
    "finite_number": "a finite number",
}
"""Pydantic's types of error, and what a value should be in the words of people who know no Python."""


class JobFileError(ValueError):
    """A job file that cannot be used. The message names file, line and key, and what is allowed there."""


@dataclass(frozen=True)
class Document:
    """A parsed job file: its data, and the line each key stands on (1-based)."""

    data: Any
    name: str = "job"
    lines: Mapping[Where, int] = field(default_factory=dict)

    def line(self, where: Where) -> int | None:
        """The line of a key, or of the nearest block around it."""
        return next((self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines), None)

    def locate(self, where: Where) -> str:
        """``file, line n: key.path`` as far as it is known."""
        line = f", line {self.line(where)}" if self.lines else ""
        return f"{self.name}{line}: {dotted(where)}" if where else f"{self.name}{line}"


def dotted(where: Where) -> str:
    """``('steps', 0, 'seed')`` -> ``steps[0].seed``."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def warn(message: str) -> None:
    """Tell Python users; commands print it."""
    warnings.warn(message, FutureWarning, stacklevel=3)


def load(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), tell: Callable[[str], None] = warn
) -> Job:
    """Read and validate a job.

    Args:
        source: Path of a YAML file, or its content as a mapping.
        overrides: ``a.b=value`` settings that replace what the file says; values are YAML. A list's items are
            addressed by index, steps of a chain also by name.
        tell: Called with a sentence for each key that has another name by now.

    Raises:
        JobFileError: With one line for each thing that is wrong.
    """
    document = Document(dict(source)) if isinstance(source, Mapping) else read(Path(source))
    for override in overrides:
        document = _override(document, override)
    job = validate(document)
    for where, now in _old_keys(document.data, type(job)):
        tell(f"{document.locate(where)} is called {now!r} now; the old name is read as well")
    return job


def read(path: Path) -> Document:
    """Parse a YAML file, keeping the lines of its keys. Duplicate keys are errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        hint = registry.nearest(path.name, (p.name for p in folder.glob("*.y*ml")))
        raise JobFileError(f"{path}: no such job file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(f"{path}: cannot be read: {error}") from None
    try:
        lines = _composed(text, str(path))
        if not lines:
            raise JobFileError(f"{path}: the file is empty; it needs at least `job:` and `input:`")
        return Document(yaml.safe_load(text), str(path), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise JobFileError(f"{path}{line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise JobFileError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise JobFileError(f"{path}: its blocks are nested without end") from None


def _composed(text: str, name: str) -> dict[Where, int]:
    """The line of every key; empty if there is nothing.

    Raises:
        JobFileError: A key is given twice, or a value holds itself.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return {} if node is None else dict(_lines(node, name))


def _lines(
    node: yaml.Node, name: str, where: Where = (), above: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[Where, int]]:
    if any(node is other for other in above):
        raise JobFileError(f"{name}, line {node.start_mark.line + 1}: {dotted(where)} refers to itself by its anchor")
    above = (*above, node)
    yield where, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise JobFileError(
                    f"{name}, line {line}: {dotted((*where, key))} is given twice (first on {seen[key]})"
                )
            seen[key] = line
            yield from _lines(value_node, name, (*where, key), above)
            yield (*where, key), line
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines(item, name, (*where, index), above)


def _override(document: Document, override: str) -> Document:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise JobFileError(f"--set {override}: write it as key=value, for instance --set resources.gpus=1")
    try:
        _composed(text, f"--set {override}")
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobFileError(f"--set {override}: the value is not valid YAML: {error}") from None
    data, where = _resolved(document.data, path.split("."), override)
    return Document(_with(data, where, value), document.name, document.lines)


def _resolved(data: Any, keys: Sequence[str], override: str) -> tuple[Any, Where]:
    """The document with short forms on the way to a setting written out, and the setting's place: items of lists by
    name, method or number, and keys by the name that the document has for them."""
    kind = data.get("job") if isinstance(data, Mapping) else None
    model = registry.find(kind) if kind in registry.kinds() else None
    where, here = Where(), data
    for key in keys:
        part: str | int = key
        if isinstance(here, (list, tuple)):
            part = _item(here, key, ".".join(map(str, where)), override)
        elif isinstance(here, Mapping) and key not in here and model is not None:
            part = next((own for own in _synonyms(model, data, where, key) if own in here), key)
        elif model is not None and isinstance(here, str):
            data = _with(data, where, _long_form(list(_blocks(model, data, where)), here))
        where, here = (*where, part), _child(here, part)
    return data, where


def _long_form(blocks: Sequence[type[BaseModel]], short: str) -> Any:
    """What a word or a path stands for where a block may stand too."""
    if any("method" in block.model_fields for block in blocks):
        return {"method": short}
    for block in blocks:
        with suppress(ValidationError):
            return block.model_validate(short).model_dump(mode="json", exclude_unset=True)
    return short


def _item(items: Sequence[Any], key: str, of: str, override: str) -> int:
    names = {name: n for n, item in enumerate(items) if (name := _name(item)) is not None}
    index = names.get(key, int(key) if key.isdigit() else -1)
    if not 0 <= index < len(items):
        choices = [*names, *map(str, range(len(items)))]
        hint = registry.nearest(key, choices)
        raise JobFileError(
            f"--set {override}: {of} is a list, and {key!r} is no item of it.{hint} Write {of}.ITEM.KEY=value, where "
            f"ITEM is one of {', '.join(choices)}."
        )
    return index


def _name(item: Any) -> str | None:
    """What an item of a list is called, if anything."""
    if isinstance(item, str):
        return item
    names = [item.get(key) for key in ("name", "method", "job")] if isinstance(item, Mapping) else []
    return next((str(name) for name in names if name is not None), None)


def _synonyms(model: type[BaseModel], data: Any, where: Where, key: str) -> Iterator[str]:
    """The old names of a key, or the new one of an old one."""
    for block in _blocks(model, data, where):
        for old, now in old_keys_of(block).items():
            if key in (old, now):
                yield now if key == old else old


def _with(data: Any, where: Where, value: Any) -> Any:
    """A copy of nested mappings and lists with one value replaced."""
    if not where:
        return value
    key, rest = where[0], where[1:]
    if isinstance(data, (list, tuple)):
        return [_with(item, rest, value) if n == key else item for n, item in enumerate(data)]
    if not isinstance(data, Mapping):
        data = {"path": data} if isinstance(data, str) else {}  # the short form of an input block
    return {**data, key: _with(data.get(key), rest, value)}


def _old_keys(data: Any, model: type[BaseModel], where: Where = ()) -> Iterator[tuple[Where, str]]:
    """Keys of a valid document that have another name by now, and that name."""
    here = data
    for part in where:
        here = here[part]
    if isinstance(here, (list, tuple)):
        for index in range(len(here)):
            yield from _old_keys(data, model, (*where, index))
    if not isinstance(here, Mapping):
        return
    old = {was: now for block in _blocks(model, data, where) for was, now in old_keys_of(block).items()}
    current = {key for block in _blocks(model, data, where) for key in keys_of(block).values()}
    for key in here:
        if key in old and key not in current:
            yield (*where, key), old[key]
        yield from _old_keys(data, model, (*where, key))


def validate(document: Document) -> Job:
    """The job that a document describes.

    Raises:
        JobFileError: With one line for each thing that is wrong.
    """
    data = document.data
    if not isinstance(data, Mapping):
        raise JobFileError(f"{document.name}: a job file is a mapping of keys to values, this one is a {_kind(data)}")
    kind = data.get("job")
    if not isinstance(kind, str) or kind not in registry.kinds():
        where: Where = ("job",)
        raise JobFileError(f"{document.locate(where)}: {registry.unknown_kind(kind, registry.kinds())}")
    model = registry.find(kind)
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [(_in_data(problem["loc"], data), problem) for problem in error.errors()]
        inner = {where[:n] for where, _ in problems for n in range(len(where))}
        problems = [found for found in problems if found[0] not in inner]  # "too short" because an item is wrong
        problems.sort(key=lambda found: document.line(found[0]) or 0)
        texts = [f"{document.locate(where)}: {_explain(problem, data, model, where)}" for where, problem in problems]
        raise JobFileError("\n".join(dict.fromkeys(texts))) from None


def _explain(problem: Mapping[str, Any], data: Any, model: type[BaseModel], where: Where) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(str(where[-1]), list(_blocks(model, data, where[:-1])))
    if kind == "missing":
        return "this key is required."
    if kind in ("literal_error", "union_tag_invalid"):
        given, expected = context.get("tag", problem["input"]), context.get("expected", context.get("expected_tags"))
        allowed = [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]
        return f"{given!r} is not allowed.{registry.nearest(given, allowed)} Allowed: {expected}."
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is required here."
    if kind in ("chain", "value_error", "assertion_error"):
        return str(context.get("message") or context.get("error") or problem["msg"])
    if kind in ("too_short", "string_too_short") and context.get("min_length") == 1:
        return f"{_short(problem['input'])} will not do: should not be empty."
    message = _PLAIN.get(kind, problem["msg"].removeprefix("Input should be "))
    return f"{_short(problem['input'])} will not do: should be {message}."


def _unknown(key: str, blocks: Sequence[type[BaseModel]]) -> str:
    old = {was: now for block in blocks for was, now in old_keys_of(block).items()}
    allowed = sorted({name for block in blocks for name in keys_of(block).values()})
    if key in old:
        return f"the old name of {old[key]!r}, which is given as well: keep one of them."
    near = registry.nearest(key, [*allowed, *old])
    for was, now in old.items():
        near = near.replace(repr(was), repr(now))
    return f"unknown key.{near} Allowed here: {', '.join(allowed)}."


def _in_data(where: Where, data: Any) -> Where:
    """Pydantic's location without the parts that name union members rather than keys; a missing key stays."""
    kept: list[str | int] = []
    for part in where[:-1]:
        inner = _child(data, part)
        if inner is not _NOTHING:
            kept.append(part)
            data = inner
    if where and (isinstance(data, Mapping) or _child(data, where[-1]) is not _NOTHING):
        kept.append(where[-1])
    return tuple(kept)


def _child(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part, _NOTHING)
    if isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
        return data[part]
    return _NOTHING


def _blocks(model: type[BaseModel], data: Any, where: Where) -> Iterator[type[BaseModel]]:
    """The models whose keys may stand at a place of the document."""
    if not where:
        yield model
        return
    key, rest = where[0], where[1:]
    inner = data.get(key) if isinstance(data, Mapping) else None
    if key == "steps" and rest and isinstance(inner, (list, tuple)) and isinstance(rest[0], int):
        step = inner[rest[0]]
        if isinstance(step, Mapping) and step.get("job") in step_kinds():
            yield from _blocks(step_model(step["job"]), step, rest[1:])
        return
    field = next((name for name, own in keys_of(model).items() if own == old_keys_of(model).get(str(key), key)), None)
    if field is None:
        return
    annotation = model.model_fields[field].annotation
    while rest and (isinstance(rest[0], int) or get_origin(annotation) is dict):
        inner, rest, annotation = _child(inner, rest[0]), rest[1:], (get_args(annotation) or (annotation,))[-1]
    candidates = list(_models(model.model_fields[field].annotation))
    method = inner.get("method") if isinstance(inner, Mapping) else None
    named = [one for one in candidates if "method" in one.model_fields and one.model_fields["method"].default == method]
    for candidate in named or candidates:
        yield from _blocks(candidate, inner, rest)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, typing.Annotated, tuple, list, dict):
        for argument in get_args(annotation):
            yield from _models(argument)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return {str: "text", list: "list", type(None): "empty file"}.get(type(value), type(value).__name__)
