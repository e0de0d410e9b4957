"""What Prometheus is told of a run."""

import pytest

from pipeline.run.cluster import Meters, label


@pytest.mark.parametrize("path", ["/data/out", "s3://bucket/out put"])
def test_a_path_in_ascii_is_its_own_label(path: str) -> None:
    assert label(path) == path


@pytest.mark.parametrize("path", ["/data/Bäume", "/data/日本", "/data/\udcff"])
def test_any_output_can_be_counted(path: str, local_ray: str) -> None:
    assert label(path).isascii()
    assert label(path) != label("/data/Baume")
    meters = Meters(path)
    meters.workers(1)
    meters.committed(2, 1, 1)
