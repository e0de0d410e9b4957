"""One run at a time in a folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import machine
from pipeline.output import lock as locks
from pipeline.output.lock import NAME, Lock, LockLost, OutputLocked, holder, latest_epoch, lock_name
from pipeline.output.planfile import OutputError
from pipeline.storage import Folder

ELSEWHERE = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 1, "process": "1", "token": "t", "renewed": 0}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a third of a second."""
    for name, value in {"RENEW_S": 0.05, "LEASE_S": 0.3, "POLL_S": 0.02, "SETTLE_S": 0.1}.items():
        monkeypatch.setattr(locks, name, value)


def put(folder: Folder, epoch: int = 1, **said: Any) -> None:
    """Leave a lock of somebody else's."""
    folder.write(lock_name(epoch), json.dumps({**ELSEWHERE, **said}).encode())


def here(**said: Any) -> dict[str, Any]:
    """What a process of this machine and namespace says; by default one that is gone."""
    return {
        **machine.here.process(),
        "pid": 1 << 30,
        **said,
    }


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    script = f"""
import os, signal
from pipeline.output.lock import Lock
from pipeline.storage import Folder
Lock(Folder.at({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    left = holder(folder)
    assert left is not None
    assert left["stale"]
    lock = Lock(folder)
    with pytest.raises(OutputLocked, match=str(os.getpid())):
        Lock(folder)
    lock.release()
    assert holder(folder) is None


@pytest.mark.parametrize("name", [NAME, lock_name(4)])
def test_a_silent_holder_on_another_machine_is_waited_for(tmp_path: Path, hurried: None, name: str) -> None:
    """A restarted driver goes on once the lease is over; how long that is, it says. Older code's lock counts too."""
    folder = Folder.at(str(tmp_path))
    folder.write(name, json.dumps({k: v for k, v in ELSEWHERE.items() if k != "namespace" or name != NAME}).encode())
    said: list[str] = []
    begun = time.monotonic()
    lock = Lock(folder, said.append)
    assert time.monotonic() - begun > 0.3
    assert len(said) == 1
    assert "elsewhere" in said[0]
    assert "waiting" in said[0]
    assert lock.epoch == (1 if name == NAME else 5)
    assert not folder.exists(name)
    lock.release()


@pytest.mark.parametrize("ahead", [-1e6, 1e6])
def test_a_holder_that_renews_is_alive_whatever_its_clock_says(tmp_path: Path, hurried: None, ahead: float) -> None:
    folder = Folder.at(str(tmp_path))
    put(folder)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.05):
            put(folder, renewed=time.time() + ahead)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OutputLocked, match="elsewhere"):
            Lock(folder)
    finally:
        stop.set()
        thread.join()


