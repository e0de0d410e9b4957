"""What running out of memory taught the workers of a run: for all of them, and for when the run goes on.

Kept in the output folder beside the plan. It changes no row: who loses it learns it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pipeline.contract import Fit, Fits, StageSpec
from pipeline.input.files import OWN
from pipeline.output.dataset import Output

FILE = f"{OWN}/memory.json"


class Memory:
    """What goes through at once, by kind of work and of device.

    Args:
        output: Where it is kept.
        stage: What was learned of one whose settings differ (slots, offloading ...) is not taken over.
        gpus: Nor of one that had another share of them.

    Attributes:
        fits: The smallest that a worker found.
    """

    def __init__(self, output: Output, stage: StageSpec, gpus: float) -> None:
        told = json.dumps([stage.name, stage.params, gpus], sort_keys=True, default=str)
        self._output, self._mark = output, hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        self.fits = self._kept()

    def _kept(self) -> dict[str, Fit]:
        try:
            told: Any = json.loads(self._output.folder.read(FILE))
            found = {
                str(work): Fit(max(1, int(rows)), int(relieved)) for work, (rows, relieved) in told["fits"].items()
            }
            return found if told["stage"] == self._mark else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # there is none, or it is damaged

    def add(self, fits: Fits) -> Iterator[str]:
        """Take in what a worker was taught.

        Yields:
            What is new, for a message.
        """
        new = {work: fit | self.fits.get(work, fit) for work, fit in fits.items()}
        new = {work: fit for work, fit in new.items() if fit != self.fits.get(work)}
        if not new:
            return
        self.fits = {**self.fits, **new}
        kept = {work: [fit.rows, fit.relieved] for work, fit in self.fits.items()}
        with suppress(OSError):  # the store is away, or the disk full
            self._output.check()
            self._output.folder.write(FILE, json.dumps({"stage": self._mark, "fits": kept}, indent=1).encode())
        for work, fit in new.items():
            yield f"memory ran out in {work}: {fit.rows} at once from now on, in all workers"
