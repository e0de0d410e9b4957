"""cluster.yaml against Ray's own validation, and the example of docs/clusters.md."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def validated(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = validated(config)
    assert prepared["max_workers"] == config["max_workers"]


def test_ray_would_refuse_a_mistake(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="head_nod"):
        validated({**{key: value for key, value in config.items() if key != "head_node_type"}, "head_nod_type": "head"})


def test_a_cpu_head_and_gpu_workers_that_install_this_package(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head, gpu = types[config["head_node_type"]], types["gpu"]
    assert "GPU" not in head["resources"]
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["max_workers"] <= config["max_workers"]
    (target,) = [remote for remote, local in config["file_mounts"].items() if local == "."]
    assert any(Path(target).name in command and "pip install" in command for command in config["setup_commands"])


def test_the_rayjob_in_the_docs_is_whole() -> None:
    text = (ROOT / "docs/clusters.md").read_text()
    blocks = [block.partition("\n```")[0] for block in text.split("```yaml\n")[1:]]
    job = next(doc for block in blocks for doc in yaml.safe_load_all(block) if doc.get("kind") == "RayJob")
    assert "latentmill run-job" in job["spec"]["entrypoint"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"]
