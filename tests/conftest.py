"""Fixtures that several test files share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks for a bucket's type by gRPC: no emulator does

from collections.abc import Iterator

import pytest

from tests.support.in_process import without_ray
from tests.support.toy_job import Toy, known

pytest.register_assert_rewrite("tests.support.weather", "tests.support.card_lines")  # asserted in several files


LONGEST = (
    "simulation/test_simulation.py",
    "jobs/test_remote_output.py",
    "jobs/test_card_snippets.py",
    "test_snippets.py",
    "stages/concepts/test_problem.py",
    "stages/test_out_of_memory.py",
    "pipeline/run/test_driver.py",
    "jobs/commands/test_terminal.py",
    "stages/rare/test_stage.py",
    "jobs/kinds/test_invert_flows.py",
    "stages/inversion/test_samplers.py",
    "pipeline/run/test_reading.py",
    "benchmarks/gpu/test_gpu.py",
    "jobs/kinds/test_rare_concepts.py",
    "stages/inversion/test_stage.py",
    "test_working_directory.py",
    "test_packaging.py",
    "pipeline/run/test_faults.py",
    "pipeline/run/test_nodes.py",
    "pipeline/run/test_gcs.py",
    "pipeline/run/test_s3.py",
    "benchmarks/runtime/test_chaos.py",
)
"""Files of half a minute and more (of ten seconds, where that is one test), the longest first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: with several processes (`-n 2 --dist loadfile`) one of them would else run a long file
    at the end, alone."""
    ranks = {str(config.rootpath / "tests" / name): rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))


def pytest_configure(config: pytest.Config) -> None:
    """A process that runs tests on cards alone (`-m card`) knows them from the start. And files keep their order:
    pytest-xdist would hand out those of one test last, however long it takes."""
    config.option.loadscopereorder = False
    if config.option.markexpr == "card":
        from tests.support.cards import card

        card()


@pytest.fixture
def toy_job() -> Iterator[type[Toy]]:
    """The kind ``toy``, registered for one test."""
    with known():
        yield Toy


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in the test's own process, without Ray."""
    without_ray(monkeypatch)


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Ray for all tests that need one; the value is its address, for child processes."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else other work on a busy machine starves the workers
    root = os.path.dirname(os.path.dirname(__file__))
    context = ray.init(
        address="local", num_cpus=6, include_dashboard=False, object_store_memory=150_000_000, log_to_driver=False,
        logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": root}},
    )  # fmt: skip
    yield context.address_info["gcs_address"]
    ray.shutdown()
