"""``python -m jobs`` is the command ``latentmill``, and this its entry point: Ctrl-C may come while it is imported."""

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from jobs.commands.cli import main as commands

        commands()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
