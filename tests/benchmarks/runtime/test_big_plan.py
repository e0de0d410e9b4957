"""`benchmarks.runtime.big_plan`, with few rows: each step finds what the steps before it left."""

from pathlib import Path

from benchmarks.runtime.big_plan import on_a_store


def test_each_step_on_a_store_finds_what_is_there(tmp_path: Path) -> None:
    found = {name: figures["found"] for name, figures in on_a_store(tmp_path, 40_000, 4_000)}
    assert found == {"plan": 4000, "half": None, "input": {}, "resume": 1, "hand": 20_000, "status": 20_000, "fold": 4}
