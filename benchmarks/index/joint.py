"""Joint statistics of texts and images: processor seconds and memory, one thread.

OMP_NUM_THREADS=1 python -m benchmarks.index.joint [--rows 20000] [--width 1280]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from index import joint

RESULTS = Path(__file__).with_name("results")


BLOCK = 8192
"""Rows of a shard, made afresh."""


def _peak() -> float:
    """MB of this process, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=1280)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    sums = joint.Accumulator(options.width, options.width)
    adding, held, memory = 0.0, 0.0, []
    for _ in range(options.rows // BLOCK):
        t_NE = rng.standard_normal((BLOCK, options.width), dtype=np.float32)
        z_NE = t_NE + rng.standard_normal((BLOCK, options.width), dtype=np.float32)
        held = held or _peak()
        begun = time.process_time()
        sums.add(t_NE, z_NE)
        adding += time.process_time() - begun
        memory.append(_peak() - held)
    begun = time.process_time()
    joint.Fit.of(sums.pairs()).under(1e-3)
    result = {
        "rows": BLOCK * len(memory),
        "width of each": options.width,
        "processor seconds a million rows": 1e6 * adding / (BLOCK * len(memory)),
        "seconds of the fit": time.process_time() - begun,
        "MB beyond a block, at most: after the first, after the last, with the fit": [
            memory[0],
            memory[-1],
            _peak() - held,
        ],
    }
    (RESULTS / "joint.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
