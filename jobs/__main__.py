"""``python -m jobs`` is the command ``latentmill``."""

from jobs.cli import main

main()