def test_a_run_that_could_not_say_that_it_is_done_holds_nobody_up_in_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(str(tmp_path))
    lock = Lock(folder)

    def full(*ignored: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            lock.release()
    again = Lock(folder)
    with pytest.raises(OutputLocked):
        Lock(folder)
    assert again.epoch == 2
    again.release()


def test_a_process_of_another_namespace_is_not_looked_up_here(
    tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share host name and boot, and number their processes each for themselves."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(machine.here, "sleep", sleep)
    folder = Folder.at(str(tmp_path))
    put(folder, **here(namespace="pid:[1]"))
    begun = time.monotonic()
    Lock(folder).release()
    assert time.monotonic() - begun > 0.3
    assert waits
    assert set(waits) == {locks.POLL_S}
    waits.clear()
    put(folder, epoch=9, **here())
    Lock(folder).release()
    assert not waits
    assert latest_epoch(folder) == 10


@pytest.mark.parametrize("content", [b"{}", b"[]", b"", b"7", b'{"host": "a", "pid": "x"}'])
def test_a_lock_that_says_nothing_holds_nobody_up(tmp_path: Path, content: bytes) -> None:
    folder = Folder.at(str(tmp_path))
    folder.write(NAME, content)
    assert holder(folder)["stale"]  # type: ignore[index]
    Lock(folder).release()
    folder.write(lock_name(7), content)
    Lock(folder).release()
    assert holder(folder) is None


def test_of_many_that_take_a_stale_lock_one_does(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    put(folder, **here())
    won: list[Lock] = []
    others: list[BaseException] = []
    ready = threading.Barrier(12)

    def take() -> None:
        ready.wait()
        try:
            won.append(Lock(folder))
        except BaseException as error:
            others.append(error)

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lock.epoch for lock in won] == [2]
    assert [type(error) for error in others] == [OutputLocked] * 11
    won[0].check()
    won[0].release()


def test_who_has_lost_the_folder_hears_of_it_and_writes_nothing(tmp_path: Path, hurried: None) -> None:
    folder = Folder.at(str(tmp_path))
    lost = Lock(folder)
    put(folder, epoch=2)  # as another machine does after a lease
    with pytest.raises(LockLost, match="another run has taken"):
        lost.check()
    lost.release()
    assert holder(folder)["host"] == "elsewhere"  # type: ignore[index]
    deleted = Lock(Folder.at(str(tmp_path / "b")))
    (tmp_path / "b" / lock_name(1)).unlink()
    time.sleep(0.2)  # renewing does not bring it back
    with pytest.raises(LockLost):
        deleted.check()
    assert not (tmp_path / "b" / lock_name(1)).exists()


class Careless(MemoryFileSystem):
    """A store without conditional writes: what is to be created replaces what is there."""

    protocol = "careless"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **rest: Any) -> None:
        super().pipe_file(path, value)


def test_a_store_that_replaces_what_is_to_be_created_is_found_out(hurried: None) -> None:
    folder = Folder("careless://out", Careless(), "/out", False)
    said: list[str] = []
    with pytest.raises(OutputError, match=r"one run at a time writes here and say so \(resources: \{sole_run: true"):
        Lock(folder, said.append)
    assert said == []
    lock = Lock(folder, said.append, sole=True)
    assert len(said) == 1
    assert "no conditional writes" in said[0]
    with pytest.raises(OutputLocked):
        Lock(folder, sole=True)
    lock.check()
    lock.release()
    assert holder(folder) is None
    assert [name for name in Careless.store if "probe" in name] == []
    sound = Folder.at("memory://lock-test")
    Lock(sound, said.append).release()
    assert len(said) == 1


class Paused(machine.Machine):
    """A machine whose processes have stood still for so many seconds."""

    paused = 0.0

    def clock(self) -> float:
        return super().clock() + self.paused


def test_an_answer_is_as_old_as_its_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that stands still between asking for its lock and hearing of it does not go on unasked after that."""
    folder, here = Folder.at("memory://paused"), Paused()
    monkeypatch.setattr(machine, "here", here)
    lock = Lock(folder)
    here.paused = 100.0
    with monkeypatch.context() as patch:

        def slowly(lock: Lock, epoch: int) -> bool:
            here.paused += 200.0
            return True

        patch.setattr(Lock, "_holds", slowly)
        lock.check()
    put(folder, epoch=2)
    with pytest.raises(LockLost):
        lock.check()
    lock.release()


def test_a_holder_that_wakes_while_its_folder_is_taken_keeps_it(
    tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes it may stand still between the end of the lease and its own lock."""
    folder = Folder.at(str(tmp_path))
    put(folder)
    real = Folder.create

    def late(folder: Folder, name: str, data: bytes) -> bool:
        put(folder, renewed=1.0)
        return real(folder, name, data)

    monkeypatch.setattr(Folder, "create", late)
    with pytest.raises(OutputLocked, match="just woken"):
        Lock(folder)
    assert (latest_epoch(folder), holder(folder)["host"]) == (1, "elsewhere")  # type: ignore[index]


@pytest.mark.parametrize("wakes", ["before the lock is created", "after it"])
@pytest.mark.parametrize("where", ["disk", "memory://wakes"])
def test_a_holder_that_asks_after_a_long_silence_and_who_takes_its_folder_do_not_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, wakes: str
) -> None:
    """It was told that it has the folder, seconds before another one's patience ran out: it went on, as the other."""
    folder, here = Folder.at(str(tmp_path) if where == "disk" else where + wakes[:3]), Paused()
    monkeypatch.setattr(machine, "here", here)
    monkeypatch.setattr(Paused, "sleep", lambda self, seconds: setattr(self, "paused", self.paused + seconds))
    woken, real = Lock(folder), Folder.create
    monkeypatch.setattr(locks, "_alive", lambda content: None)
    have = []

    def wake() -> None:
        with suppress(LockLost):
            woken.check()
            have.append(woken)

    def create(folder: Folder, name: str, data: bytes) -> bool:
        if wakes == "before the lock is created":
            wake()
        created = real(folder, name, data)
        if wakes == "after it":
            wake()
        return created

    monkeypatch.setattr(Lock, "_probed", lambda lock, sole: True)
    monkeypatch.setattr(Folder, "create", create)
    with suppress(OutputLocked):
        have.append(Lock(folder))
    assert len(have) == 1
    have[0].check()
    for lock in (woken, *have):
        lock.release()


