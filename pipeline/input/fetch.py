"""Pictures that a row only names: read from a disk, a store or the web, with what went wrong said in a sentence."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import fsspec

from pipeline.input.pictures import PictureError
from pipeline.input.rows import Encoded
from pipeline.input.source import Source
from pipeline.input.streams import open_input
from pipeline.storage import ATTEMPTS, patiently

LONGEST_PATH = 200
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers that another attempt may change: too many requests, a server that is busy or starting."""
TIMEOUTS_S = {"total": 300, "sock_connect": 15, "sock_read": 30}


class _Answer(OSError):
    """An HTTP answer that may change, or a connection that broke off."""


def picture_bytes(value: Encoded, source: Source, folder: str) -> bytes:
    """The encoded bytes of a picture, fetched if only its place is known. They are kept on ``value``.

    Raises:
        PictureError: The file is not there, or there is neither bytes nor path.
    """
    if value.data is None:
        if not value.path:
            raise PictureError("no picture (null)")
        path = value.path if "://" in value.path or value.path.startswith("/") else f"{folder}/{value.path}"
        try:
            value.data = _fetched(path, source)
        except _Answer as error:
            raise PictureError(f"{_shown(path)}: {error}, {ATTEMPTS} times") from None
        except OSError as error:
            raise PictureError(f"{_shown(path)}: {error.strerror or _reason(error)}") from None
        except (ValueError, ImportError) as error:  # no such protocol, or no address at all
            raise PictureError(f"{_shown(path)}: {error}") from None
    return value.data


def _fetched(path: str, source: Source) -> bytes:
    if path.startswith(("http://", "https://")):
        return patiently(partial(_get, path, options_for(path, source)))
    with open_input(path, replace(source, storage_options=options_for(path, source))) as handle:
        return patiently(handle.read)


def _get(path: str, options: dict[str, Any]) -> bytes:
    """One GET: asking for the size first would double the requests, and signed addresses refuse it.

    Raises:
        _Answer: Another attempt may succeed.
        PictureError: None will.
    """
    import aiohttp

    if "client_kwargs" not in options:
        options = {**options, "client_kwargs": {"timeout": aiohttp.ClientTimeout(**TIMEOUTS_S)}}
    fs, address = fsspec.url_to_fs(path, **options)
    try:
        return bytes(fs.cat_file(address))
    except FileNotFoundError:
        raise PictureError(f"{_shown(path)}: 404 Not Found") from None
    except aiohttp.ClientResponseError as error:
        if error.status in PASSING:
            raise _Answer(f"{error.status} {error.message}") from None
        raise PictureError(f"{_shown(path)}: {error.status} {error.message}") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _Answer(_reason(error)) from None


def options_for(path: str, source: Source) -> dict[str, Any]:
    """The input's storage options, as far as they are meant for this address: a store's keys are none of the web's."""
    given = {_protocol(entry) for entry in source.path}
    meant = given <= {"file"} or _protocol(path) in given
    return dict(source.storage_options) if meant else {}


def _protocol(path: str) -> str:
    protocol = fsspec.core.split_protocol(path)[0] or "file"
    return {"local": "file", "https": "http", "s3a": "s3"}.get(protocol, protocol)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or "no answer in time" if isinstance(error, TimeoutError) else text or "cannot be read")[:LONGEST_PATH]


def _shown(path: str) -> str:
    """A path that may be anything, even a picture written as text, at a length that can be read."""
    return path if len(path) <= LONGEST_PATH else f"{path[:60]}... ({len(path):,} characters)"
