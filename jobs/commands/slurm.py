"""A job on a Slurm allocation: the batch script that starts a Ray there, runs the job on it, and resumes it.

The first node of the allocation is Ray's head and a worker; the script runs there. Ports come from the job's number, so
that jobs which share a node do not meet, and the token is drawn anew in each start. What ends the run decides what
follows. The time limit announces itself by USR1: the run is stopped and queued again, and the next start resumes it.
Whom Slurm preempts it queues again by itself (--requeue). scancel sends TERM, and nothing follows. Before each start
the script writes down what the output holds (`kept`); after `IDLE_STARTS` that added nothing it ends.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAST_SECONDS = 180
"""How long before the time limit the run is stopped: what workers have in hand is lost, what is committed is not."""
IDLE_STARTS = 3
"""So many starts in a row that keep nothing new, neither a shard nor a checkpoint, are the last."""
CHECKPOINTS = "_checkpoints"
"""Folder of an output in which long trainings keep how far they are."""


@dataclass(frozen=True)
class Allocation:
    """What is asked of Slurm.

    Attributes:
        nodes: Machines.
        gpus_per_node: GPUs of each; 0: none.
        cpus_per_node: CPUs of each; None: whole nodes, with all that they have.
        options: Further options of sbatch, ``--partition=gpu``.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    options: Sequence[str] = ()

    def directives(self, name: str) -> list[str]:
        """What stands behind ``#SBATCH``."""
        cpus = "--exclusive" if self.cpus_per_node is None else f"--cpus-per-task={self.cpus_per_node}"
        gpus = [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        return [
            f"--job-name={name}", f"--nodes={self.nodes}", "--ntasks-per-node=1", cpus, *gpus,
            "--output=%x-%j.log", "--open-mode=append", "--no-kill", "--requeue",
            f"--signal=B:USR1@{LAST_SECONDS}", *self.options,
        ]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What runs on the allocation. Paths are the same on every node.

    Attributes:
        job: The job file.
        output: Where its dataset goes.
        settings: Those of ``--set``.
        retry_failed: As for ``run-job``.
    """

    job: str
    output: str
    settings: Sequence[str] = ()
    retry_failed: bool = False

    @property
    def command(self) -> list[str]:
        """``latentmill run-job ...`` without ``--address``."""
        sets = [part for setting in self.settings for part in ("--set", setting)]
        again = ["--retry-failed"] if self.retry_failed else []
        return ["latentmill", "run-job", self.job, "--output", self.output, *sets, *again]


def kept(run: Run) -> str:
    """What an output holds so far: a line that is another one after a commit or a checkpoint.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    from jobs.commands.status import look
    from jobs.kinds.chain import read_listing
    from jobs.schema import reading
    from pipeline.access import filesystem, granted
    from pipeline.output.planfile import OutputError
    from pipeline.storage import version_of

    trained: list[tuple[str, str]] = []
    with granted(run.output, reading.load(Path(run.job), run.settings).storage_options):
        try:
            steps = look(run.output)
        except OutputError:
            return "no plan"
        found = {name: state.progress.shards_done for name, state in steps.items() if state is not None}
        for step in read_listing(run.output) or [{"output": run.output}]:
            place, folder = filesystem(f"{step['output']}/{CHECKPOINTS}")
            trained += [(name, version_of(info)) for name, info in place.find(folder, detail=True).items()]
    digest = hashlib.sha256(repr((sorted(found.items()), sorted(trained))).encode()).hexdigest()
    return f"{sum(found.values())} shards, {len(trained)} checkpoints, {digest[:16]}"


def script(name: str, run: Run, allocation: Allocation) -> str:
    """The batch script.

    Args:
        name: Of the job, for squeue and the log.
    """
    directives = "\n".join(f"#SBATCH {option}" for option in allocation.directives(name))
    return _SCRIPT.format(
        directives=directives,
        bin=shlex.quote(str(Path(sys.executable).parent)),
        gpus=allocation.gpus_per_node,
        command=shlex.join(run.command),
        kept=shlex.join(["python", "-m", "jobs.commands.slurm", run.job, run.output, *run.settings]),
        idle=IDLE_STARTS,
    )


_SCRIPT = """\
#!/bin/bash
{directives}
set -euo pipefail
export PATH={bin}:"$PATH"
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
export RAY_raylet_start_wait_time_s=300  # Python from a shared disk, on many nodes at once, starts slowly

# A file beside the log: what the output held before each start. A store that cannot be asked counts as progress.
starts=$SLURM_JOB_NAME-$SLURM_JOB_ID.starts
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -f "$starts"
kept=$({kept} 2> /dev/null) || kept="unknown at $(date +%s)"
echo "$kept" >> "$starts"
if [ "$(tail -n $(({idle} + 1)) "$starts" | grep -cxF "$kept")" -gt {idle} ]; then
    echo "not started again: the last {idle} starts added neither a shard nor a checkpoint to what is there ($kept)." \
        "A start has to last for a shard: submit with a longer --time, or fewer shard_rows and another folder." >&2
    exit 1
fi

ip=$(python -c 'from ray.util import get_node_ip_address; print(get_node_ip_address())')
port=$((20000 + 2 * (SLURM_JOB_ID % 6000)))
temp=/tmp/ray-$SLURM_JOB_ID
driver="" stopped="" queue_again=""

# shellcheck disable=SC2317  # called by the trap
end() {{
    trap "" TERM USR1
    jobs -p | xargs -r kill 2> /dev/null || true
    pkill -f "$temp/session_" || true  # what `ray start` left, and nobody else's Ray
    wait
    rm -rf "$temp"
}}
trap end EXIT
trap 'stopped=1; [ -z "$driver" ] || kill -TERM "$driver"' TERM
trap 'stopped=1 queue_again=1; [ -z "$driver" ] || kill -TERM "$driver"' USR1

pkill -KILL -f "$temp/session_" && sleep 2  # of an earlier start of this job that Slurm killed before its end
rm -rf "$temp"
ray start --head --node-ip-address="$ip" --port="$port" --ray-client-server-port=$((port + 1)) --temp-dir="$temp" \
    --include-dashboard=false --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus={gpus} > /dev/null

others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    # shellcheck disable=SC2016  # what is to be expanded on the other nodes
    srun --quiet --nodes="$others" --relative=1 --ntasks="$others" --ntasks-per-node=1 --cpu-bind=none --no-kill \
        --kill-on-bad-exit=0 bash -c 'exec ray --logging-level=warning start --block --address="$0" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus={gpus} > /dev/null' "$ip:$port" &
fi

{command} --address "$ip:$port" &
driver=$!
[ -z "$stopped" ] || kill -TERM "$driver"  # it was too early for the traps
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2> /dev/null; do  # a signal ended the wait, not the driver
    status=0
    wait "$driver" || status=$?
done
driver=""
trap - EXIT
end  # first: whom Slurm queues again it kills at once
if [ -n "$queue_again" ] && [ "$status" -ne 0 ]; then
    echo "the time limit is near: queued again, the next start resumes"
    scontrol requeue "$SLURM_JOB_ID"
fi
[ "$status" -ne 0 ] || rm -f "$starts"
exit "$status"
"""

if __name__ == "__main__":
    job, output, *given = sys.argv[1:]
    print(kept(Run(job, output, given)))
