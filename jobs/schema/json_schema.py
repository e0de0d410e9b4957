"""The JSON schema of job files: a union over ``job:``, from the same models that validate them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jobs.schema import registry
from jobs.schema.steps import step_kinds, step_model

SCHEMA_FILE = "job.schema.json"
HEADER = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
"""First line of a job file: by it editors with yaml-language-server (VS Code's YAML extension by Red Hat, Neovim, ...)
find the schema that lies beside it."""


def write_schema(folder: Path) -> None:
    """Write the schema into a folder with job files, where `HEADER` leads to; it replaces an older one."""
    (folder / SCHEMA_FILE).write_text(_text(tuple(registry.kinds())), encoding="utf-8")


@cache
def _text(kinds: tuple[str, ...]) -> str:
    return json.dumps(job_schema(), indent=2) + "\n"


def headed(text: str) -> str:
    """A job file that begins with `HEADER`."""
    return text if text.startswith(HEADER) else HEADER + text


def job_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of everything that ``latentmill run-job`` takes."""
    jobs = {kind: registry.find(kind) for kind in registry.kinds()}
    steps = {kind: step_model(kind) for kind in step_kinds()}
    models: list[type[BaseModel]] = [*jobs.values(), *steps.values()]
    names, schema = models_json_schema([(model, "validation") for model in models])
    union = [names[(model, "validation")] for model in jobs.values()]
    definitions = schema["$defs"]
    for model in models:
        definition = definitions[names[(model, "validation")]["$ref"].rpartition("/")[2]]
        definition.setdefault("required", []).insert(0, "job")  # the key chooses among the kinds
        if model in steps.values():
            definition["required"] = [name for name in definition["required"] if name not in ("input", "name")]
    chain = definitions[names[(jobs["chain"], "validation")]["$ref"].rpartition("/")[2]]
    chain["properties"]["steps"]["items"] = {"oneOf": [names[(model, "validation")] for model in steps.values()]}
    _allow_short_forms(definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "latentmill job file",
        "oneOf": union,
        "$defs": definitions,
    }


def _allow_short_forms(definitions: dict[str, Any]) -> None:
    """What validators take beside the full blocks (`Input`, `Resources`, `Captions`, `Methods`)."""
    text: dict[str, Any] = {"type": "string"}
    paths: list[dict[str, Any]] = [text, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
    for name in {"Input", "PictureSource"} & definitions.keys():
        definitions[name]["properties"]["path"] |= {"anyOf": paths}
        del definitions[name]["properties"]["path"]["type"]
        definitions[name] = {"anyOf": [*paths, definitions[name]]}
    for name in {"Captions", "CaptionSettings"} & definitions.keys():
        definitions[name] = {"anyOf": [text, {"const": True}, definitions[name]]}
    if "Resources" in definitions:
        memory = definitions["Resources"]["properties"]["memory"]
        memory["anyOf"] = [{"type": "string"}, *memory["anyOf"]]
        definitions["Workers"] = {"anyOf": [{"type": "integer", "minimum": 1}, definitions["Workers"]]}
    for definition in definitions.values():
        for entry in definition.get("properties", {}).values():
            _allow_names_of_methods(entry)


def _allow_names_of_methods(entry: dict[str, Any]) -> None:
    """A method's name for its block, and one method for a list of one; in place."""
    for inner in entry.get("anyOf", ()):
        _allow_names_of_methods(inner)
    listed = entry.get("items", {}) if entry.get("type") == "array" else {}
    union = listed or entry
    if union.get("discriminator", {}).get("propertyName") != "method":
        return
    block = {key: union[key] for key in ("discriminator", "oneOf")}
    one: list[dict[str, Any]] = [{"enum": sorted(block["discriminator"]["mapping"])}, block]
    if listed:
        several = {"type": "array", "items": {"anyOf": one}, "minItems": entry["minItems"]}
        one = [*one, several]
    for key in ("type", "items", "minItems", "discriminator", "oneOf"):
        entry.pop(key, None)
    entry["anyOf"] = one
