"""A cell of `benchmarks.ovi.grid` holds what the command's rows say."""

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from benchmarks.ovi import grid
from jobs.commands import compbench
from jobs.run import run_job


def test_a_cell_holds_the_numbers_of_the_commands_rows(in_process: None, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32))
    given = {
        "job": "reference",
        "input": {"path": str(tmp_path / "z.npy")},
        "given": "embeddings",
        "encoder": "micro:prior",
    }
    reference = run_job(given, output=str(tmp_path / "reference")).output
    compbench.run(
        str(tmp_path / "out"), reference=reference, methods=["retrieval-8"], categories=["numeracy"], limit=3, draws=2
    )
    rows = ds.dataset(tmp_path / "out" / "rows" / "data", format="parquet").to_table().to_pylist()
    said = {row["id"]: row for row in rows}
    assert len(said) == 6
    method = grid.methods()["retrieval-8"]
    stage = grid.stage_of(method, reference)
    given_rows = grid.rows_of("numeracy", 1, "retrieval-8")[:3]
    cell = grid.filled(stage, given_rows)
    for place, row in enumerate(given_rows):
        for name in ("bound", "success", "clip_score", "nearest_cosine"):
            assert cell[name][place] == pytest.approx(float(said[row["id"]][name]), abs=1e-3), name
    assert min(cell["milliseconds"]) > 0

    cells = {"retrieval-8/numeracy/0": {**cell, "bound": [0.0, 1.0, 1.0]},
             "retrieval-8/numeracy/1": {**cell, "bound": [1.0, 1.0, 1.0]},
             "retrieval-8/rare/0": cell}  # fmt: skip
    assert "| retrieval-8 | 0.833 ± 0.327 | 0.833 ± 0.327 |" in grid.tables(cells, ["numeracy"])
    assert "| retrieval-8 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in grid.tables(cells, ["numeracy"], limit=1)
    assert "Pictures: retrieval-8: 6." in grid.tables(cells, ["numeracy"])


def test_the_methods_are_those_of_the_commands_job() -> None:
    assert set(grid.methods()) >= {
        "trained-prior", "retrieval-8", "captions-8", "mean-shift", "procrustes", "linear", "linear-rescaled",
        "linear-drawn", "kernel", "kernel-rescaled", "kernel-sharp", "kernel-typical", "ovi",
        "ovi-kernel", "ovi-captions", "direct-kernel",
    }  # fmt: skip
