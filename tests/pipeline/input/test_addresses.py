"""Where rows may point: attacks by who wrote the rows are refused, with the key that would allow them."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.schema.reading import JobFileError, load
from pipeline import web
from pipeline.addresses import Refused, has_password, names_host, placed, shown, unsigned
from pipeline.input.source import Source, SourceError
from pipeline.pictures import encode_picture
from tests.support.plain_stages import rows_of

PICTURE = encode_picture(Image.new("RGB", (9, 7), "red"))
SECRET = b"-----BEGIN PRIVATE KEY-----"


def _table(folder: Path, pictures: list[str]) -> Path:
    """A foreign Parquet file whose pictures are only named, as `datasets` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": path} for path in pictures], kind)
    pq.write_table(pa.table({"image": cells, "text": ["a"] * len(pictures)}), folder / "in.parquet")
    return folder / "in.parquet"


def _read(path: Path, out: Path, **source: Any) -> list[dict[str, Any]]:
    return rows_of(path, out, ["image"], stage="Captioned", **source)


def test_no_file_outside_the_rows_folder_is_read(tmp_path: Path) -> None:
    """Before: each of these came out in the dataset, a private key too where the column was only kept."""
    secret, away = tmp_path / "id_rsa", tmp_path / "holiday.png"
    secret.write_bytes(SECRET)
    away.write_bytes(PICTURE)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.png").symlink_to(away)
    (folder / "up").symlink_to(tmp_path)
    (folder / "own.png").write_bytes(PICTURE)
    (folder / "inner.png").symlink_to(folder / "own.png")
    (tmp_path / "in-too").mkdir()
    (tmp_path / "in-too" / "a.png").write_bytes(PICTURE)
    attacks = [
        str(away), f"file://{away}", f"local://{away}", "../holiday.png", "a/../../holiday.png", "link.png",
        "up/holiday.png", str(secret), f"file:///{secret}", "../in-too/a.png", "/proc/self/environ",
    ]  # fmt: skip
    good = ["own.png", "inner.png", "./own.png", f"{folder}/own.png", f"file://{folder}/own.png"]
    rows = _read(
        _table(folder, attacks + good),
        tmp_path / "out",
    )
    for row in rows[: len(attacks)]:
        assert (row["status"], row["image"]) == ("failed", None), row
        assert "input: {allow: [" in row["error"]
    assert [(row["status"], row["width"], row["image"]["bytes"]) for row in rows[len(attacks) :]] == [
        ("ok", 9, PICTURE)
    ] * len(good)
    everything = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert SECRET not in everything


def test_what_the_job_file_allows_is_read(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_bytes(PICTURE)
    path = _table(tmp_path / "in", [str(tmp_path / "pictures" / "a.png"), "../pictures/a.png", "../b.png"])
    rows = _read(path, tmp_path / "out", allow=(str(tmp_path / "pictures"),))
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]


def test_what_is_kept_is_a_picture(tmp_path: Path) -> None:
    """Before: a kept column took over whatever the file was, though the stage never looked at it."""
    folder = tmp_path / "in"
    path = _table(folder, ["key.png", "fine.png", "cut.png"])
    (folder / "key.png").write_bytes(SECRET)
    (folder / "fine.png").write_bytes(PICTURE)
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    (folder / "cut.png").write_bytes(noise.getvalue()[:-600])
    rows = rows_of(path, tmp_path / "out", ["image"], columns={"text": "text"})
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [row["image"] and row["image"]["bytes"] for row in rows] == [None, PICTURE, None]


def test_a_kept_picture_outside_fails_its_row(tmp_path: Path) -> None:
    (tmp_path / "away.png").write_bytes(PICTURE)
    rows = rows_of(_table(tmp_path / "in", ["../away.png"]), tmp_path / "out", ["image"], columns={"text": "text"})
    assert rows[0]["status"] == "failed"
    assert rows[0]["error"].startswith("image: ../away.png: lies outside the folder")


def test_no_address_is_asked_that_is_not_allowed(tmp_path: Path, server: _Server) -> None:
    """Before: a row's address was fetched from inside the user's network, whatever answered there."""
    addresses = [
        f"{server.address}/a.png", f"http://localhost:{server.server_port}/a.png", "http://169.254.169.254/latest",
        "s3://bucket/a.png", "memory://a.png", f"simplecache::{server.address}/a.png", "github://org:repo@main/a.png",
        f"http://user:secret@127.0.0.1:{server.server_port}/a.png",
    ]  # fmt: skip
    rows = _read(_table(tmp_path / "in", addresses), tmp_path / "out", allow=("https://images.example.org/",))
    assert {row["status"] for row in rows} == {"failed"}
    assert server.asked == []
    assert "allow" in rows[0]["error"]
    assert "secret" not in rows[-1]["error"]


