"""The table of methods: what a cell holds, the verdicts, and going on where an earlier run stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.inversion import table
from benchmarks.inversion.pictures import LEARNT_FROM, PHOTOGRAPHS, crop_rows, photograph_rows, without_captions
from benchmarks.inversion.stock import Stock
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from tests.support import tiny_flows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_flows.build(tmp_path_factory.mktemp("flux-dev"), "flux-dev")


def line(method: str, passes: float, dB: float, **more: Any) -> dict[str, Any]:
    given = {"rows_of": "world", "steps": 20, "guidance": 1.0, "rows": 4, "failed": 0, "extra_state": False}
    return {**given, "method": method, "passes": passes, "psnr_decoded": dB, "psnr": 30.0, "floor_psnr": 31.0, **more}


def test_a_peer_is_beaten_by_an_lbo_of_no_more_passes() -> None:
    own = [line("euler", 20, 30.0), line("lbo-1", 20, 29.0), line("renoise", 40, 32.0), line("lbo", 38.5, 33.0),
           line("belm", 20, 90.0, extra_state=True), line("lbo+ilb", 10, 99.0, psnr=33.5)]  # fmt: skip
    assert table.unbeaten({r["method"]: r for r in own}) == ["euler"]
    assert "| world | 20 | 1 | 1.00 | 1.93 | 2.50 | euler |" in table.verdicts(own)


def test_the_floor_stands_first_and_extra_state_last() -> None:
    text = table.table([line("euler", 20, 30.0, psnr_ci=0.25), line("belm", 20, 90.0, extra_state=True)])
    rows = [row.split("|")[1].strip() for row in text.splitlines() if row.startswith("| ")]
    assert rows == ["method", "*autoencoder alone (floor)*", "euler", "*with extra state:*", "belm"]
    assert "| 30.00 ± 0.25 |" in text


def test_the_stock_pipeline_is_the_one_that_anybody_loads(folder: str) -> None:
    from diffusers import FluxPipeline

    model = open_latent_model(LatentModelSettings(model=folder, device="cpu"))
    seed = torch.randn(2, *model.geometry.latent_shape, generator=torch.Generator().manual_seed(3))
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    packed = FluxPipeline._pack_latents(seed.bfloat16(), *seed.shape)
    wanted = pipe(["red star", ""], num_inference_steps=3, guidance_scale=2.5, latents=packed, height=16, width=16,
                  output_type="pt").images  # fmt: skip
    made = Stock(model, "bfloat16")(seed, ["red star", ""], 3, 2.5)
    assert torch.equal(made, wanted.float() * 2 - 1)


def test_a_run_goes_on_where_another_stopped(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []
    measure = table.measure

    def noted(model: Any, method: Any, rows: Any, *given: Any) -> dict[str, Any]:
        measured.append((method.label, len(rows)))
        return measure(model, method, rows, *given)

    def run(*more: str, model: str = folder) -> list[dict[str, Any]]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["table", "--model", model, "--photographs", "0", "--settings", "2:3.5",
                                          "--results", str(tmp_path / "results"), "--threads", "1", *more])  # fmt: skip
        table.main()
        (file,) = (tmp_path / "results").glob("*.json")
        return json.loads(file.read_text())["results"]

    monkeypatch.setattr(table, "measure", noted)
    (only, bare) = run("--pictures", "2", "--methods", "euler")
    assert measured == [("euler", 2)] * 2
    assert (only["rows_of"], bare["rows_of"]) == ("world", "world, no caption")
    assert only["psnr_decoded"] != bare["psnr_decoded"], "its guidance is told to the network, caption or not"
    assert 0 < only["stock_bfloat16"] < 100
    assert np.isfinite(only["psnr_ci"])
    both = run("--pictures", "2", "--methods", "euler", "uni-inv")
    assert measured == [("uni-inv", 2)] * 2
    assert [r["method"] for r in both] == ["euler", "uni-inv"] * 2
    assert only in both
    run("--pictures", "1", "--methods", "euler", "--again")
    assert measured == [("euler", 1)] * 2


def test_results_of_other_weights_are_dropped(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    file = results / f"inversion_table_{Path(folder).name}.json"
    old = line("uni-inv", 20, 30.0, weights="of an earlier training")
    file.write_text(json.dumps({"results": [old]}))
    argv = ["table", "--model", folder, "--photographs", "0", "--settings", "1:1", "--threads", "1", "--pictures", "1",
            "--methods", "euler", "--results", str(results)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    table.main()
    assert {r["method"] for r in json.loads(file.read_text())["results"]} == {"euler"}


def test_photographs_are_such_as_no_autoencoder_learnt_from(tmp_path: Path) -> None:
    from PIL import Image

    from micro import photographs

    shown = {row["id"].partition("-")[0] for row in photograph_rows(0, LEARNT_FROM)}
    learnt = {file.name for file in _learnt(tmp_path)}
    assert shown == {name.partition(".")[0] for name in PHOTOGRAPHS if name not in learnt}
    crops = crop_rows(tmp_path, 5)
    assert len({row["id"] for row in crops}) == 5
    assert all(isinstance(row["image"], Image.Image) and row["prompt"] == "" for row in crops)
    heldout = photographs.files(tmp_path, "photograph", heldout=True)
    assert {row["id"].rpartition("-")[0] for row in crops} == {file.stem for file in heldout}
    assert without_captions([{"id": "a", "prompt": "red"}]) == [{"id": "a", "prompt": ""}]


def _learnt(folder: Path) -> list[Path]:
    from PIL import Image

    from micro import photographs

    place = folder / "usr/share/tuxpaint/templates"
    place.mkdir(parents=True)
    Image.new("RGB", (80, 70), "red").save(place / "rocks.jpg")
    return photographs.files(folder, "photograph", heldout=False)
