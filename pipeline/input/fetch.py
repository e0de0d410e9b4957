"""Pictures that a row only names: read from a disk, a store or the web, with what went wrong said in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import fsspec

from pipeline import web
from pipeline.addresses import LONGEST, SAME, Refused, names_host, placed, shown
from pipeline.failures import Away, passing
from pipeline.input.rows import Encoded
from pipeline.input.source import Source
from pipeline.input.streams import open_input
from pipeline.patience import hosts
from pipeline.pictures import PictureError
from pipeline.storage import ATTEMPTS, patiently

BYTES_A_PIXEL, BYTES_BESIDE = 8, 64 << 20
"""No picture needs more: 16 bits of red, green, blue and alpha; and what describes it."""


class UntrustedError(PictureError):
    """The row points where the job file does not allow it to."""


def picture_bytes(value: Encoded, source: Source, folder: str) -> bytes:
    """The encoded bytes of a picture, fetched if only its place is known. They are kept on ``value``.

    Raises:
        UntrustedError: It is neither below the folder of the row's file nor below what ``source.allow`` names.
        PictureError: The file is not there, is too long, or there is neither bytes nor path.
        Away: The store or server is; that is no fault of the row's.
    """
    if value.data is None:
        if not value.path:
            raise PictureError("no picture (null)")
        try:
            path = value.path if value.listed else placed(value.path, folder, source.allow)
            value.data = _fetched(path, source, folder)
        except Refused as error:
            raise UntrustedError(str(error)) from None
        except Away:
            raise
        except web.Busy as error:
            raise PictureError(f"{shown(value.path)}: {error}, {ATTEMPTS} times") from None
        except OSError as error:
            if passing(error):
                raise Away(f"{shown(value.path)}: {_reason(error)}") from error
            raise PictureError(f"{shown(value.path)}: {error.strerror or _reason(error)}") from None
        except (ValueError, ImportError) as error:  # no such protocol, or no address at all
            raise PictureError(f"{shown(value.path)}: {error}") from None
    return value.data


def _fetched(path: str, source: Source, folder: str) -> bytes:
    limit = source.max_pixels * BYTES_A_PIXEL + BYTES_BESIDE
    options, named = options_for(path, source), partial(names_host, (folder, *source.allow))
    if path.startswith(("http://", "https://")):
        return _from_web(path, partial(web.get, options=options, limit=limit, named=named))
    with open_input(path, replace(source, storage_options=options)) as handle:
        data = patiently(partial(handle.read, limit + 1))
    if len(data) > limit:
        raise ValueError(f"is longer than {limit:,} bytes, more than a picture of `max_pixels` needs")
    return data


def _from_web(address: str, get: Callable[[str], bytes]) -> bytes:
    """The content behind a web address; a server that is away is waited for."""

    def ask() -> bytes:
        try:
            found = patiently(partial(get, address))
        except web.Answered:
            hosts.answered(address)
            raise
        hosts.answered(address)
        return found

    def alive(other: str) -> bool:
        try:
            get(other)
        except web.Answered:
            return True
        except (OSError, ValueError):
            return False
        return True

    try:
        return ask()
    except web.Busy as error:
        return hosts.outlast(address, error, ask, alive)


def options_for(path: str, source: Source) -> dict[str, Any]:
    """The input's storage options, as far as they are meant for this address: a store's keys are none of the web's, and
    those of one host none of another's.
    """
    given = {_meant(entry) for entry in source.path}
    meant = given <= {"file"} or _meant(path) in given
    return dict(source.storage_options) if meant else {}


def _meant(path: str) -> str:
    """The protocol; of a web address, the host too."""
    protocol = fsspec.core.split_protocol(path)[0] or "file"
    if protocol in ("http", "https"):
        return f"http://{path.partition('://')[2].partition('/')[0].lower()}"
    return SAME.get(protocol, protocol)


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or "cannot be read")[:LONGEST]
