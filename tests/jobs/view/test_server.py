"""The app over HTTP: what it answers, and whom it does not."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.view.app import App
from jobs.view.server import COOKIE, Server, is_loopback


def get(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, Mapping[str, str], bytes]:
    """One request; the Host header is the server's own unless one is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def ask(server: Server, path: str, **given: Any) -> Any:
    query = urlencode({name: json.dumps(one) if isinstance(one, list) else one for name, one in given.items()})
    status, _, body = get(server, f"/{path}?{query}")
    assert status == 200, body
    return json.loads(body)


def test_the_page_comes_with_everything_it_names(server: Server) -> None:
    status, headers, body = get(server, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"http" not in body.replace(b"latentmill", b"")  # nothing from elsewhere
    for name in ("/view.js", "/markup.js", "/table.js", "/panels.js", "/view.css"):
        status, headers, text = get(server, name)
        assert status == 200
        assert b"//" not in text.replace(b"// ", b"").replace(b"http://www.w3.org/2000/svg", b"")
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_rows_are_browsed_counted_and_opened(server: Server, table: pa.Table) -> None:
    (many, other) = ask(server, "api/runs")["runs"]
    assert (many["rows"], many["failed"]) == (table.num_rows, table["status"].to_pylist().count("failed"))
    assert other["name"] == "other"
    given = [{"column": "method", "op": "is", "value": "lbo"}]
    wanted = table["method"].to_pylist().count("lbo")
    assert ask(server, "api/count", run="many", filters=given)["rows"] == wanted
    page = ask(server, "api/rows", run="many", filters=given, columns=["id", "psnr", "picture"], limit=3)
    after = ask(server, "api/rows", run="many", filters=given, columns=["id"], limit=3, after=page["next"])
    ids = [one["id"] for one in table.select(["id", "method"]).to_pylist() if one["method"] == "lbo"]
    assert [row["cells"]["id"] for row in page["rows"] + after["rows"]] == ids[:6]
    told = ask(server, "api/row", run="many", at="3-7")
    assert told["cells"]["id"] == "row-00000307"
    assert told["cells"]["prompt"] == table["prompt"][307].as_py()
    load = next(block["text"] for block in told["lines"] if "load_dataset" in block["text"])
    assert 'row = rows[307]\nassert row["id"] == "row-00000307"' in load


def test_the_line_for_duckdb_gives_the_row(server: Server, table: pa.Table) -> None:
    (line,) = [
        block["text"] for block in ask(server, "api/row", run="many", at="5-99")["lines"] if "duckdb" in block["text"]
    ]
    known: dict[str, Any] = {}
    exec(line, known)
    assert known["row"].fetchall()[0][:2] == (table["id"][599].as_py(), table["prompt"][599].as_py())


def test_a_picture_comes_in_the_size_asked_for_and_once(server: Server, table: pa.Table) -> None:
    good = table["status"].to_pylist().index("ok")
    path = f"/picture?run=many&at=0-{good}&column=picture&size=96"
    status, headers, body = get(server, path)
    assert (status, headers["content-type"]) == (200, "image/png")
    stored = Image.open(io.BytesIO(table["picture"][good].as_py()["bytes"])).convert("RGB")
    assert Image.open(io.BytesIO(body)).tobytes() == stored.tobytes()
    assert get(server, path, If_None_Match=headers["etag"])[0] == 304
    bad = table["status"].to_pylist().index("failed")
    assert get(server, f"/picture?run=many&at={bad // 100}-{bad % 100}&column=picture")[0] == 400
    assert get(server, f"/picture?run=many&at=0-{good}&column=picture&size=5000")[0] == 400


def test_a_vector_is_told_in_figures(server: Server, table: pa.Table) -> None:
    good = table["status"].to_pylist().index("ok")
    told = ask(server, "api/vector", run="many", at=f"0-{good}", column="latent")["vector"]
    values = np.asarray(table["latent"][good].as_py(), np.float64)
    assert told["shape"] == [4, 4, 4]
    assert told["norm"] == pytest.approx(np.linalg.norm(values))
    assert told["curve"] == pytest.approx(values)  # 64 values: each its own point
    status, headers, body = get(server, f"/latent?run=many&at=0-{good}&column=latent")
    assert (status, headers["content-type"], Image.open(io.BytesIO(body)).size) == (200, "image/png", (4, 4))


def test_two_runs_are_compared_row_by_row(server: Server, table: pa.Table) -> None:
    told = ask(server, "api/compare", a="many", b="other")
    there = sum(value is not None for value in table["psnr"].to_pylist()[:10])
    assert (told["both"], told["only_a"], told["only_b"]) == (600, 0, 50)
    differ = {column["name"]: column for column in told["columns"] if column["differ"]}
    assert {name: one["differ"] for name, one in differ.items()} == {"psnr": there, "method": 3}
    assert differ["psnr"]["mean"] * (600 - table["psnr"].null_count) == pytest.approx(there, abs=1e-3)
    assert told["same"] == 590 + sum(n >= 3 and table["psnr"][n].as_py() is None for n in range(10))
    found, after = [], None
    while True:
        page = ask(server, "api/pairs", a="many", b="other", show="any", sort="psnr", down=1, limit=4,
                   columns=["id", "psnr"], **({"after": after} if after else {}))  # fmt: skip
        found += page["pairs"]
        if (after := page["next"]) is None:
            break
    changed = [f"row-{n:08d}" for n in range(10) if n < 3 or table["psnr"][n].is_valid]
    assert sorted(pair["a"]["cells"]["id"] for pair in found) == changed
    for pair in found:
        assert pair["a"]["cells"]["id"] == pair["b"]["cells"]["id"]
    alone = ask(server, "api/pairs", a="many", b="other", show="only_b", limit=100)["pairs"]
    assert sorted(pair["b"]["cells"]["id"] for pair in alone) == [f"row-{n:08d}" for n in range(600, 650)]
    assert all(pair["a"] is None for pair in alone)
    methods = ask(server, "api/pairs", a="many", b="other", column="method", columns=["method"])["pairs"]
    assert [pair["b"]["cells"]["method"] for pair in methods] == ["another"] * 3


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/view.js", "/view.py", "//etc/passwd", "/api/runs/"],
)
def test_no_other_file_is_served(server: Server, path: str) -> None:
    assert get(server, path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/api/rows?run=../../etc",
        "/api/row?run=many&at=../1",
        "/api/row?run=many&at=99-0",
        "/api/row?run=many&at=0-999",
        "/api/rows?run=many&sort=psnr%3B+DROP+TABLE+x",
        "/api/rows?run=many&sort=latent",
        "/api/rows?run=many&limit=-1",
        "/api/rows?run=many&after=AAAA",
        "/api/rows?run=many&columns=%5B%22nothing%22%5D",
        "/api/vector?run=many&at=0-0&column=id",
        "/picture?run=many&at=0-0&column=" + quote('picture" FROM x --'),
        "/api/search?run=many&text=star",
        "/api/compare?a=many&b=nothing",
        "/api/pairs?a=many&b=other&sort=" + quote("psnr; DROP TABLE pair_0"),
        "/api/pairs?a=many&b=other&show=1%3D1",
        "/api/values?run=many&column=picture",
        "/api/histogram?run=many&column=id",
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(server: Server, path: str) -> None:
    status, headers, body = get(server, path)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert 10 < len(json.loads(body)["error"]) < 300


def test_only_get_is_answered(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert get(server, "/api/runs", method)[0] in (501, 405)


HOSTS = (
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example",
    "user@127.0.0.1:{port}",
    "[::1",
    "",
    "192.168.1.1",
)


@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_name_is_not_served(server: Server, host: str) -> None:
    assert get(server, "/api/runs", Host=host.format(port=server.server_address[1]))[0] == 403


def test_a_forwarded_port_is_served(server: Server) -> None:
    for host in ("localhost:9000", "127.0.0.1", "[::1]:80"):
        assert get(server, "/api/runs", Host=host)[0] == 200


def test_another_sites_page_is_not_served(server: Server) -> None:
    assert get(server, "/api/runs", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert get(server, "/api/runs", Sec_Fetch_Site="same-origin")[0] == 200
    assert get(server, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert "access-control-allow-origin" not in get(server, "/api/runs", Origin="https://evil.example")[1]


@pytest.fixture(scope="module")
def guarded(app: App) -> Iterator[Server]:
    """A server that others reach."""
    made = Server(app, "0.0.0.0")
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_who_is_reached_by_others_asks_for_the_token(guarded: Server, capfd: pytest.CaptureFixture[str]) -> None:
    token = guarded.token
    assert token is not None
    assert token in guarded.url
    for headers in ({}, {"Cookie": f"{COOKIE}=x"}, {"Authorization": "Bearer x"}, {"Cookie": "a=\x7f;;=;"}):
        for path in ("/", "/api/runs", "/view.js", "/picture?run=many", "/?token=wrong", f"/api/runs?token={token}"):
            status, told, body = get(guarded, path, **headers)
            assert status == 401
            assert token.encode() not in body
            assert token not in str(told)
    assert get(guarded, "/api/runs", Authorization=f"Bearer {token}")[0] == 200
    status, told, _ = get(guarded, f"/?token={token}")
    assert (status, told["location"]) == (303, "/")
    assert "HttpOnly" in told["set-cookie"]
    assert "SameSite=Strict" in told["set-cookie"]
    assert get(guarded, "/api/runs", Cookie=told["set-cookie"].partition(";")[0])[0] == 200
    assert get(guarded, "/api/runs", Cookie=f"{COOKIE}={token}", Host="evil.example")[0] == 403
    written = capfd.readouterr()
    assert token not in written.out + written.err


def test_loopback_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.3.2.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.org", "localhost.example.org")))
