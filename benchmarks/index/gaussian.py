"""Gaussian statistics: exactness against numpy in float64, and speed beside a plain matrix product.

python -m benchmarks.index.gaussian [--rows 1000000] [--width 1280]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from index import gaussian

RESULTS = Path(__file__).with_name("results")
BLOCK = 50_000


def block_of(seed: int, rows: int, mixing_EE: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x_NE = rng.standard_normal((rows, len(mixing_EE)), dtype=np.float32) @ mixing_EE
    return x_NE + np.linspace(-3, 3, len(mixing_EE), dtype=np.float32)


def mixing(width: int) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)


def exactness(rows: int = 200_000, width: int = 512) -> dict[str, Any]:
    """Relative errors against numpy on the float64 copy, whole and in shards of several numbers and orders."""
    x_NE = np.concatenate([block_of(s, BLOCK, mixing(width)) for s in range(rows // BLOCK)])
    exact_NE = x_NE.astype(np.float64)
    mean_E, covariance_EE = exact_NE.mean(0), np.cov(exact_NE.T)
    del exact_NE

    def errors(found: gaussian.Moments) -> tuple[float, float]:
        mean = np.linalg.norm(found.mean_E - mean_E) / np.linalg.norm(mean_E)
        covariance = np.linalg.norm(found.covariance() - covariance_EE) / np.linalg.norm(covariance_EE)
        return float(mean), float(covariance)

    whole = gaussian.moments(x_NE)
    result: dict[str, Any] = {"rows": rows, "width": width, "whole": errors(whole), "shards": {}}
    for count in (8, 100):
        parts = [gaussian.moments(part) for part in np.array_split(x_NE, count)]
        orders = {"in order": parts, "reversed": parts[::-1]}
        orders["shuffled"] = [parts[i] for i in np.random.default_rng(0).permutation(count)]
        for name, order in orders.items():
            merged = gaussian.merge(order)
            change = np.linalg.norm(merged.scatter_EE - whole.scatter_EE) / np.linalg.norm(whole.scatter_EE)
            result["shards"][f"{count}, {name}"] = {"errors": errors(merged), "against whole": float(change)}
    return result


def speed(rows: int, width: int) -> dict[str, Any]:
    """Seconds for the statistics and for ``X' X`` by a general float64 product, in turns, block by block.

    Each block is drawn anew (which is not timed) and given to both, one right after the other, so that whatever else
    the machine does falls on both alike. The product gets blocks that are float64 already, and neither centres nor
    counts anything; it is given another buffer for X', so that numpy cannot see that the result is symmetric.
    GFLOP/s counts what a general product needs, 2 N E^2, for both: numpy forms the symmetric product by half of that.
    """
    mixing_EE = mixing(width)
    accumulator = gaussian.Accumulator(width)
    total_EE = np.zeros((width, width))
    ours, product, load = [], [], []
    for number in range(rows // BLOCK):
        x_NE = block_of(number, BLOCK, mixing_EE)
        begun = time.perf_counter()
        accumulator.add(x_NE)
        ours.append(time.perf_counter() - begun)
        y_NE = x_NE.astype(np.float64)
        z_EN = np.ascontiguousarray(y_NE.T)
        begun = time.perf_counter()
        for start in range(0, BLOCK, gaussian.BLOCK_ROWS):
            stop = start + gaussian.BLOCK_ROWS
            total_EE += z_EN[:, start:stop] @ y_NE[start:stop]
        product.append(time.perf_counter() - begun)
        load.append(os.getloadavg()[0])
    begun = time.perf_counter()
    found = accumulator.moments()
    last = time.perf_counter() - begun
    assert found.rows == rows // BLOCK * BLOCK
    flop = 2 * found.rows * width**2
    seconds = sum(ours) + last
    shares = np.array(product) / np.array(ours)
    return {
        "rows": found.rows,
        "width": width,
        "seconds": seconds,
        "of them, moving the sums to the mean": last,
        "seconds of the product": sum(product),
        "GFLOP/s": flop / seconds / 1e9,
        "GFLOP/s of the product": flop / sum(product) / 1e9,
        "share": sum(product) / seconds,
        "share a block, lowest, median, highest": [float(q) for q in np.quantile(shares, (0, 0.5, 1))],
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "load, lowest to highest": [min(load), max(load)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1280)
    arguments = parser.parse_args()
    result = {"exactness": exactness(), "speed": speed(arguments.rows, arguments.width)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gaussian.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
