"""A job whose output lies on a store that only its own `storage_options` reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.report import write_report
from jobs.run import run_job
from jobs.schema.base import RowJob
from tests.support.weather import s3_server

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture
def options() -> Iterator[dict[str, Any]]:
    with s3_server() as port:
        yield {"key": "test", "secret": "test", "endpoint_url": f"http://127.0.0.1:{port}"}


def test_a_run_ends_with_its_report(
    tmp_path: Path, toy_job: type[RowJob], local_ray: str, options: dict[str, Any]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(4)))
    step = {"job": "toy", "input": str(rows), "resources": {"cpus": 0.5}, "storage_options": options}
    result = run_job(step, output="s3://bucket/out")
    assert (result.state, result.ok, result.report) == ("complete", 4, "s3://bucket/out/report.html")
    fs = s3fs.S3FileSystem(**options)
    assert "Lengths" in fs.cat_file("bucket/out/report.html").decode()
    assert write_report("s3://bucket/out", storage_options=options) == result.report
    chain = {"job": "chain", "steps": [{**step, "name": "one"}], "storage_options": options}
    assert run_job(chain, output="s3://bucket/chain").report == "s3://bucket/chain/report.html"
    assert 'href="one/report.html"' in fs.cat_file("bucket/chain/report.html").decode()
