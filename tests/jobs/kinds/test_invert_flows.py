"""A job on a rectified flow: folder, pictures, dataset, card, and the card's lines in the stock pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from jobs.run import run_job
from stages.inversion.metrics import measure_pictures
from tests.stages.inversion.test_stage import picture
from tests.support import tiny_flows, tiny_stable_diffusion
from tests.support.in_process import without_ray


def carried_out(card: str, row: dict[str, Any]) -> Any:
    """The picture that a card's lines draw, of this row in place of the first one."""
    code = re.search(r"```python\n(import torch.*?)```", card, re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if not line.startswith(("rows =", "row =", "picture.save"))]
    names: dict[str, Any] = {"row": row}
    exec("\n".join(lines), names)
    return names["picture"]


def decibels(made: Any, wanted: Any) -> float:
    x, y = (torch.from_numpy(np.asarray(one).astype(np.float32) / 127.5 - 1)[None] for one in (made, wanted))
    return measure_pictures(x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2))["psnr"][0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("flux-dev", {"guidance": 3.5, "scheduler": {"shift_terminal": 0.05}}),
        ("flux-schnell", {"size": 24, "max_sequence_length": 3}),
        ("sd35-medium", {"guidance": 2.0, "negative": "blue"}),
        ("sd3-without-t5", {"prompt": ""}),
        ("chroma", {"guidance": 2.0, "negative": "blue", "max_sequence_length": 9}),
        ("flux2-dev", {"guidance": 3.5, "size": 24}),
        ("flux2-klein", {"prompt": "", "size": 16}),
        ("flux2-klein-base", {"guidance": 1.5, "negative": "blue", "max_sequence_length": 6, "size": 16}),
        ("qwen-image", {"guidance": 2.0, "size": 32}),
        ("qwen-image-21", {"guidance": 1.5, "negative": "blue", "max_sequence_length": 30, "size": 32}),
        ("qwen-image-21-turbo", {"size": 64, "steps": 4}),
        ("z-image", {"guidance": 1.5, "negative": "blue", "size": 32}),
        ("ovis-image", {"guidance": 2.0, "negative": "blue", "max_sequence_length": 120}),
    ],
)
def test_the_card_s_lines_give_the_picture_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    from datasets import load_dataset

    without_ray(monkeypatch)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        picture(i).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(["red star", "a dotted circle"][i])
    ended = run_job({
        "job": "invert-images", "input": {"path": str(pictures), "columns": {"image": "image", "prompt": "text"}},
        "model": tiny_flows.build(tmp_path / "model", kind), "device": "cpu", "steps": 3,
        "methods": ["euler", {"method": "lbo", "tolerance": 1e-5, "passes": 30}], **options,
    }, output=str(tmp_path / "out"))  # fmt: skip
    assert ended.state == "complete", ended
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    card = (tmp_path / "out" / "README.md").read_text()
    for row in rows:
        assert row["status"] == "ok", row["error"]
        assert decibels(carried_out(card, row), row["picture"]) == pytest.approx(row["psnr"], abs=0.05)
        if row["method"] == "lbo":
            assert row["psnr_decoded"] > 50
            assert row["residual_max"] < 1e-4
        else:
            assert row["residual"] is None


@pytest.mark.parametrize("kind", ["flux-dev", "sd3", "sdxl"])
def test_pictures_of_any_shape_are_inverted_in_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Portrait, landscape, panorama: the nearest bucket, cut by no more than its shape asks, and the card's lines."""
    from datasets import load_dataset

    without_ray(monkeypatch)
    shapes = {"square": (30, 30), "portrait": (30, 50), "landscape": (64, 40), "panorama": (90, 24)}
    size = 32 if kind == "sdxl" else 16
    fitted = {"square": (size, size), "portrait": (size * 3 // 4, size * 5 // 4),
              "landscape": (size * 5 // 4, size * 3 // 4), "panorama": (size * 2, size // 2)}  # fmt: skip
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, (name, shape) in enumerate(shapes.items()):
        picture(i, shape).save(pictures / f"{name}.png")
    build = tiny_stable_diffusion.build if kind == "sdxl" else tiny_flows.build
    ended = run_job({
        "job": "invert-images", "input": {"path": str(pictures)}, "prompt": "red star", "store": "float16",
        "model": build(tmp_path / "model", kind), "device": "cpu", "steps": 2, "fit": "bucket", "slots": 2,
        "size": size,
        "methods": [{"method": "lbo", "tolerance": 1e-5, "passes": 30}, {"method": "belm", "ilb": {"iterations": 2}}],
    }, output=str(tmp_path / "out"))  # fmt: skip
    assert ended.state == "complete", ended
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert len(rows) == 2 * len(shapes)
    for row in rows:
        assert row["status"] == "ok", row["error"]
        name = row["id"].partition(".")[0]
        assert (row["width"], row["height"]) == row["picture"].size == row["reconstruction"].size == fitted[name]
        wanted = ImageOps.fit(picture(list(shapes).index(name), shapes[name]), fitted[name], Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(row["picture"]), np.asarray(wanted))
        if row["method"] == "lbo":
            assert len(row["latent"]) == row["width"] * row["height"] // 4 * (4 if kind == "sdxl" else 16)
            assert decibels(carried_out(card, row), row["picture"]) == pytest.approx(row["psnr"], abs=0.05)
