"""What libraries print (Ray on deaths, progress bars, warnings) goes into a file, not between our lines."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

LOG = "_latentmill/log.txt"


@contextmanager
def quiet(output: str | None = None) -> Iterator[TextIO]:
    """While it lasts, standard error is a file, for this process and those that it starts.

    Args:
        output: A run's folder. Where it is a local one that is there at the end, the file is added to `LOG` in it.

    Yields:
        The real standard error, for what people are to see.
    """
    try:
        ours = sys.stderr.fileno() == 2 and not os.environ.get("LATENTMILL_TRACEBACK")
    except (OSError, ValueError):  # a notebook's or a test's own
        ours = False
    if not ours:
        yield sys.stderr
        return
    with tempfile.TemporaryFile() as log:
        sys.stderr.flush()
        real = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            with os.fdopen(os.dup(real), "w", buffering=1, errors="backslashreplace") as shown:
                yield shown
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            log.seek(0)
            _keep(output, log.read())


def _keep(output: str | None, said: bytes) -> None:
    from pipeline.storage import Folder

    folder = Path(output) if output and "://" not in output else None
    if said and folder is not None and folder.is_dir():
        with suppress(ValueError):  # the name is a stranger's link
            log = Path(Folder.at(str(folder)).path(LOG))
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as file:
                file.write(said)
