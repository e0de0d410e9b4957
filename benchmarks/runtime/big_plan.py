"""What a plan of very many rows and shards costs its driver, and a start that finds half of them done.

    python -m benchmarks.runtime.big_plan [--rows 100000000] [--shards 1000000] [--folder /tmp/big]

Parquet files of one small column are planned and half of the shards are said to be committed: empty attempts, and their
records in the log as the driver folds them. Each step then runs in a process of its own, on this disk, and tells its
seconds, processor seconds and peak memory:

plan     the input is scanned and cut, the plan written
input    the files are compared with the plan, as every start does
resume   the survey: which shards are done; until work begins
hand     every shard that is left, as the dispatcher takes them
fold     as many records, heard of one after the other, folded
status   what `latentmill status` asks
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

import numpy as np

from pipeline.contract import StageSpec
from pipeline.input.source import Source
from pipeline.output.commit import ATTEMPTS, RECORDS, Record, attempt_name
from pipeline.output.dataset import Output
from pipeline.output.fold import FOLD_RECORDS, Folding
from pipeline.output.log import LOG, encode, log_name
from pipeline.output.planfile import own_folder, read_shards
from pipeline.run.draft import RunSpec, draft
from pipeline.run.driver import _survey
from pipeline.run.plan import check_input, write_plan
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Task
from pipeline.storage import Folder

RESULTS = Path(__file__).parent / "results"
FILE_ROWS = 1_000_000
STEPS = ("plan", "half", "input", "resume", "hand", "status", "fold")


def spec(folder: Path, rows: int, shards: int) -> RunSpec:
    stage = StageSpec("benchmarks.runtime.rows:Lengths")
    source = Source((str(folder / "in"),), columns={"text": "text"})
    return RunSpec(stage, source, str(folder / "out"), shard_rows=-(-rows // shards))


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
    name = attempt_name(output.run, 1, shard, ".0123456789ab.parquet")
    measures = {"length": {"n": float(rows), "sum": 6.0 * rows, "min": 6.0, "max": 6.0}}
    return Record(shard, "0123456789ab", name, 0, "0" * 32, rows, 0, 1.7e9, 1.0, "host:1", measures, run=output.run,
                  epoch=1, made_with="latentmill 0.1.0, torch 2.13.0, diffusers 0.42.0")  # fmt: skip


def half_done(output: Output, shards: int, rows: int) -> None:
    """Every second shard; the last thousand records are not folded yet."""
    folder = output.folder
    for name in (ATTEMPTS, RECORDS, LOG):
        os.makedirs(folder.path(name), exist_ok=True)
    done = [record(output, shard, rows) for shard in range(0, shards, 2)]
    for one in done:
        os.close(os.open(folder.path(f"{ATTEMPTS}/{one.file}"), os.O_CREAT))
    rest = len(done) % FOLD_RECORDS or FOLD_RECORDS
    folded, loose = done[:-rest], done[-rest:]
    for number, start in enumerate(range(0, len(folded), FOLD_RECORDS)):
        some = folded[start : start + FOLD_RECORDS]
        folder.create(log_name(output.run, 1, number), encode((r.shard, r.generation, r) for r in some))
    for one in loose:
        folder.create(one.name, one.to_json().encode())


def steps(folder: Path, rows: int, shards: int) -> dict[str, Callable[[], object]]:
    asked, each = spec(folder, rows, shards), -(-rows // shards)

    def opened() -> Output:
        return Output.open(asked.output)

    def resume() -> int:
        tally, done, again = _survey(opened(), Reporter(None, None, None))
        assert (tally.rows, len(done), not again) == (each * len(done), -(-shards // 2), True)
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
        "plan": lambda: write_plan(asked, draft(asked), own_folder(Folder.at(asked.output)), 0.0)["shards"],
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime.big_plan")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step", choices=STEPS, help="this alone, in a folder that holds what comes before it")
    chosen = parser.parse_args()
    if chosen.step:
        print(json.dumps(measured(steps(chosen.folder, chosen.rows, chosen.shards)[chosen.step])))
        return
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="latentmill-big-"))
    folder.mkdir(exist_ok=True)
    found: dict[str, object] = {"rows": chosen.rows, "shards": chosen.shards, "cores": os.cpu_count()}
    for name, figures in all_steps(folder, chosen.rows, chosen.shards):
        found[name] = figures
        print(name, figures, flush=True)
    path = RESULTS / "big_plan.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, str(chosen.shards): found}, indent=1) + "\n")
    if chosen.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
