"""Lines on a terminal, and through a pipe, that are not ours.

    python -m benchmarks.runtime.noise FOLDER [--kinds K...]

The smallest job of each kind runs on a pseudo-terminal and, into another folder, through a pipe, on a Ray of its own;
then every command that takes its output or its job file. What is shown and is no line of ours is counted and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.runtime.chaos import jobs

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from jobs.__main__ import main; main()"]
FOREIGN = re.compile(
    r"Traceback|[Ww]arning:|WARN|\bINFO\b|ERROR|\((raylet|autoscaler|pid=|\w+ pid=)|it/s|s/it|\d+%\|"
    r"|\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d|Loading|Fetching|Downloading|Map:|Generating|Exception ignored"
    r"|resource_tracker|urllib3|huggingface_hub|site-packages|object at 0x|^\s*File \"|libgomp|OMP:"
    r"|TqdmExperimental|deprecat|loky|semaphore"
)
"""Signs of a line that a library, Python or Ray has written."""
OURS = re.compile(
    r"[█▒·]{20}  |(planning|starting|running|finishing|publishing|complete|interrupted|failed)\b|waiting for workers: "
    r"|report: |step \d+ of \d+: |\d+ x |note: |results? |\d+ held-out pictures|  "
)
"""How a line of ``run-job`` begins."""


def on_a_terminal(words: list[str], stop_at: str | None = None) -> tuple[int, str]:
    """Exit code, and all that was shown; Ctrl-C once a text is seen."""
    pid, handle = pty.fork()
    if not pid:
        os.environ.update(TERM="xterm-256color", COLUMNS="160", LINES="50")
        os.execv(sys.executable, [*COMMAND, *words])
    raw, stopped = b"", False
    while True:
        try:
            select.select([handle], [], [], 60)
            data = os.read(handle, 65536)
        except OSError:
            break
        if not data:
            break
        raw += data
        if stop_at and not stopped and stop_at.encode() in raw:
            time.sleep(0.5)
            os.kill(pid, signal.SIGINT)
            stopped = True
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(handle)
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode(errors="replace"))


def through_a_pipe(words: list[str]) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def lines(text: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def strangers(words: list[str], text: str) -> list[str]:
    """Lines that look foreign; of a run all that do not begin as ours do."""
    of_a_run = words[0] == "run-job" and "--dry-run" not in words
    return [line for line in lines(text) if FOREIGN.search(line) or (of_a_run and not OURS.match(line))]


def commands(kind: str, job: Path, out: Path, beside: Path, folder: Path) -> Iterator[tuple[list[str], str | None]]:
    """Words of each command, and what is seen when it is to be stopped."""
    yield ["run-job", str(job), "-o", str(out), "--dry-run"], None
    yield ["run-job", str(job), "-o", str(out)], None
    yield ["run-job", str(job), "-o", str(out)], None  # complete already
    for name in ("status", "verify", "failed", "report"):
        yield [name, str(out)], None
    yield ["doctor", str(job)], None
    yield ["submit", str(job), "-o", str(out), "--slurm", "--print"], None
    yield ["view", str(out), "--port", "0"], "http://"
    yield ["push", str(out), "ada/rows", "--dry-run"], None
    if beside.exists():
        yield ["diff", str(out), str(beside)], None
    for target in ("parquet", "webdataset", "safetensors") if kind != "chain" else ():
        yield ["export", str(out), str(folder / f"{kind}-{target}"), "--to", target], None
    if kind == "reference":
        yield ["search", str(out), "a red star"], None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(jobs.KINDS))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    os.environ["PYTHONPATH"] = str(ROOT)
    counts: dict[str, dict[str, int]] = {}
    for kind in given.kinds:
        job = jobs.write(kind, given.folder, 1, {})
        out, piped = given.folder / "expected" / kind, given.folder / "piped" / kind
        told = [(words, *on_a_terminal(words, stop)) for words, stop in commands(kind, job, out, piped, given.folder)]
        words = ["run-job", str(job), "-o", str(piped)]
        told += [(words, *through_a_pipe(words))]
        words = ["diff", str(out), str(piped)]
        told += [(words, *through_a_pipe(words))]
        foreign = {" ".join(words): strangers(words, text) for words, _, text in told}
        shown = sum(len(lines(text)) for _, _, text in told)
        counts[kind] = {"lines": shown, "foreign": sum(map(len, foreign.values()))}
        (given.folder / f"{kind}.told").write_text("\n".join(f"$ {w} -> {code}\n{text}" for w, code, text in told))
        print(kind, counts[kind], [(w[0], code) for w, code, _ in told if code], flush=True)
        for command, found in foreign.items():
            print(*(f"   {command}: {line}" for line in found[:8]), sep="\n", end="\n" if found else "", flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
