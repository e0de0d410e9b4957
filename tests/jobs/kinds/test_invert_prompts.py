"""The job `invert-prompts`: its model and its panels."""

import io
import json

import pytest
import yaml

from jobs.kinds.invert_prompts import InvertPrompts
from jobs.schema.reading import JobFileError, load
from stages.ovi.stage import InvertPrompts as Stage
from tests.support import ROOT

JOBS = ROOT / "jobs" / "examples"


def test_job_plans_one_row_a_prompt_and_method(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a star\na ring\n")
    job = load({"job": "invert-prompts", "input": str(prompts), "methods": ["text-embedding", "direct"],
                "draws": 2, "reference": str(tmp_path)})  # fmt: skip
    assert isinstance(job, InvertPrompts)
    assert job.source().variants == {"draw": ("0", "1"), "method": ("text-embedding", "direct")}
    assert job.stage().load_class() is Stage
    assert json.loads(json.dumps(job.stage().params))["methods"][1]["constraint"]["mahalanobis"] == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ["ovi", "ovi"]}, "two are called 'ovi'"),
        ({"methods": [{"method": "ovi", "name": "a/b"}]}, "slash"),
        ({"methods": ["magic"]}, "magic"),
        ({"methods": []}, "methods"),
        ({"score": ["clip"]}, "decode"),
        ({"score": ["frechet"]}, "reference"),
        ({"methods": [{"method": "ovi", "recipe": "published", "steps": 5}]}, "fixes steps"),
        ({"methods": [{"method": "ovi", "tokenz": 5}]}, "tokenz"),
        ({"methods": ["retrieval"]}, "method 'retrieval' needs `reference:`"),
        ({"methods": ["direct"]}, "method 'direct' needs `reference:`"),
        ({"methods": ["ovi", {"method": "text-embedding", "name": "own", "rescale": True}]}, "method 'own' needs"),
        ({"methods": [{"method": "ovi", "constraint": {"neighbours": 1}}]}, "method 'ovi' needs"),
        ({"methods": [{"method": "ovi", "stop": {"watch": "mahalanobis", "patience": 3}}]}, "method 'ovi' needs"),
    ],
)
def test_job_files_that_cannot_be_meant(change, says):
    with pytest.raises(JobFileError, match=says):
        load({"job": "invert-prompts", "input": "p.txt", "methods": ["ovi"], **change})


@pytest.mark.parametrize("name", ["ovi-kandinsky22", "compbench-kandinsky22", "compbench-micro"])
def test_shipped_job_files_are_valid(name):
    config = yaml.safe_load((JOBS / f"{name}.yaml").read_text())
    job = load({"input": "p.txt", **config})
    assert isinstance(job, InvertPrompts)
    assert len(job.methods) >= 5


def test_report_panels_show_prompts_by_methods(tmp_path):
    from types import SimpleNamespace

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    found = [
        {"id": f"p{i}/{m}", "prompt": f"<b>{i}</b>", "method": m, "image": buffer.getvalue()}
        for i in range(3)
        for m in ("ovi", "near")
    ][:-1]
    (tmp_path / "methods.json").write_text(json.dumps({"ovi": {"rows": 3.0, "norm": 1.25}, "near": {"rows": 2.0}}))
    view = SimpleNamespace(
        columns={"image": "image"}, rows=lambda columns, limit, spread: found,
        config={"methods": [{"method": "ovi", "name": ""}, {"method": "retrieval", "name": "near"}]},
        output=SimpleNamespace(open_file=lambda name: (tmp_path / name).open("rb")),
    )  # fmt: skip
    job = InvertPrompts.model_construct()
    methods, grid = (panel.draw(view) for panel in job.panels())
    assert grid.count("<img") == 5
    assert grid.count("no picture") == 1
    assert "&lt;b&gt;2" in grid
    assert "<b>" not in grid
    assert grid.index("<th>ovi") < grid.index("<th>near")
    assert "1.25" in methods
