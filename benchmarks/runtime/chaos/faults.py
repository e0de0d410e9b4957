"""What is done to a run: each fault is a function of it that says what it has done, or None where it could not."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from pipeline.output.commit import RECORDS, SUMMARIES
from pipeline.output.dataset import Output
from pipeline.output.log import LOG
from pipeline.output.products import PRODUCTS
from pipeline.storage import Folder

if TYPE_CHECKING:
    from benchmarks.runtime.chaos.life import Life

LONGEST_STILL_S = 12.0
LONGEST_STORM_S = 10.0


def kill_worker(life: Life) -> str | None:
    """As the kernel does that wants its memory."""
    worker = life.some_worker()
    if worker is None:
        return None
    with suppress(psutil.NoSuchProcess):
        worker.kill()
    return f"worker {worker.pid} killed"


def stop_worker(life: Life) -> str | None:
    """A machine that hangs for a while; the run goes on meanwhile."""
    worker = life.some_worker()
    if worker is None:
        return None
    seconds = life.chance.uniform(0.5, LONGEST_STILL_S)
    with life.world.standing_still(worker.pid):
        life.wait(seconds)
    return f"worker {worker.pid} stood still for {seconds:.1f} s"


def kill_driver(life: Life) -> str | None:
    if life.driver.poll() is not None:
        return None
    life.driver.kill()
    life.driver.wait()
    return "driver killed"


def kill_both(life: Life) -> str | None:
    """A machine that goes, with all that is on it."""
    worker = life.some_worker()
    said = kill_driver(life)
    if worker is None or said is None:
        return None
    with suppress(psutil.NoSuchProcess):
        worker.kill()
    return "driver and worker killed"


def stop_driver(life: Life) -> str | None:
    if life.driver.poll() is not None:
        return None
    seconds = life.chance.uniform(0.5, LONGEST_STILL_S)
    with life.world.standing_still(life.driver.pid):
        time.sleep(seconds)
    return f"driver stood still for {seconds:.1f} s"


def second_driver(life: Life) -> str | None:
    """The same command again while the first one runs: it has to be refused."""
    if life.driver.poll() is not None:
        return None
    second = life.start()
    with life.ended_afterwards(second):
        second.wait(life.patience_s)
        if second.returncode == 0:  # right only if the first had ended by then, and has let go of the lock
            life.driver.wait(life.patience_s)
            return "a second driver came when the first had ended"
        return f"a second driver was refused ({second.returncode})"


def restart_beside_still_driver(life: Life) -> str | None:
    """The first driver stands still, a second one is started, the first wakes."""
    if life.driver.poll() is not None:
        return None
    with life.world.standing_still(life.driver.pid):
        second = life.start()
        with life.ended_afterwards(second):
            second.wait(life.patience_s)
    return f"a second driver beside one that stood still ended with {second.returncode}"


def lose_node(life: Life) -> str | None:
    if life.world.cluster is None:
        return None
    life.world.lose_node()
    return "a node's raylet killed"


def cut_file(life: Life) -> str | None:
    """A committed file loses its end."""
    found = _some_file(life)
    if found is None:
        return None
    folder, name, size = found
    left = life.chance.randrange(size) if size else 0
    with suppress(FileNotFoundError):  # it has just been published
        folder.write(name, folder.read(name)[:left])
        return f"{name} cut to {left} of {size} bytes"
    return None


def delete_file(life: Life) -> str | None:
    found = _some_file(life)
    if found is None:
        return None
    found[0].remove(found[1])
    return f"{found[1]} deleted"


def storm(life: Life) -> str | None:
    """Of seventeen answers one is an error, one is lost before and one after the store has acted."""
    return _weather(life, "stormy", True)


def away(life: Life) -> str | None:
    return _weather(life, "away", True)


def slow(life: Life) -> str | None:
    """Every answer takes a fifth of a second."""
    return _weather(life, "slow", 0.2)


def _weather(life: Life, kind: str, value: bool | float) -> str | None:
    if life.world.proxy is None:
        return None
    seconds = life.chance.uniform(1, LONGEST_STORM_S)
    setattr(life.world.proxy, kind, value)
    try:
        life.wait(seconds)
    finally:
        setattr(life.world.proxy, kind, type(value)(0))
    return f"store {kind} for {seconds:.1f} s"


def _some_file(life: Life) -> tuple[Folder, str, int] | None:
    """A file that counts, of any kind there is: rows, summaries, records, products."""
    kinds: dict[str, list[tuple[Folder, str, int]]] = {}
    for output in life.outputs():
        for kind, name in _files(output):
            size = output.folder.size(name)
            if size is not None:
                kinds.setdefault(kind, []).append((output.folder, name, size))
    if not kinds:
        return None
    return life.chance.choice(kinds[life.chance.choice(sorted(kinds))])


def _files(output: Output) -> Iterator[tuple[str, str]]:
    listed = output.listings()
    for record in output.records(lambda name, error: None):
        if name := output.locate(record, listed):
            yield "rows", name
        yield from (("summary", f"{SUMMARIES}/{name}") for name in record.summary)
    for folder in (RECORDS, LOG):
        yield from (("record", f"{folder}/{name}") for name in output.folder.listing(folder))
    with suppress(FileNotFoundError):
        files = json.loads(output.folder.read(PRODUCTS))["files"]
        yield from (("product", file["name"]) for file in files)


FAULTS: dict[str, tuple[float, Callable[[Life], str | None]]] = {
    "kill-worker": (3, kill_worker),
    "stop-worker": (2, stop_worker),
    "kill-driver": (3, kill_driver),
    "kill-both": (1, kill_both),
    "stop-driver": (2, stop_driver),
    "second-driver": (2, second_driver),
    "restart-beside-still-driver": (1, restart_beside_still_driver),
    "lose-node": (1, lose_node),
    "cut-file": (3, cut_file),
    "delete-file": (3, delete_file),
    "storm": (3, storm),
    "away": (2, away),
    "slow": (1, slow),
}
"""Name -> how often it is drawn, and what it does."""
ON_A_STORE, ON_A_CLUSTER = ("storm", "away", "slow"), ("lose-node",)


def drawn(chance: random.Random, count: int, store: bool, cluster: bool) -> list[str]:
    """As many faults of those that this world can do."""
    names = [n for n in FAULTS if (store or n not in ON_A_STORE) and (cluster or n not in ON_A_CLUSTER)]
    return chance.choices(names, [FAULTS[name][0] for name in names], k=count)
