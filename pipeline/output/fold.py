"""The driver's side of the log (`pipeline.output.log`): records are folded, and those that are lost withdrawn."""

from __future__ import annotations

from pipeline.failures import passing
from pipeline.output.commit import Record, record_name
from pipeline.output.dataset import Output
from pipeline.output.leftovers import remove
from pipeline.output.log import encode, key, log_name

FOLD_RECORDS = 1000
"""Records that are put into one file; up to as many stay for themselves."""


class Folding:
    """Folds the records that it is told of; to be used by the driver that holds the folder."""

    def __init__(self, output: Output) -> None:
        self._output, self._number = output, 0
        self._records: dict[int, Record] = {}
        self._withdrawn: set[tuple[int, int]] = set()
        self._due = FOLD_RECORDS

    def add(self, record: Record) -> None:
        """A record that stands. Whether it is folded now or later changes nothing: a store that is away may be so.

        Raises:
            LockLost: Another run has the folder.
        """
        own = key(record.shard, record.generation)
        if self._output.log.holds(own):
            return
        self._records[own] = record
        if len(self._records) < self._due:
            return
        self._due = len(self._records) + FOLD_RECORDS
        try:
            self._fold()
        except OSError as error:
            if not passing(error):
                raise

    def _fold(self) -> None:
        records = list(self._records.values())
        self._write([(record.shard, record.generation, record) for record in records])
        self._records, self._due = {}, FOLD_RECORDS
        remove(self._output, [record.name for record in records])

    def withdraw(self, shard: int, generation: int) -> None:
        """A record whose file is lost, or in whose place another stands."""
        self._withdrawn.add((shard, generation))

    def close(self) -> None:
        """Write what is withdrawn; only then may its files go.

        Raises:
            LockLost: Another run has the folder.
        """
        if self._withdrawn:
            self._write([(shard, generation, None) for shard, generation in self._withdrawn])
            remove(
                self._output,
                [record_name(shard, self._output.run, generation) for shard, generation in sorted(self._withdrawn)],
            )
            self._withdrawn = set()

    def _write(self, rows: list[tuple[int, int, Record | None]]) -> None:
        output, content = self._output, encode(rows)
        output.check()
        while not output.folder.create(name := log_name(output.run, output.epoch, self._number), content):
            self._number += 1  # a file of this run's earlier rounds, or one that a store kept though it said it had not
        self._number += 1
        output.log.take(output.folder, output.run, name, content)
