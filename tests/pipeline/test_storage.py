"""A folder: what one process lists while others write in it."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline import machine
from pipeline.output.dataset import RECORD_READERS
from pipeline.storage import END_BYTES, Folder
from tests.simulation.store import Bucket
from tests.simulation.world import World


def test_a_file_that_goes_while_a_folder_is_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files come and go: whoever commits a record makes one, and renames it."""
    (tmp_path / "records").mkdir()
    for i in range(20):
        (tmp_path / f"records/{i:06d}.json").write_text("{}")
    (tmp_path / "records/.a.tmp").write_text("{}")
    real = os.scandir

    def scandir(path: Any) -> Any:
        with real(path) as found:
            entries = list(found)
        (tmp_path / "records/.a.tmp").unlink()
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(Folder.at(str(tmp_path)).listing("records")) == [f"{i:06d}.json" for i in range(20)]
    monkeypatch.setattr(os, "scandir", real)
    assert Folder.at(str(tmp_path)).listing("nothing") == {}


def test_a_file_of_ones_own_that_is_said_to_exist_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS answers so to a request that it was sent twice; a run then took its own lock for another's."""
    real = os.link

    def twice(source: Any, target: Any) -> None:
        real(source, target)
        real(source, target)

    folder = Folder.at(str(tmp_path))
    monkeypatch.setattr(os, "link", twice)
    assert folder.create("lock.json", b"mine")
    assert not folder.create("lock.json", b"another's")
    assert (folder.read("lock.json"), [*folder.listing("")]) == (b"mine", ["lock.json"])


def test_the_end_of_a_file_on_a_store_tells_its_size() -> None:
    """One request instead of two, and no other size passes."""
    folder = Folder.at("memory://ends")
    for size in (1, 100, END_BYTES - 1, END_BYTES, END_BYTES + 1, 3 * END_BYTES):
        data = bytes(i % 251 for i in range(size))
        folder.write("file", data)
        assert folder.end("file", size) == data[-END_BYTES:]
        assert folder.end("file", size + 1) is None
        assert size == 1 or folder.end("file", size - 1) is None


@pytest.mark.parametrize("address", ["", "memory://many", "sim://many"])
def test_many_files_are_deleted_though_some_are_gone(tmp_path: Path, address: str) -> None:
    options = {"bucket": Bucket(World(0))} if address.startswith("sim") else None
    folder = Folder.at(address or str(tmp_path), options)
    names = [f"a/{i}" for i in range(2500)] if folder.at_once > 1 else [f"a/{i}" for i in range(3)]
    for name in [*names[1:], "b"]:
        folder.write(name, b"x")
    for start in range(0, len(names), folder.at_once):
        folder.remove_all(names[start : start + folder.at_once])
    assert folder.listing("a") == {}
    assert folder.exists("b")


@pytest.mark.parametrize("address", ["", "memory://top"])
def test_files_directly_in_a_folder_are_listed(tmp_path: Path, address: str) -> None:
    folder = Folder.at(address or str(tmp_path))
    folder.write("a", b"1")
    folder.write("b/c", b"22")
    assert (folder.listing(""), folder.listing("b")) == ({"a": 1}, {"c": 2})
    assert folder.lacks("a.probe") == []


def test_as_many_threads_as_ask_s3_are_answered_at_once() -> None:
    """Before: its client opened ten connections for sixteen threads."""
    all_here = threading.Barrier(RECORD_READERS)

    class Waits(BaseHTTPRequestHandler):
        """Answers when all have asked; else it forbids what they ask for."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(threading.BrokenBarrierError):
                all_here.wait(60)
            self.send_response(403 if all_here.broken else 200)
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"x")

        def log_message(self, *rest: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        request_queue_size = 2 * RECORD_READERS

    with Server(("127.0.0.1", 0), Waits) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "key": "a", "secret": "b",
                   "config_kwargs": {"read_timeout": 120}, "skip_instance_cache": True}  # fmt: skip
        folder = Folder.at("s3://bucket/out", options)
        read = machine.several(folder.read, map(str, range(RECORD_READERS)), RECORD_READERS)
        assert list(read) == [b"x"] * RECORD_READERS
        server.shutdown()
