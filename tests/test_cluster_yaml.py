"""cluster.yaml against Ray's own validation, and what its machines may do."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib
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
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any(f"{Path(target).name}[" in command and "pip install" in command for command in commands)


def test_each_machine_may_use_the_bucket_and_the_head_may_start_the_others(config: dict[str, Any]) -> None:
    nodes = {name: node["node_config"] for name, node in config["available_node_types"].items()}
    profiles = {name: node["IamInstanceProfile"]["Arn"] for name, node in nodes.items()}
    assert profiles["head"] != profiles["gpu"]
    bucket, head = (json.loads((ROOT / "deploy" / f"aws-{name}.json").read_text()) for name in ("bucket", "head"))
    may = {action: statement["Resource"] for statement in bucket["Statement"] for action in statement["Action"]}
    assert may["s3:PutObject"] == may["s3:GetObject"] == may["s3:DeleteObject"] == may["s3:ListBucket"] + "/*"
    passed = next(statement for statement in head["Statement"] if statement["Action"] == "iam:PassRole")
    assert passed["Resource"] == profiles["gpu"].replace("instance-profile", "role")


def test_python_is_brought_along_and_the_same_on_every_machine(config: dict[str, Any]) -> None:
    """The images of Ubuntu 22.04 have Python 3.10, which is too old: nothing here may ask for theirs."""
    everywhere = config["setup_commands"]
    assert not any(re.search(r"(^|[\s;&])python3(\.\d+)?\s", command) for command in everywhere)
    (made,) = [command for command in everywhere if " venv " in command]
    assert "--managed-python" in made
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (asked,) = re.findall(r"--python (\S+)", made)
    assert asked == requires.removeprefix(">=")
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        (install,) = commands
        assert "-c ~/latentmill/constraints.txt" in install
        assert '"ray[default]"' in install
    assert "boto3" in config["head_setup_commands"][0], "Ray's autoscaler starts machines with it"
    assert "[gpu," in config["worker_setup_commands"][0]


def test_commands_are_shell(config: dict[str, Any]) -> None:
    for name, commands in config.items():
        if name.endswith("_commands"):
            subprocess.run(["bash", "-n", "-c", "\n".join(commands)], check=True)


def test_every_machine_has_the_token(config: dict[str, Any]) -> None:
    home = f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
