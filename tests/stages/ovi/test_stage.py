"""The stage of `invert-prompts` on random weights, alone and on Ray."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.kinds.invert_prompts import InvertPrompts as InvertPromptsJob
from jobs.kinds.invert_prompts import summarise
from pipeline.output.commit import read_summary
from pipeline.run.draft import RunSpec
from stages.ovi.settings import InvertPromptsSettings
from stages.ovi.stage import InvertPrompts as Stage
from tests.support.in_hand import Planned
from tests.support.tiny_kandinsky import WIDTH, build_decoder, build_prior, build_reference

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
        "encoder": prior,
        "methods": METHODS,
        "reference": build_reference(folder / "made", prior),
        "decoder": {"model": build_decoder(folder / "decoder"), "steps": 2, "batch_size": 3},
        "scores": ["clip", "frechet"],
        "store_tokens": True,
    }


@pytest.fixture(scope="module")
def stage(params):
    return Stage(InvertPromptsSettings(**params))


def test_a_job_in_half_precision_holds_no_other_weights(params):
    methods = [
        {"method": "ovi", "name": f"ovi-{lr}", "lr": lr, "steps": 2, "precision": "bfloat16"} for lr in (0.1, 0.2)
    ]
    alone = Stage(InvertPromptsSettings(encoder=params["encoder"], methods=methods))
    linear = [layer for layer in alone.image_encoder.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert {layer.weight.dtype for layer in linear} == {torch.bfloat16}
    decoded = Stage(InvertPromptsSettings(encoder=params["encoder"], methods=methods, decoder=params["decoder"]))
    assert {weight.dtype for weight in decoded.image_encoder.model.parameters()} == {torch.float32}
    given = rows(["a red star"], [method["name"] for method in methods])
    ours, theirs = ({row["id"]: row["embedding"] for row in stage(given)} for stage in (alone, decoded))
    assert all((ours[name] == theirs[name]).all() for name in ours)


def rows(prompts, labels=LABELS):
    return [{"id": f"p{i}/{m}", "prompt": p, "method": m} for i, p in enumerate(prompts) for m in labels]


PROMPTS = ["a red star", "blue circle <b>", "striped ring", "photo of ice " * 40, "星"]


@pytest.fixture(scope="module")
def solved(stage):
    found, tally = list(stage(rows(PROMPTS))), stage.tally()
    for row in found:
        tally.add(row)
    return {row["id"]: row for row in found}, {**stage.take_summary(), **tally.summary()}


def test_what_does_not_fit_is_told_before_anything_is_loaded(params, tmp_path):
    def described(**changes):
        return Stage.describe(InvertPromptsSettings(**{**params, **changes}))

    with pytest.raises(ValueError, match=r"method 'near': k is 301, .* has 300 rows"):
        described(methods=[{"method": "retrieval", "k": 301, "name": "near"}], store_tokens=False)
    with pytest.raises(ValueError, match="takes embeddings of width 25, the encoder gives 24"):
        described(decoder={"model": build_decoder(tmp_path / "decoder", width=25)})
    other = build_prior(tmp_path / "other", seed=4)
    with pytest.raises(ValueError, match="embeddings of different encoders cannot be compared"):
        described(encoder=other)


@pytest.mark.parametrize("compact", [False, True])
def test_hidden_states_are_those_behind_the_embedding(stage, params, compact):
    """Of CLIP the class token, which comes first, is what the head makes the embedding of."""
    given = {"encoder": params["encoder"], "store_states": "last",
             "methods": ["text-embedding", {"method": "ovi", "steps": 4, "compact": compact}]}  # fmt: skip
    settings = InvertPromptsSettings(**given)
    (column,) = [one for one in Stage.describe(settings).columns if one.name == "states"]
    assert (column.shape, column.dtype) == ((5 if compact else 17, 32), "float16")
    found = list(Stage(settings)(rows(PROMPTS[:2], ["text-embedding", "ovi"])))
    model = stage.image_encoder.model
    for row in found:
        assert ("states" in row) == (row["method"] == "ovi")
        if "states" in row:
            assert (row["states"].shape, row["states"].dtype) == (column.shape, np.float16)
            head = model.visual_projection(model.vision_model.post_layernorm(torch.tensor(row["states"][0]).float()))
            np.testing.assert_allclose(head.detach().numpy(), row["embedding"], atol=0.02)
    for methods, said in (
        (["text-embedding"], "needs OVI methods"),
        (["ovi", {"method": "ovi", "name": "small", "compact": True}], "OVI methods with sequences of one length"),
        ([{"method": "ovi", "stop": {"relative": 0.1, "best": True}}], "keeps the last step's"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Stage.describe(InvertPromptsSettings(**{**given, "methods": methods}))


def test_prompts_that_the_encoder_cuts_are_told(solved):
    found, _ = solved
    told = [(found[f"p{i}/ovi"]["prompt_tokens"], found[f"p{i}/ovi"]["prompt_truncated"]) for i in range(len(PROMPTS))]
    assert told[0] == (5, False)
    assert [cut for _, cut in told] == [False, False, False, True, False]
    assert told[3][0] == 2 + 3 * 40


def test_one_row_out_for_each_row_in_with_the_declared_columns(solved, params):
    found, _ = solved
    assert sorted(found) == sorted(row["id"] for row in rows(PROMPTS))
    declared = {column.name for column in Stage.describe(InvertPromptsSettings(**params)).columns}
    for row in found.values():
        assert row["status"] == "ok"
        assert set(row) - {"id", "status", "error"} - declared == {"picture_embedding"}  # for the tally
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


@pytest.mark.parametrize(("held", "read"), [(1 << 20, 4), (0, 12)])
def test_a_prompt_is_read_once_while_there_is_room_to_remember_it(params, monkeypatch, held, read):
    """Wherever its rows stand; what is forgotten is read again, and the same."""
    monkeypatch.setattr("stages.ovi.stage.KNOWN_BYTES", held)
    one = {"encoder": params["encoder"], "methods": [{"method": "text-embedding"}]}
    stage = Stage(InvertPromptsSettings(**one))
    stage.chunk, seen, counted = 4, [], stage.text.counted
    monkeypatch.setattr(stage.text, "counted", lambda prompts, *batch: seen.extend(prompts) or counted(prompts, *batch))
    prompts = ["a red star", "a blue ring", "two moons", "a cat"] * 3
    given = [{"id": f"{n}/text-embedding", "prompt": p, "method": "text-embedding"} for n, p in enumerate(prompts)]
    found = {row["id"]: row["embedding"] for row in stage(given)}
    assert len(seen) == read
    wanted_BE = stage.text(prompts[:4]).numpy()
    for number in range(12):
        assert np.abs(found[f"{number}/text-embedding"] - wanted_BE[number % 4]).max() < 1e-5


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
    columns = ["id", "status", "method", "text_cosine", "nearest_cosine", "clip_score", "steps"]
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in found.values()])
    whole = summarise([table], [summary], LABELS, params["reference"])
    assert list(whole) == LABELS
    for label in LABELS:
        assert whole[label]["rows"] == len(PROMPTS)
        mean = np.mean([row["text_cosine"] for row in found.values() if row["method"] == label])
        assert whole[label]["text_cosine"] == pytest.approx(mean, rel=1e-5)
        assert whole[label]["frechet_pictures"] >= 0
        assert whole[label]["seconds_per_prompt"] > 0
    assert 0 < whole["ovi"]["occupancy"] <= 1
    twice = summarise([table, table], [summary, summary], LABELS, params["reference"])
    assert twice["ovi"]["rows"] == 2 * len(PROMPTS)
    assert twice["near"]["text_cosine"] == pytest.approx(whole["near"]["text_cosine"])


def test_what_older_code_left_of_a_shard_is_read(params):
    old = {"totals.ovi": np.array([3.0, 1, 6, 0, 40, 30]), "totals.direct": np.array([3.0, 0, 1.5, 0, 8, 8])}
    new = {"spent.ovi": np.array([2.0, 1, 60, 55]), "spent.direct": np.zeros(4)}
    table = pa.table({"id": ["a/ovi", "a/direct", "b/ovi"], "status": ["ok", "ok", "failed"]})
    told = summarise([table, table], [old, new], ["ovi", "direct"], None)
    assert told["ovi"] == {
        "rows": 2, "failed": 2, "seconds_per_prompt": 4, "decode_seconds_per_prompt": 0.5, "occupancy": 0.85
    }  # fmt: skip
    assert told["direct"]["occupancy"] == 1


MANY = 24
UNEQUAL = [
    {"method": "ovi", "steps": 12, "slots": 3, "stop": {"target": 0.35}, "name": "short"},
    {"method": "text-embedding"},
    {"method": "direct", "steps": 30, "slots": 4},
]


@pytest.fixture
def planned(params, tmp_path):
    """A worker on shards of 6 rows; `apart`: it takes one after the other."""

    def plan(name, **options):
        job = InvertPromptsJob.model_validate({
            "job": "invert-prompts", "input": {"path": str(tmp_path / "prompts.txt"), "columns": {"prompt": "text"}},
            "encoder": params["encoder"], "reference": params["reference"], "decode": params["decoder"],
            "score": ["clip", "frechet"], "methods": UNEQUAL,
        })  # fmt: skip
        words = ["red", "blue", "star", "ring", "ice", "small", "striped", "heart", "plain"]
        draw = np.random.default_rng(3)
        lines = [" ".join(draw.choice(words, draw.integers(1, 6))) for _ in range(MANY)]
        (tmp_path / "prompts.txt").write_text("".join(f"{line} {i}\n" for i, line in enumerate(lines)))
        return Planned(RunSpec(job.stage(), job.source(), str(tmp_path / name), shard_rows=6), **options)

    return plan


def test_shards_in_hand_together_give_what_they_give_one_after_the_other(planned, params):
    """The same rows, pictures and statistics of every shard, and slots that stay full over their borders."""
    alone, joined = planned("alone", apart=True), planned("joined")
    apart, together = alone.all(), joined.all()
    assert len(together) == MANY * len(UNEQUAL) // 6
    steps = set()
    for one, other in zip(apart, together, strict=True):
        a, b = alone.table(one), joined.table(other)
        exact = ["id", "prompt", "method", "status", "steps", "passes", "stopped", "nearest_id", "prompt_tokens"]
        assert a.select(exact).equals(b.select(exact))
        steps |= set(a["steps"].to_pylist())
        for name in ("embedding", "loss", "text_cosine", "norm", "mahalanobis", "clip_score"):
            values = (np.array(table[name].to_pylist(), float) for table in (a, b))
            close = 1e-3 if name == "clip_score" else 1e-4  # of other batches; a level of a pixel
            assert np.allclose(*values, rtol=close, atol=close, equal_nan=True), name
        left, right = (summaries(bench, record) for bench, record in ((alone, one), (joined, other)))
        moments = sorted(name for name in left if name.startswith("moments"))
        assert len(moments) == 4 * 2 * len(UNEQUAL)
        assert moments == sorted(name for name in right if name.startswith("moments"))
        for name in moments:
            assert np.allclose(left[name], right[name], rtol=1e-3, atol=1e-3), name
    assert len(steps) > 6
    labels = ["short", "text-embedding", "direct"]
    whole = [
        summarise(map(bench.table, records), (summaries(bench, r) for r in records), labels, params["reference"])
        for bench, records in ((alone, apart), (joined, together))
    ]
    for label, slots in (("short", 3), ("direct", 4)):
        assert whole[0][label]["rows"] == whole[1][label]["rows"] == MANY
        rows_of = [row for r in together for row in joined.rows(r) if row["method"] == label]
        longest = max(row["steps"] + 1 for row in rows_of)  # the start is evaluated too
        idle = [sum(idle_slots(bench, r, label) for r in rs) for bench, rs in ((alone, apart), (joined, together))]
        assert idle[1] <= (slots - 1) * longest < idle[0]  # once, when no row is left


def idle_slots(bench, record, label):
    _, _, slots, busy = summaries(bench, record)[f"spent.{label}"]
    return slots - busy


def summaries(bench, record):
    (name,) = record.summary
    return read_summary(bench.output.folder, name)


def test_end_to_end_on_ray(params, tmp_path, local_ray):
    """Rows through the runtime: planned twice a prompt, committed, summarised, on the report page, and resumed."""
    from jobs.run import run_job

    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "category": "c", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "none", "prompt": ""}]))
    config = {
        "job": "invert-prompts",
        "input": {"path": str(prompts), "id": "id"},
        "encoder": params["encoder"],
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
    assert summary["ovi"]["failed"] == 1  # the empty prompt's
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Prompt by method" in page
    assert "blue circle &lt;b&gt;" in page
    assert "blue circle <b>" not in page
