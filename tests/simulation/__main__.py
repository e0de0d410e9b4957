"""``python -m tests.simulation --seed 17``: one schedule again. ``--count 1000000``: so many, from a seed on."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

from tests.simulation.schedule import Schedule, outcome, simulated


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--count", type=int, default=1, help="how many schedules")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    begun, wrong, claims = time.perf_counter(), 0, 0
    if asked.count == 1:
        with simulated():
            Schedule(asked.seed).run()
        print(f"seed {asked.seed}: as it has to be")
        return 0
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        seeds = range(asked.seed, asked.seed + asked.count)
        for seed, problem, claimed in pool.imap_unordered(outcome, seeds, chunksize=16):
            claims += claimed
            if problem is not None:
                wrong += 1
                print(f"seed {seed}: {problem}", flush=True)
    seconds = time.perf_counter() - begun
    print(f"{asked.count} schedules in {seconds:.1f} s: {claims} runs said complete, {wrong} schedules are wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