def test_allowed_for_all_hosts_is_allowed_for_public_ones(tmp_path: Path, server: _Server) -> None:
    number = int.from_bytes(socket.inet_aton("127.0.0.1"), "big")
    port = server.server_port
    hosts = ["127.0.0.1", "localhost", str(number), "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
    addresses = [f"http://{host}:{port}/a.png" for host in hosts]
    rows = _read(_table(tmp_path / "in", addresses), tmp_path / "out", allow=("http://",))
    assert {row["status"] for row in rows} == {"failed"}
    assert server.asked == []
    assert "127.0.0.1 is no public address" in rows[0]["error"]
    assert "name its host by name in `allow`" in rows[0]["error"]


def test_a_redirect_leads_to_no_inner_address(tmp_path: Path, server: _Server) -> None:
    addresses = [f"{server.address}/to-{where}" for where in ("inner", "file", "round", "fine")]
    rows = _read(_table(tmp_path / "in", addresses), tmp_path / "out", allow=(server.address,))
    assert [row["status"] for row in rows] == ["failed"] * 3 + ["ok"]
    assert "is no public address" in rows[0]["error"]  # localhost is another name than 127.0.0.1, and was not named
    assert "which is no web address" in rows[1]["error"]
    assert "redirects" in rows[2]["error"]
    assert "secret.png" not in server.asked


def test_a_host_by_name_may_be_inner_but_not_where_clouds_keep_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ("http://inner.example/", "http://169.254.169.254/")
    assert web._client_for("http://inner.example/a", {}, lambda a: names_host(named, a)) is web._inner
    assert web._client_for("http://169.254.169.254/a", {}, lambda a: names_host(named, a)) is web._anywhere
    assert web._client_for("http://other.example/a", {}, lambda a: names_host(named, a)) is web._public
    for number in ("169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"):
        with pytest.raises(OSError, match="by its number"):
            web._inner_socket((0, 0, 0, "", (number, 80)))
    inner = "10.1.2.3 192.168.0.1 172.16.9.9 100.64.0.1 127.9.9.9 0.0.0.0 224.0.0.1 ::1 fc00::1 ::ffff:10.0.0.1"
    for number in inner.split():
        with pytest.raises(OSError, match="no public address"):
            web._public_socket((0, 0, 0, "", (number, 80)))
    with web._public_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("93.184.216.34", 80))) as opened:
        assert opened.family == socket.AF_INET


def test_an_endless_answer_is_cut_off(tmp_path: Path, server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.input.fetch.BYTES_BESIDE", 1 << 20)
    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.001)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "big.png").write_bytes(PICTURE + bytes(3 << 20))
    path = _table(tmp_path / "in", [f"{server.address}/endless", "big.png"])
    rows = _read(path, tmp_path / "out", allow=(server.address,), max_pixels=1000)
    assert [row["status"] for row in rows] == ["failed"] * 2
    assert all("is longer than 1,056,576 bytes" in row["error"] for row in rows)
    assert server.asked == ["endless"]


def test_a_device_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe.png")
    rows = _read(_table(tmp_path / "in", ["pipe.png"]), tmp_path / "out")
    assert "is no file" in rows[0]["error"]


WEB, STORE = ("https://host.example/public/",), ("s3://bucket/a",)


@pytest.mark.parametrize("address", [
    "https://host.example/public/a.png", "https://HOST.example:443/public/a.png?size=1", "https://host.example./public/a",
])  # fmt: skip
def test_below_an_allowed_address(address: str) -> None:
    assert placed(address, "/data", WEB) == address
    assert placed("s3a://bucket/a/b.png", "/data", STORE) == "s3a://bucket/a/b.png"
    assert placed("b.png", "s3://bucket/in", ()) == "s3://bucket/in/b.png"


@pytest.mark.parametrize("address", [
    "https://host.example/publicity/a.png", "https://host.example/public/../private", "http://host.example/public/a",
    "https://host.example/public/%2e%2e/private", "https://host.example/public/%2E./x", "https://host.example.evil/public/a",
    "https://host.example@evil.example/public/a", "https://evil.example\\@host.example/public/a",
    "https://host.example:8443/public/a", "https://evil.example/public/#@host.example/public/", "https:///public/a",
    "https://evil.example?@host.example/public/a", "https://host.example/ public/a", "HTTPS://evil.example/public/a",
    "s3://bucket/ab/c.png", "s3://bucket/a/../b.png", "s3://bucket2/a", "gs://bucket/a/b.png", "a.png::https://host.example/public/",
])  # fmt: skip
def test_not_below_an_allowed_address(address: str) -> None:
    with pytest.raises(Refused):
        placed(address, "s3://elsewhere/in", (*WEB, *STORE))


