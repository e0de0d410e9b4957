"""``python -m jobs`` is the command ``latentmill``."""

from jobs.commands.cli import main

main()
