"""What lies in an output folder and belongs to no record of its run."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.output.commit import ATTEMPTS, RECORDS, SUMMARIES, Record, epoch_of, recorded
from pipeline.output.dataset import Output


class Leftovers:
    """Attempts and summaries that no record names: those of losers, of the dead, and of strangers; and their records.

    What a later driver's workers have made is not touched: a driver that has lost the folder may not know yet. What
    lies there is listed first; each record then spares its own, and `remove` deletes the rest.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._names = {f"{place}/{name}" for place in (ATTEMPTS, SUMMARIES) for name in output.folder.listing(place)
                       if epoch_of(name) <= output.epoch}  # fmt: skip
        records = output.folder.listing(RECORDS)
        self._names |= {f"{RECORDS}/{name}" for name in records if recorded(name, output.run) is None}

    def spare(self, record: Record) -> None:
        self._names.discard(f"{ATTEMPTS}/{record.file}")
        self._names.difference_update(f"{SUMMARIES}/{name}" for name in record.summary)

    def remove(self) -> None:
        remove(self._output, sorted(self._names))


def remove(output: Output, names: Sequence[str]) -> None:
    """Delete files of an output.

    Raises:
        LockLost: Another run has the folder.
    """
    for start in range(0, len(names), output.folder.at_once):
        output.check()
        output.folder.remove_all(names[start : start + output.folder.at_once])
