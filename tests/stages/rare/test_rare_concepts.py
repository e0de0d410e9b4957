"""The job rare-concepts: SeedSelect against torch's own parts, the stage on every kind of row, a chain on Ray."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from jobs.kinds.rare_concepts import RareConcepts as Job
from stages.engine.randomness import row_generator
from stages.models.clip import ImageEncoder
from stages.models.families import open_latent_model, read_geometry
from stages.models.fingerprint import describe_model
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.models.settings import LatentModelSettings
from stages.rare.candidates import new_noise
from stages.rare.inverted import InvertedDataset
from stages.rare.noise import slerp
from stages.rare.references import read_concept_row
from stages.rare.seed_select import Target, centroid, clip_pixels, embedder, last_latents, optimise_noise, select_loss
from stages.rare.settings import NoiseMethod, RareConceptsSettings
from stages.rare.stage import RareConcepts
from tests.support import tiny_kandinsky, tiny_stable_diffusion

METHODS = [
    {"method": "random"},
    {"method": "slerp"},
    {"method": "linear"},
    {"method": "nao", "points": 8, "updates": 20},
    {"method": "seed-select", "iterations": 2, "steps": 3},
    {"method": "seed-select", "name": "from-slerp", "start": "slerp", "iterations": 1},
]
LABELS = [method.get("name", method["method"]) for method in METHODS]
OPTIONS = {"steps": 4, "guidance": 3.0, "slots": 3, "inversion": {"method": "ddim"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_stable_diffusion.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_kandinsky.build_prior(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(folder: str) -> LatentModel:
    return open_latent_model(LatentModelSettings(model=folder, device="cpu"))


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def rows(labels=LABELS, concepts=("star", "ring"), count: int = 2) -> list[dict]:
    return [
        {
            "id": f"{name}/{label}/{number}",
            "name": name,
            "prompt": f"a red {name}",
            "pictures": [png(10 * index + i, (20, 16)) for i in range(3)],
            "method": label,
            "number": str(number),
        }
        for index, name in enumerate(concepts)
        for label in labels
        for number in range(count)
    ]


def stage(folder: str, clip: str, methods=METHODS, **changes) -> RareConcepts:
    return RareConcepts(settings(folder, clip, methods, **changes))


def settings(folder: str, clip: str, methods=METHODS, **changes) -> RareConceptsSettings:
    return RareConceptsSettings(model=folder, methods=methods, clip=clip, device="cpu", **{**OPTIONS, **changes})


def method(name: str, **options) -> NoiseMethod:
    (found,) = RareConceptsSettings(methods=[{"method": name, **options}]).methods
    return found


def by_id(made) -> dict[str, dict]:
    made = list(made)
    found = {row["id"]: row for row in made}
    assert len(found) == len(made)
    return found


# --- SeedSelect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 48])
def test_clip_pixels_are_the_processors(clip: str, size: int) -> None:
    encoder = ImageEncoder(clip)
    drawn = picture(3, (size, size))
    x = torch.from_numpy(np.asarray(drawn, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    wanted = encoder.processor([drawn], return_tensors="pt").pixel_values
    # Pillow rounds a resized picture to 8 bits; a grey level is 1/255 before the division by the deviation (0.26).
    assert float((clip_pixels(x, encoder) - wanted).abs().max()) < (1e-5 if size == 32 else 2.5 / 255 / 0.26)


def test_the_last_latents_are_the_samplers_and_checkpoints_do_not_change_gradients(model: LatentModel) -> None:
    schedule = model.schedule(5)
    predict = model.predictor(3.0)
    condition = model.condition(["red star", "a ring"], guided=True)
    z = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    tail = last_latents(predict, schedule, z, condition, 3)
    torch.testing.assert_close(tail[0], sample(predict, schedule, z.detach(), condition), atol=1e-5, rtol=1e-5)
    plain, kept = z, []
    for k in range(4, -1, -1):
        t = torch.full((2,), int(schedule.t_S[k]))
        plain = float(schedule.scale_S[k]) * plain + float(schedule.weight_S[k]) * predict(plain, t, condition)
        kept.insert(0, plain)
    for own, wanted in zip(tail, kept[:3], strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad(sum(one.square().sum() for one in tail), z)
    (theirs,) = torch.autograd.grad(sum(one.square().sum() for one in kept[:3]), z)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_loss_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn((2, 3, 2, 2), generator=generator) for _ in range(3)]
    given = torch.randn((5, 12), generator=generator)
    middle = centroid(given)
    mean = sum(np.array(row) / np.linalg.norm(row) for row in given.double().tolist())
    np.testing.assert_allclose(middle, mean / np.linalg.norm(mean), atol=1e-6)
    target = Target(middle.expand(2, -1), torch.randn((2, 3, 2, 2), generator=generator))
    found = select_loss(latents, target, lambda z: z.flatten(1))
    for row in range(2):
        total = float(np.mean((latents[0][row].numpy() - target.latent_BCHW[row].numpy()) ** 2))
        for weight, z in zip((0.7, 0.25, 0.05), latents, strict=True):  # the last step counts most
            flat = z[row].double().flatten().numpy()
            total += 10 * weight * (1 - flat @ middle.double().numpy() / np.linalg.norm(flat))
        assert float(found[row]) == pytest.approx(total, rel=1e-5)


def test_optimised_seeds_against_torch_adamw_row_by_row(model: LatentModel, clip: str) -> None:
    schedule = model.schedule(3)
    predict, embed = model.predictor(2.0), embedder(model.decode, ImageEncoder(clip))
    generator = torch.Generator().manual_seed(4)
    z, latent = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    target = Target(torch.nn.functional.normalize(torch.randn((2, 24), generator=generator), dim=1), latent)
    condition = model.condition(["red star", "a ring"], guided=True)
    found = optimise_noise(
        z, condition, target, predict=predict, schedule=schedule, embed=embed, iterations=5, rate=0.05
    )
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in condition.items()}
        aim = Target(target.centroid_BE[row : row + 1], latent[row : row + 1])
        variable = torch.nn.Parameter(z[row : row + 1].clone())
        adam = torch.optim.AdamW([variable], lr=0.05)
        losses = []
        for update in range(5):
            adam.param_groups[0]["lr"] = 0.05 if update < 3 else 0.005
            adam.zero_grad()
            loss = select_loss(last_latents(predict, schedule, variable, own, 3), aim, embed).sum()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
        assert float(found.start_B[row]) == pytest.approx(losses[0], rel=1e-4)
        assert float(found.loss_B[row]) == pytest.approx(losses[-1], rel=1e-3)
        assert losses[-1] < losses[0]
        assert float((found.z_BCHW[row] - variable[0].detach()).abs().max()) < 0.01


# --- seeds of a row ---------------------------------------------------------------------------------------------------


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [row_generator(seed, str(number), "0") for number in range(count)]


def test_new_seeds_are_the_formulas_at_their_weights() -> None:
    z = torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    noise, none = new_noise(method("random"), z, generators(4))
    assert float(none.abs().max()) == 0
    torch.testing.assert_close(noise[2], torch.randn((4, 4, 4), generator=generators(3)[2]))
    made, weights = new_noise(method("slerp", margin=0.1), z, generators(40))
    assert bool((weights.sum(1) - 1).abs().max() < 1e-6)
    assert bool(((weights > 0).sum(1) == 2).all())
    for own, weight in zip(made, weights, strict=True):
        first, second = weight.nonzero().flatten().tolist()
        assert 0.1 <= float(weight[second]) <= 0.9
        wanted = slerp(weight[second : second + 1], z[first].view(1, -1), z[second].view(1, -1))
        torch.testing.assert_close(own.view(1, -1), wanted, atol=1e-5, rtol=1e-5)
    made, weights = new_noise(method("linear"), z, generators(2000))
    torch.testing.assert_close(weights.sum(1), torch.ones(2000))
    # Uniform on the simplex: each weight has mean 1/3 and variance 1/18.
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    torch.testing.assert_close(weights.var(0), torch.full((3,), 1 / 18), atol=0.005, rtol=0)
    wanted = torch.einsum("bk,kchw->bchw", weights, z) / weights.square().sum(1).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    made, weights = new_noise(method("nao", margin=0.4, updates=30), z, generators(50))
    assert bool(((weights > 0).sum(1) == 1).all())
    assert float(weights.max()) <= 0.6
    nearest = torch.nn.functional.cosine_similarity(made.flatten(1)[:, None], z.flatten(1)[None], dim=2).argmax(1)
    assert float((nearest == weights.argmax(1)).float().mean()) > 0.8  # a path leads towards its own reference


# --- the stage --------------------------------------------------------------------------------------------------------


def test_every_method_gives_every_row_once_with_declared_columns(folder: str, clip: str) -> None:
    given = rows()
    columns = {c.name: c for c in RareConcepts.describe(settings(folder, clip, candidates=2)).columns}
    done = by_id(stage(folder, clip, candidates=2)(given))
    assert set(done) == {row["id"] for row in given}
    for name, row in done.items():
        assert row["status"] == "ok", (name, row["error"])
        made = set(row) - {"id", "name", "pictures", "status", "error"}
        assert made <= set(columns), made - set(columns)
        for key in made:
            if columns[key].kind == "tensor":
                assert np.shape(row[key]) == columns[key].shape, key
        assert row["image"].size == (16, 16)
        assert row["score"] == pytest.approx(row["clip_score"]) == pytest.approx(max(row["candidate_scores"]))
        assert (row["concept"], row["method"], row["number"]) == (*name.split("/")[:2], int(name[-1]))
        assert ("references" in row) == (row["number"] == 0)
        parents = json.loads(row["parents"])
        wanted = {"random": 0, "slerp": 2}.get(row["method"], 3)
        assert len(parents) == wanted
        assert all(np.isfinite(parent["psnr"]) for parent in parents)
        assert ("select_loss" in row) == (row["method"] in ("seed-select", "from-slerp"))
    assert done["star/seed-select/0"]["select_loss"] < done["star/seed-select/0"]["select_start"]
    pictures = [row["image"].tobytes() for row in done.values()]
    assert len(set(pictures)) == len(pictures)


def test_a_row_does_not_depend_on_the_rows_beside_it(folder: str, clip: str) -> None:
    methods = METHODS[:4]
    together = by_id(stage(folder, clip, methods, candidates=3)(rows(LABELS[:4])))
    alone = stage(folder, clip, methods, candidates=3, slots=2)
    for row in rows(LABELS[:4])[::3]:
        (own,) = alone([row])
        # Adam turns the last digits of inverted seeds into steps of its own size where a gradient is next to zero.
        close = 5e-3 if row["method"] == "nao" else 1e-4
        np.testing.assert_allclose(own["latent"], together[row["id"]]["latent"], atol=close)
        wanted = together[row["id"]]["candidate_scores"]
        np.testing.assert_allclose(own["candidate_scores"], wanted, atol=0.2 if row["method"] == "nao" else 1e-2)
    other = by_id(stage(folder, clip, methods, candidates=3, seed=1)(rows(LABELS[:4])))
    assert all(np.abs(other[i]["latent"] - together[i]["latent"]).max() > 1e-3 for i in together)


def test_the_kept_candidate_is_the_best_and_the_first_score_decides(folder: str, clip: str) -> None:
    given = rows(["random"], count=6)
    single = {c: by_id(stage(folder, clip, METHODS[:1], candidates=c)(given)) for c in (1, 4)}
    for name in single[1]:  # candidate 0 of four is the only one of one
        assert single[4][name]["candidate_scores"][0] == pytest.approx(single[1][name]["score"], abs=1e-3)
        assert single[4][name]["score"] >= single[1][name]["score"] - 1e-3
    assert any(single[4][i]["score"] > single[1][i]["score"] + 1e-3 for i in single[1])
    by_picture = by_id(stage(folder, clip, METHODS[:1], candidates=4, scores=["image", "text"])(given))
    assert all(row["score"] == pytest.approx(row["clip_image"]) for row in by_picture.values())
    assert any(by_picture[i]["clip_image"] > single[4][i]["clip_image"] + 1e-3 for i in by_picture)


def test_bad_rows_say_what_to_do_and_the_others_go_on(folder: str, clip: str, tmp_path: Path) -> None:
    def row(name: str, method: str, **values) -> dict:
        plain = {"id": f"{name}/{method}/0", "name": name, "prompt": "a star", "pictures": [png(1), png(2)]}
        return plain | {"method": method, "number": "0"} | values

    picture(5).save(tmp_path / "good.png")
    given = [
        row("good", "slerp", pictures=["good.png", png(1)]),
        row("no-prompt", "random", prompt=" "),
        row("unheard", "unheard-of"),
        row("one", "slerp", pictures=[png(1)]),
        row("one", "random", pictures=[png(1)]),
        row("none", "random", pictures=None),
        row("gone", "random", pictures=["not-there.png"]),
        row("text", "linear", pictures='["good.png", "good.png"'),
    ]
    done = by_id(stage(folder, clip, root=str(tmp_path))(given))
    errors = {name: row["error"] for name, row in done.items()}
    assert errors.pop("good/slerp/0") is None
    assert errors.pop("one/random/0") is None
    assert json.loads(done["good/slerp/0"]["parents"])[0]["id"] in ("good.png", "picture 1")
    for name, said in {
        "no-prompt/random/0": "'prompt' is empty", "unheard/unheard-of/0": "no method 'unheard-of'",
        "one/slerp/0": "at least 2 pictures", "none/random/0": "needs pictures", "gone/random/0": "does not exist",
        "text/linear/0": "no valid JSON",
    }.items():  # fmt: skip
        assert re.search(said, errors.pop(name) or "")
    assert not errors
    (alone,) = stage(folder, clip, METHODS[:1], scores=["text"])([row("none", "random", pictures=None)])
    assert alone["status"] == "ok"  # a prompt is enough for the baseline


def test_a_seed_that_overflows_fails_its_own_row(folder: str, clip: str) -> None:
    wild = [METHODS[0], {"method": "seed-select", "iterations": 1, "rate": 1e39, "steps": 3}]
    done = by_id(stage(folder, clip, wild)(rows(["random", "seed-select"])))
    for row in done.values():
        if row["method"] == "random":
            assert row["status"] == "ok"
        else:
            assert "seed-select: a seed is not finite" in row["error"]


def test_running_out_of_memory_halves_the_pictures_at_once(folder: str, clip: str) -> None:
    own = stage(folder, clip, METHODS[:1], slots=2)
    assert own.shrink()
    assert own.slots == own.inversion.slots == 1
    assert not own.shrink()


# --- seeds from an inversion dataset ----------------------------------------------------------------------------------


def inverted(folder: Path, unet: str, *, methods=("lbo",), by: str = "concept") -> str:
    (folder / "data").mkdir(parents=True)
    shape = [("id", pa.string()), (by, pa.string()), ("latent", pa.list_(pa.float32(), 4)), ("status", pa.string())]
    note = {
        "stage": "stages.inversion.stage:InvertImages",
        "models": {"unet": {"fingerprint": unet}},
        "config": {"methods": [{"method": name} for name in methods]},
    }
    schema = pa.schema(shape, metadata={"latentmill": json.dumps(note)})
    made = [
        {"id": f"p{i}", by: "star" if i < 5 else "ring", "latent": [i] * 4, "status": "failed" if i == 1 else "ok"}
        for i in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(made, schema), folder / "data" / "part-00000-of-00001.parquet")
    (folder / "_SUCCESS").write_text("{}")
    return str(folder)


def test_seeds_are_found_by_name_or_by_id(tmp_path: Path) -> None:
    dataset = InvertedDataset(inverted(tmp_path / "out", "abc"), "concept", "abc")
    asked = [
        read_concept_row(key, {"id": key, "prompt": "x", **row}, 3)
        for key, row in {
            "star": {}, "other": {"name": "ring"}, "listed": {"seeds": ["p6", "p0"]}, "gone": {"seeds": '["p1"]'},
            "moon": {},
        }.items()
    ]  # fmt: skip
    found = dataset.find(asked, (4, 1, 1), 3)
    ids = {key: value if isinstance(value, str) else value.ids for key, value in found.items()}
    assert ids["star"] == ("p0", "p2", "p3")  # the failed one is none, and three are enough
    assert ids["other"] == ("p5", "p6")
    assert ids["listed"] == ("p6", "p0")
    assert "no inverted row 'p1'" in ids["gone"]
    assert "no inverted row with concept 'moon'" in ids["moon"]
    star = found["star"]
    assert not isinstance(star, str)
    assert star.z_KCHW[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert "another size" in str(dataset.find(asked[:1], (3, 1, 1), 3)["star"])


def test_an_inversion_dataset_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another model"):
        InvertedDataset(inverted(tmp_path / "model", "abc"), "concept", "def")
    with pytest.raises(ValueError, match="2 methods"):
        InvertedDataset(inverted(tmp_path / "two", "abc", methods=("lbo", "ddim")), "concept", "abc")
    with pytest.raises(ValueError, match="no finished output"):
        InvertedDataset(str(tmp_path), "concept", "abc")
    nameless = InvertedDataset(inverted(tmp_path / "nameless", "abc", by="label"), "concept", "abc")
    found = nameless.find([read_concept_row("star", {"id": "star", "prompt": "x"}, 3)], (4, 1, 1), 3)
    assert "has no column 'concept'" in str(found["star"])


# --- the job ----------------------------------------------------------------------------------------------------------


def test_job_file_errors_name_the_key() -> None:
    for wrong, said in (
        ({"methods": ["nao", "nao"]}, "two are called 'nao'"),
        ({"methods": ["nao"], "inversion": "edict"}, "inversion: edict needs more than a seed"),
        ({"methods": ["nao"], "inversion": {"method": "lbo", "replay": True}}, "needs more than a seed"),
        ({"methods": [{"method": "slerp", "margin": 0.5}]}, "margin"),
        ({"methods": ["nao"], "score": []}, "score"),
        ({"methods": [{"method": "slerp", "name": "a/b"}]}, "slash"),
    ):
        with pytest.raises(ValidationError, match=said):
            Job.model_validate({"input": "x", **wrong})
    assert method("seed-select").budget == (30, 0.1)  # type: ignore[attr-defined]
    assert method("seed-select", start="nao").budget == (5, 0.05)  # type: ignore[attr-defined]


def test_shipped_job_files_are_valid_and_plan_a_row_for_each_concept_method_and_number() -> None:
    from jobs.schema.reading import load
    from pipeline.input.files import list_files, resolve
    from pipeline.input.read import reader_of
    from pipeline.input.rows import Span

    real = load("jobs/examples/rare-concepts-sd15.yaml")
    assert isinstance(real, Job)
    assert real.shard_rows == real.count * len(real.methods)
    job = load("jobs/examples/rare-concepts-micro.yaml")
    assert isinstance(job, Job)
    source = resolve(job.source())
    ids = []
    for file in list_files(source):
        scan = reader_of(source).scan(source, file, lambda row: False)
        for raw in reader_of(source).rows(source, Span(file.name, file.path, 0, scan.rows), None):
            ids.append(raw.id)
            asked = read_concept_row("key", {"id": raw.id, **raw.values}, 16)
            assert len(asked.pictures) == 4
            assert raw.values["objects"][0]["shape"] in asked.prompt
    assert len(set(ids)) == len(ids) == 4 * len(job.methods) * job.count
    assert "checkered-pink-star/nao-select/3" in ids


@pytest.mark.slow
def test_a_chain_from_pictures_to_a_corpus_regenerates_by_the_documented_lines(
    folder: str, clip: str, tmp_path: Path, monkeypatch
) -> None:
    from jobs.run import run_job

    (tmp_path / "pictures").mkdir()
    listing = []
    for number in range(6):
        picture(number).save(tmp_path / "pictures" / f"{number}.png")
        concept = ("star", "ring")[number % 2]
        listing.append({"image": f"pictures/{number}.png", "concept": concept, "prompt": f"a red {concept}"})
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listing))
    table = [{"name": name, "prompt": f"a red {name}"} for name in ("star", "ring", "moon")]
    (tmp_path / "concepts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    result = run_job(
        {
            "job": "chain",
            "output": str(tmp_path / "out"),
            "steps": [
                {
                    "name": "seeds", "job": "invert-images", "model": folder, "steps": 10, "device": "cpu",
                    "input": {"path": str(tmp_path / "pictures.jsonl"), "images": ["image"]}, "keep": ["concept"],
                    "methods": [{"method": "lbo"}],
                },
                {
                    "name": "corpus", "job": "rare-concepts", "model": folder, "clip": clip, "steps": 10, "guidance": 2,
                    "input": {"path": str(tmp_path / "concepts.jsonl"), "id": "name"}, "seeds": "${seeds}",
                    "methods": ["slerp", {"method": "seed-select", "start": "linear", "iterations": 1, "steps": 3}],
                    "count": 3, "candidates": 2, "slots": 4, "shard_rows": 5, "device": "cpu", "store": "float16",
                    "max_failed_fraction": 0.5,
                },
            ],
        }
    )  # fmt: skip
    assert (result.state, result.ok, result.failed) == ("complete", 6 + 12, 6)
    out = tmp_path / "out" / "corpus"
    stored = [row for part in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    wanted = [f"{c}/{m}/{n}" for c in ("star", "ring", "moon") for m in ("slerp", "seed-select") for n in range(3)]
    assert [row["id"] for row in stored] == wanted
    assert all("no inverted row with concept 'moon'" in row["error"] for row in stored if row["id"][:4] == "moon")
    for row in stored[:12]:
        kept = {parent["id"] for parent in json.loads(row["parents"])}
        assert kept <= {f"pictures.jsonl#{i}/lbo" for i in ((0, 2, 4) if row["concept"] == "star" else (1, 3, 5))}
    (lines,) = re.findall(r"back to its picture\n\n```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for index in (0, 4, 11):
        exec(lines.replace('"OUT"', repr(str(out))).replace('"train")[0]', f'"train")[{index}]'), {})
        again = np.asarray(Image.open("again.png")).astype(int)
        kept = np.asarray(Image.open(io.BytesIO(stored[index]["image"]["bytes"]))).astype(int)
        assert np.abs(again - kept).max() <= 2
    report = (out / "report.html").read_text()
    assert "Methods of new seeds" in report
    assert "its pictures" in report
    assert "a panel" not in report


def test_the_stage_names_what_it_was_made_with(folder: str, clip: str, tmp_path: Path) -> None:
    own = describe_model(folder, None, "unet")["fingerprint"]
    seeds = inverted(tmp_path / "out", own)
    described = RareConcepts.describe(settings(folder, clip, seeds=seeds, scores=("image", "oracle")))
    assert {"unet", "vae", "text_encoder", "clip_image", "oracle", "seeds"} <= set(described.models)
    assert "clip_text" not in described.models
    (tmp_path / "out" / "_SUCCESS").write_text("{} ")
    again = RareConcepts.describe(settings(folder, clip, seeds=seeds, scores=("image", "oracle")))
    assert again.models["seeds"]["fingerprint"] != described.models["seeds"]["fingerprint"]
    assert read_geometry(settings(folder, clip)).latent_shape in [column.shape for column in described.columns]


def test_the_oracle_ranks_where_the_concept_says_what_it_is(folder: str, clip: str) -> None:
    own = stage(folder, clip, METHODS[:1], candidates=2, scores=["oracle"])
    # A judge that finds every object in pictures that are bright on the whole.
    seen = SimpleNamespace(shape="star", color="red", texture="plain", size="small")

    def read(pictures):
        return [SimpleNamespace(things=(seen,) if np.asarray(p).mean() > level else ()) for p in pictures]

    own.judge.oracle = SimpleNamespace(read=read)
    given = [{**row, "objects": [{"shape": "star"}]} for row in rows(["random"], ["star"], 8)]
    level = -1.0
    brightness = [np.asarray(row["image"]).mean() for row in own(given)]
    level = float(np.median(brightness))
    done = list(own(given))
    assert {row["success"] for row in done} == {True, False}
    for row in done:
        assert row["score"] == float(row["success"]) == max(row["candidate_scores"])
        assert row["success"] == bool(np.asarray(row["image"]).mean() > level)
    (bad,) = own([rows(["random"], ["star"], 1)[0]])
    assert "needs the column 'objects'" in bad["error"]
