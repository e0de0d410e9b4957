"""What lies in an output folder and belongs to no record of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.input.files import OWN
from pipeline.output.commit import ATTEMPTS, RECORDS, SUMMARIES, Record, epoch_of, recorded
from pipeline.output.dataset import Output
from pipeline.output.log import LOG, key, logged
from pipeline.output.planfile import unfinished


class Leftovers:
    """Attempts and summaries that no record names: those of losers, of the dead, and of strangers; and their records.

    Records that are in the log are left over too, as are files of another run's log, and on a disk tables of plans that
    were not finished: a store has none of whoever died while it wrote them.

    What a later driver's workers have made is not touched: a driver that has lost the folder may not know yet. What
    lies there is listed first; each record then spares its own, and `remove` deletes the rest.

    Args:
        listed: `Output.listings`, from before any record was read: a million files are not listed twice.
    """

    def __init__(self, output: Output, listed: Mapping[str, Mapping[str, int]]) -> None:
        self._output = output
        self._names = {f"{place}/{name}" for place in (ATTEMPTS, SUMMARIES) for name in listed[place]
                       if epoch_of(name) <= output.epoch}  # fmt: skip
        records = {f"{RECORDS}/{name}": recorded(name, output.run) for name in output.folder.listing(RECORDS)}
        self._records = {name: key(*of) for name, of in records.items() if of is not None}
        self._names |= {name for name, of in records.items() if of is None}
        self._names |= {f"{LOG}/{name}" for name in output.folder.listing(LOG) if logged(name, output.run) is None}
        if output.folder.local and output.run:
            self._names |= {f"{OWN}/{name}" for name in unfinished(output.own, output.plan)}

    def spare(self, record: Record) -> None:
        self._names.discard(f"{ATTEMPTS}/{record.file}")
        self._names.difference_update(f"{SUMMARIES}/{name}" for name in record.summary)

    def remove(self) -> None:
        folded = {name for name, own in self._records.items() if self._output.log.holds(own)}
        remove(self._output, sorted(self._names | folded))


def remove(output: Output, names: Sequence[str]) -> None:
    """Delete files of an output.

    Raises:
        LockLost: Another run has the folder.
    """

    def gone(some: Sequence[str]) -> None:
        output.check()
        output.folder.remove_all(some)

    every = output.folder.at_once
    for _ in output.several(gone, (names[start : start + every] for start in range(0, len(names), every))):
        pass
