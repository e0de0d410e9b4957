"""A hub on this machine: what `huggingface_hub` and `datasets` ask of one, over large files by Git LFS (no Xet).

Answers are those that the client's own source reads. Contents are known once they are put, and files of a repository
once a commit names them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"
LARGE = (".parquet", ".tar", ".png", ".npy", ".faiss")


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """A dataset: its branches, each path -> content."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": {".gitattributes": b"*.parquet lfs"}}
    )
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds, and was asked.

    Attributes:
        contents: Large contents that were put, by SHA-256, whether a commit names them or not.
        puts: Their hashes, one for each time that one was sent.
        breaks_after: So many contents are taken; then every answer is 500.
        asked: Method and path of each request.
    """

    url: str = ""
    datasets: dict[str, Repository] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    contents: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    breaks_after: int | None = None
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self._chunk, b""))
        parts = urlsplit(self.path)
        self.asked, hub = parse_qs(parts.query), self.server.hub
        hub.asked.append(f"{self.command} {parts.path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self._refuse(401, "Invalid credentials in Authorization header")
        if hub.breaks_after is not None and len(hub.puts) >= hub.breaks_after:
            return self._refuse(400, "the hub has had enough")
        for method, pattern, answer in _ROUTES:
            if (found := re.fullmatch(pattern, parts.path)) and self.command in method:
                return answer(self, *map(unquote, filter(None, found.groups())))
        return self._refuse(404, f"no such address: {self.command} {self.path}")

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, value: Any, code: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, told in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), told)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: int, message: str, kind: str | None = None) -> None:
        self._answer({"error": message}, code, X_Error_Message=message, **({"X_Error_Code": kind} if kind else {}))

    def _files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        repository = self.server.hub.datasets.get(name)
        if repository is None:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        branch = next((own for own in repository.branches if revision in (own, _commit_of(own, repository))), None)
        if branch is None:
            return self._refuse(404, "Invalid rev id", "RevisionNotFound")
        return repository.branches[branch]

    def create(self) -> None:
        asked, hub = json.loads(self.body), self.server.hub
        name = f"{asked['organization']}/{asked['name']}"
        if not name.startswith("ada/"):
            return self._refuse(403, f'You don\'t have the rights to create a dataset under the namespace "{name}"')
        if name in hub.datasets or name in hub.models:
            return self._answer({"error": "You already created this repo", "url": f"{hub.url}/datasets/{name}"}, 409)
        assert asked["type"] == "dataset"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.datasets[name] = Repository(private)
        return self._answer({"url": f"{hub.url}/datasets/{name}"})

    def info(self, name: str, revision: str = "main") -> None:
        if (files := self._files(name, revision)) is None:
            return
        repository = self.server.hub.datasets[name]
        head = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        branch = next(own for own, held in repository.branches.items() if held is files)
        self._answer({
            "id": name, "sha": _commit_of(branch, repository), "private": repository.private, "tags": [],
            "cardData": yaml.safe_load(head[1]) if head else None, "siblings": [{"rfilename": own} for own in files],
        })  # fmt: skip

    def tree(self, name: str, revision: str, below: str = "") -> None:
        if (files := self._files(name, revision)) is None:
            return
        entries, below = {}, f"{below}/" if below else ""
        for path, data in files.items():
            if not path.startswith(below):
                continue
            folder, _, rest = path[len(below) :].partition("/")
            if rest and self.asked.get("recursive") not in (["True"], ["true"]):
                entries[folder] = {"type": "directory", "path": below + folder, "oid": "0" * 40, "size": 0}
                continue
            entries[path] = _entry(path, data)
        self._answer(list(entries.values()))

    def paths_info(self, name: str, revision: str) -> None:
        if (files := self._files(name, revision)) is None:
            return
        kind = self.headers.get("Content-Type", "")
        asked = json.loads(self.body)["paths"] if "json" in kind else parse_qs(self.body.decode())["paths"]
        found: list[Any] = [_entry(path, files[path]) for path in asked if path in files]
        folders = [own for own in asked if any(path.startswith(f"{own}/") for path in files)]
        self._answer(found + [{"type": "directory", "path": own, "oid": "0" * 40, "size": 0} for own in folders])

    def branch(self, name: str, branch: str) -> None:
        repository = self.server.hub.datasets[name]
        if branch in repository.branches:
            return self._refuse(409, "Reference already exists")
        repository.branches[branch] = dict(repository.branches["main"])
        return self._answer({})

    def preupload(self, name: str, revision: str) -> None:
        if (files := self._files(name, revision)) is None:
            return
        told = [
            {"path": own["path"], "shouldIgnore": False, "oid": _oid(own["path"], files),
             "uploadMode": "lfs" if own["path"].endswith(LARGE) else "regular"}
            for own in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._answer({"files": told})

    def batch(self, name: str) -> None:
        hub, objects = self.server.hub, []
        for own in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{hub.url}/contents/{own['oid']}"}}
            objects.append({**own, **({} if own["oid"] in hub.contents else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.hub.contents[oid] = self.body
        self.server.hub.puts.append(oid)
        self._answer({})

    def commit(self, name: str, revision: str) -> None:
        if (files := self._files(name, revision)) is None:
            return
        after, repository = dict(files), self.server.hub.datasets[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                after[value["path"]] = self.server.hub.contents[value["oid"]]
            elif line["key"] == "deletedFile":
                del after[value["path"]]
        repository.branches[revision] = after
        repository.commits.append({"revision": revision, "lines": lines})
        oid = _commit_of(revision, repository)
        self._answer({"commitUrl": f"{self.server.hub.url}/datasets/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (files := self._files(name, revision)) is None:
            return
        if path not in files:
            return self._refuse(404, "Entry not found", "EntryNotFound")
        repository = self.server.hub.datasets[name]
        branch = next(own for own, held in repository.branches.items() if held is files)
        start, _, stop = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        data = files[path][int(start) : int(stop) + 1 if stop else None]
        headers = {"ETag": f'"{_oid(path, files)}"', "X_Repo_Commit": _commit_of(branch, repository)}
        return self._answer(data, 206 if "Range" in self.headers else 200, Accept_Ranges="bytes", **headers)

    def yaml(self) -> None:
        self._answer({"errors": [], "warnings": []})


_NAME = "([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.yaml),
    ("GET", f"/api/datasets/{_NAME}", _Handler.info),
    ("GET", f"/api/datasets/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/datasets/{_NAME}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    ("POST", f"/api/datasets/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    ("POST", f"/api/datasets/{_NAME}/branch/([^/]+)", _Handler.branch),
    ("POST", f"/api/datasets/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/datasets/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", f"/datasets/{_NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/contents/(.+)", _Handler.put),
    ("GET HEAD", f"/datasets/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _commit_of(branch: str, repository: Repository) -> str:
    held = sorted((path, git_hash(data)) for path, data in repository.branches[branch].items())
    return hashlib.sha1(json.dumps([branch, held]).encode()).hexdigest()


def _oid(path: str, files: dict[str, bytes]) -> str | None:
    if path not in files:
        return None
    return hashlib.sha256(files[path]).hexdigest() if path.endswith(LARGE) else git_hash(files[path])


def _entry(path: str, data: bytes) -> dict[str, Any]:
    large = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return {
        "type": "file", "path": path, "size": len(data), "oid": git_hash(data),
        **({"lfs": large} if path.endswith(LARGE) else {}),
    }  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub without any repository; its only user is ``ada``, whose token is `TOKEN`."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()
