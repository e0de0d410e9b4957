"""Datasets on the Hugging Face hub as input: ``hf://datasets/...``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.failures import passing
from pipeline.input.source import SourceError
from pipeline.run.plan import make_plan
from pipeline.run.worker import Worker
from tests.pipeline.run.test_changed_input import planned
from tests.support.hub import Hub, Repository, hub_server
from tests.support.plain_stages import rows_of, spec_of


def _parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        old = {"data/train-0.parquet": _parquet("old")}
        files = {"README.md": b"", "data/train-0.parquet": _parquet("a", "bb"), "data/train-1.parquet": _parquet("ccc")}
        server.datasets["ada/set"] = Repository(branches={"main": files, "v1": old})
        yield server


@pytest.mark.parametrize(
    ("path", "lengths"),
    [("data", [1, 2, 3]), ("data/*.parquet", [1, 2, 3]), ("data/train-1.parquet", [3]), ("", [1, 2, 3])],
)
def test_a_dataset_of_the_hub_is_read(tmp_path: Path, hub: Hub, path: str, lengths: list[int]) -> None:
    address = f"hf://datasets/ada/set/{path}".rstrip("/")
    rows = rows_of(address, tmp_path / "out", storage_options={"endpoint": hub.url})
    assert [row["length"] for row in rows] == lengths


def test_of_a_revision_that_revision_is_read(tmp_path: Path, hub: Hub) -> None:
    rows = rows_of("hf://datasets/ada/set@v1/data", tmp_path / "out", storage_options={"endpoint": hub.url})
    assert [row["length"] for row in rows] == [3]


def test_a_file_that_was_replaced_since_it_was_planned_is_not_read(tmp_path: Path, hub: Hub) -> None:
    spec = spec_of("hf://datasets/ada/set/data", tmp_path / "out", storage_options={"endpoint": hub.url})
    worker, (task,) = planned(spec)
    before = hub.datasets["ada/set"].branches["main"]["data/train-1.parquet"]
    hub.datasets["ada/set"].branches["main"]["data/train-1.parquet"] = _parquet("ddd")  # of the same size
    assert len(before) == len(_parquet("ddd"))
    assert isinstance(worker, Worker)
    with pytest.raises(SourceError, match=r"train-1\.parquet: the input changed"):
        worker.process(task)


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    spec = spec_of("hf://datasets/ada/set", tmp_path / "out", storage_options={"endpoint": "http://127.0.0.1:9"})
    with pytest.raises(OSError, match=r"^ConnectError: .*refused") as caught:
        make_plan(spec)
    assert passing(caught.value)  # a run waits for it
