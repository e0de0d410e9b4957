"""One run at a time in an output folder.

Each run that takes the folder has an epoch, one more than the last one's, and takes it by creating
``locks/<epoch>.json``: of two that try, the filesystem lets one. The folder is held by the highest epoch. Its holder
renews its own file every few seconds, and says in it when it is done; it never writes another's.

A holder is gone if its process is (same machine, boot and process namespace), or if it was this process and has ended:
a run that ends on a full disk cannot say so. Any other that is silent is watched for a lease, by the watcher's own
clock: one that renews in that time is alive, whatever its clock says. A holder that finds a higher epoch than its own
has lost the folder; it asks before all that it changes. One that was silent for long shows first that it lives, and
asks then: an answer is worth nothing while somebody's patience may run out.

A watcher sees that a holder lives by its file's content alone. So no sign of life says what an earlier one said, also
where an answer was lost and it is sent again; and one at a time is on its way, so that no older one lies over it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pipeline import machine
from pipeline.input.files import OWN
from pipeline.output.planfile import OutputError
from pipeline.storage import Folder

LOCKS = f"{OWN}/locks"
NAME = f"{OWN}/lock.json"
"""Where older code kept its lock; it counts as epoch 0."""
_EPOCH = re.compile(r"(\d+)\.json")
RENEW_S = 10.0
LEASE_S = 120.0
"""How long a holder that cannot be asked has to be silent before its folder is taken."""
POLL_S = 2.0
SETTLE_S = 1.0
_held: set[str] = set()
"""Tokens of the locks that this process holds."""
LOST = "another run has taken this output folder, or it was deleted; this run has stopped"


class OutputLocked(RuntimeError):
    """Another run holds the output folder; the message says which."""


class LockLost(RuntimeError):
    """This run does not hold the output folder any more; it must change nothing in it."""


def lock_name(epoch: int) -> str:
    return f"{LOCKS}/{epoch:06d}.json"


def _epochs(folder: Folder) -> list[int]:
    found = (_EPOCH.fullmatch(name) for name in folder.listing(LOCKS))
    return [int(match[1]) for match in found if match]


def latest_epoch(folder: Folder) -> int:
    """The highest epoch that a run took the folder in; 0 if none did."""
    return max(_epochs(folder), default=0)


def _content(folder: Folder, epoch: int) -> dict[str, Any] | None:
    """What a lock says; None if there is none, or if it says that its holder is done."""
    try:
        said = json.loads(folder.read(lock_name(epoch) if epoch else NAME))
        if said.get("done"):
            return None
        texts = {name: str(said[name]) for name in ("host", "boot", "process", "token")}
        numbers = {"pid": int(said["pid"]), "renewed": float(said["renewed"])}
        return {**texts, **numbers, "namespace": str(said.get("namespace", "")), "damaged": False}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):  # no run writes such a lock
        return {"host": "unknown", "pid": 0, "token": "", "renewed": 0.0, "damaged": True}


def _alive(content: Mapping[str, Any]) -> bool | None:
    """Whether a lock's holder lives; None: it cannot be asked from here."""
    if content["damaged"]:
        return False
    mine = machine.here.process()
    if any(not mine[name] or content[name] != mine[name] for name in ("host", "boot", "namespace")):
        return None
    if machine.here.began(content["pid"]) != content["process"]:
        return False
    return content["pid"] != mine["pid"] or content["token"] in _held


def holder(folder: Folder) -> dict[str, Any] | None:
    """Who holds the lock, at a glance: ``host``, ``pid``, ``silent_s``, ``stale``; None if nobody does.

    A holder that cannot be asked is judged by its own time stamp, which is as good as the two clocks are. `Lock` does
    not go by it.
    """
    content = _content(folder, latest_epoch(folder))
    if content is None:
        return None
    silent = max(0.0, machine.here.wall() - content["renewed"])
    alive = _alive(content)
    return {**content, "silent_s": silent, "stale": silent > LEASE_S if alive is None else not alive}


class Proxy:
    """A driver's lock, as one asks who works for it elsewhere: whether a later driver has the folder.

    Attributes:
        epoch: The driver's.
    """

    def __init__(self, folder: Folder, epoch: int) -> None:
        self._folder, self.epoch = folder, epoch

    def check(self) -> None:
        """Ask before changing anything.

        Raises:
            LockLost: Another run has the folder, or it was deleted.
        """
        if latest_epoch(self._folder) != self.epoch:
            raise LockLost(LOST)


