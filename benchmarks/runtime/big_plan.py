"""What a plan of very many rows and shards costs its driver, and a start that finds half of them done.

    python -m benchmarks.runtime.big_plan [--rows 100000000] [--shards 1000000] [--folder /tmp/big] [--store]

Parquet files of one small column are planned and half of the shards are said to be committed: empty attempts, and their
records in the log as the driver folds them. Each step then runs in a process of its own, on this disk, and tells its
seconds, processor seconds and peak memory:

plan     the input is scanned and cut, the plan written
input    the files are compared with the plan, as every start does
resume   the survey: which shards are done; until work begins
hand     every shard that is left, as the dispatcher takes them
fold     as many records, heard of one after the other, folded
status   what `latentmill status` asks

With ``--store`` the output lies in the simulated store of `tests.simulation`, which answers each request in 30 ms of
its own time and lists a thousand names at a time: told are its seconds, requests, processor seconds, and the memory
beyond what the store itself holds, which is in the same process. Bytes take no time there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from pipeline import machine
from pipeline.contract import StageSpec
from pipeline.input.source import Source
from pipeline.output.commit import ATTEMPTS, RECORDS, Record, attempt_name
from pipeline.output.dataset import Output
from pipeline.output.fold import FOLD_RECORDS, Folding
from pipeline.output.log import LOG, encode, log_name
from pipeline.output.planfile import own_folder, read_shards
from pipeline.run.committed import committed
from pipeline.run.draft import RunSpec, draft
from pipeline.run.plan import check_input, write_plan
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Task
from pipeline.storage import Folder
from tests.simulation.store import CALM, Bucket, Weather
from tests.simulation.world import Host, Simulated, World

RESULTS = Path(__file__).parent / "results"
FILE_ROWS = 1_000_000
ANSWER_S = 0.03
STEPS = ("plan", "half", "input", "resume", "hand", "status", "fold")


def spec(folder: Path, rows: int, shards: int) -> RunSpec:
    stage = StageSpec("benchmarks.runtime.rows:Lengths")
    source = Source((str(folder / "in"),), columns={"text": "text"})
    return RunSpec(stage, source, str(folder / "out"), shard_rows=-(-rows // shards))


def stored(asked: RunSpec, bucket: Bucket) -> RunSpec:
    """The same run, into a simulated store."""
    return replace(asked, output="sim://out", storage_options={"bucket": bucket})


def write_input(folder: Path, rows: int) -> None:
    """A file, under as many names as it takes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "in").mkdir()
    table = pa.table({"text": pa.DictionaryArray.from_arrays(np.zeros(FILE_ROWS, np.int8), ["a text"]).cast("string")})
    for number in range(-(-rows // FILE_ROWS)):
        here, left = folder / f"in/{number:04d}.parquet", rows - number * FILE_ROWS
        if number and left >= FILE_ROWS:
            os.link(folder / "in/0000.parquet", here)
        else:
            pq.write_table(table.slice(0, min(FILE_ROWS, left)), here)


def record(output: Output, shard: int, rows: int) -> Record:
    attempt = attempt_name(output.run, 1, shard, ".0123456789ab.parquet")
    name = output.part(shard).removeprefix("data/") if output.named_at_commit else attempt
    measures = {"length": {"n": float(rows), "sum": 6.0 * rows, "min": 6.0, "max": 6.0}}
    return Record(shard, "0123456789ab", name, 0, "0" * 32, rows, 0, 1.7e9, 1.0, "host:1", measures, run=output.run,
                  epoch=1, made_with="latentmill 0.1.0, torch 2.13.0, diffusers 0.42.0")  # fmt: skip


def half_done(output: Output, shards: int, rows: int) -> None:
    """Every second shard; the last thousand records are not folded yet."""
    folder = output.folder
    for name in (ATTEMPTS, RECORDS, LOG) if folder.local else ():
        os.makedirs(folder.path(name), exist_ok=True)
    done = [record(output, shard, rows) for shard in range(0, shards, 2)]
    for one in done:
        path = folder.path(f"data/{one.file}" if output.named_at_commit else f"{ATTEMPTS}/{one.file}")
        if folder.local:
            os.close(os.open(path, os.O_CREAT))
        else:
            folder.fs.bucket.put(path, b"")
    rest = len(done) % FOLD_RECORDS or FOLD_RECORDS
    folded, loose = done[:-rest], done[-rest:]
    for number, start in enumerate(range(0, len(folded), FOLD_RECORDS)):
        some = folded[start : start + FOLD_RECORDS]
        folder.create(log_name(output.run, 1, number), encode((r.shard, r.generation, r) for r in some))
    for one in loose:
        folder.create(one.name, one.to_json().encode())


def steps(asked: RunSpec, rows: int, shards: int) -> dict[str, Callable[[], object]]:
    each = -(-rows // shards)

    def opened() -> Output:
        return Output.open(asked.output, asked.storage_options)

    def plan() -> object:
        own = own_folder(Folder.at(asked.output, asked.storage_options))
        return write_plan(asked, draft(asked), own, 0.0, named_at_commit=not own.local)["shards"]

    def resume() -> int:
        found = committed(opened(), Reporter(None, None, None))
        done = found.done
        assert (found.tally.rows, len(done), not found.again) == (each * len(done), -(-shards // 2), True)
        return next(shard.index for shard in read_shards(opened().own) if shard.index not in done)

    def hand() -> int:
        done = set(range(0, shards, 2))
        return sum(Task.of(shard).stop for shard in read_shards(opened().own) if shard.index not in done)

    def fold() -> int:
        output = opened()
        folding = Folding(replace(output, lock=None))
        for shard in range(1, shards, 2):
            folding.add(record(output, shard, each))
        return len(output.folder.listing(LOG))

    return {
        "plan": plan,
        "half": lambda: half_done(opened(), shards, each),
        "input": lambda: check_input(draft(asked).source, opened().own, None),
        "resume": resume,
        "hand": hand,
        "status": lambda: opened().status().progress.rows_ok,
        "fold": fold,
    }


def measured(step: Callable[[], object]) -> dict[str, object]:
    begun, spent = time.perf_counter(), time.process_time()
    said = step()
    return {
        "seconds": round(time.perf_counter() - begun, 1), "cpu_seconds": round(time.process_time() - spent, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3), "found": said,
    }  # fmt: skip


def all_steps(folder: Path, rows: int, shards: int) -> Iterator[tuple[str, dict[str, object]]]:
    write_input(folder, rows)
    for name in STEPS:
        asked = [str(folder), "--rows", str(rows), "--shards", str(shards), "--step", name]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.runtime.big_plan", "--folder", *asked],
            stdout=subprocess.PIPE,
            check=True,
        )
        yield name, json.loads(done.stdout.splitlines()[-1])


def _memory(line: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at most since it was last forgotten."""
    told = Path("/proc/self/status").read_text()
    return int(told.partition(f"{line}:")[2].split()[0]) / 1e3


def on_a_store(folder: Path, rows: int, shards: int) -> Iterator[tuple[str, dict[str, object]]]:
    """All steps in this process, in the world's time."""
    write_input(folder, rows)
    world = World(0)
    bucket, found = Bucket(world), dict[str, dict[str, object]]()

    def work() -> None:
        for name, step in steps(stored(spec(folder, rows, shards), bucket), rows, shards).items():
            bucket.weather = CALM if name == "half" else Weather(delay_s=ANSWER_S)
            begun, spent, asked, held = world.now, time.process_time(), bucket.requests, _memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            said = step()
            found[name] = {
                "store_seconds": round(world.now - begun, 1), "requests": bucket.requests - asked,
                "cpu_seconds": round(time.process_time() - spent, 1), "more_mb": round(_memory("VmHWM") - held),
                "found": said,
            }  # fmt: skip

    with patch.object(machine, "here", Simulated()):
        thread = world.process(Host("node", "boot", "pid"), "driver").start(work)
        world.run(1e9)
    if thread.error is not None:
        raise thread.error
    yield from found.items()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime.big_plan")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--store", action="store_true", help="into a simulated store")
    parser.add_argument("--step", choices=STEPS, help="this alone, in a folder that holds what comes before it")
    chosen = parser.parse_args()
    of = (chosen.folder, chosen.rows, chosen.shards)
    if chosen.step:
        print(json.dumps(measured(steps(spec(*of), chosen.rows, chosen.shards)[chosen.step])))
        return
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="latentmill-big-"))
    folder.mkdir(exist_ok=True)
    found: dict[str, object] = {"rows": chosen.rows, "shards": chosen.shards, "cores": os.cpu_count()}
    run = on_a_store if chosen.store else all_steps
    for name, figures in run(folder, chosen.rows, chosen.shards):
        found[name] = figures
        print(name, figures, flush=True)
    path = RESULTS / ("big_plan_store.json" if chosen.store else "big_plan.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, str(chosen.shards): found}, indent=1) + "\n")
    if chosen.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
