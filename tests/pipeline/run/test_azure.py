"""The same run on Azure's blobs: a small server of the tests' own, and Azurite where ``AZURITE`` is its executable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Folder
from tests.support.blobs import azurite_server, fake_server, options_at
from tests.support.in_process import without_ray
from tests.support.weather import Weather, check_end, check_lock, check_run, check_shards, check_writing, weather_before

adlfs = pytest.importorskip("adlfs")
HttpResponseError = pytest.importorskip("azure.core.exceptions").HttpResponseError
BlobServiceClient = pytest.importorskip("azure.storage.blob").BlobServiceClient

needs_azurite = pytest.mark.skipif("AZURITE" not in os.environ, reason="AZURITE names no azurite-blob")


@pytest.fixture(params=["fake", pytest.param("azurite", marks=needs_azurite)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """fsspec options for a container behind the weather, and the proxy."""
    azurite = request.param == "azurite"
    server = azurite_server(os.environ["AZURITE"], tmp_path / "azurite") if azurite else fake_server()
    with server as port, weather_before(port) as proxy:
        adlfs.AzureBlobFileSystem(**options_at(proxy.server_port)).mkdir("bucket")
        yield options_at(proxy.server_port), proxy
    adlfs.AzureBlobFileSystem.clear_instance_cache()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's client waits a quarter of a minute before it asks again."""
    waiting = "azure.storage.blob._shared.policies_async.ExponentialRetry.get_backoff_time"
    monkeypatch.setattr(waiting, lambda self, settings: 0.0)
    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("pipeline.azure.PAUSE_S", 0.0)


def test_what_a_commit_needs(store: tuple[dict[str, Any], Any], quick: None) -> None:
    folder = Folder.at("az://bucket/out", store[0])
    assert folder.is_exclusive("a.probe")
    assert folder.lacks("a.probe") == []
    check_writing(folder)
    folder.write("parts-of-another/b", b"1")
    assert folder.listing("parts") == {"whole": 1000}
    folder.move("parts/whole", "data/whole")
    assert (folder.listing("parts"), folder.listing("data")) == ({}, {"whole": 1000})
    assert folder.read("data/whole") == b"x" * 1000
    with pytest.raises(FileNotFoundError):
        folder.copy("parts/whole", "data/again")
    folder.remove("new")
    folder.remove("new")
    assert list(folder.names()) == ["a", "data", "once", "parts-of-another"]
    check_lock(folder)


def test_a_list_of_blocks_is_taken_twice(store: tuple[dict[str, Any], Any], quick: None) -> None:
    """The client sends it again where the answer was lost."""
    blobs = BlobServiceClient.from_connection_string(store[0]["connection_string"]).get_container_client("bucket")
    blob = blobs.get_blob_client("a")
    blob.stage_block("MQ==", b"one")
    blob.stage_block("Mg==", b"two")
    for _ in range(2):
        blob.commit_block_list(["MQ==", "Mg=="])
        assert blob.download_blob().readall() == b"onetwo"
    blob.delete_blob()
    with pytest.raises(HttpResponseError, match="InvalidBlockList"):
        blob.commit_block_list(["MQ==", "Mg=="])


def test_the_end_of_a_file_tells_its_size(store: tuple[dict[str, Any], Any], quick: None) -> None:
    check_end(Folder.at("az://bucket/out", store[0]))


def test_a_copy_is_waited_for(quick: None) -> None:
    """The service may answer that it will copy; whoever deletes the source then has nothing left."""
    with fake_server() as port:
        adlfs.AzureBlobFileSystem(**options_at(port)).mkdir("bucket")
        folder = Folder.at("az://bucket/out", options_at(port))
        folder.write("a", b"content")
        folder.move("a", "b")
        assert folder.read("b") == b"content"
    adlfs.AzureBlobFileSystem.clear_instance_cache()


def test_a_refusal_is_told_in_a_sentence(store: tuple[dict[str, Any], Any], quick: None) -> None:
    """adlfs raises RuntimeErrors too, with the answer's XML."""
    folder = Folder.at("az://nothing/out", store[0])
    with pytest.raises(OSError, match=r"^ResourceNotFoundError: [^<>\n]*$"):
        folder.write("a", b"1")
    upload = folder.begin("b")
    upload.write(b"x")
    with pytest.raises(OSError, match=r"^ResourceNotFoundError: [^<>\n]*$"):
        upload.close()


def test_keys_that_do_not_open_it_are_told_at_once(
    store: tuple[dict[str, Any], Any], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, proxy = store
    monkeypatch.setattr(Weather, "refusal", lambda self, body: 403)
    asked = proxy.requests
    with pytest.raises(PermissionError, match=r"^HttpResponseError: .*403"):
        Folder.at("az://bucket/out", options).read("a")
    assert proxy.requests == asked + 1


@pytest.mark.fault
def test_run_on_a_stormy_store(
    tmp_path: Path, store: tuple[dict[str, Any], Any], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    options, proxy = store
    check_run(tmp_path, "az", adlfs.AzureBlobFileSystem(**options), options, proxy)
    plan = adlfs.AzureBlobFileSystem(**options).cat_file("bucket/out/_latentmill/plan.json").decode()
    assert "AccountKey" not in plan


@pytest.mark.fault
@pytest.mark.parametrize("shards", [17, 45] if "AZURITE" in os.environ else [45])
def test_any_number_of_shards(
    tmp_path: Path, local_ray: str, store: tuple[dict[str, Any], Any], shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_at(store[1].behind)
    check_shards(tmp_path, "az", adlfs.AzureBlobFileSystem(**options), options, shards, monkeypatch)


@pytest.mark.parametrize("names", [("abfs://bucket", "az://bucket"), ("az://bucket", "abfss://bucket")])
def test_the_names_of_the_protocol_are_one(names: tuple[str, str]) -> None:
    from pipeline.access import granted, options_for

    with granted(f"{names[0]}/out", {"account_key": "k"}, "store"):
        assert options_for(f"{names[1]}/in/a.txt", "store") == {"account_key": "k"}


def test_an_account_in_the_address_is_kept_and_is_no_secret(tmp_path: Path) -> None:
    from pipeline.access import connect
    from pipeline.addresses import beside, has_password, shown

    address, key = "abfss://pics@mine.dfs.core.windows.net/in/a.txt", {"account_key": "a2V5"}
    fs, path = connect(address, {**key, "account_name": "mine"})
    assert (fs.account_name, path) == ("mine", "pics/in/a.txt")
    assert beside(fs.unstrip_protocol(path), address) == address.replace("abfss", "abfs")
    assert beside("abfs://pics/b", "abfs://pics/in") == "abfs://pics/b"
    assert (shown(address), has_password(address)) == (address, False)
    assert shown("https://token@host/a") == "https://***@host/a"
    with pytest.raises(ValueError, match=r"mine\.dfs\.core\.windows\.net/in/a\.txt: the account in `storage_options`"):
        Folder.at(address, {**key, "account_name": "other"})


def test_a_row_that_names_another_account_gets_no_key() -> None:
    from pipeline.addresses import Refused, placed

    allow = ["abfss://pics@mine.dfs.core.windows.net/in"]
    assert placed("az://pics@mine.dfs.core.windows.net/in/a.png", "/data", allow)
    for other in ("abfss://pics@theirs.dfs.core.windows.net/in/a.png", "abfs://pics/in/a.png"):
        with pytest.raises(Refused):
            placed(other, "/data", allow)
