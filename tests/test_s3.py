"""The same run against an S3 server that answers with errors and drops connections now and then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.lock import OutputLocked
from pipeline.output import Output, verify
from pipeline.run import Resources, run
from pipeline.source import Source
from tests.faulty import data, run_plain, spec_for
from tests.weather import weather_before

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
LINES = [f"line {i}" for i in range(40)]


@pytest.fixture
def store() -> Iterator[tuple[dict[str, Any], Any]]:
    """fsspec options for a bucket behind the weather, and the proxy."""
    import boto3

    real = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    real.start()
    port = real.get_host_and_port()[1]
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="bucket")
    with weather_before(port) as proxy:
        address = f"http://127.0.0.1:{proxy.server_port}"
        client = {"region_name": "us-east-1"}
        yield {"key": "test", "secret": "test", "endpoint_url": address, "client_kwargs": client}, proxy
    real.stop()


@pytest.mark.fault
def test_run_on_a_stormy_store(tmp_path: Path, local_ray: str, store: tuple[dict[str, Any], Any]) -> None:
    import pyarrow as pa
    import s3fs

    options, proxy = store
    plain = spec_for(tmp_path, LINES)
    expected = data(run_plain(plain).path)
    fs = s3fs.S3FileSystem(**options)
    fs.pipe_file("bucket/in/in.txt", Path(plain.source.path[0]).read_bytes())
    source = Source(("s3://bucket/in/*.txt",), columns={"text": "text"}, storage_options=options)
    spec = replace(plain, source=source, output="s3://bucket/out", storage_options=options)
    proxy.stormy = True
    result = run(spec, resources=Resources(max_workers=2, cpus=0.5))
    assert (result.state, result.ok) == ("complete", 40)
    assert proxy.requests > 60
    report = verify(spec.output, options, input_options=options)
    assert report.ok, report.problems
    assert pa.concat_tables(Output.open(spec.output, options).tables()).combine_chunks().equals(expected)
    proxy.stormy = False
    fs.invalidate_cache()
    assert not [name for name in fs.find("bucket/out") if "/attempts/" in name or name.endswith("lock.json")]
    assert "secret" not in fs.cat_file("bucket/out/_latentmill/plan.json").decode()
    fs.rm_file("bucket/out/data/part-00002-of-00004.parquet")
    assert not verify(spec.output, options).ok
    again = run(spec, resources=Resources(cpus=0.5))
    assert (again.state, again.resumed) == ("complete", 3)
    assert verify(spec.output, options).ok


def test_lock_on_a_store(store: tuple[dict[str, Any], Any]) -> None:
    from pipeline.lock import Lock
    from pipeline.storage import Folder

    folder = Folder.at("s3://bucket/locked", store[0])
    lock = Lock(folder)
    with pytest.raises(OutputLocked):
        Lock(folder)
    lock.release()
    Lock(folder).release()
