"""The index against brute force; builds that are killed and resumed."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index import neighbours

E = 32
N = 24_000  # just above what is searched flat
PART = 6000


def _clustered(n: int = N, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(150, E))
    scale = rng.uniform(0.5, 20, (n, 1))  # raw norms differ: cosine must not care
    return ((centres[rng.integers(0, 150, n)] + 0.7 * rng.normal(size=(n, E))) * scale).astype(np.float32)


def _stored(folder: Path, x_NE: np.ndarray) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", x_NE)
    return np.load(folder / "vectors.npy", mmap_mode="r")


def _brute(q_BE: np.ndarray, x_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    cos_BN = (q_BE / np.linalg.norm(q_BE, axis=1, keepdims=True)).astype(np.float64) @ (
        x_NE / np.linalg.norm(x_NE, axis=1, keepdims=True)
    ).T.astype(np.float64)
    order_BK = np.argsort(-cos_BN, axis=1)[:, :k]
    return np.take_along_axis(cos_BN, order_BK, 1), order_BK


def test_exact_search_equals_brute_force_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SCAN_ROWS", 700)
    x_NE = _clustered(3000)
    wanted_cos, wanted = _brute(x_NE[:20], x_NE, 9)
    cos_BK, rows_BK = neighbours.exact(x_NE[:20], x_NE, 9)
    assert (rows_BK == wanted).all()
    assert np.abs(cos_BK - wanted_cos).max() < 1e-6


def test_recall_is_reached_and_stated_for_texts_too(tmp_path: Path) -> None:
    """Texts lie apart from the pictures, as CLIP's do: what suffices for pictures finds too little for them."""
    x_NE = _stored(tmp_path, _clustered())
    rng = np.random.default_rng(5)
    text_BE = (rng.normal(size=(200, E)) + 4 * rng.normal(size=E)).astype(np.float32)
    plain = neighbours.build(x_NE, [N], tmp_path / "plain", neighbours.Plan(), {"vectors": "a"})
    tuned = neighbours.build(x_NE, [N], tmp_path / "tuned", neighbours.Plan(), {"vectors": "a"}, texts=lambda: text_BE)

    def recall(made: dict[str, Any], q_BE: np.ndarray, folder: str) -> float:
        index = neighbours.Index.read(tmp_path / folder / "index.faiss", x_NE, made["factory"]).probing(made["nprobe"])
        found, wanted = index.search(q_BE, 10)[1], _brute(q_BE, x_NE, 10)[1]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted, strict=True)]))

    assert "text_recall" not in plain
    assert plain["recall"]["10"] >= 0.95 > recall(plain, text_BE, "plain")
    assert tuned["text_recall"]["10"] == pytest.approx(recall(tuned, text_BE, "tuned"), abs=1e-5)
    assert tuned["text_recall"]["10"] >= 0.95
    assert tuned["recall"]["10"] >= plain["recall"]["10"]
    assert (tuned["queries"], tuned["text_queries"]) == (1000, 200)


def test_flat_index_finds_what_brute_force_finds(tmp_path: Path) -> None:
    x_NE = _stored(tmp_path, _clustered(2000))
    made = neighbours.build(x_NE, [700, 700, 600], tmp_path, neighbours.Plan(part_rows=800), {"vectors": "a"})
    assert made["factory"] == "Flat"
    assert made["recall"] == {"1": 1.0, "10": 1.0, "100": 1.0}
    index = neighbours.Index.open(tmp_path)
    cos_BK, rows_BK = index.search(x_NE[:30] * 3.0, 7)
    wanted_cos, wanted = _brute(x_NE[:30], x_NE, 7)
    assert (rows_BK == wanted).all()
    assert np.abs(cos_BK - wanted_cos).max() < 1e-5
    assert np.array_equal(index.gather(rows_BK), x_NE[rows_BK])


