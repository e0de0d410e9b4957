"""Bad weather between a run and an object store, and what has to hold in it whatever the store."""

from __future__ import annotations

import http.client
import json
import logging
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, quote, urlsplit

import pyarrow as pa
import pytest

from pipeline.input.source import Source
from pipeline.output.commit import Taken, end
from pipeline.output.dataset import Output
from pipeline.output.lock import Lock, OutputLocked, holder
from pipeline.output.progress import Progress
from pipeline.output.verify import verify
from pipeline.run.driver import Resources, run
from pipeline.storage import END_BYTES, Folder, Upload
from tests.support.faulty import commit_plain, data, run_plain, spec_for


class Weather(BaseHTTPRequestHandler):
    """Passes requests on; every so often answers 500, or hangs up, before or after the server has acted.

    The server has `behind` (the real server's port), `requests`, `stormy` and `guard`: see `weather_before`.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement of its headers
    server: Any

    def refusal(self, body: bytes) -> int | None:
        """A status that is answered in the real server's place."""
        return None

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        with suppress(BrokenPipeError):
            super().finish()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.guard:
            self.server.requests += 1
            turn = self.server.requests % 17 if self.server.stormy else 0
        if turn == 5:
            self.send_error(500, "InternalError")
            return
        if turn == 9:
            self.close_connection = True
            self.connection.close()
            return
        if (refused := self.refusal(body)) is not None:
            self.send_error(refused)
            return
        headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
        self.upstream.request(self.command, self.path, body, headers)
        answer = self.upstream.getresponse()
        content = answer.read()
        if turn == 13:  # it is done, and nobody hears of it
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError):  # the reader has seen enough
                self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Google(Weather):
    """The emulator takes no preconditions; the real service answers 412 to `ifGenerationMatch=0` for what exists, of an
    upload in parts to the last of them, whose address still bears it (fsouza/fake-gcs-server, issue 1967)."""

    def refusal(self, body: bytes) -> int | None:
        parts = urlsplit(self.path)
        asked = parse_qs(parts.query)
        if asked.get("ifGenerationMatch") != ["0"]:
            return None
        bucket = parts.path.split("/b/")[1].split("/")[0]
        if asked["uploadType"] == ["resumable"]:
            if "upload_id" not in asked or self.headers["Content-Range"].endswith("/*"):
                return None
            name = asked["name"][0]
        else:
            name = json.loads(body[body.index(b"{") : body.index(b"}") + 1])["name"]  # the metadata before the content
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        upstream.request("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        return 412 if upstream.getresponse().status == 200 else None


class Proxy(ThreadingHTTPServer):
    request_queue_size = 128  # else of sixteen that connect at once some wait a second

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to write to stderr about: tests read what is there."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of an S3 server on this machine with an empty bucket ``bucket``; what is put there is gone after."""
    import boto3
    from moto.moto_api._internal import moto_api_backend
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    port = server.get_host_and_port()[1]
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="bucket")
    try:
        yield port
    finally:
        server.stop()
        moto_api_backend.reset()  # its content is the process's, not the server's


@contextmanager
def gcs_server() -> Iterator[int]:
    """The port of a Google Cloud Storage server on this machine with an empty bucket ``bucket``; wants `Google`."""
    from gcp_storage_emulator import server as emulator

    quick = (
        patch.object(emulator.RequestHandler, "disable_nagle_algorithm", True),  # else 40 ms an answer
        patch.object(emulator.server.HTTPServer, "request_queue_size", 128),  # else a second for some of sixteen
        patch.object(emulator.Storage, "_write_config_to_file", lambda self: None),  # else all names at every write
    )
    with quick[0], quick[1], quick[2]:
        real = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        real.start()
        try:
            yield real._api._httpd.server_port
        finally:
            real.stop()


@contextmanager
def weather_before(port: int, handler: type[Weather] = Weather) -> Iterator[Any]:
    """A proxy before the server at a port of this machine; bad once its `stormy` is set, counts its `requests`."""
    proxy: Any = Proxy(("127.0.0.1", 0), handler)
    proxy.behind, proxy.requests, proxy.stormy, proxy.guard = port, 0, False, threading.Lock()
    threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


