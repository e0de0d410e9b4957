"""A Ray of our own that is slow to come up."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import ray

from pipeline.run import cluster
from pipeline.run.cluster import ClusterError, connected

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def replace(monkeypatch: pytest.MonkeyPatch, init: Callable[..., None]) -> None:
    for name, value in {"init": init, "shutdown": lambda: None, "is_initialized": lambda: False}.items():
        monkeypatch.setattr(ray, name, value)
    monkeypatch.setattr(cluster, "knock", lambda address: None)


@pytest.mark.parametrize(("failures", "address", "tried"), [(1, None, 2), (2, None, 2), (1, "10.0.0.1:6379", 1)])
def test_one_of_our_own_is_started_a_second_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch, failures: int, address: str | None, tried: int
) -> None:
    starts: list[str] = []

    def init(**options: object) -> None:
        starts.append(str(options["address"]))
        if len(starts) <= failures:
            raise Exception(f"{SLOW}\nmore")

    replace(monkeypatch, init)
    if failures < tried:
        with connected(address, 1) as ours:
            assert ours
    else:
        with pytest.raises(ClusterError, match="timed out during startup") as caught, connected(address, 1):
            pass
        assert "\n" not in str(caught.value)
    assert len(starts) == tried


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rays_own", [False, True])
def test_a_signal_while_ray_starts_is_an_interruption_whatever_ray_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, number: int, rays_own: bool
) -> None:
    """It may end Ray's processes before ours hears of it; and Ray's handler, in ours' place then, exits."""
    starts: list[int] = []

    def init(**options: object) -> None:
        starts.append(number)
        if rays_own:
            raise SystemExit(int(signal.SIGTERM))
        signal.raise_signal(number)
        raise Exception(SLOW)

    replace(monkeypatch, init)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), connected(None, 1):
        pass
    assert (starts, signal.getsignal(number)) == ([number], before)


def test_an_exit_that_no_signal_asked_for_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise SystemExit(1)

    replace(monkeypatch, init)
    with pytest.raises(SystemExit), connected(None, 1):
        pass
