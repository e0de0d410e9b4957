"""The JSON schema of job files: a union over ``job:``, from the same models that validate them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jobs.schema import registry
from jobs.schema.steps import step_kinds, step_model


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
    """What the validators of `jobs.schema.base` take beside the full blocks."""
    paths: list[dict[str, Any]] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
    if "Input" in definitions:
        definitions["Input"]["properties"]["path"] |= {"anyOf": paths}
        del definitions["Input"]["properties"]["path"]["type"]
        definitions["Input"] = {"anyOf": [*paths, definitions["Input"]]}
    if "Resources" in definitions:
        memory = definitions["Resources"]["properties"]["memory"]
        memory["anyOf"] = [{"type": "string"}, *memory["anyOf"]]
        definitions["Workers"] = {"anyOf": [{"type": "integer", "minimum": 1}, definitions["Workers"]]}
