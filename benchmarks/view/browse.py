"""How long the page of ``latentmill view`` waits for what it asks, and what memory that takes.

``python -m benchmarks.view.folder OUT --rows 1000000``, then ``python -m benchmarks.view.browse OUT``. The command is
started as a user starts it; each question is asked over HTTP, three times with other values, and timed. Writes
``results/browse.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

RESULTS = Path(__file__).with_name("results") / "browse.json"
CELLS = ["id", "prompt", "method", "psnr", "ssim", "residual_max", "forwards", "picture", "reconstruction", "status"]
WORDS = ("star", "cat", "harbour", "lamp", "bridge")
REQUESTS, TIMES = 200, 3
BROWSED = ("page", "filtered page", "sorted page", "histogram", "picture", "row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    out = parser.parse_args().out
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "jobs", "view", out, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()  # type: ignore[union-attr]
            name = out.rstrip("/").rpartition("/")[2]
            told = {"start": time.perf_counter() - started} | measured(url, name, psutil.Process(server.pid))
        finally:
            server.terminate()
    told |= {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


def measured(url: str, run: str, process: psutil.Process) -> dict[str, Any]:
    def ask(path: str, **given: Any) -> Any:
        plain = {name: json.dumps(one) if isinstance(one, list | dict) else one for name, one in given.items()}
        with urllib.request.urlopen(f"{url}{path}?{urlencode({'run': run, **plain})}", timeout=120) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers["Content-Type"] == "application/json" else body

    def filtered(n: int) -> list[dict[str, Any]]:
        return [{"column": "prompt", "op": "contains", "value": WORDS[n % len(WORDS)]},
                {"column": "psnr", "op": "between", "value": [30 + n % 7, None]}]  # fmt: skip

    def timed(question: Callable[[int], Any]) -> dict[str, float]:
        """The median of three, and the processor time of one."""
        seconds, before = [], sum(process.cpu_times()[:2])
        for n in range(TIMES):
            since = time.perf_counter()
            question(n)
            seconds.append(time.perf_counter() - since)
        return {"s": statistics.median(seconds), "cpu_s": (sum(process.cpu_times()[:2]) - before) / TIMES}

    since = time.perf_counter()
    ask("api/runs")
    page = ask("api/rows", columns=CELLS, limit=50)
    first = time.perf_counter() - since
    rows = next(one["rows"] for one in ask("api/runs")["runs"] if one["name"] == run)
    after = page["next"]
    at = [row["at"] for row in page["rows"]]
    questions: dict[str, Callable[[int], Any]] = {
        "page": lambda n: ask("api/rows", columns=CELLS, limit=50, after=after),
        "filtered page": lambda n: ask("api/rows", columns=CELLS, filters=filtered(n)),
        "filtered count": lambda n: ask("api/count", filters=filtered(n)),
        "page of nothing": lambda n: ask("api/rows", filters=[{"column": "prompt", "op": "is", "value": f"no {n}"}]),
        "sorted page": lambda n: ask("api/rows", columns=CELLS, sort="psnr", down=n % 2),
        "filtered, sorted page": lambda n: ask("api/rows", columns=CELLS, sort="ssim", down=1, filters=filtered(n)),
        "histogram": lambda n: ask("api/histogram", column=("psnr", "ssim", "forwards")[n % 3]),
        "filtered histogram": lambda n: ask("api/histogram", column="ssim", filters=filtered(n)),
        "values of a column": lambda n: ask("api/values", column="method", filters=filtered(n)),
        "picture": lambda n: ask("picture", at=at[n], column="picture", size=96),
        "row": lambda n: ask("api/row", at=at[n]),
    }
    told = {name: timed(question) for name, question in questions.items()}
    memory = []
    for n in range(REQUESTS):
        questions[BROWSED[n % len(BROWSED)]](n % 5)
        if n % 50 == 49:
            memory.append(round(process.memory_info().rss / 1e6))
    return {"rows": rows, "first page": first, **told, f"MB after each 50 of {REQUESTS} requests": memory}


if __name__ == "__main__":
    main()
