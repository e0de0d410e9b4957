"""A whole job on real photographs, those that come with scikit-image: run, verified, reported, read by others."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageCms
from typer.testing import CliRunner

import micro
from jobs.commands.cli import app
from pipeline.input.source import SUFFIXES

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
"""Grey, RGB, RGBA, palette and animated; PNG, JPEG, GIF and TIFF; a page of text, a Hubble field, a cat."""
runner = CliRunner()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    job = folder / "job.yaml"
    job.write_text(
        f"job: reference\ninput: {{path: '{PHOTOGRAPHS}', format: images}}\nencoder: micro:prior\nkeep: [image]\n"
        "shard_rows: 12\nresources: {cpus: 0.5}\n"
    )
    done = runner.invoke(app, ["run-job", str(job), "-o", str(folder / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["planned"] == len(_names())
    return folder / "out"


def _names() -> list[str]:
    return sorted(path.name for path in PHOTOGRAPHS.iterdir() if path.suffix in SUFFIXES["images"])


def _readable(name: str) -> bool:
    """Whether Pillow can make pixels of it (one TIFF of three pages it cannot)."""
    try:
        Image.open(PHOTOGRAPHS / name).convert("RGB")
    except OSError:
        return False
    return True


def test_verified_and_reported(out: Path) -> None:
    checked = json.loads(runner.invoke(app, ["verify", str(out), "--json"]).stdout)
    assert checked["ok"], checked
    readable = sum(map(_readable, _names()))
    assert (checked["rows_ok"], checked["rows_failed"]) == (readable, len(_names()) - readable)
    page = (out / "report.html").read_text()
    shown = re.findall(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=]+)", page)
    assert len(shown) >= 8
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).width > 1 for picture in shown)


def test_embeddings_are_those_of_transformers(out: Path) -> None:
    import polars
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    rows = polars.read_parquet(f"{out}/data/*.parquet").filter(polars.col("status") == "ok")
    assert rows["id"].to_list() == [name for name in _names() if _readable(name)]
    model = CLIPVisionModelWithProjection.from_pretrained(micro.MODELS / "prior/image_encoder", dtype=torch.float32)
    processor = CLIPImageProcessorPil.from_pretrained(micro.MODELS / "prior/image_processor")
    for name in ("astronaut.png", "chelsea.png", "logo.png", "rocket.jpg"):
        picture = Image.open(PHOTOGRAPHS / name)
        if name == "rocket.jpg":  # Adobe RGB: seen as a viewer shows it
            profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            picture = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"))
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        with torch.no_grad():
            expected = model(**processor(flat, return_tensors="pt")).image_embeds[0].numpy()
        (stored,) = rows.filter(polars.col("id") == name)["embedding"].to_list()
        assert np.allclose(stored, expected, atol=1e-4 * np.abs(expected).max()), name


def test_datasets_and_duckdb_read_it(out: Path, tmp_path: Path) -> None:
    import datasets
    import duckdb

    rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path))
    cat = next(row for row in rows if row["id"] == "chelsea.png")
    assert np.array_equal(np.asarray(cat["image"]), np.asarray(Image.open(PHOTOGRAPHS / "chelsea.png")))
    query = f"select count(*), max(len(embedding)), min(norm) from '{out}/data/*.parquet' where status = 'ok'"
    count, width, norm = duckdb.connect().execute(query).fetchone() or ()
    assert (count, width) == (sum(map(_readable, _names())), len(cat["embedding"]))
    assert norm > 0


def test_search_finds_a_photograph_by_itself(out: Path) -> None:
    found = runner.invoke(app, ["search", str(out), str(PHOTOGRAPHS / "coffee.png"), "-k", "2"])
    assert found.exit_code == 0, found.output
    assert "1.0000" in found.output
    assert "coffee.png" in found.output.split("1.0000")[1]
