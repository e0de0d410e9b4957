"""The same run against a Google Cloud Storage server, in fair weather and in foul."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Folder
from tests.support.weather import (
    SHARDS,
    Google,
    check_end,
    check_lock,
    check_run,
    check_shards,
    check_writing,
    gcs_server,
    weather_before,
)

gcsfs = pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator.server")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], Any]]:
    """fsspec options for a bucket behind the weather, and the proxy."""
    monkeypatch.setattr("pipeline.storage.PART_BYTES", 1 << 18)  # the emulator takes long for more
    with gcs_server() as port, weather_before(port, Google) as proxy:
        yield {"token": "anon", "project": "test", "endpoint_url": f"http://127.0.0.1:{proxy.server_port}"}, proxy
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_what_a_commit_needs(store: tuple[dict[str, Any], Any]) -> None:
    folder = Folder.at("gs://bucket/out", store[0])
    check_writing(folder)
    assert folder.listing("parts") == {"whole": 1000}
    folder.move("parts/whole", "data/whole")
    assert (folder.listing("parts"), folder.listing("data")) == ({}, {"whole": 1000})
    folder.remove("new")
    folder.remove("new")
    assert list(folder.names()) == ["a", "data", "once"]
    check_lock(folder)


def test_the_end_of_a_file_tells_its_size(store: tuple[dict[str, Any], Any]) -> None:
    check_end(Folder.at("gs://bucket/ends", store[0]))


def test_a_refusal_is_told_in_a_sentence(store: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs' own exceptions are no OSErrors, which is what all of the pipeline expects of a store."""
    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(Google, "refusal", lambda self, body: 409)
    folder = Folder.at("gs://bucket/out", store[0])
    with pytest.raises(OSError, match="409"):
        folder.write("a", b"1")
    upload = folder.begin("b")
    upload.write(b"x")
    with pytest.raises(OSError, match="409"):
        upload.close()


def test_the_command_line_tells_of_a_refusal_in_a_sentence(
    store: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from typer.testing import CliRunner

    from jobs.commands.cli import app

    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(Google, "refusal", lambda self, body: 409)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store[0]["endpoint_url"])
    result = CliRunner().invoke(app, ["status", "gs://bucket/out"])
    assert result.exit_code == 2
    assert result.output.startswith("error: HttpError: ")  # then what the server says
    assert "Traceback" not in result.output
    assert not caplog.records


@pytest.mark.parametrize("error", ["gcsfs.retry.HttpError", "builtins.KeyError"])
def test_only_a_client_s_own_exceptions_lose_their_traceback(error: str) -> None:
    import typer

    from jobs.commands.errors import errors

    module, _, name = error.rpartition(".")
    raised = getattr(importlib.import_module(module), name)
    with pytest.raises(typer.Exit if module.startswith("gcsfs") else raised), errors():
        raise raised({"code": 401, "message": "Invalid Credentials"})


@pytest.mark.fault
def test_run_on_a_stormy_store(tmp_path: Path, local_ray: str, store: tuple[dict[str, Any], Any]) -> None:
    options, proxy = store
    check_run(tmp_path, "gs", gcsfs.GCSFileSystem(**options), options, proxy)


@pytest.mark.fault
@pytest.mark.parametrize("shards", SHARDS)
def test_any_number_of_shards(
    tmp_path: Path, local_ray: str, store: tuple[dict[str, Any], Any], shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_shards(tmp_path, "gs", gcsfs.GCSFileSystem(**store[0]), store[0], shards, monkeypatch)
