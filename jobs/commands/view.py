"""``latentmill view``: a page of this machine's own to look through outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.errors import errors, terminable
from jobs.commands.stores import StorageOptions, reaching

if TYPE_CHECKING:
    from jobs.view.app import App
    from jobs.view.server import Server
    from pipeline.output.dataset import Output


def view(
    outs: Annotated[
        list[str], typer.Argument(metavar="OUT", help="Output folders of runs or chains, here or on a store.")
    ],
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="To listen on. Any but this machine's own needs the token that is printed."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any that is free.")] = 8710,
    storage_options: StorageOptions = None,
) -> None:
    """Look through outputs in a browser: filter, sort, compare.

    Reads only, and asks nothing of the web.
    """
    with errors(), terminable(), ExitStack() as stack:
        for out in outs:
            stack.enter_context(reaching(out, storage_options))
        from jobs.view.app import App

        app = App(named(outs))
        stack.callback(app.close)
        for name in app.outputs:
            app.run(name)  # what is damaged is told before a browser is opened
        server = _listening(app, host, port)
        stack.callback(server.server_close)
        typer.echo(f"{server.url}\n{', '.join(app.outputs)}; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _listening(app: App, host: str, port: int) -> Server:
    """
    Raises:
        ValueError: The port or the address cannot be had.
    """
    from jobs.view.server import Server

    try:
        return Server(app, host, port)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}; another one: --port 0") from None


def named(outs: Sequence[str]) -> dict[str, Output]:
    """The outputs of folders by short names; of a chain those of its steps that have begun.

    Raises:
        OutputError: There is no run in one of them.
    """
    from jobs.kinds.chain import read_listing
    from pipeline.output.dataset import Output
    from pipeline.output.planfile import load_plan
    from pipeline.storage import Folder

    found: dict[str, Output] = {}
    for out in outs:
        steps = read_listing(out)
        begun = [step for step in steps or () if load_plan(Folder.at(step["output"])) is not None]
        for name, path in [(step["name"], step["output"]) for step in begun] or [(_last(out), out)]:
            longer = "/".join(path.rstrip("/").split("/")[-2:])
            names = (name, longer, *(f"{name} ({n})" for n in range(2, len(found) + 3)))
            found[next(one for one in names if one not in found)] = Output.open(path)
    return found


def _last(out: str) -> str:
    return out.rstrip("/").rpartition("/")[2] or out
