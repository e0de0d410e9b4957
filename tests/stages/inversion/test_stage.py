"""The job invert-images: its stage on every kind of row, and the documented way from a row back to its picture."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import read_geometry
from tests.support import tiny_stable_diffusion

METHODS = [
    {"method": "ddim"},
    {"method": "lbo", "tolerance": 1e-5, "passes": 40},
    {"method": "lbo", "name": "boosted", "ilb": {"iterations": 8, "warmup": 1}},
    {"method": "lbo", "name": "joint", "ilb": {"form": "joint", "iterations": 4, "every": 2}},
    {"method": "lbo", "name": "replay", "replay": True, "passes": 1},
    {"method": "lbo", "name": "shown", "replay": "shown", "passes": 1},
    {"method": "belm"},
    {"method": "edict"},
    {"method": "null-text", "iterations": 2},
]
LABELS = [method.get("name", method["method"]) for method in METHODS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_stable_diffusion.build(tmp_path_factory.mktemp("model"))


def told(folder: str, methods=({"method": "ddim"},), **options) -> InvertImagesSettings:
    return InvertImagesSettings(model=folder, methods=methods, device="cpu", **options)


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_every_method_gives_every_row_once_with_declared_columns(folder) -> None:
    options = {"steps": 3, "slots": 2, "edit_guidance": 2.0}
    settings = told(folder, METHODS, **options)
    stage = InvertImages(settings)
    columns = {column.name: column for column in InvertImages.describe(settings).columns}
    rows = [
        {
            "id": f"{i}/{label}",
            "image": picture(i, (20, 16)),
            "prompt": "red star",
            "edit_prompt": "blue star",
            "method": label,
        }
        for i in range(3)
        for label in LABELS
    ]
    rows.append({"id": "none/ddim", "image": None, "prompt": "red star", "method": "ddim"})
    rows.append({"id": "other", "image": picture(9), "method": "unheard-of"})
    done = {row["id"]: row for row in stage(rows)}
    assert set(done) == {row["id"] for row in rows}
    assert "no picture" in done.pop("none/ddim")["error"]
    assert "unheard-of" in done.pop("other")["error"]
    for name, row in done.items():
        assert row["status"] == "ok", (name, row["error"])
        made = set(row) - {"id", "image", "edit_prompt", "status", "error"}
        assert made <= set(columns), made - set(columns)
        for key in made:
            if columns[key].kind == "tensor" and row[key] is not None:
                assert np.shape(row[key]) == columns[key].shape, key
        assert row["edited"].size == row["picture"].size == (16, 16)
    mean = {
        label: np.mean([row["psnr_decoded"] for row in done.values() if row["method"] == label]) for label in LABELS
    }
    assert mean["lbo"] > mean["ddim"]
    assert mean["replay"] > 60
    assert mean["shown"] > 60
    passes = {label: {row["forwards"] for row in done.values() if row["method"] == label} for label in LABELS}
    assert (passes["replay"], passes["shown"]) == ({6}, {3})
    assert mean["edict"] > 40
    boosted = [row for row in done.values() if row["method"] == "boosted"]
    assert all(row["psnr"] > row["floor_psnr"] for row in boosted)


def test_a_share_of_the_pictures_is_regenerated_the_same_ones_for_each_method(folder) -> None:
    methods = [{"method": "ddim"}, {"method": "lbo"}]
    rows = [
        {"id": f"{i}/{label}", "image": picture(i), "prompt": "red star", "method": label}
        for i in range(24)
        for label in ("ddim", "lbo")
    ]
    whole = {row["id"]: row for row in InvertImages(told(folder, methods, steps=2, slots=8))(rows)}
    some = {row["id"]: row for row in InvertImages(told(folder, methods, steps=2, slots=5, reconstruct=0.4))(rows)}
    again = {
        row["id"] for row in InvertImages(told(folder, methods, steps=2, reconstruct=0.4))(rows[::-1]) if "psnr" in row
    }
    measured = {name for name, row in some.items() if row.get("psnr") is not None}
    assert measured == again
    assert {name.partition("/")[0] for name in measured if name.endswith("lbo")} == {
        name.partition("/")[0] for name in measured if name.endswith("ddim")
    }
    assert 4 <= len(measured) / 2 <= 16
    for name, row in some.items():
        assert row["status"] == "ok"
        assert row["latent"] == pytest.approx(whole[name]["latent"], abs=1e-4)
        if name in measured:
            assert row["psnr"] == pytest.approx(whole[name]["psnr"], abs=1e-2)
            assert row["reconstruction"].size == (16, 16)
        else:
            assert not {"psnr", "ssim", "psnr_decoded", "latent_mse", "reconstruction"} & set(row)


def test_guidance_tightens_lbo_s_tolerance_unless_one_is_given(folder) -> None:
    """Generation under guidance magnifies what inversion leaves over."""
    row = {"id": "a", "image": picture(0), "prompt": "red star"}

    def residual(guidance: float, **method: float) -> float:
        stage = InvertImages(told(folder, [{"method": "lbo", "passes": 60, **method}], steps=10, guidance=guidance))
        (done,) = stage([row])
        return float(np.median(done["residual"]))  # a random network's step may have no solution

    assert residual(1.5) <= 1e-5
    assert 1e-5 < residual(1.0) <= 1e-3
    assert 1e-5 < residual(1.5, tolerance=1e-2) <= 1e-2


def test_captions_rows_and_fixed(folder) -> None:
    given = [{"id": "a", "image": picture(1), "prompt": "red star"}]
    own = next(iter(InvertImages(told(folder, steps=2, slots=1))(given)))
    fixed = next(iter(InvertImages(told(folder, steps=2, slots=1, prompt=""))(given)))
    assert (own["prompt"], fixed["prompt"]) == ("red star", "")
    assert np.abs(own["latent"] - fixed["latent"]).max() > 1e-4


def test_captions_that_are_cut_are_told(folder) -> None:
    """The tiny model reads 16 tokens; two captions that differ behind them give one latent, and say why."""
    given = [
        {"id": str(i), "image": picture(1), "method": "ddim", "prompt": "red " * 20 + end}
        for i, end in enumerate(("star", "ring"))
    ]
    first, second = InvertImages(told(folder, steps=2))(given)
    assert np.array_equal(first["latent"], second["latent"])
    assert (first["prompt_tokens"], first["prompt_truncated"]) == (23, True)
    (short,) = InvertImages(told(folder, steps=2))([{**given[0], "prompt": "red star"}])
    assert (short["prompt_tokens"], short["prompt_truncated"]) == (4, False)


def test_an_inverter_takes_the_place_of_captions(folder, tmp_path: Path) -> None:
    """The stored text latent is what `InvertText` reads, and the documented lines regenerate the picture under it."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    from jobs.kinds.invert_images import InvertImages as Job
    from stages.inverter.model import InverterShape, TextInverter
    from stages.inverter.settings import InvertTextSettings
    from stages.inverter.stage import InvertText

    torch.manual_seed(0)
    shape = InverterShape(latent=(4, 8, 8), text=(16, 32), patch=4, width=32, layers=2, heads=4)
    TextInverter(shape).save(str(tmp_path))
    rows = [{"id": "a", "image": picture(1), "method": "ddim", "prompt": "red star"}]
    settings = told(folder, steps=3, inverter=str(tmp_path))
    (row,) = InvertImages(settings)(rows)
    columns = {column.name: column for column in InvertImages.describe(settings).columns}
    assert columns["text_latent"].shape == np.shape(row["text_latent"]) == (16, 32)
    (read,) = InvertText(InvertTextSettings(inverter=str(tmp_path), model=folder, device="cpu"))(rows)
    np.testing.assert_allclose(row["text_latent"].astype(np.float32), read["text_latent"], rtol=1e-3, atol=1e-3)
    (captioned,) = InvertImages(told(folder, steps=3))(rows)
    assert np.abs(captioned["latent"] - row["latent"]).max() > 1e-4

    assert "prompt_truncated" not in columns
    call = f"pipe({read_geometry(settings).usage.from_row()}, **options)"
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    latents = torch.tensor(row["latent"]).reshape(1, 4, 8, 8)
    named = {"num_inference_steps": 3, "guidance_scale": 1.0, "latents": latents}
    stored = {**row, "text_latent": row["text_latent"].astype(np.float32).tolist()}
    again = eval(call, {"torch": torch, "row": stored, "pipe": pipe, "options": named}).images[0]
    assert np.abs(np.asarray(again).astype(int) - np.asarray(row["reconstruction"]).astype(int)).max() <= 2
    with pytest.raises(ValueError, match="leave out `prompt`"):
        Job(input="x", model=folder, inverter=str(tmp_path), prompt="a")


