"""One GET of an address that a stranger may have written: within limits of bytes, time and redirects, and never from an
inner network unless its host was named. The address that counts is the one that is connected to: a name may resolve to
anything, and to something else the next time.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from pipeline.addresses import shown
from pipeline.failures import passing_status

REDIRECTS = 5
TIMEOUTS_S = {"total": 300, "sock_connect": 15, "sock_read": 30}
_EMBEDDED = ipaddress.ip_network("64:ff9b::/96")


class Busy(OSError):
    """No answer, or one that another attempt may change."""


class Denied(ValueError):
    """There is nothing to be had, and that will not change."""


class Answered(Denied):
    """The server says so: it is there."""


def get(address: str, options: Mapping[str, Any], limit: int, named: Callable[[str], bool]) -> bytes:
    """The content behind an address.

    Args:
        options: fsspec's for http; sent to this host alone.
        limit: Bytes, after decompression.
        named: Whether an address's host was named by who started the job.

    Raises:
        Busy: Another attempt may succeed.
        Denied: None will.
    """
    import aiohttp
    import fsspec
    from fsspec.asyn import sync

    timeouts = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(**TIMEOUTS_S)}}
    options = {**timeouts, **options}
    try:
        for _ in range(REDIRECTS + 1):
            fs = fsspec.filesystem("http", get_client=_client_for(address, options, named), **options)
            found = sync(fs.loop, _ask, fs, address, limit)
            if isinstance(found, bytes):
                return found
            if urlsplit(found)[:2] != urlsplit(address)[:2]:
                options = timeouts
            address = found
    except aiohttp.ClientConnectorCertificateError as error:
        raise Denied(_told(error)) from None
    except aiohttp.InvalidURL:  # whose text is the address, with its query
        raise Denied("is no valid address") from None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        if isinstance(error, Busy):
            raise
        lasting = _cause(error) in (errno.EACCES, socket.EAI_NONAME)
        raise (Denied if lasting else Busy)(_told(error)) from None
    raise Denied(f"more than {REDIRECTS} redirects")


async def _ask(fs: Any, address: str, limit: int) -> bytes | str:
    """The content, or where it has moved to."""
    session = await fs.set_session()
    async with session.get(fs.encode_url(address), **{**fs.kwargs, "allow_redirects": False}) as answer:
        if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
            target = urljoin(address, answer.headers["Location"])
            if not target.startswith(("http://", "https://")):
                raise Answered(f"is redirected to {shown(target)}, which is no web address")
            return target
        if answer.status >= 300:
            raise (Busy if passing_status(answer.status) else Answered)(f"{answer.status} {answer.reason}")
        found = bytearray()
        async for block in answer.content.iter_chunked(1 << 18):
            found += block
            if len(found) > limit:
                raise Answered(f"is longer than {limit:,} bytes, more than a picture of `max_pixels` needs")
        return bytes(found)


def _client_for(address: str, options: Mapping[str, Any], named: Callable[[str], bool]) -> Callable[..., Any]:
    """A client that connects to public addresses; for a host that was named, to inner ones too.

    An address of the link-local range, where clouds keep their machines' credentials, has to be named by its number.
    """
    if (options.get("client_kwargs") or {}).get("trust_env"):
        return _anywhere  # a proxy of the user's connects, and is within
    if not named(address):
        return _public
    try:
        ipaddress.ip_address(urlsplit(address).hostname or "")
    except ValueError:
        return _inner
    return _anywhere


async def _anywhere(loop: Any = None, **options: Any) -> Any:
    import aiohttp

    return aiohttp.ClientSession(**options)


async def _public(loop: Any = None, **options: Any) -> Any:
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_public_socket), **options)


async def _inner(loop: Any = None, **options: Any) -> Any:
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_inner_socket), **options)


def _public_socket(found: Any) -> socket.socket:
    number = _number(found)
    if not number.is_global or number.is_multicast:
        raise _inside(number, "its host by name")
    return _socket(found)


def _inner_socket(found: Any) -> socket.socket:
    number = _number(found)
    if number.is_link_local:
        raise _inside(number, "it by its number")
    return _socket(found)


def _inside(number: Any, how: str) -> OSError:
    why = f"{number} is no public address; if you trust it, name {how} in `allow` of the job file's `input`"
    return OSError(errno.EACCES, why)


def _number(found: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """What is connected to; an IPv4 address also where it stands in an IPv6 one."""
    number = ipaddress.ip_address(str(found[4][0]).partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address):
        if number in _EMBEDDED:
            return ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
        return number.ipv4_mapped or number.sixtofour or number
    return number


def _socket(found: Any) -> socket.socket:
    return socket.socket(found[0], found[1], found[2])


def _cause(error: BaseException) -> int | None:
    return getattr(getattr(error, "os_error", error), "errno", None)


def _told(error: BaseException) -> str:
    inner = getattr(error, "os_error", None)
    refused = inner.strerror if inner is not None and inner.errno == errno.EACCES else None
    text = " ".join(str(refused or error).split())
    return (text or ("no answer in time" if isinstance(error, TimeoutError) else "cannot be read"))[:200]