def test_what_is_shown_of_an_address_holds_no_secret() -> None:
    assert unsigned("https://host/a.png?X-Amz-Signature=abc#x") == "https://host/a.png"
    assert unsigned("s3://bucket/what?.png") == "s3://bucket/what?.png"
    assert "secret" not in shown("https://user:secret@host/a.png?sig=secret")
    assert has_password("sftp://user:secret@host/a")
    assert not has_password("hf://datasets/org/name@main/a:b@c")


@pytest.mark.parametrize(("entry", "why"), [
    ("pictures", "absolute folder"), ("https://*.example.org/", "without patterns"), ("", "absolute folder"),
    ("https://user:secret@host/", "storage_options"), ("https://host/a?sig=secret", "no query"),
])  # fmt: skip
def test_an_entry_that_means_nothing_is_refused(entry: str, why: str) -> None:
    job = {"job": "reference", "input": {"path": "in.jsonl", "allow": [entry]}, "output": "out"}
    with pytest.raises(JobFileError, match=why) as told:
        load(job)
    assert "secret" not in str(told.value)


def test_an_absolute_path_in_a_table_of_ones_own_needs_its_folder(tmp_path: Path) -> None:
    """The job file is the user's; a table may come from anywhere, so its paths are not."""
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "in.jsonl").write_text(json.dumps({"image": str(tmp_path / "a.png")}) + "\n")
    (told,) = rows_of(tmp_path / "in" / "in.jsonl", tmp_path / "no", stage="Captioned")
    assert f"input: {{allow: [{tmp_path}]}}" in told["error"]
    (row,) = rows_of(tmp_path / "in" / "in.jsonl", tmp_path / "yes", stage="Captioned", allow=(str(tmp_path),))
    assert row["width"] == 9


class _Server(http.server.ThreadingHTTPServer):
    """On the loopback; ``/to-...`` redirects, ``/endless`` never ends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.tables: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.strip("/").partition("?")[0]
        if name == "404.png":
            self.send_error(404)
            return
        self.server.asked.append(name)
        port = self.server.server_port
        leads = {"to-inner": f"http://localhost:{port}/secret.png", "to-file": "file:///etc/passwd",
                 "to-round": "/to-round", "to-fine": "/fine.png"}.get(name)  # fmt: skip
        data = b"" if leads else self.server.tables.get(name, PICTURE)
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part:
            data = data[int(part[1]) : int(part[2]) + 1]
        self.send_response(302 if leads else 206 if part else 200)
        if leads:
            self.send_header("Location", leads)
        if name == "endless":
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                self.close_connection = True
                return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr("pipeline.storage.FIRST_WAIT_S", 0.001)
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_signature_is_in_no_id_no_plan_and_no_output(tmp_path: Path, server: _Server) -> None:
    """Before: the query of a signed address stood in every derived id and in plan.json, which one then publishes."""
    signature = "X-Amz-Signature=hush&X-Amz-Credential=AKIA/20261126/eu/s3"
    server.tables["in.jsonl"] = (json.dumps({"image": f"{server.address}/404.png?{signature}"}) + "\n").encode() * 2
    out = tmp_path / "out"
    rows = rows_of(f"{server.address}/in.jsonl?{signature}", out, stage="Captioned", shard_rows=1)
    assert [row["id"] for row in rows] == [f"{server.address}/in.jsonl#{number}" for number in range(2)]
    assert "404" in rows[0]["error"]
    written = [file.read_bytes() for file in out.rglob("*") if file.is_file()]
    for table in out.rglob("*.parquet"):  # whose bytes are compressed
        written.append(repr(pq.read_table(table).to_pydict()).encode())
    assert not [content for content in written if b"hush" in content or b"X-Amz" in content]


def test_a_password_in_an_address_is_refused(tmp_path: Path) -> None:
    for job in ({"input": "https://user:hush@host/in.jsonl"}, {"output": "s3://key:hush@bucket/out"}):
        with pytest.raises(JobFileError, match="storage_options") as told:
            load({"job": "reference", "input": "in.jsonl", "output": "out", **job})
        assert "hush" not in str(told.value)
    with pytest.raises(SourceError, match="storage_options"):
        Source(("https://user:hush@host/in.jsonl",))
    with pytest.raises(SourceError, match="differ only"):
        Source(("https://host/get?file=1", "https://host/get?file=2"))


@pytest.mark.parametrize(
    "address",
    ["https://models.example/1.safetensors?token=hush", "HTTP://x/y?Signature=hush", "s3://key:hush@bucket/a"],
)
def test_what_a_job_names_holds_no_secret(address: str) -> None:
    """Before: a token in a model's address stood in plan, card and report."""
    job = {"job": "reference", "input": "in.jsonl", "encoder": "micro:prior", "output": "out"}
    for plain in ("https://models.example/1.safetensors", "is it https://host/?"):
        assert load({**job, "encoder": plain})
    with pytest.raises(JobFileError, match=r"encoder: .* (has a password or a query|holds a password)") as told:
        load({**job, "encoder": address})
    assert "hush" not in str(told.value)
