"""Nothing is lost, doubled or changed in any schedule; and schedules find it if something were."""

from __future__ import annotations

import multiprocessing
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from pipeline.storage import Folder
from tests.simulation.crowd import crowd
from tests.simulation.faults import FAULTS
from tests.simulation.pool import SimPool
from tests.simulation.schedule import Schedule, outcome, simulated
from tests.simulation.store import Bucket
from tests.simulation.world import World

SCHEDULES = 10_000
FOUND_S = 60.0
"""Of processor time, until a fault that is put back is found."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_happens_every_row_is_there_once(capsys: pytest.CaptureFixture[str]) -> None:
    """More of them: ``python -m tests.simulation --count 1000000``."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        outcomes = list(pool.imap_unordered(outcome, range(SCHEDULES), chunksize=20))
    wrong = [f"python -m tests.simulation --seed {seed}: {problem}" for seed, problem, _ in outcomes if problem]
    assert not wrong, "\n".join(sorted(wrong))
    assert sum(claims for _, _, claims in outcomes) > 2 * SCHEDULES


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_found(fault: str) -> None:
    begun = time.process_time()
    with FAULTS[fault]():
        for seed in range(100_000):
            if outcome(seed)[1] is not None:
                return
            assert time.process_time() - begun < FOUND_S, f"not in {seed + 1} schedules"


def test_a_thousand_workers_are_kept_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds a shard, a tenth of a second a turn of the driver: of their time 95 % is work at least."""
    used = crowd(1000, 5000, 10.0)
    assert used.shards == 5000
    assert 44_000 < used.busy_s < used.had_s < 1000 * used.seconds
    assert used.share > 0.95
    monkeypatch.setattr(
        SimPool, "idle", property(lambda pool: int(any(m.ready and not m.tasks for m in pool._members)))
    )
    assert crowd(1000, 1500, 10.0).share < 0.2, "with one shard a turn there is work for a hundred"


def test_a_seed_is_a_whole_history() -> None:
    def history(seed: int) -> tuple[float, int, int, list[str]]:
        with simulated():
            schedule = Schedule(seed)
            schedule.run()
        bucket = schedule.bucket
        return schedule.world.now, bucket.requests, schedule.claims, sorted(bucket.objects)

    histories = [history(seed) for seed in range(12)]
    assert histories == [history(seed) for seed in range(12)]
    assert len({requests for _, requests, _, _ in histories}) > 9


def test_the_store_is_a_folder_as_a_disk_is(tmp_path: Path) -> None:
    """The same random requests have the same answers."""
    random = Random(0)
    bucket = Bucket(World(0))
    folders = (Folder.at(str(tmp_path)), Folder.at("sim://out", {"bucket": bucket}))
    names = [f"{place}/{name}" for place in ("a", "b", "a/c") for name in ("x", "y", "z")]
    for turn in range(600):
        name, other, data = random.choice(names), random.choice(names), b"%d" % random.randrange(5)
        do = random.choice(("write", "create", "move", "remove", "size", "read", "listing", "exists", "begin", "open"))
        answers = []
        for folder in folders:
            with suppress(FileNotFoundError):
                if do in ("write", "create"):
                    answers.append(getattr(folder, do)(name, data))
                elif do == "move":
                    answers.append(folder.move(name, other) if name != other else None)
                elif do == "begin":
                    upload = folder.begin(name)
                    upload.write(data)
                    upload.close()
                    answers.append(upload.checksum)
                elif do == "open":
                    with folder.open(name) as file:
                        answers.append(file.read())
                elif do == "listing":
                    answers.append(folder.listing(name.rpartition("/")[0]))
                else:
                    answers.append(getattr(folder, do)(name))
        assert len(answers) != 1, f"turn {turn}: {do} {name}: one raises"
        assert answers[:1] == answers[1:], f"turn {turn}: {do} {name}"
    assert all(folder.is_exclusive("probe") for folder in folders)
