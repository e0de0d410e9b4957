"""What a GPU makes of the methods: one command for a machine with one GPU, without Ray and without weights.

    python -m benchmarks.gpu [--minutes 8] [--price 2.5] [--only card,sd15]
    python -m benchmarks.gpu --device cpu --toy            the same code at toy sizes, to try it without a GPU

Needs torch, transformers, diffusers, pyarrow, pydantic, pytest; no Ray, no datasets; faiss for one measure. Networks
have the published sizes and random weights (`benchmarks.gpu.networks`). Measures run in order, the most important
first (`benchmarks.gpu.measures`), in a process of their own: one that fails, hangs or loses the device is noted with
its error, and the next ones go on in a new process. What no longer fits into the time is skipped. Each result is
written at once to benchmarks/results/gpu-CARD.json; started again, the command goes on with what is not done. The
table, also beside it as gpu-CARD.md, tells hours and dollars a million rows.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.record import Record, slug, table

if TYPE_CHECKING:
    from benchmarks.gpu.instruments import Bench
    from benchmarks.gpu.measures import Measure

RESULTS = Path(__file__).parents[1] / "results"
PRICE = 2.5
"""Dollars an hour of an H100, rented, as of 2026: an assumption, not a quotation."""
LOST = 3
"""Exit code of a child whose device refuses all further work."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    card = "cpu" if options.device == "cpu" else card_name()
    if card is None:
        print("no GPU found (nvidia-smi names none): `--device cpu --toy` tries this command without one")
        return 2
    name = f"gpu-{slug(card)}{'-toy' if options.toy else ''}.json"
    record = Record(options.output or RESULTS / name)
    record.describe(card=card, toy=options.toy)
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--child", str(record.path), "--device", options.device,
        "--run", str(time.time()), "--deadline", str(time.time() + 60 * options.minutes),
        *(["--only", options.only] if options.only else []), *(["--toy"] if options.toy else []),
    ]  # fmt: skip
    code = supervise(command, record)
    told = table(record.read(), options.price)
    record.path.with_suffix(".md").write_text(told)
    print(told)
    return code


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="networks of a few thousand numbers")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no measure begins")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars an hour of the card")
    parser.add_argument("--only", help="measures, separated by commas")
    parser.add_argument("--output", type=Path, help="the file, in place of benchmarks/results/gpu-CARD.json")
    for hidden in ("--child", "--run"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def card_name() -> str | None:
    """The first GPU's name, without a process of our own on it."""
    if shutil.which("nvidia-smi") is None:
        return None
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    lines = told.stdout.strip().splitlines()
    return lines[0] if told.returncode == 0 and lines else None


def supervise(command: Sequence[str], record: Record, tick: float = 0.5) -> int:
    """Run the measures in a child; where one kills it, or exceeds its limit, note that and go on in a new child."""
    while True:
        child = subprocess.Popen(command)
        stopped = ""
        while child.poll() is None:
            time.sleep(tick)
            for entry in running(record).values():
                if time.time() > entry["began"] + entry["limit"]:
                    stopped = f"stopped: it took longer than its limit of {entry['limit']:g} s"
                    child.kill()
        code = child.wait()
        cut_off = running(record)
        for name, entry in cut_off.items():
            error = stopped or f"its process ended with code {code}"
            record.write(name, **{**entry, "state": "failed", "error": error})
        if code == 0 or not (cut_off or code == LOST):
            return code


def running(record: Record) -> dict[str, dict]:
    return {name: entry for name, entry in record.read()["measures"].items() if entry["state"] == "running"}


def measure_all(options: argparse.Namespace) -> int:
    """The child: every measure that is neither done nor tried in this run, while there is time."""
    record = Record(Path(options.child))
    try:
        import torch

        from benchmarks.gpu.instruments import Bench
        from benchmarks.gpu.measures import chosen

        measures = chosen(options.only.split(",") if options.only else None)
    except (ImportError, ValueError) as error:
        print(f"cannot begin: {error}")
        return 1
    record.describe(torch=torch.__version__, python=platform.python_version())
    if options.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        record.describe(memory_bytes=about.total_memory, processors=about.multi_processor_count)
    gc.freeze()  # what was imported stays: looking for cycles in it would take longer than some measures
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        return run_each(measures, record, Bench(options.device, options.toy, Path(scratch)), options)


def run_each(measures: Mapping[str, Measure], record: Record, bench: Bench, options: argparse.Namespace) -> int:
    """Each measure's result, error, or why it was left out, into the record."""
    from benchmarks.gpu.instruments import Unavailable, lost

    for name, measure in measures.items():
        entry = record.entry(name)
        if entry.get("state") != "done" and entry.get("run") != options.run:
            began = time.time()
            about_it = {"run": options.run, "began": began, "limit": measure.limit}
            if began + (0 if options.toy else measure.needs) > options.deadline:
                record.write(
                    name, state="skipped", why=f"{max(0, options.deadline - began):.0f} s were left", **about_it
                )
                continue
            record.write(name, state="running", **about_it)
            print(f"{name} ...", flush=True)
            try:
                found = measure.run(bench)
            except Unavailable as error:
                record.write(name, state="skipped", why=str(error), **about_it)
            except Exception as error:
                record.write(name, state="failed", error=traceback.format_exc()[-4000:], **about_it)
                if lost(error):
                    return LOST
            else:
                seconds = time.time() - began
                record.write(name, state="done", seconds=seconds, found=found, **about_it)
            print(f"{name}: {record.entry(name)['state']}, {time.time() - began:.1f} s", flush=True)
            bench.clear()
        if name == "card":
            bench.peaks = record.entry(name).get("found", {})
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given = parsed(None)
    sys.exit(measure_all(given) if given.child else main())
