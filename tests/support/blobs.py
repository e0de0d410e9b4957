"""A server on this machine that speaks as much of Azure's Blob API as adlfs asks for; nothing is authenticated.

A copy answers first and is made later, as the service may do: its source is read when the copy is asked for the second
time. Blocks that no list has named are no part of a blob.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every emulator; Microsoft's documentation has it."""


class Blobs(BaseHTTPRequestHandler):
    """The server has `blobs` (container/name -> bytes), `containers`, `blocks`, those `committed`, `copying` (target ->
    source and what is left to wait), `guard`.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def do(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        name = unquote(parts.path).strip("/").partition("/")[2]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        container = name.partition("/")[0]
        with self.server.guard:
            if query.get("restype") == "container" and query.get("comp") == "list":
                self._list(container, query)
            elif query.get("restype") == "container":
                self._container(container)
            elif container not in self.server.containers:
                self._say(404, "ContainerNotFound")
            else:
                {"PUT": self._put, "GET": self._get, "HEAD": self._get, "DELETE": self._delete}[self.command](
                    name, query, body
                )

    do_GET = do_PUT = do_HEAD = do_DELETE = do

    def _container(self, name: str) -> None:
        known = name in self.server.containers
        self.server.containers.add(name)
        self._say(201 if self.command == "PUT" else 200 if known else 404, "" if known else "ContainerNotFound")

    def _put(self, name: str, query: dict[str, str], body: bytes) -> None:
        if query.get("comp") == "block":
            self.server.blocks[name, query["blockid"]] = body
            self._say(201)
            return
        if self.headers.get("If-None-Match") == "*" and name in self.server.blobs:
            self._say(409, "BlobAlreadyExists")
            return
        source = self.headers.get("x-ms-copy-source")
        if source is not None:
            self._copy(name, unquote(urlsplit(source).path).strip("/").partition("/")[2])
            return
        if query.get("comp") == "blocklist":
            sent, named = self.server.blocks, [(name, part.text) for part in ElementTree.fromstring(body)]
            # A list whose answer was lost is sent again: blocks of the blob as it stands will do.
            there = {own: sent.pop(own, self.server.committed.get(own)) for own in named}
            if None in there.values():
                self._say(400, "InvalidBlockList")
                return
            self.server.committed |= there
            body = b"".join(there[own] for own in named)
        self.server.blobs[name] = body
        self._say(201, more=self._facts(name))

    def _copy(self, name: str, source: str) -> None:
        if source not in self.server.blobs:
            self._say(404, "BlobNotFound")
            return
        self.server.blobs[name] = bytes(len(self.server.blobs[source]))  # right in size, not yet in content
        self.server.copying[name] = [source, 1]
        self._say(202, more={"x-ms-copy-id": "1", "x-ms-copy-status": "pending", **self._facts(name)})

    def _copied(self, name: str) -> str:
        """What has become of a copy: pending at the first question, made at the second if its source is still there."""
        source, left = self.server.copying[name]
        if left:
            self.server.copying[name] = [source, left - 1]
            return "pending"
        if source not in self.server.blobs:
            return "failed"
        self.server.blobs[name] = self.server.blobs[source]
        return "success"

    def _get(self, name: str, query: dict[str, str], body: bytes) -> None:
        if name not in self.server.blobs:
            self._say(404, "BlobNotFound")
            return
        more = {"x-ms-copy-id": "1", "x-ms-copy-status": self._copied(name)} if name in self.server.copying else {}
        data = self.server.blobs[name]
        facts = {**self._facts(name), **more, "x-ms-blob-type": "BlockBlob", "Accept-Ranges": "bytes"}
        wanted = self.headers.get("x-ms-range") or self.headers.get("Range")
        if self.command == "HEAD" or wanted is None:
            self._say(200, body=data, more=facts)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(data)
        if start >= len(data):
            self._say(416, "InvalidRange")
            return
        part = data[start:stop]
        facts["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        self._say(206, body=part, more=facts)

    def _delete(self, name: str, query: dict[str, str], body: bytes) -> None:
        gone = self.server.blobs.pop(name, None) is None
        self.server.committed = {own: data for own, data in self.server.committed.items() if own[0] != name}
        self._say(404 if gone else 202, "BlobNotFound" if gone else "")

    def _list(self, container: str, query: dict[str, str]) -> None:
        if container not in self.server.containers:
            self._say(404, "ContainerNotFound")
            return
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, str] = {}
        for full in sorted(self.server.blobs):
            name = full.removeprefix(f"{container}/")
            if full == name or not name.startswith(prefix):
                continue
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            if end >= 0:
                entries[name[: end + 1]] = f"<BlobPrefix><Name>{escape(name[: end + 1])}</Name></BlobPrefix>"
                continue
            facts = {**self._facts(full), "Content-Length": str(len(self.server.blobs[full])), "BlobType": "BlockBlob"}
            properties = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in facts.items())
            entries[name] = f"<Blob><Name>{escape(name)}</Name><Properties>{properties}</Properties></Blob>"
        found = "".join(entries[name] for name in sorted(entries))
        self._say(200, body=(
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{container}"><Blobs>{found}'
            "</Blobs><NextMarker /></EnumerationResults>"
        ).encode(), more={"Content-Type": "application/xml"})  # fmt: skip

    def _facts(self, name: str) -> dict[str, str]:
        """What changes when a blob does."""
        digest = hashlib.blake2b(self.server.blobs[name], digest_size=8).hexdigest()
        return {"Etag": f'"0x{digest}"', "Last-Modified": formatdate(0, usegmt=True)}

    def _say(self, status: int, code: str = "", body: bytes = b"", more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("x-ms-error-code", code)
            body = b"" if self.command == "HEAD" else (
                f"<Error><Code>{code}</Code><Message>{code} is what it says.\nRequestId:1</Message></Error>".encode()
            )  # fmt: skip
            more = {"Content-Type": "application/xml"}
        for key, value in {**(more or {}), "x-ms-version": "2025-01-05"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


@contextmanager
def fake_server() -> Iterator[int]:
    """The port of such a server."""
    server: Any = _Server(("127.0.0.1", 0), Blobs)
    server.blobs, server.containers, server.blocks, server.committed, server.copying = {}, set(), {}, {}, {}
    server.guard = threading.Lock()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def azurite_server(command: str, folder: Path) -> Iterator[int]:
    """The port of Microsoft's emulator.

    Args:
        command: Its executable, ``azurite-blob``.
        folder: For its files.
    """
    port = free_port()
    flags = ["--skipApiVersionCheck", "--silent", "--blobPort", str(port), "--location", str(folder)]
    process = subprocess.Popen([command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def options_at(port: int) -> dict[str, Any]:
    """fsspec's options for an emulator at a port of this machine."""
    place = f"http://127.0.0.1:{port}/{ACCOUNT}"
    account = f"AccountName={ACCOUNT};AccountKey={KEY}"
    return {"connection_string": f"DefaultEndpointsProtocol=http;{account};BlobEndpoint={place};"}
