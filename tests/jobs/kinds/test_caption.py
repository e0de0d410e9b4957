"""The job `caption`: pictures without captions become a captioned reference, and prompts are inverted by it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.run import run_job
from jobs.schema.reading import JobFileError, load
from pipeline.output.verify import verify
from tests.support import tiny_captioners
from tests.support.rare import picture

ROWS = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(ROWS):
        picture(number).save(folder / f"{number}.png")
    return folder


def test_captions_lead_to_a_prior_without_training(
    in_process: None, tmp_path: Path, pictures: Path, prior: str
) -> None:
    model = tiny_captioners.build_llava(tmp_path / "llava")
    (tmp_path / "prompts.txt").write_text("a red star\n")
    out = {name: str(tmp_path / name) for name in ("said", "seen", "asked")}
    said = {"job": "caption", "input": str(pictures), "model": model, "keep": ["image"], "max_tokens": 5,
            "shard_rows": 4, "max_failed_fraction": 0.9}  # fmt: skip
    seen = {"job": "reference", "input": out["said"], "encoder": prior, "captions": True, "max_failed_fraction": 0.9}
    asked = {"job": "invert-prompts", "input": str(tmp_path / "prompts.txt"), "encoder": prior,
             "reference": out["seen"],
             "methods": [{"method": "retrieval", "nearest_by": "caption", "k": 2}]}  # fmt: skip
    for name, job in (("said", said), ("seen", seen), ("asked", asked)):
        run_job(job, output=out[name])
    rows = {name: pq.read_table(f"{folder}/data").to_pylist() for name, folder in out.items()}
    good = [row for row in rows["said"] if row["status"] == "ok"]
    assert len(good) > 2
    for row in good:
        assert row["image"]["bytes"] == (pictures / row["id"]).read_bytes()
        assert 0 < row["caption_tokens"] <= 5
    embedded = {row["id"]: row for row in rows["seen"] if row["status"] == "ok"}
    assert set(embedded) == {row["id"] for row in good}
    assert all(row["text_embedding"] is not None for row in embedded.values())
    assert [row["status"] for row in rows["asked"]] == ["ok"]
    assert verify(out["said"]).problems == ()
    page = (tmp_path / "said/report.html").read_text()
    assert good[0]["caption"] in page
    assert "captions: true" in (tmp_path / "said/README.md").read_text()


def test_several_captions_of_a_picture(in_process: None, tmp_path: Path, pictures: Path) -> None:
    model = tiny_captioners.build_llava(tmp_path / "llava")
    job = {"job": "caption", "input": str(pictures), "model": model, "max_tokens": 5, "draws": 3, "temperature": 2.0,
           "max_failed_fraction": 1.0}  # fmt: skip
    run_job(job, output=str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out/data").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(f"{n}.png/{draw}" for n in range(ROWS) for draw in range(3))
    assert len({row["caption"] for row in rows}) > ROWS
    assert "caption_tokens" in (tmp_path / "out/report.html").read_text()


def test_settings_that_say_nothing_are_refused() -> None:
    for wrong, said in (({"draws": 2}, "all be the same"), ({"top_p": 0.9}, "set `temperature`")):
        with pytest.raises(JobFileError, match=said):
            load({"job": "caption", "input": "pictures/", "model": "org/model", **wrong})
