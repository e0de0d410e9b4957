"""Keys that were called otherwise once: job files may have the old name, plans go on with it, people hear the new."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from jobs.schema import reading, registry
from jobs.schema.reading import JobFileError
from pipeline.contract import as_job_file, keys_of, old_keys_of
from tests.support import ROOT


def models() -> Iterator[type[BaseModel]]:
    """Every block that a job file can hold."""
    left: list[Any] = [registry.find(kind) for kind in registry.kinds()]
    seen = set()
    while left:
        part = left.pop()
        if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen:
            seen.add(part)
            left += [field.annotation for field in part.model_fields.values()]
            yield part
        left += get_args(getattr(part, "__value__", part))


RENAMED = {model: old for model in models() if (old := old_keys_of(model))}

FILES = {
    "decode": ("input: a\ndecode:\n  model: m\n  {}: 3\n", "batch", "batch_size"),
    "caption": ("input: a\nmodel: m\n{}: 3\n", "batch", "batch_size"),
}
"""Kind -> a job file but for one key's name, the name it had, and the one it has."""


def written(folder: Path, kind: str, *names: str) -> Path:
    text = FILES[kind][0]
    line = next(line for line in text.splitlines(keepends=True) if "{}" in line)
    path = folder / "job.yaml"
    path.write_text(f"job: {kind}\n" + text.replace(line, "".join(line.format(name) for name in names)))
    return path


def line_of(path: Path, key: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if f"{key}:" in line)


@pytest.mark.parametrize("model", RENAMED)
def test_a_field_is_called_by_its_new_name_and_written_by_its_old_one(model: type[BaseModel]) -> None:
    current = keys_of(model)
    for old, now in RENAMED[model].items():
        assert current[now] == now
        assert old not in current.values()
        assert model.model_fields[now].serialization_alias == old


@pytest.mark.parametrize("kind", FILES)
def test_old_and_new_name_make_the_same_plan_and_the_old_one_is_told(kind: str, tmp_path: Path) -> None:
    _, old, now = FILES[kind]
    said: list[str] = []
    before = reading.load(path := written(tmp_path, kind, old), tell=said.append)
    line = line_of(path, old)
    after = reading.load(written(tmp_path, kind, now), tell=said.append)
    assert before == after
    plan = json.dumps(before.model_dump(mode="json"))
    assert plan == json.dumps(after.model_dump(mode="json"))
    assert f'"{old}": ' in plan
    assert f'"{now}": ' in json.dumps(as_job_file(after))
    [message] = said
    assert message.startswith(f"{path}, line {line}: ")
    assert f"{old} is called {now!r} now" in message


@pytest.mark.parametrize("kind", FILES)
def test_both_names_are_refused(kind: str, tmp_path: Path) -> None:
    _, old, now = FILES[kind]
    path = written(tmp_path, kind, now, old)
    with pytest.raises(JobFileError) as caught:
        reading.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line_of(path, old)}: ")
    assert message.endswith(f"{old}: the old name of {now!r}, which is given as well: keep one of them.")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("typed", [0, 1])
def test_a_misspelt_name_leads_to_the_new_one(kind: str, typed: int, tmp_path: Path) -> None:
    _, old, now = FILES[kind]
    wrong = f"{(old, now)[typed]}x"
    with pytest.raises(JobFileError, match=rf"{wrong}: unknown key\. Did you mean {now!r}\? Allowed here: .*\b{now}\b"):
        reading.load(written(tmp_path, kind, wrong))


def test_an_override_replaces_the_key_by_either_name(tmp_path: Path) -> None:
    for given in ("batch", "batch_size"):
        path = written(tmp_path, "decode", given)
        for name in ("batch", "batch_size"):
            job: Any = reading.load(path, [f"decode.{name}=5"], tell=lambda message: None)
            assert job.decode.batch_size == 5


def test_python_users_are_warned() -> None:
    job = {"job": "caption", "input": "a", "model": "m"}
    with pytest.warns(FutureWarning, match="job: batch is called 'batch_size' now"):
        reading.load({**job, "batch": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading.load({**job, "batch_size": 2})


@pytest.mark.parametrize("model", RENAMED)
def test_editors_offer_the_new_names_alone(model: type[BaseModel]) -> None:
    offered = model.model_json_schema()["properties"].keys()
    assert set(RENAMED[model].values()) <= offered
    assert not set(RENAMED[model]) & offered


def test_the_docs_list_every_renamed_key() -> None:
    text = (Path(ROOT) / "docs/jobs.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE))
    assert listed == {pair for old in RENAMED.values() for pair in old.items()}
