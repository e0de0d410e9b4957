"""Pictures by address: every answer of a server is a picture or a reason, and passing trouble is waited out."""

from __future__ import annotations

import errno
import gzip
import http.server
import io
import json
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.failures import Away, passing
from pipeline.input.fetch import options_for
from pipeline.input.read import read_rows
from pipeline.input.rows import Span
from pipeline.input.source import Source, SourceError
from pipeline.output.dataset import Output
from pipeline.patience import Patience, hosts
from pipeline.web import Busy
from tests.support.plain_stages import rows_of


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 50).save(buffer, "PNG")
    return buffer.getvalue()


class _Server(http.server.ThreadingHTTPServer):
    """Answers by path: ``/503.png`` with that status, ``/busy.png`` with 503 twice and then the picture, and so on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.away = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_error(403)  # as stores do where an address is signed for GET

    def do_GET(self) -> None:
        name = self.path.strip("/").partition("?")[0].removesuffix(".png")
        self.server.asked.append(name)
        data, status, headers = _picture(), 200, {}
        if self.server.away:
            status = 503
        elif name.isdigit():
            status = int(name)
        elif name == "busy" and self.server.asked.count(name) < 3:
            status = 503
        elif name == "moved":
            status, headers = 302, {"Location": "/fine.png"}
        elif name == "page":
            data = b"<!DOCTYPE html><html>Sign in</html>"
        elif name == "drawing":
            data = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
        elif name == "zipped":
            data, headers = gzip.compress(data), {"Content-Encoding": "gzip"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) * (2 if name == "cut" else 1)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.001)
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


ANSWERS = {
    "fine": None, "moved": None, "zipped": None, "busy": None, "fine.png?signed=a%2Fb": None,
    "404": "404 Not Found", "403": "403 Forbidden", "410": "410 Gone",
    "page": "it is an HTML page", "drawing": "it is SVG",
}  # fmt: skip
SILENCE = {
    "503": "503 Service Unavailable, 5 times", "429": "429 Too Many Requests, 5 times",
    "500": "500 Internal Server Error, 5 times", "cut": ", 5 times", "fine": None,
}  # fmt: skip


@pytest.mark.parametrize("answers", [ANSWERS, SILENCE], ids=["answers", "silence"])
def test_every_answer_is_a_picture_or_a_reason(tmp_path: Path, server: _Server, answers: dict[str, str | None]) -> None:
    """A row whose address stays busy is to blame as long as its server answers others."""
    names = [name if "?" in name else f"{name}.png" for name in answers]
    lines = [json.dumps({"url": f"{server.address}/{name}"}) + "\n" for name in names]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    source = {"columns": {"image": "url"}, "allow": (server.address,)}
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", ["url"], stage="Captioned", shard_rows=50, **source)
    for row, reason in zip(rows, answers.values(), strict=True):
        if reason is None:
            assert (row["status"], row["width"]) == ("ok", 60), row
        else:
            assert row["status"] == "failed"
            assert row["error"].startswith("image: ")
            assert reason in row["error"]
    if answers is ANSWERS:
        assert server.asked.count("fine") == 3  # once for itself, once signed, once where `moved` leads
        assert server.asked.count("404") == 1
    else:
        assert server.asked.count("503") == 5


def _outage(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    monkeypatch.setattr("pipeline.patience.hosts._good", OrderedDict())
    monkeypatch.setattr("pipeline.patience.FIRST_S", 0.05)
    monkeypatch.setattr("pipeline.patience.LIMIT_S", limit)


def test_a_server_that_is_away_is_nobodys_fault(
    tmp_path: Path, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 of 20 rows were committed as failed. Now none is: the work is given up until the server is back."""
    _outage(monkeypatch, 0.3)
    (tmp_path / "in.jsonl").write_text(json.dumps({"url": f"{server.address}/fine.png"}) + "\n")
    server.away = True
    source = {"columns": {"image": "url"}, "allow": (server.address,), "stage": "Captioned"}
    with pytest.raises(Away, match=rf"{server.address} does not answer \("):
        rows_of(tmp_path / "in.jsonl", tmp_path / "out", **source)
    assert list(Output.open(str(tmp_path / "out")).records()) == []
    said: list[str] = []

    def comes_back() -> None:
        said.append(hosts.waits)
        server.away = False

    threading.Timer(1.0, comes_back).start()
    _outage(monkeypatch, 30.0)
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "again", **source)
    assert [row["status"] for row in rows] == ["ok"]
    assert said[0].startswith(f"{server.address} does not answer (")
    assert hosts.waits == ""


