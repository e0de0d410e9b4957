"""Whose fault it is when a web address does not answer: the row's, or that of a server or network that is away.

The answer is found by asking: another address of that host which answered before (its front page if none has), then
another host that did. Where the host answers, the silence is the row's own. One that is away though it answered before,
or while nothing else answers either, is waited for; then the work is given up for now, and no row is blamed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from pipeline import machine
from pipeline.failures import Away

T = TypeVar("T")
FIRST_S, LONGEST_S, LIMIT_S = 1.0, 15.0, 180.0
"""How long the first and the longest pause are, and all waiting for one address before its shard is given back."""
HOSTS = 10_000
"""That are remembered."""


class Patience:
    """What one process knows of hosts."""

    def __init__(self) -> None:
        self._good: OrderedDict[str, str] = OrderedDict()
        self._given_up: set[str] = set()
        self._waits: dict[int, str] = {}
        self._guard = threading.Lock()

    @property
    def waits(self) -> str:
        """What some thread waits for right now, in a sentence; empty if none does."""
        return next(iter(list(self._waits.values())), "")

    def answered(self, address: str) -> None:
        """A host is there: this address of its had an answer."""
        host = host_of(address)
        with self._guard:
            self._good[host] = address
            self._good.move_to_end(host)
            self._given_up.discard(host)
            if len(self._good) > HOSTS:
                self._good.popitem(last=False)

    def outlast(self, address: str, error: OSError, ask: Callable[[], T], alive: Callable[[str], bool]) -> T:
        """What the address holds, once its host is back.

        Args:
            error: What the last attempt came to.
            ask: Makes another.
            alive: Whether an address has an answer now.

        Raises:
            OSError: The last attempt's, if the host, or else other hosts, answer: the row is to blame.
            Away: Nobody answers, for `LIMIT_S`.
        """
        try:
            return self._outlasted(address, error, ask, alive)
        finally:
            self._waits.pop(threading.get_ident(), None)

    def _outlasted(self, address: str, error: OSError, ask: Callable[[], T], alive: Callable[[str], bool]) -> T:
        host, pause, until = host_of(address), FIRST_S, machine.here.clock() + LIMIT_S
        while True:
            known, other = self._known(host)
            at_home = host not in self._given_up and alive(known or front_page(address))
            if at_home or host in self._given_up or (known is None and other is not None and alive(other)):
                raise error
            if machine.here.clock() >= until:
                if other is not None and alive(other):
                    self._given_up.add(host)
                    raise error
                raise Away(f"{host} does not answer ({error})")
            self._waits[threading.get_ident()] = f"{host} does not answer ({error})"
            machine.here.sleep(pause)
            try:
                return ask()
            except OSError as again:
                error, pause = again, min(2 * pause, LONGEST_S)

    def _known(self, host: str) -> tuple[str | None, str | None]:
        """Addresses that had an answer: the last one of this host, and of any other."""
        with self._guard:
            other = next((address for name, address in reversed(self._good.items()) if name != host), None)
            return self._good.get(host), other


def host_of(address: str) -> str:
    """Scheme and host of a web address."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}"


def front_page(address: str) -> str:
    return host_of(address) + "/"


hosts = Patience()
"""Of this process."""
