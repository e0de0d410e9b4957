"""Real collections of pictures, where they are installed, against plain loops over their files.

openclipart-png and tuxpaint-stamps-default are Debian's packages of these names. Google's emoji are npm's:
``npm install --prefix FOLDER emoji-datasource-google``, and NODE_PATH=FOLDER/node_modules.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from typer.testing import CliRunner

from jobs import jobfile
from jobs.commands.cli import app
from jobs.run import run_job, run_spec
from pipeline.output.verify import verify
from pipeline.run.plan import make_plan

MOST_PIXELS = 100_000_000
EMOJI = "emoji-datasource-google/img/google/64"
PLACES = {
    "openclipart": ["/usr/share/openclipart/png"],
    "tuxpaint": ["/usr/share/tuxpaint/stamps"],
    "emoji": [f"{root}/{EMOJI}" for root in os.environ.get("NODE_PATH", "/usr/share/nodejs").split(os.pathsep)],
}
PICTURES = (120, 6)
"""That are embedded, and inverted: the whole of a collection would take a quarter of an hour on two cores."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]


@pytest.fixture(params=list(PLACES))
def collection(request: pytest.FixtureRequest) -> Path:
    there = [Path(place) for place in PLACES[request.param] if Path(place).is_dir()]
    if not there:
        pytest.skip(f"{request.param} is not installed")
    return there[0]


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, followlinks=True):
        yield from (Path(root) / name for name in names)


def _pictures(folder: Path) -> list[Path]:
    """In the order of their ids: folder by folder, names sorted."""
    found = [path for path in _files(folder) if path.suffix.lower() == ".png"]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _pixels(picture: Path) -> int:
    """By the header of a PNG."""
    with open(picture, "rb") as handle:
        return math.prod(struct.unpack(">II", handle.read(24)[16:]))


def _duplicates(folder: Path, pictures: list[Path]) -> dict[str, str]:
    first: dict[str, str] = {}
    found = {}
    for picture in pictures:
        own = str(picture.relative_to(folder))
        earlier = first.setdefault(hashlib.sha256(picture.read_bytes()).hexdigest(), own)
        if earlier != own:
            found[own] = earlier
    return found


def _job(kind: str, path: Any, **options: Any) -> dict[str, Any]:
    return {"job": kind, "input": {"path": path, "format": "images", "dedupe": "content"}, **options}


def test_the_plan_counts_what_is_there(collection: Path, tmp_path: Path) -> None:
    pictures = _pictures(collection)
    job = jobfile.load(_job("reference", str(collection), encoder="micro:prior"))
    plan = make_plan(run_spec(job, str(tmp_path / "out")))  # type: ignore[arg-type]
    assert plan.rows == len(pictures)
    told = "\n".join(plan.notes)
    twice = _duplicates(collection, pictures)
    assert f"{len(twice):,} of {len(pictures):,} rows hold what an earlier row holds" in told
    if links := sum(picture.is_symlink() for picture in pictures):
        assert f"{links:,} files of the input are links" in told
    others = Counter(path.suffix for path in _files(collection) if path.suffix not in (".png", ".txt"))
    for suffix, count in others.items():
        assert f"{count:,} called {suffix} (" in told


def test_embedded_searched_and_inverted(collection: Path, tmp_path: Path) -> None:
    pictures = _pictures(collection)[: PICTURES[0]]
    twice = _duplicates(collection, pictures)
    out = str(tmp_path / "reference")
    job = _job("reference", str(collection), encoder="micro:prior", keep=["path", "text"], max_failed_fraction=1)
    result = run_job(job, output=out, limit=PICTURES[0])
    large = {str(p.relative_to(collection)) for p in pictures if _pixels(p) > MOST_PIXELS}
    assert (result.state, result.duplicates) == ("complete", len(twice))
    assert verify(out).ok
    rows = ds.dataset(f"{out}/data").to_table(columns=["id", "status", "duplicate_of", "error", "text"]).to_pylist()
    assert [row["id"] for row in rows] == [str(picture.relative_to(collection)) for picture in pictures]
    assert {row["id"]: row["duplicate_of"] for row in rows if row["status"] == "duplicate"} == twice
    assert {row["id"] for row in rows if row["status"] == "failed"} == large - twice.keys()
    for picture, row in zip(pictures, rows, strict=True):
        beside = picture.with_suffix(".txt")
        said = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else None
        assert row["text"] == said
    sought = next(row["id"] for row in rows if row["status"] == "ok")
    found = CliRunner().invoke(app, ["search", out, str(collection / sought), "-k", "3", "--json"])
    nearest = json.loads(found.stdout)[0]
    assert nearest["cosine"] == pytest.approx(1, abs=1e-3)
    inverted = str(tmp_path / "inverted")
    job = _job("invert-images", str(collection), methods=[{"method": "ddim"}], steps=4, pictures=False)
    assert run_job(job, output=inverted, limit=PICTURES[1]).state == "complete"
    rows = ds.dataset(f"{inverted}/data").to_table(columns=["status", "psnr"]).to_pylist()
    assert {row["status"] for row in rows} <= {"ok", "duplicate"}
    assert all(math.isfinite(row["psnr"]) for row in rows if row["status"] == "ok")


def test_pictures_that_are_too_large_fail_and_say_how_large(collection: Path, tmp_path: Path) -> None:
    """Three of Debian's clip art are beyond Pillow's own limit too."""
    pictures = _pictures(collection)
    large = [picture for picture in pictures if _pixels(picture) > MOST_PIXELS]
    if not large:
        pytest.skip("all its pictures are of usual size")
    job = _job(
        "reference", [*map(str, large), *map(str, pictures[:50:10])], encoder="micro:prior", max_failed_fraction=1
    )
    result = run_job({**job, "input": {**job["input"], "dedupe": None}}, output=str(tmp_path / "out"))
    assert (result.ok, result.failed) == (5, len(large))
    rows = ds.dataset(str(tmp_path / "out/data")).to_table(columns=["status", "error"]).to_pylist()
    said = [row["error"] for row in rows if row["status"] == "failed"]
    assert all("pixels is above the limit of 100000000" in error for error in said)
