"""Requests to an S3 server that each step of a run makes for a shard, counted.

    python -m benchmarks.runtime.requests [--shards 64 192]

The server is moto's, on this machine; requests are counted as the client sends them. A step's cost is taken at two
numbers of shards: what grows with them is a shard's, the rest is paid once. Workers run in this process. The lock is
not renewed meanwhile: that is four requests every ten seconds, however many shards there are.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.contract import StageSpec
from pipeline.input.source import Source
from pipeline.output import lock as locks
from pipeline.output.dataset import Output, Tally
from pipeline.output.leftovers import Leftovers
from pipeline.output.lock import Lock
from pipeline.output.planfile import own_folder
from pipeline.output.publish import publish
from pipeline.output.verify import verify
from pipeline.run.committed import Committed, committed
from pipeline.run.draft import draft
from pipeline.run.driver import Resources, RunSpec, _worker_job
from pipeline.run.plan import write_plan
from pipeline.run.reporter import Reporter
from pipeline.run.worker import Worker
from pipeline.storage import Folder

RESULTS = Path(__file__).parent / "results"
KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}


@contextmanager
def server() -> Any:
    """fsspec options for an empty bucket ``bucket``."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    address = "http://127.0.0.1:{1}".format(*running.get_host_and_port())
    boto3.client("s3", endpoint_url=address, **KEYS).create_bucket(Bucket="bucket")
    yield {"key": "test", "secret": "test", "endpoint_url": address, "client_kwargs": {"region_name": "us-east-1"}}
    running.stop()


class Count:
    """Requests of a client by step, as `Counter` of their methods."""

    def __init__(self, folder: Folder) -> None:
        fs = folder.fs  # fsspec gives the same one to all who ask with its options
        fs.connect()
        fs.s3.meta.events.register("before-send.s3", self._sent)
        self.steps: dict[str, Counter[str]] = {}
        self._now: Counter[str] = Counter()

    def _sent(self, request: Any, **rest: Any) -> None:
        self._now[request.method] += 1

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        self._now = self.steps[name] = Counter()
        try:
            return action()
        finally:
            self._now = Counter()


def counted(shards: int, options: dict[str, Any]) -> dict[str, Counter[str]]:
    """A run of so many shards of two rows, step by step."""
    with tempfile.TemporaryDirectory(prefix="latentmill-requests-") as name:
        (Path(name) / "in.txt").write_text("".join(f"line {i}\n" for i in range(2 * shards)))
        source = Source((f"{name}/in.txt",), columns={"text": "text"})
        stage = StageSpec("benchmarks.runtime.rows:Lengths")
        spec = RunSpec(stage, source, f"s3://bucket/out-{shards}", shard_rows=2, storage_options=options)
        folder = Folder.at(spec.output, options)
        count = Count(folder)
        lock = count.step("lock", lambda: Lock(folder))
        early = count.step("whether it refuses a taken name", lambda: folder.ends_once("_latentmill/one.probe"))
        count.step("plan", lambda: write_plan(spec, draft(spec), own_folder(folder), 0.0, named_at_commit=early))
        output = replace(Output.open(spec.output, options), lock=lock)
        worker = Worker(_worker_job(spec, output, Resources()))
        tasks = list(Committed(Tally()).tasks(output))
        count.step("worker", lambda: [worker.process(task) for task in tasks])
        tally = count.step("survey", lambda: committed(output, Reporter(None, None, 1))).tally
        assert isinstance(tally, Tally)
        assert tally.shards == shards
        count.step("survey again", lambda: committed(output, Reporter(None, None, 1)))
        count.step("publish", lambda: publish(output, tally, "counted", ""))
        count.step("status", Output.open(spec.output, options).status)
        later = replace(Output.open(spec.output, options), lock=lock)
        count.step("resume of a complete one", lambda: committed(later, Reporter(None, None, 1)))
        report = count.step("verify", lambda: verify(spec.output, options))
        assert report.ok, report.problems
        for task in tasks:  # as if a second run had been lost
            with suppress(FileNotFoundError):
                worker.process(replace(task, part=None))
        count.step("sweep", lambda: Leftovers(output, output.listings()).remove())
        lock.release()
    return count.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs=2, default=[64, 192])
    parser.add_argument("--save", default="requests.json")
    few, many = parser.parse_args().shards
    locks.RENEW_S = 3600.0
    with server() as options:
        less, more = counted(few, options), counted(many, options)
    found = {}
    for step in less:
        a_shard = {verb: (more[step][verb] - less[step][verb]) / (many - few) for verb in more[step]}
        once = sum(less[step].values()) - few * sum(a_shard.values())
        found[step] = {"a_shard": {verb: count for verb, count in a_shard.items() if count}, "once": once}
        told = ", ".join(f"{count:.2f} {verb}" for verb, count in a_shard.items() if count)
        print(f"{step:28} {sum(a_shard.values()):6.2f} a shard ({told}), {once:.0f} once")
    (RESULTS / parser.parse_args().save).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
