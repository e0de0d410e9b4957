"""The job learn-concepts: from a folder tree to files that diffusers loads, the command, the report panels."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image

from jobs.commands.try_concept import draw_sheet
from jobs.dry_run import plan_job
from jobs.kinds import learn_concepts
from jobs.kinds.learn_concepts import LearnConcepts
from jobs.kinds.train_inverter import InvertText, TrainInverter, draw_training
from jobs.run import run_spec
from pipeline.input.files import list_files, resolve
from pipeline.input.read import read_rows, reader_of
from pipeline.input.rows import Span
from pipeline.run.driver import make_plan
from stages.concepts.samples import concept_tokens, sheet, without_concept
from stages.inverter.model import TextInverter
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.support.tiny_stable_diffusion import build

LEARNING = {"steps": 4, "window": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture
def tree(tmp_path):
    """Three concepts: a good one, one with two subjects, one that lacks pictures."""
    rng = np.random.default_rng(0)
    says = {"concept": "frozen in ice", "positive": {"frozen": ["cold"], "ice": ["blue"]}}
    says |= {"negative": {"frozen": ["warm"], "ice": ["red"]}}
    places = {
        "frozen-in-ice": (says | {"subject": "robot"}, ["with", "without"]),
        "two-subjects": (says, [f"subjects/{s}/{side}" for s in ("star", "heart") for side in ("with", "without")]),
        "broken": (says | {"subject": "ring"}, ["with"]),
    }
    for name, (text, sides) in places.items():
        for side in sides:
            (tmp_path / "tree" / name / side).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "tree" / name / side / f"{number}.png")
        (tmp_path / "tree" / name / "concept.yaml").write_text(yaml.safe_dump(text))
    (tmp_path / "tree" / "frozen-in-ice" / "with" / "notes.txt").write_text("no picture")
    return tmp_path / "tree"


def rows_of(job) -> list[dict]:
    source = resolve(job.source())
    found = []
    for file in list_files(source):
        scan = reader_of(source).scan(source, file, lambda row: False)
        span = Span(file.name, file.path, 0, scan.rows)
        for raw in read_rows(source, (span,), 0, scan.rows, None):
            found.append({"id": raw.id, **raw.values, "error": raw.error})
    return found


class Output:
    """What `finish` and the panels see of a run's output."""

    def __init__(self, path: Path, rows: list[dict], config: dict) -> None:
        self.path, self.rows, self.plan = str(path), rows, {"config": config}

    def tables(self, columns=None):
        for row in self.rows:  # a shard a row
            kept = {name: row.get(name) for name in columns or row}
            yield pa.Table.from_pylist(
                [{k: v.reshape(-1).tolist() if hasattr(v, "shape") else v for k, v in kept.items()}]
            )

    def open_file(self, name, mode="rb"):
        target = Path(self.path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        return open(target, mode)

    @property
    def output(self):
        return self


def run(job, tmp_path) -> Output:
    job = job.model_copy(update={"output": str(tmp_path / "out")})
    stage = job.stage().build()
    finished = Output(tmp_path / "out", list(stage(rows_of(job))), job.own_settings())
    job.finish(finished)
    return finished


def job_of(folder, tree, **changes) -> LearnConcepts:
    plain = {"input": str(tree), "model": folder, "learning": LEARNING, "device": "cpu", "checkpoint_seconds": 0}
    return LearnConcepts.model_validate(plain | changes)


def test_a_dry_run_shows_the_fingerprint_that_the_run_will_have(folder, tree, tmp_path):
    out = str(tmp_path / "out")
    (dry,) = plan_job(job_of(folder, tree), out)
    placed = job_of(folder, tree, output=out)
    assert placed.stage().params["checkpoints"] == f"{out}/_checkpoints"
    assert dry.plan.fingerprint == make_plan(run_spec(placed, out)).fingerprint


def test_a_folder_tree_becomes_rows(folder, tree):
    rows = {row["id"]: row for row in rows_of(job_of(folder, tree))}
    assert sorted(rows) == ["broken", "frozen-in-ice", "two-subjects"]
    assert [Path(p).name for p in rows["frozen-in-ice"]["with"]] == ["0.png", "1.png"]
    assert [s["name"] for s in rows["two-subjects"]["subjects"]] == ["heart", "star"]
    before = scans(job_of(folder, tree))
    Image.new("RGB", (16, 16)).save(tree / "broken" / "with" / "2.png")
    changed = {name for name, digest in scans(job_of(folder, tree)).items() if digest != before[name]}
    assert changed == {"broken/concept.yaml"}  # a new picture is a new input
    (tree / "broken" / "concept.yaml").write_text("concept: [")
    assert "no readable YAML" in {row["id"]: row for row in rows_of(job_of(folder, tree))}["broken"]["error"]


def scans(job) -> dict[str, str]:
    source = resolve(job.source())
    return {f.name: reader_of(source).scan(source, f, lambda row: False).digest for f in list_files(source)}


def test_the_files_load_in_diffusers_and_change_the_picture(folder, tree, tmp_path):
    from diffusers import StableDiffusionPipeline

    finished = run(job_of(folder, tree), tmp_path)
    status = {row["id"]: row["status"] for row in finished.rows}
    assert status == {"frozen-in-ice": "ok", "two-subjects": "ok", "broken": "failed"}
    error = next(row["error"] for row in finished.rows if row["id"] == "broken")
    assert "0 pictures without the concept" in error
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.safetensors"))
    own = [f"concepts/frozen-in-ice/frozen-in-ice-{t}/learned_embeds.safetensors" for t in ("1", "2", "subject-1")]
    assert [name for name in written if "two" not in name] == own
    assert len(written) == 3 + 4  # and no checkpoint is left

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    size = len(pipe.tokenizer)
    for number, name in enumerate(own[:2], start=1):
        pipe.load_textual_inversion(str(tmp_path / "out" / name))
        token = pipe.tokenizer.convert_tokens_to_ids(f"<frozen-in-ice-{number}>")
        assert token == size + number - 1
        row = next(row for row in finished.rows if row["id"] == "frozen-in-ice")
        stored = pipe.text_encoder.get_input_embeddings().weight[token].detach().numpy()
        assert np.array_equal(stored, row["embeddings"][number - 1])

    def draw(prompt):
        generator = torch.Generator().manual_seed(0)
        return np.array(pipe(prompt, num_inference_steps=2, generator=generator).images[0], dtype=int)

    learned = draw("photo of a heart that is <frozen-in-ice-1> in <frozen-in-ice-2>")
    plain = draw("photo of a heart that is frozen in ice")
    assert np.abs(learned - plain).max() > 0


def test_sdxl_writes_a_file_for_each_encoder(tree, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder = build(tmp_path / "sdxl", "sdxl")
    run(job_of(folder, tree), tmp_path)
    place = tmp_path / "out" / "concepts" / "frozen-in-ice" / "frozen-in-ice-1"
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(str(place))
    pipe.load_textual_inversion(
        str(place),
        weight_name="learned_embeds_2.safetensors",
        text_encoder=pipe.text_encoder_2,
        tokenizer=pipe.tokenizer_2,
    )
    made = pipe("a <frozen-in-ice-1> star", num_inference_steps=1, output_type="np").images
    assert np.isfinite(made).all()


def test_concepts_of_one_name_keep_apart():
    rows = [{"id": i, "name": n} for i, n in (("a", "x"), ("b", "y"), ("c", "x"))]
    names = learn_concepts.folders(rows)
    assert names[1] == "y"
    assert len(set(names)) == 3
    assert all(name.startswith("x--") for name in (names[0], names[2]))


def test_a_sheet_with_and_without(folder, tree, tmp_path):
    finished = run(job_of(folder, tree), tmp_path)
    rows = [row for row in finished.rows if row["status"] == "ok"]
    options = {"without": None, "count": 3, "steps": 2, "guidance": 3.0, "seed": 0, "model": None, "device": "cpu"}
    path = str(tmp_path / "sheet.png")
    config = finished.plan["config"]
    prompt = "photo of a heart that is <cpt-1> in <cpt-2>"
    plain, _ = draw_sheet(rows, config, "frozen-in-ice", prompt, sheet=path, **options)
    assert plain == "photo of a heart"
    page = np.array(Image.open(path), dtype=int)
    assert page.shape == (16 * 2 + 4, 16 * 3 + 8, 3)
    assert np.abs(page[:16] - page[-16:]).max() > 0  # the concept changes the picture
    with pytest.raises(ValueError, match="no concept 'melted' was learned there; it holds frozen-in-ice, two-subjects"):
        draw_sheet(rows, config, "melted", "a <cpt-1>", sheet=path, **options)
    with pytest.raises(ValueError, match="names <frozen-in-ice-7>"):
        draw_sheet(rows, config, "frozen-in-ice", "a <cpt-7>", sheet=path, **options)


def test_prompts_with_short_names():
    tokens = ["<ice-1>", "<ice-2>", "<ice-subject-1>"]
    assert concept_tokens("a <subj> in <cpt-2>, <ice-1>", "ice", tokens) == "a <ice-subject-1> in <ice-2>, <ice-1>"
    with pytest.raises(ValueError, match="names no learned word"):
        concept_tokens("a heart", "ice", tokens)
    assert without_concept("a <ice-1> heart") == "a heart"
    assert without_concept("hearts that are <ice-1> in <ice-2>, red") == "hearts, red"
    page = sheet([Image.new("RGB", (4, 4), c) for c in ("red", "lime", "blue")], columns=2, gap=1)
    assert page.size == (9, 9)
    assert page.getpixel((6, 1)) == (0, 255, 0)
    assert page.getpixel((1, 6)) == (0, 0, 255)


def test_samples_on_new_subjects_and_report_panels(folder, tree, tmp_path):
    samples = {"subjects": ["heart", "star"], "draws": 3, "steps": 1, "guidance": 1}
    job = job_of(folder, tree, samples=samples)
    finished = run(job, tmp_path)
    row = next(row for row in finished.rows if row["id"] == "frozen-in-ice")
    assert row["samples"].size == (3 * 16 + 8, 2 * 16 + 4)
    assert row["training"].size == (4 * 16 + 12, 16)
    assert {c.name for c in job.stage().describe().columns} == set(row) - {
        *("id", "concept", "subject", "positive", "negative", "with", "without", "status", "error")
    }

    class View:
        columns = dict.fromkeys(row)

        def rows(self, columns, limit=24):
            return [{name: encoded(row[name]) for name in columns}]

    page = str(learn_concepts.draw_concepts(View())) + str(learn_concepts.draw_curves(View()))
    assert page.count("<img") == 2
    assert "robot" in page
    assert page.count("<svg") == 3
    assert "&lt;frozen-in-ice-1&gt;" in page


def encoded(value):
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, "PNG")
    return buffer.getvalue()


def test_settings_that_cannot_work_are_refused(folder):
    for learning, message in (({"steps": 5, "window": 2}, "no multiple of window"), ({"pictures": 3}, "is odd")):
        with pytest.raises(ValueError, match=message):
            LearnConcepts.model_validate({"input": "x", "learning": learning})
    info = LearnConcepts.model_validate({"input": "x", "model": folder}).stage().describe()
    assert json.loads(info.metadata["encoder_widths"]) == [32]
    assert info.columns[-1].shape == (4, 32)
    assert set(info.models) == {"unet", "vae", "text_encoder"}


def test_the_job_is_its_stage_under_a_few_other_names(folder):
    job = LearnConcepts.model_validate(
        {"input": "/data/tree", "model": folder, "output": "/out", "seed": 3, "slots": 2, "learning": {"steps": 200},
         "prompts": {"with": "a {concept} {subject}"}, "inverter": "inverter"}
    )  # fmt: skip
    params = job.stage().params
    assert params["settings"]["steps"] == 200
    assert params["templates"] == {
        "without": "Photo of a {subject}", "with_": "a {concept} {subject}", "plain": "Photo of a {concept}"
    }  # fmt: skip
    assert job.own_settings()["prompts"]["with"] == "a {concept} {subject}"
    found = {name: params[name] for name in ("inverter", "root", "checkpoints", "seed", "slots")}
    wanted = {"root": "/data/tree", "checkpoints": "/out/_checkpoints", "seed": 3, "slots": 2}
    assert found == wanted | {"inverter": str(Path("inverter").absolute())}


def test_train_inverter_job_writes_an_inverter_that_reads_pictures(folder, tmp_path):
    job = TrainInverter.model_validate(
        {
            "input": "x",
            "output": str(tmp_path / "out"),
            "model": folder,
            "device": "cpu",
            "steps": 1,
            "network": {"patch": 4, "width": 16, "layers": 1, "heads": 2},
            "training": {"steps": 4, "batch_size": 4, "noise_rows": 2, "held_out": 0.2},
        }
    )
    prompts = ["red star", "blue heart", "", "green ring", "small robot", "large circle"]
    drawn = list(job.stage().build()({"id": str(i), "prompt": p} for i, p in enumerate(prompts)))
    for row in drawn:
        row.pop("image", None)
        row["latent"] = np.asarray(row["latent"], dtype=np.float16) if row["status"] == "ok" else None
    drawn = [row for row in drawn if row["status"] == "ok"]
    finished = Output(tmp_path / "out", drawn, job.own_settings())
    finished.tables = lambda columns: iter([pa.table({
        "status": [row["status"] for row in drawn],
        "prompt": [row["prompt"] for row in drawn],
        "latent": pa.FixedSizeListArray.from_arrays(np.concatenate([row["latent"].reshape(-1) for row in drawn]), 256),
    })])  # fmt: skip
    job.finish(finished)
    inverter = TextInverter.load(str(tmp_path / "out"))
    assert inverter(torch.zeros(1, 4, 8, 8))[0].shape == (1, 16, 32)

    class View:
        output = finished

    assert "mean latent mse" in str(draw_training(View()))
    use = InvertText.model_validate({"input": "x", "model": folder, "inverter": str(tmp_path / "out"), "device": "cpu"})
    assert use.stage().describe().columns[0].name == "text_latent"
    (given,) = use.stage().build()([{"id": "0", "image": Image.new("RGB", (16, 16))}])
    model = open_latent_model(LatentModelSettings(model=folder, device="cpu"))
    assert given["text_latent"].shape == (16, model.text_encoders[0].width)


def test_a_word_on_a_store_is_handed_over_as_tensors():
    """diffusers opens no address; what the card says stands for the same file there and here."""
    import fsspec
    from safetensors.torch import load, save

    from jobs.kinds.learn_concepts import _loaded

    word = {"<dotted-1>": torch.arange(4.0)[None]}
    fsspec.filesystem("memory").pipe_file("/words/out/learned_embeds.safetensors", save(word))
    found = eval(_loaded("memory://words/out/learned_embeds.safetensors"), {"fsspec": fsspec, "load": load})
    assert found.keys() == word.keys()
    assert torch.equal(found["<dotted-1>"], word["<dotted-1>"])
    assert eval(_loaded("/out/learned_embeds.safetensors")) == "/out/learned_embeds.safetensors"


def test_a_strangers_words_are_words_in_the_card(folder, tree, tmp_path):
    """Before: who copied the card's lines ran what the concept's author had written into them."""
    evil = """robot").images; open("ran", "w"); ("$(touch ran) `touch ran` it's\n```\n# mine"""
    job = job_of(folder, tree).model_copy(update={"output": str(tmp_path / "out")})
    settings = json.dumps({"templates": {"with_": "a {subject} {concept}"}})
    row = {"id": "a", "status": "ok", "name": "a", "tokens": '["<a-1>"]', "words": json.dumps(["ice", evil]),
           "phrase": "in <a-1>", "settings": settings}  # fmt: skip
    card = job.card(Output(tmp_path / "out", [row], {}))
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```python", "```", "```sh", "```"]
    line = next(line for line in card.splitlines() if line.startswith("pipe("))
    asked = []
    exec(line, {"pipe": lambda prompt: asked.append(prompt) or Drawn(), "open": None})
    command = next(line for line in card.splitlines() if line.startswith("latentmill try-concept"))
    words = shlex.split(command, comments=True)
    assert asked == [words[-1]] == [" ".join(f"a {evil} in <a-1>".split())]


class Drawn:
    """What a pipeline gives back."""

    @property
    def images(self):
        return [self]

    def save(self, name):
        """Nowhere."""