class Lock:
    """Held from construction to `release`.

    Args:
        say: Told what takes long, or what the filesystem lacks.
        sole: The user sees to it that one run at a time writes here, where the store cannot.

    Attributes:
        epoch: Number of this run among those that held the folder; 1 for the first.
        lost: Another run has it now.

    Raises:
        OutputLocked: Another run holds the folder.
        OutputError: The store cannot do what a run needs.
    """

    def __init__(self, folder: Folder, say: Callable[[str], None] = lambda message: None, sole: bool = False) -> None:
        self._folder, self._token, self._say = folder, machine.here.token(), say
        self.lost = False
        self._exclusive = folder.local or self._probed(sole)
        self._signs = machine.here.guard()
        self._known = self._shown = machine.here.clock()
        _held.add(self._token)
        try:
            self.epoch = self._acquire()
        except BaseException:
            _held.discard(self._token)
            raise
        self._stop = machine.here.every(RENEW_S, self._renew)

    def _probed(self, sole: bool) -> bool:
        """Whether a store creates a file only if there is none; what else a run needs of it is asked too."""
        name = f"{OWN}/{self._token}.probe"
        if lacking := self._folder.lacks(name):
            raise OutputError(f"{self._folder.url}: this store does not {', '.join(lacking)}, as a run needs; name "
                              "another output folder")  # fmt: skip
        if self._folder.is_exclusive(name):
            return True
        problem = f"{self._folder.url}: this store replaces a file that is to be created (no conditional writes)"
        if not sole:
            raise OutputError(f"{problem}, so that it cannot keep two runs apart; see to it that one run at a time "
                              "writes here and say so (resources: {sole_run: true})")  # fmt: skip
        self._say(f"{problem}: see to it that one run at a time writes here")
        return False

    def _mine(self, done: bool = False) -> bytes:
        mine: Mapping[str, Any] = {
            **machine.here.process(),
            "token": self._token,
            "renewed": machine.here.wall(),
            "done": done,
        }
        return json.dumps(mine).encode()

    def _acquire(self) -> int:
        """Wait for a holder that may be dead, then take the next epoch."""
        seen, since = None, machine.here.clock()
        while True:
            asked = machine.here.clock()
            epoch = latest_epoch(self._folder)
            other = _content(self._folder, epoch)
            alive = False if other is None else _alive(other)
            if other is None or alive is False:
                return self._take(epoch + 1)
            now = (epoch, other["token"], other["renewed"])
            if alive or now != (seen or now):
                silent = max(0.0, machine.here.wall() - other["renewed"])
                raise OutputLocked(
                    f"{self._folder.url}: another run holds this folder (process {other['pid']} on {other['host']}, "
                    f"last sign of life {silent:.0f} s ago); wait for it, stop it, or name another output folder"
                )
            if seen is None:
                seen, since = now, machine.here.clock()
                self._say(f"process {other['pid']} on {other['host']} held {self._folder.url} last; whether it lives "
                          f"shows within {RENEW_S:.0f} s, that it is dead after {LEASE_S:.0f} s: waiting")  # fmt: skip
            elif asked - since > LEASE_S:
                return self._take(epoch + 1, other)
            machine.here.sleep(POLL_S)

    def _take(self, epoch: int, silent: Mapping[str, Any] | None = None) -> int:
        """Take an epoch.

        Args:
            silent: What the last holder said, if it is held for dead; it may have woken since.
        """
        self._shown = machine.here.clock()
        taken = self._folder.create(lock_name(epoch), self._mine())
        if not self._exclusive:
            machine.here.sleep(SETTLE_S)  # two may have written it; the later one's token stands
        if not taken or not self._holds(epoch):
            raise OutputLocked(f"{self._folder.url}: another run has just taken this folder; try again")
        if silent is not None and _content(self._folder, epoch - 1) not in (silent, None):
            self._folder.remove(lock_name(epoch))
            raise OutputLocked(f"{self._folder.url}: the run that holds this folder was silent, and has just woken")
        for earlier in _epochs(self._folder):
            if earlier < epoch:
                self._folder.remove(lock_name(earlier))
        self._folder.remove(NAME)
        return epoch

    def _holds(self, epoch: int) -> bool:
        """Whether the folder's last epoch is this one, and ours."""
        content = _content(self._folder, epoch) if latest_epoch(self._folder) == epoch else None
        return content is not None and content["token"] == self._token

    def check(self) -> None:
        """Ask before changing anything. On a store the answer of the last few seconds will do: a lease is far longer.

        Raises:
            LockLost: Another run has the folder, or it was deleted.
        """
        if self._silent():
            self._show()
        elif self.lost or self._folder.local or machine.here.clock() - self._known >= RENEW_S:
            self._ask()
        if self.lost:
            raise LockLost(LOST)

    def _silent(self) -> bool:
        """Whether the last sign of life is so old that somebody may soon take the folder."""
        return machine.here.clock() - self._shown > LEASE_S / 2

    def _ask(self) -> None:
        """See whether the folder is held."""
        asked = machine.here.clock()  # not when the answer came: this process may have stood still in between
        if self.lost or not self._holds(self.epoch):
            self.lost = True
        else:
            self._known = asked

    def _show(self) -> None:
        """A sign of life. After a long silence one asks again behind it: who takes the folder looks for one once it is
        taken (`_take`), so that of the two at least one sees the other.
        """
        with self._signs:
            silent = self._silent()
            self._ask()
            if not self.lost:
                shown = machine.here.clock()  # not when it was sent again: a store's client may do so by itself
                self._folder.write(lock_name(self.epoch), self._mine)
                self._shown = shown
                if silent:
                    self._ask()

    def _renew(self) -> bool:
        """Whether it is to be renewed again."""
        with suppress(OSError):  # the store is away or the disk is full: the next turn tries again
            self._show()
        return not self.lost

    def release(self) -> None:
        """Say that this run is done.

        Raises:
            OSError: It could not be said (the disk is full, the store is away). Other processes then take it for held
                while this one lives and might, or for a lease; this process does not.
        """
        self._stop()
        _held.discard(self._token)
        with self._signs:
            if not self.lost and self._holds(self.epoch):
                self._folder.write(lock_name(self.epoch), self._mine(done=True))
