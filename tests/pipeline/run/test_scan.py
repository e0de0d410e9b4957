"""Files that are scanned elsewhere, in whatever order, give the plan that one after another gives."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.input.files import resolve
from pipeline.input.read import read_rows
from pipeline.input.source import Source, SourceError
from pipeline.output.planfile import Tables, read_shards
from pipeline.run import scan as scanning
from pipeline.run.cluster import spread
from pipeline.run.columns import Watched
from pipeline.run.driver import _scanning, dry_plan, run
from pipeline.run.plan import make_plan
from pipeline.run.scan import MARK, Scanned, Scans, ScanTask, is_heavy, one_by_one, scan_elsewhere
from pipeline.run.survey import Survey, survey
from pipeline.storage import Folder
from tests.support.faulty import data
from tests.support.plain_stages import spec_of

COUNTS = (3 * MARK + 5, MARK - 1, 2 * MARK)
EVERY = 50
ROWS = [{"key": f"k{n}", "t": f"text {n}", "n": n if n < 300 else n + 0.5} for n in range(sum(COUNTS))]


def _parts() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    at = 0
    for number, count in enumerate(COUNTS):
        yield number, ROWS[at : at + count]
        at += count


def _jsonl(folder: Path) -> Source:
    for number, rows in _parts():
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source((str(folder),), columns={"text": "t"})


def _csv(folder: Path) -> Source:
    for number, rows in _parts():
        with open(folder / f"{number}.csv", "w", newline="") as handle:
            writer = csv.DictWriter(handle, ["key", "t", "n"])
            writer.writeheader()
            writer.writerows(rows)
    return Source((str(folder),), columns={"text": "t"})


def _webdataset(folder: Path) -> Source:
    for number, rows in _parts():
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in rows:
                for extension, value in (("txt", row["t"]), ("json", json.dumps(row))):
                    member = tarfile.TarInfo(f"{row['key']}.{extension}")
                    member.size = len(value)
                    tar.addfile(member, io.BytesIO(value.encode()))
    return Source((str(folder),), columns={"text": "t"})


FORMATS = [_jsonl, _csv, _webdataset]
FORMS = [{}, {"id": "key"}, {"variants": {"method": ("a", "b", "c")}}]


def _elsewhere(tasks: Iterable[ScanTask]) -> Iterator[Scanned]:
    """As other processes would: the last file first, and everything travels as bytes."""
    sent = [pickle.dumps(task) for task in tasks]
    found = [pickle.dumps(scan_elsewhere(pickle.loads(task))) for task in reversed(sent)]
    return (pickle.loads(answer) for answer in reversed(found))


def _surveyed(source: Source, scans: Scans, folder: Path) -> tuple[list[Any], Survey, Any]:
    """Shards as the plan's tables give them back, the totals, and the type that a kept column takes."""
    source, totals, columns = resolve(source), Survey(), Watched(resolve(source), {"n": "keep"}, None)
    with Tables(Folder.at(str(folder))) as tables:
        for shard in survey(source, EVERY, None, totals, tables.file, columns, scans):
            tables.shard(shard)
    return list(read_shards(Folder.at(str(folder)))), totals, columns.kept.columns and columns.kept._values["n"]


@pytest.mark.parametrize("form", FORMS, ids=["derived", "own", "variants"])
@pytest.mark.parametrize("write", FORMATS)
def test_scanned_elsewhere_is_scanned(write: Callable[[Path], Source], form: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = replace(write(tmp_path / "in"), **form)
    here, totals, kind = _surveyed(source, one_by_one, tmp_path / "here")
    there, others, other = _surveyed(source, _elsewhere, tmp_path / "there")
    assert (there, others) == (here, totals)
    if write is not _csv:  # whose columns are text
        assert vars(other) == vars(kind)
    given = [(raw.id, raw.values["text"]) for shard in here for raw in _read(source, shard)]
    times = 3 if "variants" in form else 1
    assert [text for _, text in given] == [row["t"] for row in ROWS for _ in range(times)]
    assert len({own for own, _ in given}) == times * len(ROWS)
    assert any(span.ahead for shard in here for span in shard.spans)  # or nothing of this has been tried


def _read(source: Source, shard: Any) -> Iterator[Any]:
    return read_rows(resolve(source), shard.spans, 0, shard.rows, {"text": "t"})


def test_an_id_that_two_files_share_is_found(tmp_path: Path) -> None:
    source = replace(_jsonl(tmp_path), id="key")
    (tmp_path / "9.jsonl").write_text('{"key": "k7", "t": "again"}\n')
    with pytest.raises(SourceError, match=r"'k7': row 7 of .*0\.jsonl and row 0 of .*9\.jsonl"):
        list(survey(resolve(source), EVERY, None, Survey(), lambda file, scan: None, None, _elsewhere))


def test_only_what_is_read_whole_is_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(_jsonl(tmp_path))
    assert not is_heavy(source, None)
    monkeypatch.setattr(scanning, "HEAVY_BYTES", 5000)
    assert is_heavy(source, None)
    assert not is_heavy(source, 10)  # a few rows are soon found
    assert not is_heavy(resolve(Source((str(tmp_path / "0.jsonl"),))), None)  # one file is one task
    with _scanning(source, 10, "nowhere:1", 1) as scans:
        assert scans is one_by_one


def test_planned_on_ray(tmp_path: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    _webdataset(tmp_path / "in")
    spec = spec_of(tmp_path / "in", tmp_path / "out", shard_rows=EVERY, columns={"text": "t"}, keep=("n",))
    here = make_plan(spec)
    monkeypatch.setattr(scanning, "HEAVY_BYTES", 1)
    assert dry_plan(spec) == here
    assert run(spec).state == "complete"
    assert data(str(tmp_path / "out"))["length"].to_pylist() == [len(row["t"]) for row in ROWS]


def _sized(task: int) -> int:
    if task == 5:
        raise SourceError("5.tar: is damaged")
    return task * task


def test_spread_keeps_the_order_and_tells_what_is_wrong(local_ray: str) -> None:
    assert list(spread(_sized, range(5))) == [0, 1, 4, 9, 16]
    with pytest.raises(SourceError, match=r"^5\.tar: is damaged$"):
        list(spread(_sized, range(50)))


def test_what_is_shared_goes_with_every_item(local_ray: str) -> None:
    """And with large items no more are ahead than the object store has room for."""
    shared, made = np.arange(5), list[int]()

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    found, ahead = list[int](), list[int]()
    for answer in spread(_sum, items(), shared, size=1 << 40):
        found.append(answer)
        ahead.append(len(made) - len(found))
    assert found == [10 + number for number in range(6)]
    assert max(ahead) == 1  # two at work, one of which has just been answered


def _sum(item: int, shared: np.ndarray) -> int:
    return item + int(shared.sum())
