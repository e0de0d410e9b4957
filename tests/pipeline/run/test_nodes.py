"""Ray nodes on one machine; some are removed while the run goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.output.verify import verify
from tests.support.faulty import data, run_plain, spec_for

SCRIPT = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_worker_niceness"] = "0"
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from pipeline.run.driver import Resources, run
from tests.pipeline.run.test_nodes import LINES
from tests.support.faulty import spec_for

soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 5}
args = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, "_system_config": soon}
cluster = Cluster(initialize_head=True, head_node_args=args)
second = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR",
         runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}})
state = {"removed": False, "workers": 0}

def watch(progress):
    state["workers"] = max(state["workers"], progress.workers)
    if progress.workers == 2 and progress.shards_done >= 2 and not state["removed"]:
        state["removed"] = True
        cluster.remove_node(second, allow_graceful=False)
    if progress.message:
        print(progress.message, flush=True)

spec = spec_for(Path(sys.argv[1]), LINES, shard_rows=5, delay=0.1)
result = run(spec, resources=Resources(max_workers=2), progress=watch)
assert state == {"removed": True, "workers": 2}, state
assert result.state == "complete", result

large = {"num_cpus": 2, "object_store_memory": 80_000_000}
spots, lost = [cluster.add_node(**large)], []

def preempt(progress):
    if progress.message:
        lost.extend(word for word in ["was lost"] if word in progress.message)
        print("slow row:", progress.message, flush=True)
    elif progress.workers and progress.phase == "running" and len(lost) == len(spots) - 1 < 2:
        cluster.remove_node(spots[-1], allow_graceful=False)
        spots.append(cluster.add_node(**large))

folder = Path(sys.argv[1]) / "spot"
folder.mkdir()
slow = run(spec_for(folder, ["one slow row"], delay=10.0), resources=Resources(cpus=2), progress=preempt)
assert (slow.state, slow.ok, len(spots), len(lost)) == ("complete", 1, 3, 2), (slow, lost)
ray.shutdown()
cluster.shutdown()
print("ended well")
"""
LINES = [f"line {i}" for i in range(120)]


@pytest.mark.fault
def test_node_removed_mid_run(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert "ended well" in ended.stdout, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert "was lost on" in ended.stdout
    told = r"slow row: a worker was lost on rows 0 to 0 of shard 0 \(its node (is gone|cannot be reached)\)"
    assert len(re.findall(told, ended.stdout)) == 2, ended.stdout[-2000:]
    spec = spec_for(tmp_path, LINES, shard_rows=5, delay=0.1)
    assert verify(spec.output).ok
    plain = run_plain(replace(spec_for(tmp_path, LINES, shard_rows=5), output=str(tmp_path / "plain")))
    assert data(spec.output).equals(data(plain.path))
