"""From a YAML file (or a dict) to a validated job, or to an error that says where and what to change."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jobs.schema import registry
from jobs.schema.base import Job
from jobs.schema.steps import step_kinds, step_model

Where = tuple[str | int, ...]
_NOTHING = object()


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


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Job:
    """Read and validate a job.

    Args:
        source: Path of a YAML file, or its content as a mapping.
        overrides: ``a.b=value`` settings that replace what the file says; values are YAML. A list's items are
            addressed by index, steps of a chain also by name.

    Raises:
        JobFileError: With one line for each thing that is wrong.
    """
    document = Document(dict(source)) if isinstance(source, Mapping) else read(Path(source))
    for override in overrides:
        document = _override(document, override)
    return validate(document)


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
    keys = path.split(".")
    data = _with(document.data, keys, value, override)
    return Document(data, document.name, document.lines)


def _with(data: Any, keys: Sequence[str], value: Any, override: str) -> Any:
    """A copy of nested mappings and lists with one value replaced."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(data, (list, tuple)):
        named = {n: item.get("name", item.get("job")) for n, item in enumerate(data) if isinstance(item, Mapping)}
        names = {str(name): n for n, name in named.items() if name is not None}
        index = names.get(key, int(key) if key.isdigit() else -1)
        if not 0 <= index < len(data):
            choices = [*names, *map(str, range(len(data)))]
            hint = registry.nearest(key, choices)
            raise JobFileError(f"--set {override}: no item {key!r} here.{hint} There is: {', '.join(choices)}.")
        return [_with(item, rest, value, override) if n == index else item for n, item in enumerate(data)]
    if not isinstance(data, Mapping):
        data = {"path": data} if isinstance(data, str) else {}  # the short form of an input block
    return {**data, key: _with(data.get(key), rest, value, override)}


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
        allowed = sorted({name for block in _blocks(model, data, where[:-1]) for name in block.model_fields})
        return f"unknown key.{registry.nearest(where[-1], allowed)} Allowed here: {', '.join(allowed)}."
    if kind == "missing":
        return "this key is required."
    if kind == "literal_error":
        allowed = [word.strip(" '") for word in context["expected"].replace(" or ", ",").split(",")]
        hint = registry.nearest(problem["input"], allowed)
        return f"{problem['input']!r} is not allowed.{hint} Allowed: {context['expected']}."
    if kind in ("chain", "value_error", "assertion_error"):
        return str(context.get("message") or context.get("error") or problem["msg"])
    message = problem["msg"].removeprefix("Input should be ")
    return f"{_short(problem['input'])} will not do: should be {message}."


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
    declared = model.model_fields.get(str(key))
    if declared is None:
        return
    while rest and isinstance(rest[0], int):
        inner = inner[rest[0]] if isinstance(inner, (list, tuple)) and rest[0] < len(inner) else None
        rest = rest[1:]
    for candidate in _models(declared.annotation):
        yield from _blocks(candidate, inner, rest)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, typing.Annotated, tuple, list, dict):
        for argument in get_args(annotation):
            yield from _models(argument)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return {str: "text", list: "list", type(None): "empty file"}.get(type(value), type(value).__name__)
