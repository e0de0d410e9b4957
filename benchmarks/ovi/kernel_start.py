"""What a worker's kernel prior costs at its start: fitted by itself, fitted and kept, found where another kept it.

OMP_NUM_THREADS=1 python -m benchmarks.ovi.kernel_start [--rows 20000] [--width 128]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from index import captions, fits, joint, neighbours
from index.gaussian import moments
from index.reference import Captioned, Origin, Reference, Shard, build
from stages.ovi import kernel
from stages.ovi.settings import Kernel

RESULTS = Path(__file__).with_name("results")
HIDDEN = 64
"""Numbers that a picture and its caption follow from."""


def reference(folder: Path, rows: int, width: int) -> Reference:
    """Of random captioned embeddings."""
    rng = np.random.default_rng(0)
    hidden_NH = rng.standard_normal((rows, HIDDEN))
    t_NT, z_NE = (
        (hidden_NH @ rng.standard_normal((HIDDEN, width)) + rng.standard_normal((rows, width)) + 1).astype(np.float32)
        for _ in range(2)
    )
    sums = joint.Accumulator(width, width)
    sums.add(t_NT, z_NE)
    origin = Origin("random", [rows], width, "float32", None, None, "ledoit-wolf")
    shard = Shard(0, list(map(str, range(rows))), np.arange(rows), z_NE)
    told = Captioned(lambda: [captions.Texts(np.arange(rows), t_NT)], sums.pairs())
    build(folder, origin, neighbours.Plan(), lambda: [shard], lambda: [moments(z_NE)], captioned=told)
    return Reference.open(folder)


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    method = Kernel()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        made = reference(Path(folder) / "reference", options.rows, options.width)
        texts = made.captions
        assert texts is not None
        result = {
            "captioned pictures": options.rows,
            "width of each": options.width,
            "centres": method.centres,
            "processor seconds, fitted by a worker": seconds(lambda: kernel.fit(made, texts, method)),
            "fitted and kept": seconds(lambda: kernel.kept(made, texts, method)),
            "found": seconds(lambda: kernel.kept(made, texts, method)),
            "MB kept": sum(file.stat().st_size for file in Path(folder).rglob(fits.FILE)) / 1e6,
        }
        tempfile.tempdir = None
    (RESULTS / "kernel_start.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
