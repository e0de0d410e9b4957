"""A run in a process of its own, to be killed: ``python -m tests.support.child_run REQUEST.json``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.contract import StageSpec
from pipeline.input.source import Source
from pipeline.run import driver as runtime
from pipeline.run.draft import RunSpec
from pipeline.storage import Folder


def kill_at(operation: str, name: str, moment: str, marker: Path) -> None:
    """Kill this process before or after the driver's first storage operation on a name."""
    real = getattr(Folder, operation)

    def die() -> None:
        marker.write_text(f"{operation} {name} {moment}")
        os.kill(os.getpid(), signal.SIGKILL)

    def patched(folder: Folder, own: str, *args: Any) -> Any:
        hit = name in (args[0] if operation == "move" else own).rpartition("/")[2]
        if hit and moment == "before":
            die()
        result = real(folder, own, *args)
        if hit:
            die()
        return result

    setattr(Folder, operation, patched)


def main(request: dict[str, Any]) -> None:
    orders = Path(request["orders"])
    if step := request.get("driver"):
        kill_at(*step, orders / "killed")
    if step := request.get("worker"):
        (orders / "kill-at").write_text(" ".join([*step, str(os.getpid())]))
    stage = StageSpec("tests.support.faulty:Numbers", {"orders": str(orders), "delay": request.get("delay", 0.0)})
    source = Source((request["input"],), columns={"text": "text"})
    spec = RunSpec(stage, source, request["output"], shard_rows=request["shard_rows"], keep=("text",))
    result = runtime.run(spec, address=request["address"], resources=runtime.Resources(max_workers=2, cpus=0.5))
    print(json.dumps({"state": result.state, "reason": result.reason}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background hands on that it is ignored
    main(json.loads(Path(sys.argv[1]).read_text()))
