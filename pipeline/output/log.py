"""Commit records, folded: a thousand in a file, so that who reads them asks a store for a thousandth as many.

Workers create records (`pipeline.output.commit`). Now and then the driver writes those that it has heard of as the
rows of ``log/<run>-e<epoch>-<number>.parquet``, created only if there is none, and then removes them
(`pipeline.output.fold`). A row holds shard, generation and the record as it was written, or null: the record of that
shard and generation is withdrawn, because its file is lost or a later generation stands.

Which record of a shard counts follows from what files there are, in whatever order they came to be:

1. What has been withdrawn counts no more.
2. Of a row and a record of one shard and generation the row counts; of two rows that of the earlier file.
3. Of what is left, the highest generation.

A shard and generation that a row names is never given out again: what is withdrawn is made anew as a later generation.
So a worker that was thought dead and commits after its shard's record was folded and removed adds what never counts,
and a driver that has lost the folder and folds what it once heard adds nothing that was not true. Whoever reads lists
the records first and the log second, so that what is folded in between is seen twice and not never.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input.files import OWN
from pipeline.output.commit import Record
from pipeline.output.planfile import OutputError
from pipeline.output.tally import Tally
from pipeline.storage import Folder

LOG = f"{OWN}/log"
_GENERATION_BITS = 20
_LAST = (1 << _GENERATION_BITS) - 1
_NAME = re.compile(r"(?:([0-9a-f]{12})-)?e(\d+)-(\d+)\.parquet")
_SCHEMA = pa.schema([("shard", pa.int64()), ("generation", pa.int32()), ("record", pa.string()),
                     ("sum", pa.string())])  # fmt: skip
LONGEST_SUM = 1 << 20
"""Characters: the words of failed rows have no end."""


def log_name(run: str, epoch: int, number: int) -> str:
    return f"{LOG}/" + "-".join(filter(None, (run, f"e{epoch:06d}", f"{number:06d}.parquet")))


def logged(name: str, run: str) -> tuple[int, int] | None:
    """Epoch and number of a file in the log; None if it is none of this run."""
    match = _NAME.fullmatch(name)
    return (int(match[2]), int(match[3])) if match and (match[1] or "") == run else None


def key(shard: int, generation: int) -> int:
    """A number for both; they follow each other by shard, and in a shard the latest generation comes first."""
    return shard << _GENERATION_BITS | _LAST - generation


def shard_of(key: int) -> int:
    return key >> _GENERATION_BITS


def encode(rows: Iterable[tuple[int, int, Record | None]]) -> bytes:
    """A file of the log.

    Args:
        rows: Shard, generation, and the record, or None if it is withdrawn.
    """
    ordered, tally = sorted(rows, key=lambda row: key(row[0], row[1])), Tally()
    for _, _, record in ordered:
        if record is not None:
            tally.add(record)
    said = json.dumps(tally.says())
    columns = [[shard for shard, _, _ in ordered], [generation for _, generation, _ in ordered],
               [None if record is None else record.to_json() for _, _, record in ordered],
               [said if len(said) <= LONGEST_SUM else None] + [None] * (len(ordered) - 1)]  # fmt: skip
    return _packed(pa.table(columns, schema=_SCHEMA))


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def _table(content: bytes, columns: tuple[str, ...] = tuple(_SCHEMA.names)) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False)
    return file.read(list(columns), use_threads=False)  # `pyarrow.parquet.read_table` takes milliseconds to begin


@dataclass(frozen=True)
class _File:
    """A file of the log, kept as it came; its rows are unpacked when they are asked for.

    Attributes:
        url: Where it is; order: its epoch and number.
        keys: Of all rows, ascending; withdrawn: of those that say so.
        sum: What its records are together (`Tally.says`), as JSON; None in files of older code.
    """

    url: str
    order: tuple[int, int]
    content: bytes
    keys: np.ndarray
    withdrawn: frozenset[int]
    sum: str | None = None

    @staticmethod
    def of(url: str, order: tuple[int, int], content: bytes) -> _File:
        """Raises pyarrow.ArrowException, OSError, ValueError or KeyError if it is none, or damaged."""
        table = _table(content)
        shards, generations = table["shard"].to_numpy(), table["generation"].to_numpy().astype(np.int64)
        keys = shards << _GENERATION_BITS | _LAST - generations
        if not len(keys) or np.any(keys[1:] <= keys[:-1]):
            raise ValueError("its rows are not in order")
        withdrawn = frozenset(keys[table["record"].is_null().to_numpy()].tolist())
        said = table["sum"][0].as_py() if "sum" in table.column_names else None
        return _File(url, order, content, keys, withdrawn, said)

    def rows(self) -> Iterator[Row]:
        """Its rows, in order."""
        records = _table(self.content, ("record",))["record"]
        return (
            Row(own, self.order, said, self.url)
            for own, said in zip(self.keys.tolist(), records.to_pylist(), strict=True)
        )


class Row(NamedTuple):
    """A row: its key, the order of its file, the record as it was written, and where."""

    key: int
    order: tuple[int, int]
    said: str | None
    url: str

    def record(self) -> Record:
        """Raises OutputError: It is none, or another's."""
        try:
            record = Record.from_json(self.said or "")
            if key(record.shard, record.generation) != self.key:
                raise ValueError(f"it says shard {record.shard}")
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{self.url} holds no commit record of shard {shard_of(self.key)} ({error})"
            raise OutputError(f"{problem}; delete the file and run the job again") from None
        return record


