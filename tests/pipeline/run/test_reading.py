"""What is decoded ahead of a stage is bounded by bytes, and a picture lives as long as the stage holds it."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.contract import Column, Row, StageInfo, StageSpec, ok
from pipeline.input.source import Source
from pipeline.output.dataset import Output
from pipeline.output.planfile import read_shards
from pipeline.pictures import BYTES_A_PIXEL
from pipeline.run import reading
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import Resources, _worker_job
from pipeline.run.plan import write_plan
from pipeline.run.reading import CHUNK_PICTURES, Budget, Reader, Reading
from pipeline.run.tasks import Task
from pipeline.storage import Folder
from tests.support.faulty import data, run_plain

SIDE = 64
COUNT = 48


class Light:
    """Mean of a picture. Takes all rows before it gives one back, and drops each picture at once."""

    def __init__(self, raises: bool = False) -> None:
        self._raises = raises

    @staticmethod
    def describe(raises: bool = False) -> StageInfo:
        return StageInfo((Column("mean", "float64"),), reads={"image": "picture"})

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        seen, means, alive = list[Row](), list[float](), list[Any]()
        for row in rows:
            picture = row.pop("image")
            means.append(float(np.asarray(picture).mean()))
            alive.append(weakref.ref(picture))
            seen.append(row)
            del picture, row
            gc.collect()
            assert not any(dead() for dead in alive), "somebody else holds a picture"
        if self._raises and any(row["id"].endswith("/07.png") or row["id"] == "07.png" for row in seen):
            raise ValueError("not that one")
        yield from (ok(row, mean=mean) for row, mean in zip(seen, means, strict=True))


def _spec(folder: Path, raises: bool = False, count: int = COUNT) -> RunSpec:
    (folder / "in").mkdir()
    for number in range(count):
        Image.new("RGB", (SIDE, SIDE), (number, 2 * number, 3 * number)).save(folder / f"in/{number:02d}.png")
    stage = StageSpec(f"tests.pipeline.run.test_reading:{Light.__name__}", {"raises": raises})
    return RunSpec(stage, Source((str(folder / "in"),)), str(folder / "out"), shard_rows=count)


def test_a_chunk_waits_for_room_but_never_the_one_that_is_wanted() -> None:
    room, passed = Budget(100), list[int]()

    def take(chunk: int) -> None:
        room.take(chunk, 60)
        passed.append(chunk)

    def begun(chunk: int) -> threading.Thread:
        thread = threading.Thread(target=take, args=(chunk,))
        thread.start()
        return thread

    room.take(0, 1000)  # the first is wanted, however large it is
    second = begun(2)
    room.wants(1)  # the first is the stage's now
    second.join(60)
    assert passed == [2]
    take(1)  # beyond what there is, but wanted
    third = begun(3)
    room.wants(2)
    take(2)
    assert passed == [2, 1, 2]  # with 60 held, and 60 of its own, the third has no room
    room.close()
    third.join(60)
    assert passed == [2, 1, 2, 3]


def test_pictures_are_decoded_ahead_as_far_as_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, most = _spec(tmp_path), 6
    write_plan(spec, draft(spec), Folder.at(f"{spec.output}/_latentmill"), 0.0)
    output = Output.open(spec.output)
    shard = next(iter(read_shards(output.own)))
    monkeypatch.setattr(reading, "AHEAD_BYTES", most * SIDE * SIDE * BYTES_A_PIXEL)
    real, decoded = reading.prepare, list[str]()

    def counted(raw: Any, *rest: Any) -> Any:
        found = real(raw, *rest)
        decoded.append(raw.id)
        return found

    monkeypatch.setattr(reading, "prepare", counted)
    job = _worker_job(spec, output, Resources(decode_threads=4))
    handed, chunks = 0, list[int]()
    for item in Reader(job, draft(spec).schema).rows([Reading(Task.of(shard))]):
        chunk = item and item[1]
        if chunk is None:
            continue
        assert isinstance(chunk, list)
        handed += len(chunk)
        chunks.append(len(chunk))
        time.sleep(0.05)  # whoever decodes without asking for room is far ahead by now
        assert len(decoded) <= handed + most + CHUNK_PICTURES
    assert (handed, len(decoded)) == (COUNT, COUNT)


def test_a_stage_drops_pictures_and_gets_them_again_when_one_of_them_fails_it(tmp_path: Path) -> None:
    run_plain(_spec(tmp_path, raises=True, count=12))
    rows = data(str(tmp_path / "out")).to_pylist()
    assert [i for i, row in enumerate(rows) if row["status"] == "failed"] == [7]
    assert rows[7]["error"] == "ValueError: not that one"
    assert [row["mean"] for i, row in enumerate(rows) if i != 7] == [2.0 * i for i in range(12) if i != 7]