def test_a_finished_dataset_regenerates_by_the_documented_lines(tmp_path: Path, local_ray, monkeypatch) -> None:
    from jobs.run import run_job
    from micro import world

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(world.picture(i, "heldout")).save(pictures / f"{i}.png")
    out = tmp_path / "out"
    result = run_job(
        {
            "job": "invert-images",
            "input": str(pictures),
            "output": str(out),
            "model": "micro:stable-diffusion",
            "steps": 10,
            "device": "cpu",
            "prompt": "red star",
            "methods": ["lbo"],
            "slots": 2,
            "shard_rows": 2,
            "max_failed_fraction": 0.0,
        }
    )
    assert (result.state, result.ok) == ("complete", 3)
    card = (out / "README.md").read_text()
    (lines,) = re.findall(r"plain diffusers:\n\n```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in lines.splitlines() if line.strip()]) <= 11
    monkeypatch.chdir(tmp_path)
    import pyarrow.parquet as pq

    stored = [row for part in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert all(row["status"] == "ok" for row in stored)
    for index, row in enumerate(stored):
        exec(re.sub(r"row = next\(.*\)", f"row = rows[{index}]", lines), {})
        again = np.asarray(Image.open("again.png")).astype(int)
        kept = np.asarray(Image.open(io.BytesIO(row["reconstruction"]["bytes"]))).astype(int)
        assert np.abs(again - kept).max() <= 2
        assert row["psnr_decoded"] > 50
    report = (out / "report.html").read_text()
    assert "Picture by method" in report
    assert "Methods of inversion" in report


def test_what_does_not_converge_fails_if_it_is_asked_to(folder) -> None:
    """One pass a step is not enough here; without the limit the same rows come out ok and state their residual."""
    method = {"method": "lbo", "passes": 1}
    rows = [{"id": str(i), "image": picture(i), "prompt": "red star", "method": "lbo"} for i in range(3)]
    stated = {row["id"]: row["residual_max"] for row in InvertImages(told(folder, [method], steps=3, slots=2))(rows)}
    limit = sorted(stated.values())[1]
    settings = told(folder, [method], steps=3, slots=2, max_residual=limit)
    for row in InvertImages(settings)(rows):
        if stated[row["id"]] <= limit:
            assert row["status"] == "ok"
        else:
            worst = f"{stated[row['id']]:.2g}"
            assert row["status"] == "failed"
            assert f"a residual of {worst} is left at step" in row["error"]
            assert "take more passes, more steps or less guidance" in row["error"]


def counted(monkeypatch: pytest.MonkeyPatch, stage: InvertImages) -> dict[str, list[int]]:
    """Sizes of the batches that its model encodes, decodes and reads prompts of."""
    sizes: dict[str, list[int]] = {"encode": [], "decode": [], "condition": []}
    for name, seen in sizes.items():

        def call(given, *args, work=getattr(stage.model, name), seen=seen, **options):
            seen.append(len(given))
            return work(given, *args, **options)

        monkeypatch.setattr(stage.model, name, call)
    return sizes


def test_a_picture_is_encoded_and_read_once_for_all_its_methods(folder, monkeypatch) -> None:
    """And rows are, to the last bit, what each method makes of the pictures by itself."""
    methods = [
        {"method": "ddim"},
        {"method": "uni-inv"},
        {"method": "lbo", "name": "boosted", "ilb": {"iterations": 2}},
    ]
    options = {"steps": 2, "slots": 4}
    given = [{"id": f"{i}", "image": picture(i, (20, 16)), "prompt": f"star {i // 2}"} for i in range(6)]
    wanted = {}
    for method in methods:
        label = method.get("name", method["method"])
        rows = [{**row, "id": f"{row['id']}/{label}", "method": label} for row in given]
        wanted |= {row["id"]: row for row in InvertImages(told(folder, [method], **options))(rows)}
    stage = InvertImages(told(folder, methods, **options))
    rows = [{**row, "id": f"{row['id']}/{label}", "method": label} for row in given for label in stage.methods]
    rows.append({"id": "6/ddim", "image": None, "prompt": "star", "method": "ddim"})
    # No pictures of the same name: without its method an id names nothing but its own row.
    rows.append({"id": "0", "image": picture(9), "prompt": "star 0", "method": "ddim"})
    sizes = counted(monkeypatch, stage)
    done = {row["id"]: row for row in stage(rows)}
    assert sizes["encode"] == [4, 3]
    assert sum(sizes["condition"]) == 3
    # Each once for its floor, once regenerated for each row, and once more where its latent was moved.
    assert sum(sizes["decode"]) - 6 * 2 == 7 + 19 + 6  # 2 updates of 6 pictures
    assert "no picture" in done.pop("6/ddim")["error"]
    assert np.abs(done.pop("0")["latent"] - done["0/ddim"]["latent"]).max() > 0.1
    assert done.keys() == wanted.keys()
    for name, row in done.items():
        for column, value in wanted[name].items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, row[column]), (name, column)
            else:
                assert value == row[column], (name, column)
