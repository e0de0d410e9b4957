"""Where the rows of an input may point. Who started the job is trusted, who wrote the rows is not.

What a row names is read from below the folder of its own file, or from below a place that the job file allows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

LONGEST = 200
"""Characters that are told of a stranger's words."""
WEB = ("http", "https")
PORTS = {"http": 80, "https": 443}
SAME = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs", "local": "file"}
"""Protocols that go by several names."""
_ACCOUNT = re.compile(r"^(?:abfss?|az)://[^/@:]+@([^/]+)")
"""``abfss://container@account.dfs.core.windows.net/...``: what stands before the @ is no secret."""
_SIGNS = re.compile(r"[\x00-\x20\x7f\\]")
_PASSWORD = re.compile(r"^[\w+.-]+://[^/?#]*:[^/?#]*@")


class Refused(ValueError):
    """The row points where nobody said that it may; the message says which key of the job file would allow it."""


def placed(address: str, folder: str, allow: Iterable[str] = ()) -> str:
    """The place to open for what a row names; of a local file, with all links followed.

    Args:
        address: As the row has it: a path relative to `folder`, an absolute one, or ``protocol://...``.
        folder: Of the row's file, a path or an address; empty: the one that the process runs in.
        allow: Further folders and addresses below which rows may point. ``https://`` stands for every public host.

    Raises:
        Refused: It is below none of them, or may be read in two ways.
    """
    if "\0" in address:
        raise Refused(f"{shown(address)}: holds a null byte")
    full = address if "://" in address or address.startswith("/") else f"{folder or '.'}/{address}"
    places = (folder or ".", *allow)
    if is_local(full):
        real = os.path.realpath(local_path(full))
        if not any(is_local(place) and _inside(real, os.path.realpath(local_path(place))) for place in places):
            raise Refused(_outside(address, f"[{os.path.dirname(real)}]"))
        if os.path.exists(real) and not os.path.isfile(real):
            raise Refused(f"{shown(address)}: is no file")
        return real
    if has_password(full):
        raise Refused(f"{shown(address)}: holds a password; write it into `storage_options` of the job file's `input`")
    if "::" in full:
        raise Refused(f"{shown(address)}: chained addresses (::) in rows are not followed")
    protocol, host, path = _parts(full)
    if _SIGNS.search(host) or (protocol in WEB and (_SIGNS.search(full) or not host)):
        raise Refused(f"{shown(address)}: is no valid address")
    if ".." in unquote(path).split("/"):
        raise Refused(f"{shown(address)}: leads up (..); write the place itself")
    if not any(_covers(place, protocol, host, path) for place in places):
        raise Refused(_outside(address, f'["{protocol}://{host}/"]'))
    return full


def _outside(address: str, entry: str) -> str:
    return (
        f"{shown(address)}: lies outside the folder of the row's file; if you trust it, say so in the job file: "
        f"input: {{allow: {entry}}}"
    )


def is_local(address: str) -> bool:
    """Whether it is a path of this machine."""
    return "://" not in address or address.startswith(("file://", "local://"))


def local_path(address: str) -> str:
    """The path without ``file://``."""
    return os.path.expanduser(address) if "://" not in address else "/" + address.partition("://")[2].lstrip("/")


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _parts(address: str) -> tuple[str, str, str]:
    """Protocol, host with port (or bucket), path; without what follows ``?`` on the web."""
    protocol, _, rest = address.partition("://")
    protocol = SAME.get(protocol.lower(), protocol.lower())
    if protocol in WEB:
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, _, path = rest.partition("/")
    if protocol in WEB:
        host = host.lower().removesuffix(f":{PORTS[protocol]}").removesuffix(".")
    return protocol, host, path


def store_of(address: str) -> tuple[str, str]:
    """Protocol, and bucket or host, of an address; each by one name."""
    return _parts(address)[:2]


def _covers(place: str, protocol: str, host: str, path: str) -> bool:
    """Whether an address is a place's, or below it."""
    if is_local(place):
        return False
    own, own_host, own_path = _parts(place)
    if own != protocol or (own_host and own_host != host):
        return False
    return not own_path or _inside(unquote(path), unquote(own_path))


def names_host(places: Iterable[str], address: str) -> bool:
    """Whether one of the places names this address's host; then it may be one of an inner network."""
    host = _parts(address)[1]
    return any(not is_local(place) and _parts(place)[0] in WEB and _parts(place)[1] == host for place in places)


def account_of(address: str) -> str | None:
    """The host of Azure's that ``abfss://container@host/...`` names; None where it names none."""
    found = _ACCOUNT.match(address)
    return found[1].lower() if found else None


def beside(address: str, other: str) -> str:
    """An address as a listing of `other`'s store has it, with the account that `other` names and listings leave out."""
    host = account_of(other)
    protocol, _, rest = address.partition("://")
    container, slash, path = rest.partition("/")
    return f"{protocol}://{container}@{host}{slash}{path}" if host and not account_of(address) else address


def has_password(address: str) -> bool:
    """Whether it is ``protocol://user:password@...``."""
    return _PASSWORD.match(address) is not None


def unsigned(address: str) -> str:
    """A web address without its query, which often is a signature: what may be written down."""
    return re.split(r"[?#]", address, maxsplit=1)[0] if address.lower().startswith(("http://", "https://")) else address


def shown(address: str) -> str:
    """An address that may be anything, even a picture written as text: at a length to be read, and without secrets."""
    address = unsigned(address)
    if not account_of(address):
        address = re.sub(r"://[^/?#]*@", "://***@", address)
    return address if len(address) <= LONGEST else f"{address[:60]}... ({len(address):,} characters)"


def problem_with(entry: str) -> str | None:
    """What is wrong with an entry of ``allow``, in a sentence."""
    if has_password(entry):
        return "holds a password; write it into `storage_options`"
    if entry.startswith(("http://", "https://")) and urlsplit(entry).query:
        return "needs no query; write the beginning of the address"
    if any(sign in entry for sign in "*?"):
        return "is taken as it stands, without patterns; write the beginning of the address"
    if not entry.startswith(("/", "~")) and not re.match(r"[\w+.-]+://", entry):
        return "should be an absolute folder (/data/pictures) or the beginning of an address (https://example.org/)"
    return None
