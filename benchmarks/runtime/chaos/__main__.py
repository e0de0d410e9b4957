"""Jobs of every kind on Ray nodes and stores of this machine, under faults; afterwards nothing may be lost or doubled.

    python -m benchmarks.runtime.chaos --faults 200 --seed 0 [--store disk s3 gcs] [--kind ...] [--minutes 60]

Workers and drivers are killed and stopped, nodes lost, second drivers started, committed files cut and deleted, the
store answers with errors, late or not at all. Each output then goes on to its end, and is compared with that of an
undisturbed run: `verify`, every id once, in order, every value and product. The seed draws which fault comes when; what
that meets is as the machine runs, so a finding does not replay as the simulation's do (`tests.simulation`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.runtime.chaos import jobs
from benchmarks.runtime.chaos.faults import drawn
from benchmarks.runtime.chaos.life import Expected, Life
from benchmarks.runtime.chaos.world import STORES, World, whole
from pipeline.output.dataset import Output

RECORD = Path(__file__).parents[1] / "results/chaos.json"
A_LIFE = 6
"""Faults that one output suffers."""
CHAIN = ("reference", "prompts")


def undisturbed(world: World, folder: Path, kind: str) -> Expected:
    """Run a job in calm, on this machine's disk."""
    for needed in jobs.NEEDS.get(kind, ()):
        if not (folder / "expected" / needed).exists():
            undisturbed(world, folder, needed)
    target, log = folder / "expected" / kind, folder / f"{kind}.log"
    started = world.start(jobs.write(kind, folder, 1, {}), str(target), log)
    if started.wait():
        raise SystemExit(f"{kind} does not run undisturbed:\n{log.read_text()[-2000:]}")
    steps = CHAIN if kind == "chain" else ("",)
    return Expected.of({step: Output.open(str(target / step) if step else str(target)) for step in steps})


def endure(world: World, folder: Path, kind: str, expected: Expected, faults: int, seed: str) -> Life:
    """One output of a kind, through as many faults, and what is wrong with it afterwards."""
    chance, name = random.Random(seed), seed.replace("/", "-")
    job = jobs.write(kind, folder, 2, world.options)
    life = Life(
        world, kind, job, f"{world.place}/{name}", folder / f"{name}.log", chance,
        CHAIN if kind == "chain" else ("",),
    )  # fmt: skip
    names = drawn(chance, faults, world.proxy is not None, world.cluster is not None)
    life.suffer(names, expected.shards)
    life.recover()
    life.judge(expected)
    return life


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime.chaos")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="begin no output after so many")
    parser.add_argument("--store", nargs="+", choices=STORES, default=["disk"])
    parser.add_argument("--kind", nargs="+", choices=list(jobs.KINDS), default=list(jobs.KINDS))
    parser.add_argument("--further", action="store_true", help="add to what earlier calls have recorded")
    parser.add_argument("--keep", type=Path, help="folder for the outputs and what the drivers said")
    chosen = parser.parse_args(arguments)
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks by gRPC, which no emulator knows
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    begun, lives = time.monotonic(), list[dict[str, Any]]()
    before = json.loads(RECORD.read_text()) if chosen.further else None
    scratch = chosen.keep or Path(tempfile.mkdtemp(prefix="latentmill-chaos-"))
    for kind_of_store in chosen.store:
        folder = scratch / kind_of_store
        folder.mkdir(parents=True, exist_ok=True)
        with whole(kind_of_store, folder) as world:
            expected: dict[str, Expected] = {}
            target, number = chosen.faults / len(chosen.store), 0
            while sum(sum(one["faults"].values()) for one in lives if one["store"] == kind_of_store) < target:
                if chosen.minutes is not None and time.monotonic() - begun > 60 * chosen.minutes:
                    break
                kind = chosen.kind[number % len(chosen.kind)]
                if kind not in expected:
                    expected[kind] = undisturbed(world, folder, kind)
                seed = f"{chosen.seed}/{kind}/{number}"
                life = endure(world, folder, kind, expected[kind], A_LIFE, seed)
                lives.append({"store": kind_of_store, "seed": seed, **life.result()})
                _say(lives[-1])
                _write(chosen, before, lives, time.monotonic() - begun)
                number += 1
    wrong = [f"{one['seed']}: {problem}" for one in lives for problem in one["wrong"]]
    print(f"{sum(sum(one['faults'].values()) for one in lives)} faults, {len(lives)} jobs, {len(wrong)} things wrong")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


def _say(one: dict[str, Any]) -> None:
    for said in one["told"]:
        print(f"{one['store']:5} {one['kind']:15} {said}")
    verdict = "; ".join(one["wrong"]) or (
        "whole, rounded in " + ", ".join(one["rounded"]) if one["rounded"] else "whole"
    )
    print(f"{one['store']:5} {one['kind']:15} == {verdict}", flush=True)


def _write(
    chosen: argparse.Namespace, before: dict[str, Any] | None, lives: list[dict[str, Any]], seconds: float
) -> None:
    commands = [f"python -m benchmarks.runtime.chaos --seed {chosen.seed} --store {' '.join(chosen.store)}"]
    if before is not None:
        commands = [*dict.fromkeys((*before["commands"], *commands))]
        lives, seconds = before["lives"] + lives, before["seconds"] + seconds
    faults: dict[str, Counter[str]] = {}
    for one in lives:
        faults.setdefault(one["kind"], Counter()).update(one["faults"])
    summary = {
        "commands": commands, "seconds": round(seconds),
        "jobs": len(lives), "faults": sum(total.total() for total in faults.values()),
        "by_kind": {kind: dict(sorted(total.items())) for kind, total in faults.items()},
        "by_store": dict(Counter(one["store"] for one in lives)),
        "jobs_rounded": sum(bool(one["rounded"]) for one in lives),
        "wrong": [f"{one['store']} {one['seed']}: {problem}" for one in lives for problem in one["wrong"]],
        "lives": lives,
    }  # fmt: skip
    RECORD.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