@pytest.mark.parametrize(("bytes_a_row", "codec"), [(4.6, "Flat"), (2.6, "SQfp16"), (1.6, "SQ8"), (0.7, "RaBitQ")])
def test_memory_decides_the_codec_and_recall_is_what_is_claimed(tmp_path: Path, bytes_a_row: float, codec: str) -> None:
    x_NE = _stored(tmp_path, _clustered())
    memory = int(N * E * bytes_a_row) + neighbours.lists(N) * E * 4
    plan = neighbours.Plan(memory=memory, part_rows=PART)
    made = neighbours.build(x_NE, [4000] * 6, tmp_path, plan, {"vectors": "a"})
    assert made["factory"].endswith(codec)
    assert made["lists"] is None
    assert made["recall"]["10"] >= 0.95
    own = np.random.default_rng(7).choice(N, 200, replace=False)  # other queries than those it was tuned on
    index = neighbours.Index.open(tmp_path)
    found = index.search(np.asarray(x_NE[own]), 11)[1]
    _, wanted = _brute(x_NE[own], x_NE, 11)
    share = np.mean([len(set(a) & set(b)) for a, b in zip(found, wanted, strict=True)]) / 11
    assert share == pytest.approx(made["recall"]["10"], abs=0.04)


def test_lists_go_to_disk_past_the_budget_and_the_folder_can_move(tmp_path: Path) -> None:
    x_NE = _stored(tmp_path / "a", _clustered())
    in_memory = neighbours.Plan(factory="IVF128,SQ8", part_rows=PART)
    on_disk = neighbours.Plan(factory="IVF128,SQ8", memory=1000, part_rows=PART)
    neighbours.build(x_NE, [4000] * 6, tmp_path / "a", on_disk, {"vectors": "a"})
    _stored(tmp_path / "b", x_NE)
    neighbours.build(x_NE, [4000] * 6, tmp_path / "b", in_memory, {"vectors": "a"})
    (tmp_path / "a").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "index.ivfdata").stat().st_size >= N * (E + 8)
    disk, memory = (neighbours.Index.open(tmp_path / name) for name in ("moved", "b"))
    a, b = (index.search(np.asarray(x_NE[:50]), 10) for index in (disk, memory))
    assert (a[1] == b[1]).all()
    assert np.array_equal(a[0], b[0])


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("index.*") if not path.name.endswith(".json")}


@pytest.mark.parametrize("threads", [3])
@pytest.mark.parametrize("memory", [1 << 30, 1000])
def test_threads_do_not_change_the_bytes(tmp_path: Path, threads: int, memory: int) -> None:
    x_NE = _stored(tmp_path / "a", _clustered(8000))
    made = []
    for name, count in (("a", 1), ("b", threads)):
        plan = neighbours.Plan(factory="IVF64,SQ8", memory=memory, part_rows=1000, threads=count)
        neighbours.build(x_NE, [1000] * 8, tmp_path / name, plan, {"vectors": "a"})
        made.append(_bytes(tmp_path / name))
    assert made[0] == made[1]
    assert not (tmp_path / "a" / "parts").exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from index import neighbours
    from pipeline import record

    folder, where, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    seen = 0
    real = record.commit

    def commit(draft, path, facts):
        global seen
        if path.name.startswith(where):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(draft, path, facts)

    record.commit = commit
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    plan = neighbours.Plan(factory="IVF64,SQ8", memory=int(sys.argv[4]), part_rows=1000, threads=1)
    neighbours.build(vectors, [1000] * 8, folder, plan, {"vectors": "a"})
