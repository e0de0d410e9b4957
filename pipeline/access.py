"""fsspec's options for addresses: who is given some for a store hands them over once, who opens an address asks here.

So that keys which only a job file (or a command's ``--storage-options``) knows open everything of a run that lies on
that store: its output, checkpoints, a reference, an earlier step's dataset. They are part of no setting, no plan and no
file. In Python::

    with granted("s3://bucket/out", {"key": ..., "secret": ...}):
        reference = Reference.open("s3://bucket/out")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.addresses import WEB, account_of, is_local, shown, store_of

Reach = Literal["protocol", "store"]
CONNECTIONS = 32
"""To a store of S3's, whose client would open ten, however many threads ask; those of the others open a hundred."""


@dataclass(frozen=True)
class Grant:
    """Options for an address; ``reach`` says what else they open: all of its protocol, or its bucket (host) alone."""

    address: str
    reach: Reach
    options: Mapping[str, Any] = field(repr=False)

    def closeness(self, address: str, least: int) -> int:
        """How nearly the grant is meant for an address; 0 if it is not."""
        protocol, host = store_of(address)
        if is_local(self.address):  # a job that writes to a disk has no other store than those that it reads
            return 1 if least <= 1 and self.reach == "protocol" and protocol not in WEB else 0
        own_protocol, own_host = store_of(self.address)
        if protocol != own_protocol:
            return 0
        if f"{address.rstrip('/')}/".startswith(f"{self.address.rstrip('/')}/"):
            return 3 + len(self.address)
        if host == own_host:
            return 3
        return 2 if least <= 2 and self.reach == "protocol" and protocol not in WEB else 0


_held: list[Grant] = []


@contextmanager
def granted(address: str | None, options: Mapping[str, Any] | None, reach: Reach = "protocol") -> Iterator[None]:
    """While it lasts, addresses are opened with these options: this one and those below it first of all.

    Args:
        address: Of the store; a local path stands for all stores. None: nothing is granted.
        options: fsspec's; none, and nothing is granted.
        reach: ``store``: for its bucket (its host) alone; else for other buckets of its protocol too.
    """
    grants = [Grant(address, reach, dict(options))] if address and options else []
    _held.extend(grants)
    try:
        yield
    finally:
        for grant in grants:
            del _held[next(n for n, other in enumerate(_held) if other is grant)]


def held() -> tuple[Grant, ...]:
    """All grants, for a process that works for this one."""
    return tuple(_held)


def hold(grants: Sequence[Grant]) -> None:
    """Grants for as long as this process lives."""
    _held.extend(grants)


def options_for(address: str, least: Literal["any", "store"] = "any") -> dict[str, Any]:
    """The options to open an address with: of several grants the nearest, of those the latest.

    Args:
        least: ``store``: only what was granted for this very bucket (host).
    """
    if is_local(address):
        return {}
    lowest = 3 if least == "store" else 1
    near = [(grant.closeness(address, lowest), number) for number, grant in enumerate(_held)]
    closest, number = max(near, default=(0, 0))
    return dict(_held[number].options) if closest else {}


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's filesystem for an address, and the path on it."""
    return connect(address, options_for(address))


def connect(address: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """fsspec's filesystem for an address with these options, and the path on it.

    Raises:
        ImportError: Its client is not installed.
        ValueError: There is no such protocol, or address and options name two accounts.
    """
    import fsspec

    given = fitting(address, options)
    if store_of(address)[0] in ("s3", "s3a"):
        given["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **(given.get("config_kwargs") or {})}
    opened: tuple[Any, str] = fsspec.url_to_fs(address, **given)
    return opened


def fitting(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without what the address says itself: fsspec takes an Azure account from one of them alone.

    Raises:
        ValueError: They name another account, whose keys are none of this address's.
    """
    host, account = account_of(address), options.get("account_name")
    if host is None or account is None:
        return dict(options)
    if host.partition(".")[0] != account:
        raise ValueError(f"{shown(address)}: the account in `storage_options` is another one, {account}")
    return {key: value for key, value in options.items() if key != "account_name"}
