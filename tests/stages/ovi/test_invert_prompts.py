"""The stage, the job model, and the table of `compbench`, on random weights."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.commands.compbench import compare, interval, read_prompts, read_scores, tabulate
from jobs.kinds.invert_prompts import InvertPrompts, summarise
from jobs.schema.reading import JobFileError, load
from stages.ovi.settings import InvertPromptsSettings
from stages.ovi.stage import InvertPrompts as Stage
from tests.support import ROOT
from tests.support.tiny_kandinsky import WIDTH, build_decoder, build_prior, build_reference

JOBS = ROOT / "jobs" / "examples"
METHODS = [
    {"method": "text-embedding"},
    {"method": "retrieval", "k": 3, "name": "near"},
    {"method": "ovi", "steps": 4, "slots": 3},
    {"method": "direct", "steps": 5},
]
LABELS = ["text-embedding", "near", "ovi", "direct"]


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    prior = build_prior(folder / "prior")
    return {
        "model": prior,
        "methods": METHODS,
        "reference": build_reference(folder / "made", prior),
        "decoder": {"model": build_decoder(folder / "decoder"), "steps": 2, "batch": 3},
        "scores": ["clip", "frechet"],
        "store_tokens": True,
    }


@pytest.fixture(scope="module")
def stage(params):
    return Stage(InvertPromptsSettings(**params))


def rows(prompts, labels=LABELS):
    return [{"id": f"p{i}/{m}", "prompt": p, "method": m} for i, p in enumerate(prompts) for m in labels]


PROMPTS = ["a red star", "blue circle <b>", "striped ring", "photo of ice " * 40, "星"]


@pytest.fixture(scope="module")
def solved(stage):
    found = list(stage(rows(PROMPTS)))
    return {row["id"]: row for row in found}, stage.take_summary()


def test_one_row_out_for_each_row_in_with_the_declared_columns(solved, params):
    found, _ = solved
    assert sorted(found) == sorted(row["id"] for row in rows(PROMPTS))
    declared = {column.name for column in Stage.describe(InvertPromptsSettings(**params)).columns}
    for row in found.values():
        assert row["status"] == "ok"
        assert set(row) - {"id", "status", "error"} <= declared
        assert row["embedding"].shape == (WIDTH,)
        assert row["image"].size == (16, 16)
        unit = row["embedding"] / np.linalg.norm(row["embedding"])
        assert row["norm"] == pytest.approx(np.linalg.norm(row["embedding"]), rel=1e-5)
        assert 0 <= row["nearest_cosine"] <= 1.0001
        assert abs(unit @ unit - 1) < 1e-5
    assert found["p0/ovi"]["steps"] == 4
    assert found["p0/ovi"]["passes"] == 5
    assert found["p0/ovi"]["tokens"].shape == (4, 32)
    assert found["p1/near"]["nearest_id"].startswith("image")


def test_results_do_not_depend_on_how_rows_are_split(stage, solved):
    found, _ = solved
    alone = list(stage(rows(PROMPTS)[6:7])) + list(stage(rows(PROMPTS)[3:4]))
    for row in alone:
        assert np.abs(row["embedding"] - found[row["id"]]["embedding"]).max() < 1e-4
        assert np.abs(np.asarray(row["image"], int) - np.asarray(found[row["id"]]["image"], int)).max() <= 2
    stage.take_summary()


def test_bad_rows_fail_alone_and_say_why(stage):
    bad = [
        {"id": "a/ovi", "prompt": None, "method": "ovi"},
        {"id": "b/ovi", "prompt": "  ", "method": "ovi"},
        {"id": "c/x", "prompt": "star", "method": "x"},
        {"id": "d/near", "caption": "star", "method": "near"},
    ]
    found = {row["id"]: row for row in stage(bad)}
    assert {i: row["status"] for i, row in found.items()} == {
        "a/ovi": "failed", "b/ovi": "failed", "c/x": "failed", "d/near": "ok"
    }  # fmt: skip
    assert "prompt" in found["a/ovi"]["error"]
    assert "empty" in found["b/ovi"]["error"]
    assert "text-embedding, near, ovi, direct" in found["c/x"]["error"]
    stage.take_summary()


def test_the_summary_adds_up_over_shards(solved, params):
    found, summary = solved
    columns = ["method", "text_cosine", "nearest_cosine", "clip_score", "steps"]
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in found.values()])
    whole = summarise([table], [summary], params["reference"])
    assert list(whole) == [row["method"] for i, row in found.items() if i.startswith("p0/")]
    for label in LABELS:
        assert whole[label]["rows"] == len(PROMPTS)
        mean = np.mean([row["text_cosine"] for row in found.values() if row["method"] == label])
        assert whole[label]["text_cosine"] == pytest.approx(mean, rel=1e-5)
        assert whole[label]["frechet_pictures"] >= 0
        assert whole[label]["seconds_per_prompt"] > 0
    assert 0 < whole["ovi"]["occupancy"] <= 1
    twice = summarise([table, table], [summary, summary], params["reference"])
    assert twice["ovi"]["rows"] == 2 * len(PROMPTS)
    assert twice["near"]["text_cosine"] == pytest.approx(whole["near"]["text_cosine"])


def test_the_oracle_needs_what_was_asked():
    from stages.ovi.scoring import asked_of

    asked = asked_of({"objects": '[{"shape": "star", "color": null}]', "relation": None, "count": 2})
    assert asked == {"objects": [{"shape": "star"}], "relation": None, "count": 2}
    assert asked_of({"objects": None}) is None
    with pytest.raises(ValueError, match="JSON"):
        asked_of({"objects": "a star"})


def test_job_plans_one_row_a_prompt_and_method(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a star\na ring\n")
    job = load({"job": "invert-prompts", "input": str(prompts), "methods": ["text-embedding", "direct"], "draws": 2})
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


def test_real_prompt_files_are_read_by_category(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car and a blue book\n\na green bench\n")
    (tmp_path / "spatial_val.txt").write_text("a cat left of a dog\tleft\n")
    (tmp_path / "color_train.txt").write_text("not this\n")
    found = list(read_prompts(tmp_path, None))
    assert [(row["id"], row["category"], row["prompt"]) for row in found] == [
        ("color-0", "color", "a red car and a blue book"),
        ("color-1", "color", "a green bench"),
        ("spatial-0", "spatial", "a cat left of a dog"),
    ]
    assert len(list(read_prompts(tmp_path, 1))) == 2
    miniature = list(read_prompts(None, 2))
    assert len(miniature) == 12
    assert miniature[0]["objects"]
    assert [row["category"] for row in read_prompts(tmp_path, None, ["spatial"])] == ["spatial"]
    assert [row["id"] for row in read_prompts(None, 1, ["never", "rare"])] == ["never-000", "rare-000"]
    with pytest.raises(ValueError, match="no category 'colour', there are color, spatial"):
        list(read_prompts(tmp_path, None, ["colour"]))
    with pytest.raises(ValueError, match="no prompt set 'color'"):
        list(read_prompts(None, None, ["color"]))
    with pytest.raises(ValueError, match="no prompt files"):
        list(read_prompts(tmp_path / "empty", None))


def test_the_table_gives_means_and_intervals():
    mean, half = interval([0.0, 1.0, 1.0, 0.0])
    assert (mean, half) == (0.5, pytest.approx(1.959964 * np.std([0, 1, 1, 0], ddof=1) / 2))
    scores = {
        ("ovi", "colour", "bound"): {"a": 1.0, "b": 0.5},
        ("ovi", "shape", "bound"): {"c": 0.0},
        ("near", "colour", "bound"): {"a": 0.75, "b": 0.25},
        ("near", "shape", "bound"): {"c": 1.0},
        ("near", "shape", "clip_score"): {"c": 9.0},
    }
    text = tabulate(scores, {"ovi": {"clip_score": 31.0, "passes": None}, "near": {"clip_score": 30.0}})
    assert f"| ovi | 0.750 ± 0.490 | 0.000 ± 0.000 | 0.500 ± {1.959964 * 0.5 / 3**0.5:.3f} | 31 |" in text
    differences = compare(scores)
    half = 1.959964 * np.std([0.25, 0.25, -1.0], ddof=1) / 3**0.5
    assert f"| ovi |  | {-0.5 / 3:+.3f} ± {half:.3f} |" in differences
    sure = compare({("a", "c", "bound"): {"p": 1.0, "q": 0.9}, ("b", "c", "bound"): {"p": 0.5, "q": 0.4, "r": 0.0}})
    assert "| a |  | **+0.500 ± 0.000** |" in sure


def test_draws_of_a_prompt_are_averaged_before_the_interval(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [
        {"id": f"set/p{p}/{d}/ovi", "draw": str(d), "method": "ovi", "category": "c", "bound": value, "success": None}
        for p, d, value in [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 1.0), (1, 1, None)]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "part-0.parquet")
    assert read_scores(tmp_path) == {("ovi", "c", "bound"): {"set/p0": 0.5, "set/p1": 1.0}}


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


def test_end_to_end_on_ray(params, tmp_path, local_ray):
    """Rows through the runtime: planned twice a prompt, committed, summarised, on the report page, and resumed."""
    from jobs.run import run_job

    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "category": "c", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "none", "prompt": ""}]))
    config = {
        "job": "invert-prompts",
        "input": {"path": str(prompts), "id": "id"},
        "model": params["model"],
        "reference": params["reference"],
        "methods": ["text-embedding", {"method": "ovi", "steps": 3}],
        "decode": {"model": params["decoder"]["model"], "steps": 2},
        "score": ["clip", "frechet"],
        "keep": ["category"],
        "shard_rows": 5,
        "max_failed_fraction": 0.5,
        "resources": {"cpus": 1},
    }
    done = run_job(config, output=str(tmp_path / "out"))
    assert (done.state, done.planned, done.ok, done.failed, done.shards) == ("complete", 12, 10, 2, 3)
    again = run_job(config, output=str(tmp_path / "out"))
    assert again.resumed == 3
    import datasets

    rows = datasets.load_dataset("parquet", data_files=done.data, split="train", cache_dir=str(tmp_path / "cache"))
    assert {row["id"] for row in rows} == {f"p{i}/{m}" for i in range(5) for m in ("text-embedding", "ovi")} | {
        "none/text-embedding", "none/ovi"
    }  # fmt: skip
    good = [row for row in rows if row["status"] == "ok"]
    assert all(len(row["embedding"]) == WIDTH and row["image"].size == (16, 16) for row in good)
    assert good[0]["category"] == "c"
    summary = json.loads((tmp_path / "out" / "methods.json").read_text())
    assert summary["ovi"]["rows"] == 5
    assert summary["ovi"]["failed"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Prompt by method" in page
    assert "blue circle &lt;b&gt;" in page
    assert "blue circle <b>" not in page
