"""How much of their time very many workers work, in virtual time, under the runtime's own dispatcher.

    python -m benchmarks.runtime.many_workers

The workers are simulated (`tests.simulation.crowd`): a shard takes half to one and a half times as long as said. The
driver is charged the processor time that the dispatcher takes here, and 0.12 s a turn at a thousand workers that stand
for Ray's calls (assumed, not measured). Not counted is the end of a run, when there are fewer shards left than workers.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from tests.simulation.crowd import crowd

RESULT = Path(__file__).parent / "results/many_workers.json"
RAY_S = 0.12
"""A turn at a thousand workers; in proportion at others."""
CASES = ((100, 10.0), (1000, 60.0), (1000, 10.0), (1000, 3.0))
"""Workers, seconds a shard."""


def main() -> None:
    found = []
    for workers, shard_s in CASES:
        used = crowd(workers, 10 * workers, shard_s, RAY_S * workers / 1000, charged=True)
        found.append({"workers": workers, "shard_s": shard_s, "share": round(used.share, 4), **asdict(used)})
        print(found[-1], flush=True)
    RESULT.write_text(json.dumps({"cores": os.cpu_count(), "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
