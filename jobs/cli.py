"""The command line under the name that `typer jobs.cli run ...` and the installed script know it by."""

from jobs.commands.cli import app, main

__all__ = ["app", "main"]
