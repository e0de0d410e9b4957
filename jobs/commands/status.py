"""``latentmill status``: how far a run is, once or until it ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.errors import EXIT_INCOMPLETE, errors, printable
from jobs.commands.stores import StorageOptions, reaching

if TYPE_CHECKING:
    from pipeline.output.dataset import Status

LOOK_S = 10.0
BETWEEN_STEPS_S = 300.0
"""How long nobody may hold a folder of a chain before it counts as ended: the next step is being planned."""

States = Mapping[str, "Status | None"]
"""Step of a chain, or an empty name -> how far it is; None: it has not been started."""


def status(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run, here or on a store.")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on looking until the run ends.")] = False,
    every: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="With --watch: time between looks.")
    ] = LOOK_S,
    storage_options: StorageOptions = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON; with --watch, an object a line for each change.")
    ] = False,
) -> None:
    """Say how far a run is, from any shell that reads its folder.

    With --watch the exit code is 0 if the run is complete in the end, else 1. A folder without a run is waited for.
    """
    with errors(), reaching(out, storage_options):
        if not watch:
            states = look(out)
            typer.echo(as_line(states) if as_json else "\n".join(told(states)))
            return
        with _lines(as_line) if as_json else _shown() as show:
            complete = _watched(out, every, show)
    if not complete:
        raise typer.Exit(EXIT_INCOMPLETE)


def look(out: str) -> States:
    """How far a run, or each step of a chain, is.

    Raises:
        OutputError: There is no run.
    """
    from jobs.kinds.chain import read_listing
    from pipeline.output.dataset import Output
    from pipeline.output.planfile import OutputError

    steps = read_listing(out) or [{"name": "", "output": out}]
    found: dict[str, Status | None] = {}
    for step in steps:
        try:
            found[step["name"]] = Output.open(step["output"]).status()
        except OutputError:
            if len(steps) == 1:
                raise
            found[step["name"]] = None
    return found


def _watched(out: str, every: float, show: Callable[[States], None]) -> bool:
    """Look until the run ends; whether it is complete then."""
    from pipeline.output.planfile import OutputError

    unheld = 0.0
    while True:
        try:
            states = look(out)
        except OutputError:  # queued, or still planning
            states = {}
        show(states)
        known = [state for state in states.values() if state is not None]
        if states and len(known) == len(states) and all(state.state == "complete" for state in known):
            return True
        unheld = 0.0 if not states or any(state.state == "running" for state in known) else unheld + every
        stopped = any(state.state == "incomplete" for state in known)
        if unheld and (stopped or unheld > BETWEEN_STEPS_S):
            return False
        time.sleep(every)


def told(states: States) -> Iterator[str]:
    """Lines for people."""
    from jobs.commands.progress_line import line
    from jobs.page.amounts import duration

    if not states:
        yield "no run is there yet"
    for name, state in states.items():
        prefix = f"{name}: " if name else ""
        if state is None:
            yield f"{prefix}not started"
            continue
        words = line(state.progress)
        yield prefix + (words if words.startswith(state.state) else f"{state.state}: {words}")
        if state.holder:
            yield f"  held by {state.holder.get('host')} (pid {state.holder.get('pid')})"
        yield from (f"  {count:,} x {printable(reason)}" for reason, count in list(state.errors.items())[:5])
        yield from (f"  {printable(note)}" for note in state.notes)
        if state.progress.seconds_left and state.state == "running":
            yield f"  about {duration(state.progress.seconds_left)} left"


def as_line(states: States) -> str:
    """One line of JSON: of a chain, an object a step."""
    plain = {name: None if state is None else asdict(state) for name, state in states.items()}
    return json.dumps(plain if len(plain) != 1 else next(iter(plain.values())))


@contextmanager
def _shown() -> Iterator[Callable[[States], None]]:
    """On a terminal the lines are replaced by the next ones; elsewhere one line is added for each change."""
    if not sys.stdout.isatty():
        with _lines(_summary) as show:
            yield show
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        yield lambda states: live.update(Text("\n".join(told(states))), refresh=True)


@contextmanager
def _lines(write: Callable[[States], str]) -> Iterator[Callable[[States], None]]:
    last = ""

    def show(states: States) -> None:
        nonlocal last
        line = write(states)
        if line != last:
            last = line
            print(line, flush=True)

    yield show


def _summary(states: States) -> str:
    """One line: of a chain, the step that is at work, or the last one that was."""
    begun = {name: state for name, state in states.items() if state is not None}
    running = [name for name, state in begun.items() if state.state != "complete"]
    chosen = running[:1] or list(begun)[-1:]
    return next(told({name: begun[name] for name in chosen}))
