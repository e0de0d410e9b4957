"""Index over a million vectors: recall, build time, queries a second; side by side with autofaiss.

    python -m benchmarks.index.neighbours --autofaiss /path/to/its/venv/bin/python

autofaiss runs in an environment of its own on the same vectors with the same memory budget (faiss-cpu 1.15 no longer
takes the arguments that it passes: 1.13.2 does). Both indexes are searched by this process, one after the other in
turns, with the same queries, and judged against the same exact neighbours. Builds report the processor's seconds beside
the clock's: on a machine that does other work as well, only those can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from index import neighbours

RESULTS = Path(__file__).with_name("results")
BLOCK = 50_000

AUTOFAISS = """
    import json, sys, time
    from autofaiss import build_index

    vectors, index, infos, memory, cores = sys.argv[1:6]
    begun = time.perf_counter()
    build_index(
        embeddings=vectors, index_path=index, index_infos_path=infos, file_format="npy", metric_type="ip",
        max_index_memory_usage=memory, current_memory_available="8G", nb_cores=int(cores), verbose=30,
    )
    print("SECONDS", time.perf_counter() - begun)
"""


def clustered(path: Path, rows: int, width: int) -> None:
    """Unit vectors with structure on two scales: clusters of clusters, each within a subspace of its own.

    Cluster sizes follow a power law; a point's spread lies mostly in 24 directions, as in embeddings of pictures,
    whose variance lies in a small part of their width.
    """
    rng = np.random.default_rng(0)
    tops, fines, inner = 64, 4000, 24
    top_TE = rng.standard_normal((tops, width), dtype=np.float32)
    of_F = rng.integers(0, tops, fines)
    fine_FE = top_TE[of_F] + 0.7 * rng.standard_normal((fines, width), dtype=np.float32)
    basis_TIE = rng.standard_normal((tops, inner, width), dtype=np.float32) / np.sqrt(inner)
    weight_F = 1 / np.arange(1, fines + 1) ** 0.7
    x_NE = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        pick_N = rng.choice(fines, count, p=weight_F / weight_F.sum())
        block_NE = fine_FE[pick_N] + 0.2 * rng.standard_normal((count, width), dtype=np.float32)
        inner_NI = 0.8 * rng.standard_normal((count, inner), dtype=np.float32)
        for top in range(tops):
            mine = of_F[pick_N] == top
            block_NE[mine] += inner_NI[mine] @ basis_TIE[top]
        x_NE[start : start + count] = neighbours.unit(block_NE)
    x_NE.flush()


def processor(who: int) -> float:
    """Seconds of processor time so far."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def autofaiss(python: str, vectors: Path, work: Path, memory: int) -> dict[str, Any]:
    """Build with autofaiss in its own environment; its choice and its time."""
    only = work / "vectors-only"
    only.mkdir(exist_ok=True)
    (only / "vectors.npy").unlink(missing_ok=True)
    (only / "vectors.npy").symlink_to(vectors.resolve())
    index, infos = work / "autofaiss.index", work / "autofaiss.json"
    command = [python, "-c", textwrap.dedent(AUTOFAISS), str(only), str(index), str(infos)]
    before = processor(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [*command, f"{memory / 2**30:.3f}G", str(os.cpu_count())], capture_output=True, text=True, timeout=3000
    )
    if ended.returncode:
        raise SystemExit(f"autofaiss failed:\n{ended.stderr[-2000:]}")
    seconds = float(ended.stdout.rpartition("SECONDS")[2])
    said = json.loads(infos.read_text())
    spent = processor(resource.RUSAGE_CHILDREN) - before
    return {"seconds": seconds, "processor seconds": spent, "factory": said["index_key"],
            "parameters": said["index_param"], "bytes": index.stat().st_size}  # fmt: skip


