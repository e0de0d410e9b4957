"""A Ray of our own that is slow to come up."""

from __future__ import annotations

import pytest
import ray

from pipeline.run import cluster
from pipeline.run.cluster import ClusterError, connected

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.mark.parametrize(("failures", "address", "tried"), [(1, None, 2), (2, None, 2), (1, "10.0.0.1:6379", 1)])
def test_one_of_our_own_is_started_a_second_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch, failures: int, address: str | None, tried: int
) -> None:
    starts: list[str] = []

    def init(**options: object) -> None:
        starts.append(str(options["address"]))
        if len(starts) <= failures:
            raise Exception(f"{SLOW}\nmore")

    for name, value in {"init": init, "shutdown": lambda: None, "is_initialized": lambda: False}.items():
        monkeypatch.setattr(ray, name, value)
    monkeypatch.setattr(cluster, "knock", lambda address: None)
    if failures < tried:
        with connected(address, 1) as ours:
            assert ours
    else:
        with pytest.raises(ClusterError, match="timed out during startup") as caught, connected(address, 1):
            pass
        assert "\n" not in str(caught.value)
    assert len(starts) == tried
