"""Pictures by address: every answer of a server is a picture or a reason, and passing trouble is waited out."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.input.fetch import options_for
from pipeline.input.source import Source
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
        if name.isdigit():
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
    "503": "503 Service Unavailable, 5 times", "429": "429 Too Many Requests, 5 times",
    "500": "500 Internal Server Error, 5 times", "cut": ", 5 times",
    "page": "it is an HTML page", "drawing": "it is SVG",
}  # fmt: skip


def test_every_answer_is_a_picture_or_a_reason(tmp_path: Path, server: _Server) -> None:
    names = [name if "?" in name else f"{name}.png" for name in ANSWERS]
    lines = [json.dumps({"url": f"{server.address}/{name}"}) + "\n" for name in names]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    source = {"columns": {"image": "url"}, "allow": (server.address,)}
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", ["url"], stage="Captioned", shard_rows=50, **source)
    for row, reason in zip(rows, ANSWERS.values(), strict=True):
        if reason is None:
            assert (row["status"], row["width"]) == ("ok", 60), row
        else:
            assert row["status"] == "failed"
            assert row["error"].startswith("image: ")
            assert reason in row["error"]
    assert server.asked.count("fine") == 3  # once for itself, once signed, once where `moved` leads
    assert server.asked.count("404") == 1
    assert server.asked.count("503") == 5


def test_nobody_at_the_address(tmp_path: Path, server: _Server) -> None:
    address = server.address
    server.shutdown()
    server.server_close()
    addresses = [f"{address}/a.png", "nosuch://a.png", "http://", "s3://"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"image": address}) + "\n" for address in addresses))
    rows = rows_of(tmp_path / "in.jsonl", tmp_path / "out", stage="Captioned", allow=(address, "nosuch://", "s3://"))
    assert {row["status"] for row in rows} == {"failed"}
    assert ", 5 times" in rows[0]["error"]
    assert "nosuch" in rows[1]["error"]
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