"""


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "RR64,IVF32,RaBitQ", "Flat"])
def test_parts_made_on_other_machines_give_the_same_bytes(tmp_path: Path, factory: str) -> None:
    x_NE = _stored(tmp_path / "here", _clustered(4000))
    plan = neighbours.Plan(factory=factory, part_rows=1000)
    neighbours.build(x_NE, [1000] * 4, tmp_path / "here", plan, {"vectors": "a"})
    asked: list[list[str]] = [[]]

    def spread(function, parts, trained, size):
        for number, part in enumerate(parts):
            if number == 2 and len(asked) == 1:
                raise OSError("its task cannot be done")
            asked[-1].append(str(part))
            made = function(pickle.loads(pickle.dumps(part)), trained)
            assert made.nbytes < size
            yield made

    away = replace(plan, spread=spread)
    _stored(tmp_path / "away", x_NE)
    with pytest.raises(OSError, match="cannot be done"):
        neighbours.build(x_NE, [1000] * 4, tmp_path / "away", away, {"vectors": "a"})
    asked.append([])
    neighbours.build(x_NE, [1000] * 4, tmp_path / "away", away, {"vectors": "a"})
    assert asked == [  # what was made before the failure is not made again
        ["rows 0 to 999 of the index", "rows 1,000 to 1,999 of the index"],
        ["rows 2,000 to 2,999 of the index", "rows 3,000 to 3,999 of the index"],
    ]
    assert _bytes(tmp_path / "away") == _bytes(tmp_path / "here")


@pytest.mark.fault
@pytest.mark.parametrize("memory", [1 << 30, 1000])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, memory: int) -> None:
    x_NE = _stored(tmp_path / "whole", _clustered(8000))
    plan = neighbours.Plan(factory="IVF64,SQ8", memory=memory, part_rows=1000, threads=1)
    neighbours.build(x_NE, [1000] * 8, tmp_path / "whole", plan, {"vectors": "a"})
    _stored(tmp_path / "killed", x_NE)
    places = [("trained", 1), ("part", 3), ("index.merged", 1), ("index.faiss", 1)]
    places += [("index.ivfdata", 1)] if memory == 1000 else []
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "killed")]
    kept: dict[str, int] = {}
    for where, count in sorted(places, key=lambda place: ["trained", "part", "index.ivfdata"].index(place[0])
                               if place[0] in ("trained", "part", "index.ivfdata") else 9):  # fmt: skip
        ended = subprocess.run([*command, where, str(count), str(memory)], check=False, timeout=120, cwd=Path.cwd())
        assert ended.returncode == -9, where
        if where == "part":
            kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "parts").glob("part-*.faiss")}
            assert len(kept) == 2
    steps: list[tuple[str, int, int]] = []
    neighbours.build(x_NE, [1000] * 8, tmp_path / "killed", plan, {"vectors": "a"}, lambda *step: steps.append(step))
    assert "train" not in [name for name, _, _ in steps]  # what was committed is not done again
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
    again: list[str] = []
    neighbours.build(x_NE, [1000] * 8, tmp_path / "killed", plan, {"vectors": "a"}, lambda *step: again.append(step[0]))
    assert again == []


def test_damaged_parts_are_made_again(tmp_path: Path) -> None:
    x_NE = _stored(tmp_path, _clustered(4000))
    plan = neighbours.Plan(factory="IVF16,SQ8", part_rows=1000, threads=1)
    neighbours.build(x_NE, [1000] * 4, tmp_path, plan, {"vectors": "a"})
    sound = _bytes(tmp_path)
    data = bytearray((tmp_path / "index.faiss").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "index.faiss").write_bytes(bytes(data))
    neighbours.build(x_NE, [1000] * 4, tmp_path, plan, {"vectors": "a"})
    assert _bytes(tmp_path) == sound


def test_other_vectors_start_afresh(tmp_path: Path) -> None:
    plan = neighbours.Plan(factory="IVF16,SQ8", part_rows=1000, threads=1)
    for seed in (0, 1):
        x_NE = _stored(tmp_path, _clustered(3000, seed))
        neighbours.build(x_NE, [1500] * 2, tmp_path, plan, {"vectors": str(seed)})
        assert neighbours.Index.open(tmp_path).search(np.asarray(x_NE[5:6]), 1)[1][0, 0] == 5


def test_lists_with_too_few_rows_fall_back_to_exact_search(tmp_path: Path) -> None:
    x_NE = _stored(tmp_path, _clustered(3000))
    neighbours.build(x_NE, [3000], tmp_path, neighbours.Plan(factory="IVF40,Flat", recall=0.01), {"vectors": "a"})
    index = neighbours.Index.open(tmp_path).probing(1)
    cos_BK, rows_BK = index.search(np.asarray(x_NE[:4]), 1500)
    assert (rows_BK >= 0).all()
    assert (rows_BK == neighbours.exact(x_NE[:4], x_NE, 1500)[1]).mean() > 0.99
    assert (np.diff(cos_BK, axis=1) <= 1e-6).all()


def test_tiny_sets_are_indexed_too(tmp_path: Path) -> None:
    for rows in (1, 2, 5):
        folder = tmp_path / str(rows)
        x_NE = _stored(folder, _clustered(rows))
        neighbours.build(x_NE, [rows], folder, neighbours.Plan(), {"vectors": "a"})
        assert neighbours.Index.open(folder).search(np.asarray(x_NE), 1)[1][:, 0].tolist() == list(range(rows))


def test_queries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x_NE = _stored(tmp_path, _clustered(50))
    neighbours.build(x_NE, [50], tmp_path, neighbours.Plan(), {"vectors": "a"})
    index = neighbours.Index.open(tmp_path)
    with pytest.raises(ValueError, match="between 1 and the 50"):
        index.search(np.asarray(x_NE), 51)
    with pytest.raises(ValueError, match="width"):
        index.search(np.zeros((1, E + 1), np.float32), 1)


def test_choice_by_size_and_memory() -> None:
    assert neighbours.choose(1000, 768, 1 << 30) == "Flat"
    assert neighbours.choose(1_000_000, 768, 4 << 30) == "IVF2048,Flat"
    assert neighbours.choose(1_000_000, 768, 1 << 30) == "IVF2048,SQ8"
    assert neighbours.choose(100_000_000, 1280, 30 << 30) == "RR1280,IVF16384,RaBitQ"
    assert neighbours.parts_of([10, 10, 10, 5], 20) == [(0, 20), (20, 35)]


def test_a_gpu_build_keeps_the_bytes_and_moves_what_faiss_can_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow alone: without a GPU, a copy in memory stands in for the one on the device."""
    import faiss

    x_NE = _stored(tmp_path / "cpu", _clustered(4000))
    factories = ("IVF16,SQ8", "IVF16,SQ6", f"RR{E},IVF16,RaBitQ")
    for factory in factories:
        plan = neighbours.Plan(factory=factory, part_rows=1000, threads=1)
        neighbours.build(x_NE, [1000] * 4, tmp_path / "cpu" / factory, plan, {"vectors": "a"})
    moved: list[tuple[str, int]] = []

    def to_gpu(resources: object, device: int, index: Any) -> Any:
        moved.append((type(index).__name__, device))
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", faiss.clone_index, raising=False)
    for factory, wanted in zip(factories, (4, 0, 0), strict=True):
        moved.clear()
        plan = neighbours.Plan(factory=factory, part_rows=1000, threads=1)
        neighbours.build(x_NE, [1000] * 4, tmp_path / factory, plan, {"vectors": "a"})
        assert _bytes(tmp_path / factory) == _bytes(tmp_path / "cpu" / factory)
        names = [name for name, _ in moved]
        assert names.count("IndexFlatIP") == 1  # the centroids that training compares with
        assert len(names) - 1 == wanted
    _stored(tmp_path / factories[0], x_NE)
    index = neighbours.Index.open(tmp_path / factories[0])
    moved.clear()
    on_device = index.on_gpu(1, 1 << 30)
    assert moved == [("IndexIVFScalarQuantizer", 1)]
    assert np.array_equal(on_device.search(x_NE[:50], 5)[1], index.search(x_NE[:50], 5)[1])
    assert index.on_gpu(1, 1000) is index  # too large for the device


@pytest.mark.gpu
def test_gpu_build_and_search_agree_with_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    if neighbours.gpus() == 0:
        pytest.skip("needs faiss-gpu and a GPU")
    x_NE = _stored(tmp_path, _clustered(30_000))
    neighbours.build(x_NE, [30_000], tmp_path, neighbours.Plan(factory="IVF128,Flat"), {"vectors": "a"})
    index = neighbours.Index.open(tmp_path)
    moved = index.on_gpu(0, 1 << 30)
    assert moved is not index
    assert (moved.search(x_NE[:100], 10)[1] == index.search(x_NE[:100], 10)[1]).mean() > 0.99