def test_a_host_that_is_gone_among_others_fails_its_rows_alone(
    tmp_path: Path, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of pictures on the web are full of hosts that are no more: none of them may hold up a run."""
    _outage(monkeypatch, 3600.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    addresses = [f"{server.address}/fine.png", f"{gone}/a.png", f"{gone}/b.png", f"{server.address}/fine.png"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"image": address}) + "\n" for address in addresses))
    allow = (gone, server.address)
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", stage="Captioned", allow=allow)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert ", 5 times" in rows[1]["error"]


def test_a_host_that_goes_for_good_is_waited_for_once(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _outage(monkeypatch, 0.2)
    known = Patience()
    known.answered("http://old.example.org/a.png")
    known.answered(f"{server.address}/fine.png")
    asked: list[str] = []

    def ask() -> bytes:
        asked.append("again")
        raise Busy("no answer")

    for number in range(2):
        with pytest.raises(Busy):
            known.outlast("http://old.example.org/b.png", Busy("no answer"), ask, lambda other: "old" not in other)
        assert bool(asked) == (number == 0)
        asked.clear()


def test_addresses_that_lead_nowhere(tmp_path: Path) -> None:
    addresses = ["nosuch://a.png", "http://", "s3://"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"image": address}) + "\n" for address in addresses))
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", stage="Captioned", allow=("nosuch://", "s3://"))
    assert {row["status"] for row in rows} == {"failed"}
    assert "nosuch" in rows[0]["error"]
    assert max(len(row["error"]) for row in rows) < 600


def test_the_keys_of_a_store_are_not_sent_elsewhere() -> None:
    store = Source(("s3://bucket/*.parquet",), storage_options={"secret": "hush"})
    assert options_for("s3://other/a.png", store) == {"secret": "hush"}
    assert options_for("https://example.com/a.png", store) == {}
    local = Source(("in.jsonl",), storage_options={"headers": {}})
    assert options_for("https://example.com/a.png", local) == {"headers": {}}
    web = Source(("https://data.example.com/in.parquet",), storage_options={"headers": {"Authorization": "hush"}})
    assert options_for("https://data.example.com/a.png", web) != {}
    assert options_for("https://images.example.com/a.png", web) == {}


def test_an_input_file_whose_server_is_away_is_no_missing_file(server: _Server) -> None:
    """fsspec calls an answer of 503 a FileNotFoundError, and the run ended with "could not be written"."""
    address = f"{server.address}/in.jsonl"
    source, spans = Source((address,), format="jsonl"), (Span("in.jsonl", address, 0, 1),)
    server.away = True
    with pytest.raises(Away, match=rf"{address} cannot be read now: "):
        list(read_rows(source, spans, 0, 1, None))
    server.away = False
    with pytest.raises(SourceError, match=r"/404: is gone; the input changed during the run"):
        list(read_rows(source, (Span("404", f"{server.address}/404", 0, 1),), 0, 1, None))


def test_what_passes_is_told_from_what_does_not() -> None:
    def caused(error: Exception, cause: Exception) -> Exception:
        error.__cause__ = cause
        return error

    class ClientResponseError(Exception):
        status = 503

    class ClientError(Exception):
        response = {"ResponseMetadata": {"HTTPStatusCode": 403}}

    EndpointConnectionError = type("EndpointConnectionError", (type("ConnectionError", (Exception,), {}),), {})
    assert passing(caused(FileNotFoundError("x"), ClientResponseError()))
    assert passing(OSError(errno.ECONNREFUSED, "refused"))
    assert passing(caused(OSError("EndpointConnectionError: ..."), EndpointConnectionError()))
    assert passing(TimeoutError())
    assert not passing(caused(PermissionError("x"), ClientError()))
    assert not passing(FileNotFoundError("x"))
    assert not passing(OSError(errno.ENOSPC, "full"))
    assert not passing(OSError(errno.EIO, "broken"))
