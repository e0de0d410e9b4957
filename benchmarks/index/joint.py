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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=1280)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = options.rows, options.width
    t_NE = rng.standard_normal(shape, dtype=np.float32)
    z_NE = t_NE + rng.standard_normal(shape, dtype=np.float32)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sums = joint.Accumulator(options.width, options.width)
    begun = time.process_time()
    sums.add(t_NE, z_NE)
    added = time.process_time()
    pairs = sums.pairs()
    joint.Fit.of(pairs).under(1e-3)
    result = {
        "rows": options.rows,
        "width of each": options.width,
        "processor seconds a million rows": 1e6 * (added - begun) / options.rows,
        "seconds of the fit": time.process_time() - added,
        "MB beyond the rows themselves, at most": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1e3,
    }
    (RESULTS / "joint.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
