"""Whose fault it is when something goes wrong in a run, and what follows from that; docs/runtime.md has the table."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import StrEnum

LASTING_STATUS = frozenset({501, 505, 511})
"""HTTP answers from 500 on that no other attempt changes."""
PASSING_STATUS = frozenset({408, 425, 429})
"""Those below 500 that another may change: a timeout, too early, too many requests."""
BEHIND_THE_END = 416
"""The HTTP answer to a range that begins where the file has ended."""
PASSING_ERRNO = frozenset({
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EPIPE, errno.EBUSY,
})  # fmt: skip
PASSING_NAMES = frozenset({
    "ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError", "ServiceRequestError",
    "ServiceResponseError", "TransportError", "TimeoutError",
})  # fmt: skip
"""What clients of stores call a connection that failed, or a class above it."""


class Fault(StrEnum):
    """Whose fault it is. An exception class that knows says so in its attribute ``fault``."""

    ROW = "row"
    """The row's own: it becomes an error row."""
    FILE = "file"
    """A damaged part of an input file: its rows become error rows."""
    TRANSIENT = "transient"
    """A disk's, a store's or a network's, and it passes: the work is done again, later."""
    PREEMPTED = "preempted"
    """The node's, or of who took it away: the work is done again, and counts against no row."""
    POISON = "poison"
    """The worker's own death, or its device's: its rows are suspects (`pipeline.run.deaths`)."""
    CHANGED = "changed"
    """The input or the output folder is not what was planned any more: the run ends and says what."""
    BUG = "bug"
    """Ours, or the stage's, which broke its contract: no data can be trusted, the run ends."""


class Away(OSError):
    """What was to be read does not answer; the message says what, and nobody is to blame for it."""

    fault = Fault.TRANSIENT


def passing_status(status: int) -> bool:
    """Whether another attempt may have another answer than this HTTP status."""
    return status in PASSING_STATUS or (status >= 500 and status not in LASTING_STATUS)


def passing(error: BaseException) -> bool:
    """Whether a store, a server or the network is away, whatever the exception is called in the end.

    What fsspec raises for an answer of 503 may be a FileNotFoundError: the causes count.
    """
    for cause in _causes(error):
        status = status_of(cause)
        if status is not None:
            return passing_status(status)
        if isinstance(cause, (Away, ConnectionError, TimeoutError)) or getattr(cause, "errno", None) in PASSING_ERRNO:
            return True
        if not isinstance(cause, OSError) and PASSING_NAMES & {kind.__name__ for kind in type(cause).__mro__}:
            return True
    return False


def behind_the_end(error: BaseException) -> bool:
    """Whether a store says that a file ends before the part that was asked for."""
    return any(status_of(cause) == BEHIND_THE_END for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from, the first cause first."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__
    yield from reversed(chain)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a store's client tells of, if it does."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    for told in (getattr(error, "status", None), getattr(error, "status_code", None), getattr(error, "code", None),
                 metadata.get("HTTPStatusCode")):  # fmt: skip
        if isinstance(told, int) or (isinstance(told, str) and told.isdigit()):
            return int(told)
    return None


def fault_of(error: BaseException) -> Fault:
    """Whose fault an exception is that ended a worker's task."""
    told = getattr(error, "fault", None)
    if isinstance(told, Fault):
        return told
    return Fault.TRANSIENT if isinstance(error, OSError) or passing(error) else Fault.BUG


def described(error: BaseException) -> str:
    """An exception in a line: its own words where it is made for people, else with its type before them."""
    text = " ".join(str(error).split())
    if isinstance(getattr(error, "fault", None), Fault):
        return text[:1000]
    return f"{type(error).__name__}: {text}"[:1000] if text else type(error).__name__
