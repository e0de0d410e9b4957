"""How long a driver waits for a store that answers each request in 30 ms, at 10^5 and 10^6 shards.

    python -m benchmarks.runtime.store_time [--shards 1000 4000]

The runtime's own code asks the simulated store of `tests.simulation`, in its virtual time: each request takes 30 ms,
requests of several threads overlap, a thousand names are listed at a time. What a further shard costs is taken between
two numbers of shards; 10^5 and 10^6 are computed from it. Bytes are not counted (files are small), nor is processor
time: a client that needs a millisecond a request can send no more than a thousand a second.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import machine
from pipeline.output import dataset
from pipeline.output.commit import Record
from pipeline.output.dataset import Output, Tally
from pipeline.output.fold import FOLD_RECORDS
from pipeline.output.leftovers import Leftovers
from pipeline.output.log import encode, log_name
from pipeline.output.planfile import own_folder, read_shards
from pipeline.output.publish import publish
from pipeline.output.verify import verify
from pipeline.run import plan
from pipeline.run.committed import committed
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Task
from pipeline.storage import Folder, checksum
from tests.simulation import schedule
from tests.simulation.pool import _lines, made
from tests.simulation.schedule import OUT, _draft, _spec, simulated
from tests.simulation.store import Bucket, Weather
from tests.simulation.world import Host, Simulated, World

RESULTS = Path(__file__).parent / "results"
ANSWER_S = 0.03


def waited(shards: int) -> dict[str, tuple[float, int]]:
    """Step -> (virtual seconds, requests) for a run of so many shards."""
    world = World(0)
    bucket = Bucket(world)
    options, found = {"bucket": bucket}, dict[str, tuple[float, int]]()

    def step(name: str, action: Callable[[], Any]) -> Any:
        begun, asked = world.now, bucket.requests
        result = action()
        found[name] = (world.now - begun, bucket.requests - asked)
        return result

    def work() -> None:
        spec = _spec(1.0, shards, 1, bucket)
        plan.write_plan(spec, _draft(spec), own_folder(Folder.at(OUT, options)), 0.0, named_at_commit=True)
        output = Output.open(OUT, options)
        for shard in read_shards(output.own):
            content, _ = made(output.plan["schema"], 1.0, _lines(Task.of(shard)))
            file = output.part(shard.index).removeprefix("data/")
            bucket.put(f"out/data/{file}", content)
            record = Record(shard.index, "made", file, len(content), _digest(content), shard.rows, 0, 0.0, 0.0, "here",
                            run=output.run, epoch=1)  # fmt: skip
            bucket.put(f"out/{record.name}", json.dumps(asdict(record)).encode())
        bucket.weather = Weather(delay_s=ANSWER_S)
        step("resume of records that nobody folded", lambda: committed(output, Reporter(None, None, 1)))
        output = Output.open(OUT, options)
        step("resume, until work begins", lambda: committed(output, Reporter(None, None, 1)))
        tally = step("survey after the work", lambda: committed(output, Reporter(None, None, 1))).tally
        assert isinstance(tally, Tally)
        assert tally.shards == shards
        step("publish", lambda: publish(output, tally, "", ""))
        step("status", lambda: Output.open(OUT, options).status())
        assert step("verify", lambda: verify(OUT, options)).ok
        step("sweep", lambda: Leftovers(replace(output), output.listings()).remove())

    thread = world.process(Host("node", "boot", "pid"), "driver").start(work)
    world.run(1e9)
    if thread.error is not None:
        raise thread.error
    return found


def asked(shards: int) -> dict[str, float]:
    """What ``status`` of so many committed shards takes, of which those beyond the last thousand are not folded."""
    world = World(0)
    bucket, spec = Bucket(world), _spec(1.0, 1, 1, None)
    options, found = {"bucket": bucket}, dict[str, float]()

    def work() -> None:
        plan.write_plan(spec, _draft(spec), own_folder(Folder.at(OUT, options)), 0.0, named_at_commit=True)
        output = Output.open(OUT, options)
        for start in range(0, shards, FOLD_RECORDS):
            records = [_record(output.run, shard) for shard in range(start, min(start + FOLD_RECORDS, shards))]
            if len(records) == FOLD_RECORDS:
                rows = [(record.shard, 0, record) for record in records]
                bucket.put(f"out/{log_name(output.run, 1, start // FOLD_RECORDS)}", encode(rows))
            else:
                for record in records:
                    bucket.put(f"out/{record.name}", record.to_json().encode())
        bucket.weather = Weather(delay_s=ANSWER_S)
        begun, used = world.now, time.process_time()
        status = replace(output, plan={**output.plan, "shards": shards, "rows": shards}).status()
        assert status.progress.shards_done == status.progress.rows_ok == shards
        found.update(seconds=world.now - begun, processor_seconds=time.process_time() - used, requests=bucket.requests)

    thread = world.process(Host("node", "boot", "pid"), "reader").start(work)
    world.run(1e9)
    if thread.error is not None:
        raise thread.error
    return found


def _record(run: str, shard: int) -> Record:
    """As a worker of a job with one measure writes it."""
    token = f"{shard * 2654435761 % (1 << 48):012x}"
    loss = {"n": 1, "sum": shard / 7, "min": shard / 7, "max": shard / 7}
    return Record(shard, token, f"{run}-e1-{shard:06d}.{token}.parquet", 10**7 + shard, token * 2 + token[:8], 1, 0,
                  1.8e9 + shard / 3, 60 + shard % 7 / 3, "node:1234", {"loss": loss}, run=run, epoch=1,
                  made_with="latentmill 0.1, torch 2.13.0, diffusers 0.42")  # fmt: skip


def _digest(content: bytes) -> str:
    return checksum(io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs=2, default=[1000, 4000])
    few, many = parser.parse_args().shards
    schedule.LINES = many
    readers = {name: getattr(dataset, name) for name in ("READERS", "RECORD_READERS")}
    with simulated(), patch.multiple(dataset, **readers):
        less, more = waited(few), waited(many)
    found = {}
    for name, (seconds, requests) in more.items():
        a_shard = (seconds - less[name][0]) / (many - few)
        at = {f"{n:.0e}": less[name][0] + (n - few) * a_shard for n in (1e5, 1e6)}
        found[name] = {"requests_a_shard": (requests - less[name][1]) / (many - few), "ms_a_shard": 1e3 * a_shard,
                       "seconds": at}  # fmt: skip
        told = ", ".join(f"{n} shards {value:,.1f} s" for n, value in at.items())
        print(f"{name:28} {found[name]['requests_a_shard']:.3f} requests, {1e3 * a_shard:.3f} ms a shard: {told}")
    with patch.object(machine, "here", Simulated()):  # `simulated` would keep all that is read
        for shards in (100_999, 1_000_999):
            found[f"status of {shards}"] = asked(shards)
            told = ", ".join(f"{value:.1f} {name}" for name, value in found[f"status of {shards}"].items())
            print(f"status of {shards} shards: {told}", flush=True)
    (RESULTS / "store_time.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