def check_run(tmp_path: Path, scheme: str, fs: Any, options: dict[str, Any], proxy: Any) -> None:
    """A run in a storm writes into the bucket what it writes to a disk, leaves nothing else, and repairs a loss.

    Args:
        scheme: ``s3`` or ``gs``.
        fs: The bucket's filesystem; `options` are its.
        proxy: What `weather_before` gave.
    """
    plain = spec_for(tmp_path, [f"line {i}" for i in range(40)])
    expected = data(run_plain(plain).path)
    fs.pipe_file("bucket/in/in.txt", Path(plain.source.path[0]).read_bytes())
    source = Source((f"{scheme}://bucket/in/*.txt",), columns={"text": "text"}, storage_options=options)
    spec = replace(plain, source=source, output=f"{scheme}://bucket/out", storage_options=options)
    proxy.stormy = True
    tried = set[int]()

    def tell(progress: Progress) -> None:
        tried.update(map(int, re.findall(r"shard (\d+) has to wait", progress.message or "")))

    result = run(spec, resources=Resources(max_workers=2, cpus=0.5), progress=tell)
    assert (result.state, result.ok) == ("complete", 40)
    assert proxy.requests > 60
    report = verify(spec.output, options, input_options=options)
    assert report.ok, report.problems
    assert pa.concat_tables(Output.open(spec.output, options).tables()).combine_chunks().equals(expected)
    proxy.stormy = False
    fs.invalidate_cache()
    assert not [name for name in fs.find("bucket/out") if "/attempts/" in name or name.endswith(".probe")]
    assert [name for name in fs.find("bucket/out") if "lock" in name] == ["bucket/out/_latentmill/locks/000001.json"]
    assert holder(Folder.at(spec.output, options)) is None
    output = Output.open(spec.output, options)
    for record in output.records():  # no file got its name by a copy, but one that was tried again
        assert f"data/{record.file}" == output.part(record.shard) or record.shard in tried
    fs.rm_file(f"bucket/out/{output.part(2)}")
    assert not verify(spec.output, options).ok
    again = run(spec, resources=Resources(cpus=0.5))
    assert (again.state, again.resumed) == ("complete", 3)
    assert verify(spec.output, options).ok


SHARDS = (1, 16, 17, 45, 300)
"""Counts of shards around the number of records that are read at once, and well beyond it."""


def check_shards(
    tmp_path: Path, scheme: str, fs: Any, options: dict[str, Any], shards: int, patch: pytest.MonkeyPatch
) -> None:
    """A run of so many shards completes on a store at its first start, and starting it again finds all of it done.

    Every record is seen by whoever reads them; and a survey of a whole dataset takes nothing of it away. Seventeen are
    worked off by workers on Ray; other numbers are committed on a disk and put into the bucket, in a fifth of the time.

    Args:
        fs: The bucket's filesystem; `options` are its.
    """
    spec = spec_for(tmp_path, [f"line {i}" for i in range(shards)], shard_rows=1)
    if shards != 17:
        own = Path(commit_plain(spec)[0].path) / "_latentmill"

        def copy(files: Iterable[Path]) -> None:
            fs.pipe({f"bucket/out-{shards}/_latentmill/{path.relative_to(own)}": path.read_bytes() for path in files})

        def put(*args: Any) -> None:
            copy(path for name in ("attempts", "summaries", "records") for path in (own / name).iterdir())

        copy(path for path in own.iterdir() if path.is_file())  # the plan: records count for their own run alone
        patch.setattr("pipeline.run.driver._compute", put)
    spec = replace(spec, output=f"{scheme}://bucket/out-{shards}", storage_options=options)
    for resumed in (0, shards):
        result = run(spec, resources=Resources(max_workers=2, cpus=0.5))
        assert (result.state, result.ok, result.resumed) == ("complete", shards, resumed), result.reason
        output = Output.open(spec.output, options)
        assert output.folder.exists("_SUCCESS")
    assert [record.shard for record in output.records()] == list(range(shards))
    report = verify(spec.output, options)
    assert (report.ok, report.found) == (True, shards), report.problems


def check_end(folder: Folder) -> None:
    """A store refuses a range that begins behind a file's end: the file was cut, and the store is there."""
    for size in (0, 1, 100):
        folder.write("file", b"x" * size)
        assert folder.end("file", size) == b"x" * size
        assert folder.end("file", size + 1) is None
        assert folder.end("file", size + 2 * END_BYTES) is None


def check_writing(folder: Folder) -> None:
    """A file is replaced, or made only if it is not there; an upload is whole or nothing: ``parts/whole``."""
    folder.write("a", b"1")
    folder.write("a", b"22")
    assert (folder.read("a"), folder.size("a"), folder.size("none")) == (b"22", 2, None)
    assert folder.create("new", b"mine")
    assert not folder.create("new", b"theirs")
    assert folder.read("new") == b"mine"
    upload = folder.begin("parts/whole")
    upload.write(b"x" * 1000)
    upload.close()
    left = folder.begin("parts/left")
    left.write(b"x" * 1000)
    left.abandon()
    assert folder.listing("parts") == {"whole": 1000}
    check_once(folder)


def check_once(folder: Folder) -> None:
    """A taken name is refused at the end of an upload, of one part or several, and nothing is left of that."""
    assert folder.ends_once("once/probe")
    first, second = folder.begin("once/a", once=True), folder.begin("once/a", once=True)
    for upload, byte in ((first, b"1"), (second, b"2")):
        upload.write(byte * 1000)
    first.close()
    assert (folder.read("once/a"), first.tail) == (b"1" * 1000, b"1" * 1000)
    with pytest.raises(FileExistsError):
        second.close()
    end(first, folder, "once/a")
    with pytest.raises(Taken):
        end(_lost(second), folder, "once/a")
    end(_lost(first), folder, "once/a")
    assert folder.listing("once") == {"a": 1000}


def _lost(upload: Upload) -> Any:
    """An upload of which the first answer was lost: the client asks again, and its own file is there."""

    def close() -> None:
        raise FileExistsError

    return SimpleNamespace(close=close, size=upload.size, tail=upload.tail)


def check_lock(folder: Folder) -> None:
    """One run at a time holds a folder."""
    lock = Lock(folder)
    with pytest.raises(OutputLocked):
        Lock(folder)
    lock.release()
    Lock(folder).release()
