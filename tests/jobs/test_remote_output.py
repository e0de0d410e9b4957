"""Outputs on a store that only the job file's `storage_options` reach: no environment, no profile knows its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.stores import parsed
from jobs.report import write_report
from jobs.run import run_job
from jobs.schema.base import RowJob
from pipeline.access import granted, options_for
from tests.support.weather import s3_server

SECRET = "hush-hush-secret"


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with s3_server() as port:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield {"key": "test", "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_a_run_ends_with_its_report(
    tmp_path: Path, toy_job: type[RowJob], local_ray: str, options: dict[str, Any]
) -> None:
    import s3fs

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


@pytest.mark.slow
def test_a_chain_and_all_commands_reach_the_store(
    tmp_path: Path, local_ray: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference, what reads it, what trains and keeps checkpoints; the keys stand in the chain alone, and nowhere in
    what it wrote."""
    import s3fs

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a {c} star"}) + "\n" for c in ("red", "blue", "green", "pink")))
    steps = [
        {"job": "reference", "input": "micro-world://train?rows=40&seed=0", "encoder": "micro:prior"},
        {"job": "invert-prompts", "input": str(prompts), "encoder": "micro:prior", "reference": "${reference}",
         "methods": [{"method": "direct"}]},
        {"job": "train-inverter", "input": "${invert-prompts}", "model": "micro:stable-diffusion", "steps": 2,
         "network": {"width": 32, "layers": 1, "heads": 2}, "training": {"steps": 3, "batch_size": 2},
         "checkpoint_seconds": 0},
        {"job": "invert-text", "input": "micro-world://train?rows=2&seed=0", "model": "micro:stable-diffusion",
         "inverter": "${train-inverter}"},
    ]  # fmt: skip
    job = tmp_path / "chain.yaml"
    resources = {"cpus": 0.5}
    chain = {"job": "chain", "steps": steps, "resources": resources, "storage_options": options}
    job.write_text(yaml.safe_dump(chain))
    done = invoke("run-job", str(job), "-o", "s3://bucket/all")
    assert done.exit_code == 0, done.output
    keys = ("--storage-options", f"@{job}")
    assert "reference: complete" in invoke("status", "s3://bucket/all", *keys).output
    assert json.loads(invoke("verify", "s3://bucket/all", "--json", *keys).output)["ok"] is True
    assert invoke("report", "s3://bucket/all", *keys).output.strip() == "s3://bucket/all/report.html"
    found = invoke("search", "s3://bucket/all/reference", "a red star", "--json", "-k", "2", *keys)
    assert len(json.loads(found.output)) == 2
    assert json.loads(invoke("run-job", str(job), "-o", "s3://bucket/all", "--dry-run", "--json").output)[1]["plan"]
    fs = s3fs.S3FileSystem(**options)
    names = fs.find("bucket/all")
    assert not [name for name in names if SECRET.encode() in fs.cat_file(name)]
    refused = invoke("status", "s3://bucket/all", "--storage-options", f"endpoint_url={options['endpoint_url']}")
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "Traceback" not in refused.stderr


def test_the_parts_of_an_index_are_made_on_the_cluster(tmp_path: Path, local_ray: str) -> None:
    """And are the bytes that one process makes."""
    np.save(tmp_path / "given.npy", np.random.default_rng(0).normal(size=(900, 16)).astype(np.float32))
    job = {
        "job": "reference", "input": str(tmp_path / "given.npy"), "given": "embeddings", "dim": 16, "shard_rows": 150,
        "index": {"factory": "IVF8,SQ8", "part_rows": 300},
    }  # fmt: skip
    run_job(job, output=str(tmp_path / "there"), address=local_ray)
    run_job(job, output=str(tmp_path / "here"))
    there, here = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "reference").rglob("*.faiss")}
        for name in ("there", "here")
    )
    assert there == here
    assert there.keys() == {"index.faiss"}


def test_the_nearest_grant_opens_an_address() -> None:
    with granted("s3://bucket/out", {"key": "mine"}), granted("s3://other/in/*.txt", {"key": "theirs"}, "store"):
        assert options_for("s3://bucket/out/_checkpoints/x") == {"key": "mine"}
        assert options_for("s3a://elsewhere/reference") == {"key": "mine"}
        assert options_for("s3://other/pictures/1.png") == {"key": "theirs"}
        assert options_for("s3://elsewhere/reference", "store") == {}
        assert options_for("gs://bucket/out") == options_for("https://bucket/out") == options_for("/bucket/out") == {}
        with granted("s3://bucket", {"key": "newer"}):
            assert options_for("s3://bucket/in") == {"key": "newer"}
            assert options_for("s3://bucket/out/x") == {"key": "mine"}
    with granted("out/here", {"key": "mine"}):  # written to a disk, with a reference on a store
        assert options_for("s3://bucket/reference") == {"key": "mine"}
        assert options_for("https://host/picture.png") == {}
    assert options_for("s3://bucket/out") == {}


def test_options_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("job: reference\nstorage_options: {key: k, anon: false}\n")
    assert parsed(["key=0123", "anon=true", "client_kwargs={verify: false}"]) == {
        "key": "0123", "anon": True, "client_kwargs": {"verify": False},
    }  # fmt: skip
    assert parsed([f"@{file}", "anon=true"]) == {"key": "k", "anon": True}
    for wrong, said in (("key", "key=value"), (f"@{tmp_path}/none", "No such file"), ("a=[", "not valid YAML")):
        with pytest.raises(ValueError, match=said):
            parsed([wrong])
    assert invoke("status", "s3://bucket/x", "--storage-options", f"secret-{SECRET}").stderr.count(SECRET) == 0


def test_doctor_tries_the_store_and_leaves_nothing(options: dict[str, Any]) -> None:
    import s3fs

    from jobs.commands import checks
    from pipeline.storage import Folder

    found = list(checks.store(Folder.at("s3://bucket/out", options)))
    assert [state for state, _, _ in found] == ["ok", "ok"]  # its clock is ours
    assert "only if there is none" in found[1][1]
    assert s3fs.S3FileSystem(**options, use_listings_cache=False).find("bucket") == []


def test_a_store_that_does_not_answer_is_told_in_a_sentence(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's own exception is no OSError."""
    monkeypatch.setattr("pipeline.storage.ATTEMPTS", 1)
    nowhere = [f"{name}={value}" for name, value in {**options, "endpoint_url": "http://127.0.0.1:9"}.items()]
    told = invoke("status", "s3://bucket/out", *(word for one in nowhere for word in ("--storage-options", one)))
    assert told.exit_code == 2
    assert "127.0.0.1:9" in told.stderr
    assert told.stderr.count("\n") == 1
    assert SECRET not in told.stderr
