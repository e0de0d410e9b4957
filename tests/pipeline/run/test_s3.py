"""The same run against an S3 server that answers with errors and drops connections now and then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.contract import StageSpec
from pipeline.output.dataset import Output
from pipeline.output.failed import failed_rows
from pipeline.output.verify import verify
from pipeline.run.draft import RunSpec
from pipeline.storage import Folder
from tests.pipeline.run.test_retry import BAD, IDS, LINES, Moody, start
from tests.support.faulty import data, spec_for
from tests.support.in_process import without_ray
from tests.support.weather import (
    SHARDS,
    check_end,
    check_lock,
    check_once,
    check_run,
    check_shards,
    s3_server,
    weather_before,
)

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture
def store() -> Iterator[tuple[dict[str, Any], Any]]:
    """fsspec options for a bucket behind the weather, and the proxy."""
    with s3_server() as port, weather_before(port) as proxy:
        address = f"http://127.0.0.1:{proxy.server_port}"
        client = {"region_name": "us-east-1"}
        yield {"key": "test", "secret": "test", "endpoint_url": address, "client_kwargs": client}, proxy


@pytest.mark.fault
def test_run_on_a_stormy_store(tmp_path: Path, local_ray: str, store: tuple[dict[str, Any], Any]) -> None:
    import s3fs

    options, proxy = store
    fs = s3fs.S3FileSystem(**options)
    check_run(tmp_path, "s3", fs, options, proxy)
    assert "secret" not in fs.cat_file("bucket/out/_latentmill/plan.json").decode()


def test_the_end_of_a_file_tells_its_size(store: tuple[dict[str, Any], Any]) -> None:
    check_end(Folder.at("s3://bucket/ends", store[0]))


def test_a_taken_name_is_refused_at_the_end_of_an_upload(store: tuple[dict[str, Any], Any]) -> None:
    import s3fs

    check_once(Folder.at("s3://bucket/named", store[0]))
    assert not s3fs.S3FileSystem(**store[0]).list_multipart_uploads("bucket"), "what was refused costs nothing"


def test_lock_on_a_store(store: tuple[dict[str, Any], Any]) -> None:
    check_lock(Folder.at("s3://bucket/locked", store[0]))


@pytest.mark.fault
@pytest.mark.parametrize("shards", SHARDS)
def test_any_number_of_shards(
    tmp_path: Path, local_ray: str, store: tuple[dict[str, Any], Any], shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    options, proxy = store
    options["endpoint_url"] = f"http://127.0.0.1:{proxy.behind}"  # no weather: these are many requests
    check_shards(tmp_path, "s3", s3fs.S3FileSystem(**options), options, shards, monkeypatch)


@pytest.fixture
def moody(
    tmp_path: Path, store: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[RunSpec, RunSpec]:  # fmt: skip
    """A run that is done on the disk, and the same, not begun, on the store."""
    without_ray(monkeypatch)
    stage = StageSpec(f"tests.pipeline.run.test_retry:{Moody.__name__}", {"orders": str(tmp_path / "orders")})
    plain = replace(spec_for(tmp_path, LINES, shard_rows=5), stage=stage)
    start(plain)
    return plain, replace(plain, output="s3://bucket/out", storage_options=store[0])


def test_failed_rows_on_a_store_are_listed_and_done_again(moody: tuple[RunSpec, RunSpec]) -> None:
    plain, spec = moody
    assert start(spec, BAD)[0].failed == 3
    rows = failed_rows(Output.open(spec.output, spec.storage_options))
    assert sorted(row.id for row in rows) == IDS
    again, seen = start(spec, retry_failed=True)
    assert (again.state, again.ok, seen) == ("complete", 20, IDS)
    output = Output.open(spec.output, spec.storage_options)
    assert pa.concat_tables(output.tables()).combine_chunks().equals(data(plain.output))
    report = verify(spec.output, spec.storage_options)
    assert report.ok, report.problems


def test_a_limit_grows_on_a_store(moody: tuple[RunSpec, RunSpec]) -> None:
    """What is published keeps its name and is not written again."""
    import s3fs

    plain, spec = moody
    fs, before = s3fs.S3FileSystem(**spec.storage_options), dict[str, Any]()
    for limit, done in ((7, 7), (12, 5), (None, 8)):
        result, seen = start(replace(spec, limit=limit))
        assert (result.state, len(seen)) == ("complete", done)
        output = Output.open(spec.output, spec.storage_options)
        assert pa.concat_tables(output.tables()).combine_chunks().equals(data(plain.output).slice(0, limit))
        assert verify(spec.output, spec.storage_options).ok
        fs.invalidate_cache()
        now = {found["Key"]: (found["ETag"], found["LastModified"]) for found in fs.ls("bucket/out/data", detail=True)}
        assert before.items() <= now.items()
        before = now
    assert len(before) == 5