class Log:
    """What has been read of the log of a run. Its files never change, and are read once."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._keys, self._withdrawn = np.empty(0, np.int64), frozenset[int]()

    def look(
        self,
        folder: Folder,
        run: str,
        several: Callable[[Callable[[str], bytes | None], list[str]], Iterable[bytes | None]],
    ) -> dict[str, OutputError]:
        """Read the files that are new.

        Args:
            several: `map`, or what maps several at a time.

        Returns:
            What is wrong with those that are damaged, by their names.
        """
        orders = {f"{LOG}/{name}": order for name in folder.listing(LOG) if (order := logged(name, run)) is not None}
        known = {name: file for name, file in self._files.items() if name in orders}
        new = [name for name in orders if name not in known]
        if not new and len(known) == len(self._files):
            return {}

        def content(name: str) -> bytes | None:
            try:
                return folder.read(name)
            except FileNotFoundError:
                return None

        damaged: dict[str, OutputError] = {}
        for name, data in zip(new, several(content, new), strict=True):
            try:
                if data is not None:
                    known[name] = _File.of(f"{folder.url}/{name}", orders[name], data)
            except (pa.ArrowException, ValueError, KeyError, OSError) as error:
                damaged[name] = OutputError(f"{folder.url}/{name} holds no commit records ({error}); run the job again")
        self._set(known)
        return damaged

    def take(self, folder: Folder, run: str, name: str, content: bytes) -> None:
        """A file that this process has just written."""
        order = logged(name.rpartition("/")[2], run)
        assert order is not None
        file = _File.of(f"{folder.url}/{name}", order, content)
        places = np.searchsorted(self._keys, file.keys)
        known = np.append(self._keys, -1)[places] == file.keys
        self._files = {**self._files, name: file}
        self._keys = np.insert(self._keys, places[~known], file.keys[~known])  # a million are not sorted anew each time
        self._withdrawn |= file.withdrawn

    def _set(self, files: dict[str, _File]) -> None:
        self._files = files
        keys = _merged_values(file.keys for file in files.values())
        self._keys = keys[np.diff(keys, prepend=keys[:1] - 1) > 0]
        self._withdrawn = frozenset().union(*(file.withdrawn for file in files.values()))

    def holds(self, key: int) -> bool:
        """Whether a row names this shard and generation, as a record or as withdrawn."""
        place = int(np.searchsorted(self._keys, key))
        return place < len(self._keys) and int(self._keys[place]) == key

    def shards(self) -> np.ndarray:
        """Those that have a record here that counts unless a later one does, ascending."""
        standing = np.setdiff1d(self._keys, np.fromiter(self._withdrawn, np.int64, len(self._withdrawn)))
        return np.unique(standing >> _GENERATION_BITS)

    def generations(self, but: Collection[int]) -> dict[int, int]:
        """Shard -> the latest generation that a row names, for all but some shards."""
        if not len(self._keys):
            return {}
        shards, first = np.unique(self._keys >> _GENERATION_BITS, return_index=True)
        wanted = ~np.isin(shards, np.fromiter(but, np.int64, len(but)))
        latest = _LAST - (self._keys[first[wanted]] & _LAST)
        return dict(zip(shards[wanted].tolist(), latest.tolist(), strict=True))

    def sums(self, others: Iterable[int]) -> dict[str, dict[str, Any]]:
        """The files of which every row is a record that counts, and of whose shards there is no other: name -> their
        records' sum.

        Args:
            others: Shards that have a record which is not in the log.
        """
        shards = [file.keys >> _GENERATION_BITS for file in self._files.values()]
        every = _merged_values([*shards, np.fromiter(others, np.int64)])
        more = every[1:][np.diff(every) == 0]
        return {
            name: json.loads(file.sum)
            for (name, file), own in zip(self._files.items(), shards, strict=True)
            if file.sum is not None and self._withdrawn.isdisjoint(file.keys.tolist()) and not np.isin(own, more).any()
        }

    def records(self, but: Container[str] = ()) -> Iterator[tuple[int, Record]]:
        """Key and record of all rows that are not withdrawn, by key. Few files are unpacked at a time.

        Args:
            but: Names of files whose rows are left out.
        """
        before = -1
        for row in _merged(file for name, file in self._files.items() if name not in but):
            if row.key != before and row.key not in self._withdrawn:
                yield row.key, row.record()
            before = row.key

    def find(self, key: int) -> Record | None:
        """The record of a shard and generation; None if none is here, or it is withdrawn."""
        if key in self._withdrawn or not self.holds(key):
            return None
        file = min((file for file in self._files.values() if key in file.keys), key=lambda file: file.order)
        return next(row.record() for row in file.rows() if row.key == key)


def _merged_values(parts: Iterable[np.ndarray]) -> np.ndarray:
    """All values, ascending, as often as they come. Most parts are so already: a stable sort merges them."""
    return np.sort(np.concatenate([np.empty(0, np.int64), *parts]), kind="stable")


def _merged(files: Iterable[_File]) -> Iterator[Row]:
    """The rows of all files in order; each is opened where its first row stands, which is late for most."""
    waiting = deque(sorted(files, key=lambda file: int(file.keys[0])))
    opened: list[tuple[Row, Iterator[Row]]] = []
    while opened or waiting:
        while waiting and (not opened or int(waiting[0].keys[0]) <= opened[0][0].key):
            rows = waiting.popleft().rows()
            heapq.heappush(opened, (next(rows), rows))
        row, rows = opened[0]
        yield row
        following = next(rows, None)
        if following is None:
            heapq.heappop(opened)
        else:
            heapq.heapreplace(opened, (following, rows))
