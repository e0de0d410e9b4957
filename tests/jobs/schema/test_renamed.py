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
from pipeline.contract import as_job_file, keys_of, old_keys_of, renamed_in
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

IMAGES, PROMPTS = "job: invert-images\ninput: a\n", "job: invert-prompts\ninput: a\nreference: r\n"
RARE, LEGO = "job: rare-concepts\ninput: a\n", "job: learn-concepts\ninput: a\n"
FILES = [
    ("job: decode\ninput: a\ndecode:\n  model: m\n  {}: 3\n", "batch", "batch_size"),
    ("job: caption\ninput: a\nmodel: m\n{}: 3\n", "batch", "batch_size"),
    ("job: chain\nsteps:\n- job: caption\n  name: b\n  input: a\n  model: m\n  {}: 3\n", "batch", "batch_size"),
    ("job: train-inverter\ninput: a\ntraining:\n  {}: 3\n", "batch", "batch_size"),
    ("job: judge-corpus\ninput: a\nreal: b\ncorpora:\n  c: d\n{}: 0.1\n", "rate", "lr"),
    ("job: reference\ninput: a\nencoder: m\n{}: float16\n", "dtype", "store"),
    ("job: select-corpus\ninput: a\nencoder: m\n{}: quality\n", "score", "score_column"),
    (PROMPTS + "methods: [direct]\n{}: m\n", "model", "encoder"),
    (PROMPTS + "methods:\n- method: retrieval\n  {}: caption\n", "by", "nearest_by"),
    (PROMPTS + "methods:\n- method: ovi\n  constraint:\n    neighbours: 1\n    {}: caption\n", "by", "nearest_by"),
    (PROMPTS + "methods:\n  method: trained-prior\n  {}: 3\n", "batch", "batch_size"),
    (IMAGES + "methods:\n- method: lbo\n  ilb:\n    {}: 3\n", "steps", "iterations"),
    (IMAGES + "methods:\n- method: lbo\n- method: exact\n  {}: 0.3\n", "rate", "lr"),
    (IMAGES + "methods:\n- method: newton\n  {}: 0.3\n", "prior", "prior_weight"),
    (RARE + "methods: [random]\n{}: m\n", "clip", "encoder"),
    (RARE + "methods: [random]\n{}: main\n", "clip_revision", "encoder_revision"),
    (RARE + "methods: [random]\n{}: 3\n", "most", "max_pictures"),
    (RARE + "methods: [random]\nanchors:\n  reference: r\n  {}: 3\n", "least", "min_rows"),
    (RARE + "methods:\n- method: nao\n  {}: 3\n", "updates", "iterations"),
    (RARE + "methods:\n- method: seed-select\n  {}: 0.3\n", "rate", "lr"),
    (LEGO + "{}: r\n", "start", "inverter"),
    (LEGO + "samples:\n  subjects: [cat]\n  {}: 3\n", "count", "draws"),
]
"""A job file but for one key's name, the name it had, and the one it has."""


def written(folder: Path, text: str, *names: str) -> Path:
    line = next(line for line in text.splitlines(keepends=True) if "{}" in line)
    path = folder / "job.yaml"
    path.write_text(text.replace(line, "".join(line.format(name) for name in names)))
    return path


def line_of(path: Path, key: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip("- ").startswith(f"{key}:"))


@pytest.mark.parametrize("model", RENAMED)
def test_a_field_is_called_by_its_new_name_and_written_by_its_old_one(model: type[BaseModel]) -> None:
    current = keys_of(model)
    for old, now in RENAMED[model].items():
        assert current[now] == now
        assert old not in current.values()
        assert model.model_fields[now].serialization_alias == old


@pytest.mark.parametrize(("text", "old", "now"), FILES)
def test_old_and_new_name_make_the_same_plan_and_the_old_one_is_told(
    text: str, old: str, now: str, tmp_path: Path
) -> None:
    said: list[str] = []
    before = reading.load(path := written(tmp_path, text, old), tell=said.append)
    line = line_of(path, old)
    after = reading.load(written(tmp_path, text, now), tell=said.append)
    assert before == after
    plan = json.dumps(before.model_dump(mode="json"))
    assert plan == json.dumps(after.model_dump(mode="json"))
    assert f'"{old}": ' in plan
    assert f'"{now}": ' in json.dumps(as_job_file(after))
    [message] = said
    assert message.startswith(f"{path}, line {line}: ")
    assert f"{old} is called {now!r} now" in message


@pytest.mark.parametrize(("text", "old", "now"), FILES)
def test_both_names_are_refused(text: str, old: str, now: str, tmp_path: Path) -> None:
    path = written(tmp_path, text, now, old)
    with pytest.raises(JobFileError) as caught:
        reading.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line_of(path, old)}: ")
    assert message.endswith(f"{old}: the old name of {now!r}, which is given as well: keep one of them.")


@pytest.mark.parametrize(("text", "old", "now"), FILES)
@pytest.mark.parametrize("typed", [0, 1])
def test_a_misspelt_name_leads_to_the_new_one(text: str, old: str, now: str, typed: int, tmp_path: Path) -> None:
    wrong = f"{(old, now)[typed]}x"
    with pytest.raises(JobFileError, match=rf"{wrong}: unknown key\. Did you mean {now!r}\? Allowed here: .*\b{now}\b"):
        reading.load(written(tmp_path, text, wrong))


def test_an_override_replaces_the_key_by_either_name(tmp_path: Path) -> None:
    for given in ("batch", "batch_size"):
        path = written(tmp_path, FILES[0][0], given)
        for name in ("batch", "batch_size"):
            job: Any = reading.load(path, [f"decode.{name}=5"], tell=lambda message: None)
            assert job.decode.batch_size == 5


def test_a_plan_s_names_are_told_by_those_of_the_job_file() -> None:
    job = reading.load({"job": "decode", "input": "a", "decode": {"model": "m"}})
    assert renamed_in(job) == {"decode.batch": "decode.batch_size"}
    lego = reading.load({"job": "learn-concepts", "input": "a", "samples": {"subjects": ["cat"]}})
    assert renamed_in(lego) == {"samples.count": "samples.draws", "start": "inverter"}


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


def test_shipped_job_files_speak_the_new_words() -> None:
    said: list[str] = []
    for path in (Path(ROOT) / "jobs/examples").glob("*.yaml"):
        reading.load(path, [] if "input:" in path.read_text() else ["input=a"], said.append)
    assert said == []


def test_the_docs_list_every_renamed_key() -> None:
    text = (Path(ROOT) / "docs/jobs.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE))
    assert listed == {pair for old in RENAMED.values() for pair in old.items()}
