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


def pytest_configure(config: pytest.Config) -> None:
    """A process that runs tests on cards alone (`-m card`) knows them from the start."""
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