def test_a_sign_of_life_that_is_sent_again_is_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to one was lost and the holder stood still; it sent the same again, which no watcher could see."""
    folder, real = Folder.at("memory://sent-again"), MemoryFileSystem.pipe_file
    lock, sent = Lock(folder), list[bytes]()

    def lossy(self: MemoryFileSystem, path: str, value: bytes, *args: Any, **rest: Any) -> None:
        real(self, path, value, *args, **rest)
        sent.append(value)
        if len(sent) == 1:
            raise ConnectionError("the connection was closed")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lossy)
    assert lock._renew()
    first, second = (json.loads(value) for value in sent)
    assert second["renewed"] > first["renewed"]
    assert {**second, "renewed": 0} == {**first, "renewed": 0}
    lock.release()


@pytest.mark.parametrize("then", ["check", "release"])
def test_an_older_sign_of_life_does_not_lie_over_a_newer_one(monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """A store's client sends again what had no answer, while the holder's other thread shows that it lives, or ends."""
    folder, here, real = Folder.at(f"memory://older-{then}"), Paused(), MemoryFileSystem.pipe_file
    monkeypatch.setattr(machine, "here", here)
    lock, watched = Lock(folder), list[Any]()
    landed, over = threading.Event(), threading.Event()

    def twice(self: MemoryFileSystem, path: str, value: bytes, *args: Any, **rest: Any) -> None:
        real(self, path, value, *args, **rest)
        if threading.current_thread() is renewing and not landed.is_set():
            watched.append(locks._content(folder, 1))
            here.paused += 100.0
            landed.set()
            over.wait(0.3)
            real(self, path, value, *args, **rest)

    renewing = threading.Thread(target=lock._renew)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", twice)
    renewing.start()
    assert landed.wait(10.0)
    getattr(lock, then)()
    over.set()
    renewing.join()
    if then == "release":
        assert holder(folder) is None
        return
    monkeypatch.setattr(Lock, "_acquire", lambda lock: lock._take(2, watched[0]))
    with pytest.raises(OutputLocked, match="just woken"):
        Lock(folder)
    lock.check()
    lock.release()


@pytest.mark.parametrize(
    ("method", "answer", "told"),
    [
        ("ls", lambda self, *args, **rest: [], "list what has just been written"),
        ("cat_file", lambda self, path, start=None, end=None, **rest: b"first", "read a part of a file"),
        ("cp_file", lambda self, *args, **rest: None, "copy a file"),
        ("rm_file", lambda self, *args, **rest: None, "forget what has just been deleted"),
        ("pipe_file", lambda self, *args, **rest: None, "replace a file"),
    ],
)
def test_a_store_that_cannot_hold_a_run_is_refused(
    method: str, answer: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Partial(MemoryFileSystem):
        protocol = "partial"
        store: dict[str, Any] = {}
        pseudo_dirs = [""]

    folder = Folder("partial://out", Partial(), "/out", False)
    assert folder.lacks("_latentmill/a.probe") == []
    assert Partial.store == {}
    monkeypatch.setattr(Partial, method, answer)
    with pytest.raises(OutputError, match=told):
        Lock(folder)
