"""Job files: what is taken, and what is said when it is not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.schema import reading, registry
from jobs.schema.base import Input, Resources, RowJob, Workers
from jobs.schema.reading import JobFileError
from pipeline.contract import keys_of
from pipeline.input.source import FORMATS
from tests.support import ROOT


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(JobFileError) as caught:
        reading.load(path, overrides)
    return str(caught.value)


def test_a_minimal_file_becomes_its_model_with_defaults(tmp_path: Path, toy_job: type[RowJob]) -> None:
    job = reading.load(write(tmp_path, "job: toy\ninput: rows.jsonl\n"))
    assert isinstance(job, toy_job)
    assert job.input == Input(path=("rows.jsonl",))
    assert (job.seed, job.shard_rows, job.keep, job.output) == (0, 1000, (), None)
    assert job.resources == Resources()


def test_every_mistake_is_told_with_line_key_and_remedy(tmp_path: Path, toy_job: type[RowJob]) -> None:
    text = """\
job: toy
input:
  path: rows.jsonl
  colums: {prompt: caption}
  format: parkett
mode: uper
sead: 3
factor: fast
resources:
  workers: {min: 3, max: 1}
"""
    path = write(tmp_path, text)
    lines = complaint(path).splitlines()
    assert lines[0].startswith(f"{path}, line 4: input.colums: unknown key. Did you mean 'columns'? Allowed here: ")
    assert lines[1].startswith(f"{path}, line 5: input.format: 'parkett' is not allowed. Did you mean 'parquet'?")
    assert all(name in lines[1] for name in FORMATS)
    assert lines[2].startswith(f"{path}, line 6: mode: 'uper' is not allowed. Did you mean 'upper'?")
    assert lines[3].startswith(f"{path}, line 7: sead: unknown key. Did you mean 'seed'?")
    assert lines[4] == f"{path}, line 8: factor: 'fast' will not do: should be a number."
    assert lines[5] == f"{path}, line 10: resources.workers: max (1) is below min (3)"
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n", "is a mapping of keys to values, this one is a list"),
        ("job: [toy\n", "line 2: not valid YAML"),
        ("job: toy\ninput: a\nseed: 1\nseed: 2\n", "line 4: seed is given twice (first on 3)"),
        ("input: a\n", "which job? The key is missing. Allowed: "),
        ("job: toi\ninput: a\n", "line 1: job: unknown kind of job 'toi'. Did you mean 'toy'?"),
        ("job: toy\n", "line 1: input: this key is required."),
        ("job: toy\ninput: {path: []}\n", "line 2: input.path: [] will not do"),
        ("job: toy\ninput: a\nseed: -1\n", "line 3: seed: -1 will not do: should be greater than or equal to 0."),
        ("job: toy\ninput: a\nseed: true\n", "line 3: seed: 'true' will not do: should be a whole number."),
        ("job: toy\ninput: a\nfactor: .inf\n", "line 3: factor: inf will not do: should be a finite number."),
        ("job: toy\ninput: a\nresources: {gpus: 1.5}\n", "resources.gpus: 1.5 will not do: should be a share of one"),
        ("job: toy\ninput: a\nresources: {decode_threads: true}\n", "'true' will not do: should be a whole number."),
        ("job: toy\ninput: a\nkeep: {a: b}\n", "line 3: keep"),
        ("job: toy\ninput: a\nresources: {gpu: 1}\n", "line 3: resources.gpu: unknown key. Did you mean 'gpus'?"),
        ("job: {a: b}\ninput: a\n", "unknown kind of job {'a': 'b'}"),
    ],
)
def test_single_mistakes(tmp_path: Path, toy_job: type[RowJob], text: str, said: str) -> None:
    assert said in complaint(write(tmp_path, text))


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("[lbbo]", "methods[0]: 'lbbo' is not allowed. Did you mean 'lbo'? Allowed: 'ddim', 'euler', "),
        ("[{steps: 3}]", "methods[0]: the key 'method' is required here."),
        ("[lbo, [a]]", "methods[1]: ['a'] will not do: should be a mapping of keys to values."),
        ("7", "methods: 7 will not do: should be a list."),
        ("[]", "methods: [] will not do: should not be empty."),
        ("[{method: lbo, passes: true}]", "methods[0].passes: 'true' will not do: should be a whole number."),
        ("", "methods: nothing will not do: should be a list."),
    ],
)
def test_methods_that_are_none_are_told_in_the_words_of_the_file(tmp_path: Path, methods: str, said: str) -> None:
    text = f"job: invert-images\ninput: a\nmodel: b\nmethods: {methods}\n"
    assert complaint(write(tmp_path, text)).startswith(f"{tmp_path / 'job.yaml'}, line 4: {said}")


@pytest.mark.parametrize("value", [None, 7, 1.5, True, "x", [], [7], [[1]], {}, {"a": 1}, {7: 8}, [{}], [None]])
def test_no_value_of_any_key_ends_in_a_traceback(value: object) -> None:
    """Each key of each kind of job, beside a job that is otherwise plain: it is taken, or told."""
    for kind in registry.kinds():
        model = registry.find(kind)
        for key in keys_of(model).values():
            with suppress(JobFileError):
                reading.load({"job": kind, "input": "a", "model": "b", "encoder": "c", key: value})


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "job: toy\n", "invert.yaml")
    assert "no such job file. Did you mean 'invert.yaml'?" in complaint(tmp_path / "inver.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in complaint(path)


def test_overrides_replace_nested_values(tmp_path: Path, toy_job: type[RowJob]) -> None:
    path = write(tmp_path, "job: toy\ninput: rows\nresources: {workers: 2}\n")
    changes = ["seed=7", "input.format=csv", "resources.workers.max=4", "keep=[a, b]", "factor=1e-3", "output=s3://b/o"]
    job = reading.load(path, changes)
    assert isinstance(job, toy_job)
    assert job.input == Input(path=("rows",), format="csv")
    assert (job.seed, job.keep, job.output, job.factor) == (7, ("a", "b"), "s3://b/o", 1e-3)
    assert job.resources.workers == Workers(min=1, max=4)
    assert "--set seed: write it as key=value" in complaint(path, "seed")
    assert "seeed: unknown key. Did you mean 'seed'?" in complaint(path, "seeed=3")


def test_overrides_write_short_forms_out() -> None:
    """Before, only `input` was: the others became ``{path: ...}``, which no such block has."""
    rare = {"job": "rare-concepts", "input": "a", "methods": ["random", "nao"], "anchors": "r", "inversion": "lbo"}
    job: Any = reading.load(rare, ["anchors.min_rows=3", "methods.1.points=9", "inversion.passes=4"])
    assert (job.anchors.reference, job.anchors.min_rows) == (reading.load(rare).anchors.reference, 3)  # type: ignore[attr-defined]
    assert (job.methods[1].method, job.methods[1].points) == ("nao", 9)
    assert (job.inversion.method, job.inversion.passes) == ("lbo", 4)
    reference = {"job": "reference", "input": ["a", "b"], "encoder": "m", "captions": "c.csv"}
    job = reading.load(reference, ["captions.id=key"])
    assert (job.captions.path, job.captions.id) == ("c.csv", "key")
    images: Any = reading.load({"job": "invert-images", "input": "a", "methods": "lbo"}, ["methods.passes=3"])
    assert [method.passes for method in images.methods] == [3]


def test_overrides_reach_steps_by_name_and_by_number(tmp_path: Path, toy_job: type[RowJob]) -> None:
    text = "job: chain\nsteps:\n- {job: toy, name: one, input: a}\n- {job: toy, name: two}\n"
    path = write(tmp_path, text)
    chain = reading.load(path, ["steps.one.factor=3", "steps.1.factor=4"])
    assert [step.factor for step in chain.steps] == [3, 4]  # type: ignore[attr-defined]
    assert "'tow' is no item of it. Did you mean 'two'?" in complaint(path, "steps.tow.factor=3")


def test_overrides_reach_methods_by_name_and_method(tmp_path: Path) -> None:
    methods = ["ddim", {"method": "lbo"}, {"method": "lbo", "name": "b"}]
    changes = ["methods.lbo.passes=3", "methods.b.passes=4", "methods.ddim.name=c"]
    job: Any = reading.load({"job": "invert-images", "input": "a", "methods": methods}, changes)
    assert [method.label for method in job.methods] == ["c", "lbo", "b"]
    assert [method.passes for method in job.methods[1:]] == [3, 4]
    path = write(tmp_path, "job: invert-images\ninput: a\nmodel: b\nmethods: [ddim, {method: lbo}]\n")
    said = complaint(path, "methods.passes=3")
    assert "methods is a list, and 'passes' is no item of it." in said
    assert said.endswith("Write methods.ITEM.KEY=value, where ITEM is one of ddim, lbo, 0, 1.")


def test_shipped_job_files_are_valid() -> None:
    folder = ROOT / "jobs" / "examples"
    found = sorted(folder.glob("*.yaml"))
    assert any(path.name == "quickstart.yaml" for path in found)
    for path in found:
        needs_input = "input:" not in path.read_text()  # those of `compbench`, which brings the prompt sets
        reading.load(path, ["input=prompts.jsonl"] if needs_input else [])


@pytest.mark.parametrize("text", ["job: toy\ninput: &a\n  path: *a\n", "&a\njob: toy\ninput: [*a]\n"])
def test_a_value_that_holds_itself_is_refused_in_a_line(tmp_path: Path, toy_job: type[RowJob], text: str) -> None:
    """YAML can say so by an anchor; it was a thousand lines of recursion."""
    assert complaint(write(tmp_path, text)).endswith("refers to itself by its anchor")
    fine = write(tmp_path, "job: toy\ninput: rows.jsonl\n")
    assert "--set keep=&a [*a]" in complaint(fine, "keep=&a [*a]")
    twice = write(tmp_path, "job: toy\ninput: &a rows.jsonl\noutput: *a\n")  # an anchor by itself is none
    assert reading.load(twice).output == "rows.jsonl"


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "gpu:0", "cuda:0, tpu", "GPU", ""])
def test_a_device_that_is_none_is_told_before_a_worker_starts(tmp_path: Path, device: str) -> None:
    text = f"job: invert-images\ninput: a\nmodel: b\ndevice: '{device}'\n"
    assert f"line 4: device: {device!r} is no device: write auto, cpu, cuda" in complaint(write(tmp_path, text))
