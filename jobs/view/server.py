"""The app on a socket: GET alone, for who may ask. The standard library's server behind one page's worth of rules.

Who may ask: a browser that names this machine as the host (so that no foreign name that resolves to it is served:
DNS rebinding), whose page is this one; and anywhere but on the loopback interface, who has the token.
"""

from __future__ import annotations

import gzip
import hmac
import html
import ipaddress
import json
import secrets
import socket
import sys
import traceback
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jobs.view.app import Answer, App
from jobs.view.query import BadRequest

COOKIE = "latentmill_view"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
SILENT_S = 30
LEAST_ZIPPED = 1024


class Server(ThreadingHTTPServer):
    """Listens at once; `serve_forever` answers.

    Args:
        host: Address to listen on.
        port: 0: any that is free.
    """

    daemon_threads = True

    def __init__(self, app: App, host: str = "127.0.0.1", port: int = 0) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.app = app
        self.token = None if is_loopback(host) else secrets.token_urlsafe(24)
        super().__init__((host, port), _Handler)
        self.names = _names(host)

    @property
    def url(self) -> str:
        """What to open in a browser; holds the token, which the browser then keeps in a cookie."""
        host, port = self.server_address[:2]
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else str(host)
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/{f'?token={self.token}' if self.token else ''}"

    def knows(self, host: str | None) -> bool:
        """Whether a ``Host`` header names this server; its port may be another one, which is forwarded here."""
        try:
            split = urlsplit(f"//{host or ''}")
        except ValueError:
            return False
        name = (split.hostname or "").lower()
        if split.username is not None:
            return False
        return name in self.names or (self.token is not None and _is_number(name))


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names(host: str) -> frozenset[str]:
    if is_loopback(host):
        return frozenset({"localhost", "127.0.0.1", "::1", host.lower()})
    return frozenset(name.lower() for name in ("localhost", host, socket.gethostname(), socket.getfqdn()))


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "latentmill", ""
    timeout = SILENT_S

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        asked = dict(parse_qsl(split.query, keep_blank_values=True))
        if not self.server.knows(self.headers.get("Host")):
            return self._refuse(403, "this server does not go by that name")
        foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if foreign and self.headers.get("Sec-Fetch-Mode") != "navigate":
            return self._refuse(403, "another site's page asks for this")
        if self.server.token is not None and not self._admitted():
            if split.path == "/" and _same(asked.get("token", ""), self.server.token):
                return self._admit()
            return self._refuse(401, "open the address that `latentmill view` printed: it has the token")
        try:
            answer = self.server.app.answer(split.path.removeprefix("/"), asked)
        except (BadRequest, ValueError, OSError) as error:
            return self._refuse(400, str(error) or type(error).__name__)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            return self._refuse(500, f"{type(error).__name__}: {error}")
        if answer is None:
            return self._refuse(404, "there is nothing here")
        return self._send(answer)

    def _admitted(self) -> bool:
        token = self.server.token or ""
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given = [cookie.value] if cookie else []
        scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
        given += [bearer] if scheme.lower() == "bearer" else []
        return any(_same(one, token) for one in given)

    def _admit(self) -> None:
        """The token moves from the address into a cookie, so that no history, log or referrer keeps it."""
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self._finish(b"", {"Cache-Control": "no-store"})

    def _send(self, answer: Answer) -> None:
        tag = f'"{answer.tag.encode().hex()}"' if answer.tag else ""
        if tag and self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            return self._finish(None, {"ETag": tag, "Cache-Control": "private, max-age=3600"})
        self.send_response(200)
        headers = {"Content-Type": answer.type, "Cache-Control": "no-store"}
        if tag:
            headers |= {"ETag": tag, "Cache-Control": "private, max-age=3600"}
        body = answer.body
        zips = "gzip" in self.headers.get("Accept-Encoding", "") and not answer.type.startswith("image/")
        if zips and len(body) >= LEAST_ZIPPED:
            body = gzip.compress(body, 4)
            headers["Content-Encoding"] = "gzip"
        return self._finish(body, headers)

    def _refuse(self, code: int, why: str) -> None:
        self.send_response(code)
        self._finish(json.dumps({"error": why}).encode(), {"Content-Type": "application/json",
                                                            "Cache-Control": "no-store"})  # fmt: skip

    def _finish(self, body: bytes | None, headers: dict[str, str]) -> None:
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold filters, and once the token."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself (other methods, broken requests), in the same form."""
        self.close_connection = True
        self._refuse(code, html.escape(message or "refused"))


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
