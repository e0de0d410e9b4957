"""How commands end when they cannot do what they were asked: one sentence, and an exit code."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INCOMPLETE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
FORMULA = ("=", "+", "-", "@")
_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?")
_AS_JSON: ContextVar[bool] = ContextVar("as_json", default=False)


@contextmanager
def as_json_lines(wanted: bool) -> Iterator[None]:
    """While it lasts, what went wrong is told as a line of JSON (`jobs.commands.json_lines`)."""
    token = _AS_JSON.set(wanted)
    try:
        yield
    finally:
        _AS_JSON.reset(token)


@contextmanager
def errors() -> Iterator[None]:
    """What a user can mend is told in a sentence; anything else is a bug and keeps its traceback."""
    if not os.environ.get("LATENTMILL_TRACEBACK"):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises
    try:
        yield
    except KeyboardInterrupt:
        stop("interrupted", EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        extras = {"faiss": "cpu (or gpu)", "s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure", "duckdb": "view"}
        extra = extras.get(error.name or "")
        if extra is None:
            raise
        stop(f"{error.name} is not installed: pip install 'latentmill[{extra.split()[0]}]'")
    except (ValueError, OSError) as error:
        if os.environ.get("LATENTMILL_TRACEBACK"):
            raise
        stop("\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])]))
    except RuntimeError as error:
        if type(error).__name__ not in ("RunError", "OutputLocked") or os.environ.get("LATENTMILL_TRACEBACK"):
            raise
        stop("\n".join([str(error), *getattr(error, "__notes__", [])]), EXIT_INCOMPLETE)
    except Exception as error:
        from pipeline.storage import of_a_client, told_by_a_client

        if not of_a_client(error) or os.environ.get("LATENTMILL_TRACEBACK"):
            raise
        stop(told_by_a_client(error))


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which Slurm, Kubernetes and systemd send, is as Ctrl-C: what is done stays, the lock is released."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(message: str, code: int = EXIT_USAGE) -> NoReturn:
    """Tell the user and leave."""
    from rich.text import Text

    if _AS_JSON.get():
        from jobs.commands import json_lines

        json_lines.write("error", {"message": message, "exit_code": code})
        raise typer.Exit(code)
    stderr().print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=True)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Tell the user something that stands in the way of nothing."""
    from rich.text import Text

    if _AS_JSON.get():
        from jobs.commands import json_lines

        json_lines.write("message", {"message": message, "phase": "planning"})
        return
    stderr().print(Text.assemble(("note: ", "bold"), printable(message)), soft_wrap=True)


def stderr() -> Console:
    """Where people are told things; standard output is for results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def cell(text: str) -> str:
    """A cell of CSV. A spreadsheet runs what begins as a formula: such words of a row get an apostrophe before them."""
    text = printable(text)
    return f"'{text}" if text.startswith(FORMULA) and not _NUMBER.fullmatch(text) else text


def printable(text: str) -> str:
    """Rows are untrusted: no control characters reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
