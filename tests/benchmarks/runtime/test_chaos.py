"""What `benchmarks.runtime.chaos` draws, what it takes for the same rows, and a short piece of it."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.runtime.chaos import values
from benchmarks.runtime.chaos.__main__ import endure, undisturbed
from benchmarks.runtime.chaos.faults import FAULTS, ON_A_CLUSTER, ON_A_STORE, drawn
from benchmarks.runtime.chaos.world import World


@pytest.mark.fault
@pytest.mark.timeout(1800)  # nothing in it waits for a time; a machine may be busy
def test_a_job_that_is_hurt_again_and_again_ends_whole(tmp_path: Path, local_ray: str) -> None:
    """The seed draws a worker and a driver that are killed and a file that is lost; when is as the machine runs.

    Of a traceback that Ray's own processes may leave where one is killed the benchmark tells.
    """
    world = World(local_ray, str(tmp_path / "out"))
    expected = undisturbed(world, tmp_path, "adopted")
    assert (expected.shards, expected.rows[""].num_rows) == (12, 96)
    life = endure(world, tmp_path, "adopted", expected, faults=3, seed="24")
    assert not [problem for problem in life.wrong if not problem.startswith("a traceback")], (life.wrong, life.told)
    assert life.faults, life.told
    assert not life.rounded


def _rows(**columns: list[object]) -> pa.Table:
    return pa.table({"id": ["a", "b", "c"], "x": pa.array([1.0, 2.0, None], pa.float32()), **columns})


def test_what_counts_as_the_same_rows() -> None:
    assert values.compare(_rows(), _rows()) == ([], {})
    lost = values.compare(_rows(), _rows().slice(0, 2))[0]
    assert lost == ["1 ids lost (['c']), 0 doubled, 2 rows"]
    twice = pa.concat_tables([_rows(), _rows().slice(1, 1)])
    assert values.compare(_rows(), twice)[0] == ["0 ids lost ([]), 1 doubled, 4 rows"]
    assert values.compare(_rows(), _rows().take([1, 0, 2]))[0][0] == "the rows are not in the planned order"
    near, far = ([1.0 + off, 2.0, None] for off in (1e-4, 0.1))
    wrong, rounded = values.compare(_rows(), _rows().set_column(1, "x", pa.array(near, pa.float32())))
    assert not wrong
    assert rounded["x"] == pytest.approx(5e-5, rel=0.01)
    wrong, _ = values.compare(_rows(), _rows().set_column(1, "x", pa.array(far, pa.float32())))
    assert wrong == ["x of 'a' is another: 1.0 then, 1.100000023841858 now"]
    words = [_rows(said=pa.array(said)) for said in (["u", "v", None], ["u", "w", None])]
    assert values.compare(*words)[0] == ["said of 'b' is another: v then, w now"]


def test_fractions_in_json_are_compared_each_with_itself_and_times_not_at_all() -> None:
    def told(loss: float, step: int = 4) -> pa.Table:
        cell = f'[{{"step": {step}, "loss": {loss!r}, "norms": [7.5]}}]'
        return _rows(curve=pa.array([cell, None, cell]), seconds=pa.array([random.random()] * 3))

    assert values.compare(told(0.0358), told(0.0358))[0] == []
    wrong, rounded = values.compare(told(0.3), told(0.3003))
    assert not wrong
    assert rounded["curve"] == pytest.approx(1e-3)
    for other in (told(0.31), told(0.3, step=5)):  # of the largest number in the cell it would be within rounding
        assert len(values.compare(told(0.3), other)[0]) == 1


def test_a_seed_draws_faults_that_its_world_can_do() -> None:
    everything = drawn(random.Random("0"), 400, store=True, cluster=True)
    assert everything == drawn(random.Random("0"), 400, store=True, cluster=True)
    assert set(everything) == set(FAULTS)
    assert not {*ON_A_STORE, *ON_A_CLUSTER} & set(drawn(random.Random("0"), 400, store=False, cluster=False))