def compare(finders: dict[str, Any], q_BE: np.ndarray, own_B: np.ndarray, truth_BK: np.ndarray) -> dict[str, Any]:
    """Recall@10 and queries a second of each finder, in batches of 100, timed in turns."""
    result: dict[str, Any] = {}
    spent = dict.fromkeys(finders, 0.0)
    found = {name: np.empty((len(q_BE), 11), np.int64) for name in finders}
    for finder in finders.values():
        finder(q_BE[:100])  # warm
    for start in range(0, len(q_BE), 100):
        for name, finder in finders.items():
            begun = time.perf_counter()
            found[name][start : start + 100] = finder(q_BE[start : start + 100])
            spent[name] += time.perf_counter() - begun
    for name, rows_BK in found.items():
        others_BK = neighbours._others(rows_BK, own_B)
        pairs = zip(others_BK, truth_BK, strict=True)
        recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in pairs])
        result[name] = {"recall@10": float(recall), "queries/s": len(q_BE) / spent[name]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--memory", type=float, nargs="+", default=[1.0], help="budgets in GiB")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--autofaiss", default=None, help="python of an environment with autofaiss")
    parser.add_argument("--result", default="neighbours.json", help="name of the file in benchmarks/results")
    arguments = parser.parse_args()
    import faiss

    arguments.work.mkdir(parents=True, exist_ok=True)
    vectors = arguments.work / "vectors.npy"
    if not vectors.exists():
        clustered(vectors, arguments.rows, arguments.width)
    x_NE = np.load(vectors, mmap_mode="r")
    own_B = np.sort(np.random.default_rng(99).choice(len(x_NE), arguments.queries, replace=False))
    q_BE = np.asarray(x_NE[own_B])
    truth_BK = neighbours._others(neighbours.exact(q_BE, x_NE, 11)[1], own_B)
    result: dict[str, Any] = {"rows": len(x_NE), "width": x_NE.shape[1], "cpus": os.cpu_count(), "budgets": {}}
    for memory in arguments.memory:
        budget = int(memory * 2**30)
        folder = arguments.work / f"ours-{memory}"
        folder.mkdir(exist_ok=True)
        (folder / "index.faiss.json").unlink(missing_ok=True)
        (folder / "vectors.npy").unlink(missing_ok=True)
        (folder / "vectors.npy").symlink_to(vectors.resolve())
        load = os.getloadavg()[0]
        shards = [BLOCK] * (len(x_NE) // BLOCK) + [len(x_NE) % BLOCK] * (len(x_NE) % BLOCK > 0)
        begun, before = time.perf_counter(), processor(resource.RUSAGE_SELF)
        made = neighbours.build(x_NE, shards, folder, neighbours.Plan(memory=budget), {"vectors": "benchmark"})
        seconds, spent = time.perf_counter() - begun, processor(resource.RUSAGE_SELF) - before
        index = neighbours.Index.open(folder)
        finders = {"latentmill": lambda q_BE, index=index: index.search(q_BE, 11)[1]}
        entry: dict[str, Any] = {"latentmill": {
            "seconds": seconds - made["seconds"]["measure"], "seconds measuring": made["seconds"]["measure"],
            "processor seconds, measuring included": spent, "steps": made["seconds"],
            "factory": made["factory"], "parameters": f"nprobe={made['nprobe']}",
            "bytes": made["index_bytes"], "claimed": made["recall"],
        }, "load before": load}  # fmt: skip
        if arguments.autofaiss:
            entry["autofaiss"] = autofaiss(arguments.autofaiss, vectors, arguments.work, budget)
            theirs = faiss.read_index(str(arguments.work / "autofaiss.index"))
            faiss.ParameterSpace().set_index_parameters(theirs, entry["autofaiss"]["parameters"])
            finders["autofaiss"] = lambda q_BE, theirs=theirs: theirs.search(q_BE, 11)[1]
        for name, measured in compare(finders, q_BE, own_B, truth_BK).items():
            entry[name] |= measured
        entry["load after"] = os.getloadavg()[0]
        result["budgets"][f"{memory} GiB"] = entry
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / arguments.result).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
