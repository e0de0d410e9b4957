"""An output folder: its plan, its commit records, its tables, its state.

``OUT/data/part-*.parquet``, ``OUT/README.md`` and ``OUT/_SUCCESS`` are what readers see. ``OUT/_latentmill/`` is the
bookkeeping: ``plan.json`` (and what it grew to), ``<run>-files.parquet``, ``<run>-shards.parquet``, ``records/``,
``log/``, ``attempts/`` (until published), ``summaries/``, ``progress.json``, ``locks/``, and ``set-aside/`` for files
found in ``data/`` that are not its own.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import pyarrow as pa

from pipeline import machine
from pipeline.input.files import OWN, parts
from pipeline.output import lock, parquet
from pipeline.output.commit import ATTEMPTS, RECORDS, SUMMARIES, Record, read_summary, recorded
from pipeline.output.log import Log, key, shard_of
from pipeline.output.planfile import PLAN, OutputError, load_plan, own_folder, steps
from pipeline.output.progress import Progress
from pipeline.output.tally import Tally
from pipeline.storage import Folder

PROGRESS, SUCCESS, SET_ASIDE = f"{OWN}/progress.json", "_SUCCESS", f"{OWN}/set-aside"
PART = re.compile(r"part-(\d+)-of-\d+(?:-[0-9a-f]+)?\.parquet")
"""A published file's name."""
READERS = 16
RECORD_READERS = 32
"""Of records and files of the log, which are small: of more at a time a client's processor is the limit."""
T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Status:
    """What another shell may ask at any time.

    Attributes:
        state: ``running`` (a live lock), ``complete`` (``_SUCCESS`` and a record of each shard are there), else
            ``incomplete``.
        progress: The last snapshot a run left; counts of committed shards are fresh, read from the records.
        holder: Who holds the lock: host, pid, seconds since its last sign of life. None: nobody.
        errors: Commonest reasons of failed rows -> count.
        measures: Column -> ``{"n", "mean", "min", "max"}`` over committed rows.
        notes: What planning found out about the input: what is left out of it, how many rows are duplicates, ...
    """

    state: str
    progress: Progress
    holder: Mapping[str, Any] | None
    errors: Mapping[str, int]
    measures: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()


def _refuse(name: str, error: OutputError) -> NoReturn:
    raise error


@dataclass(frozen=True)
class Output:
    """An output folder with a plan in it.

    Attributes:
        folder: Where it is.
        plan: The stored plan (``rows``, ``shards``, ``columns``, ``config``, ``models``, ``created`` ...).
        lock: The driver's, or what stands for it elsewhere; None for those who only read.
    """

    folder: Folder
    plan: Mapping[str, Any]
    lock: lock.Lock | lock.Proxy | None = None
    log: Log = field(default_factory=Log, repr=False, compare=False)
    _known: dict[tuple[str, int], Record] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def open(path: str, storage_options: Mapping[str, Any] | None = None) -> Output:
        """Open an existing output folder.

        Raises:
            OutputError: There is no run in it.
        """
        folder = Folder.at(path, storage_options)
        plan = load_plan(folder)
        if plan is None:
            raise OutputError(f"{path}: there is no run in this folder ({PLAN} is missing)")
        return Output(folder, plan)

    @property
    def path(self) -> str:
        """The folder as the user gave it."""
        return self.folder.url

    @property
    def own(self) -> Folder:
        """The bookkeeping folder."""
        return own_folder(self.folder)

    @property
    def run(self) -> str:
        """Id of the run; empty for a plan of older code."""
        return str(self.plan.get("run") or "")

    @property
    def epoch(self) -> int:
        return 0 if self.lock is None else self.lock.epoch

    def check(self) -> None:
        """To be asked before anything in the folder is changed.

        Raises:
            LockLost: Another run has the folder.
        """
        if self.lock is not None:
            self.lock.check()

    @property
    def named_at_commit(self) -> bool:
        """Whether files get their final names while the run goes on, as on a store, where a copy costs; else at its
        end. Such names bear the run."""
        return bool(self.plan.get("named_at_commit"))

    @cached_property
    def parts(self) -> str:
        """What the published files' names match, and no other run's."""
        return parts(self.plan)

    @cached_property
    def _totals(self) -> list[int]:
        """Shards of the plan each time that it grew."""
        return [int(step["shards"]) for step in steps(self.plan)]

    def part(self, shard: int) -> str:
        """The published name of a shard. It stays what it was when the plan grows: its total is that of the first plan
        that had the shard."""
        total = next((total for total in self._totals if shard < total), self._totals[-1])
        width = max(5, len(str(total)))
        return self.parts.replace("*", f"{shard:0{width}d}-of-{total:0{width}d}")

    def records(
        self, damaged: Callable[[str, OutputError], None] | None = None, superseded: bool = False
    ) -> Iterator[Record]:
        """The run's commit records, in shard order: those of the log, and those that are not folded yet.

        Args:
            damaged: Told of each file that holds none, by its name. None: it is raised.
            superseded: Earlier generations too, behind the one that counts.
        """
        told = damaged or _refuse
        loose, broken = self._look()
        for name, error in broken.items():
            told(name, error)
        yield from self._records(told, loose, superseded)

    def _records(
        self, told: Callable[[str, OutputError], None], loose: Mapping[int, tuple[str, int]], superseded: bool = False,
        but: Container[str] = (),
    ) -> Iterator[Record]:  # fmt: skip
        """`records`, of which those that are not in the log are known by name; without some files of the log."""
        for gone in self._known.keys() - loose.values():
            del self._known[gone]
        keys = sorted(loose)
        single = zip(keys, self._several_small(self._record, [loose[own] for own in keys]), strict=True)
        last = -1
        for own, found in heapq.merge(self.log.records(but), single, key=lambda entry: entry[0]):
            if shard_of(own) == last and not superseded:
                continue
            last = shard_of(own)
            record = self._folded_since(own) if found is None else found
            if isinstance(record, Record):
                yield record
            elif record is not None:
                told(loose[own][0], record)

    def _look(self) -> tuple[dict[int, tuple[str, int]], dict[str, OutputError]]:
        """Names and sizes of the records that are not in the log, by key; and what is wrong with files of the log."""
        listed = self.folder.listing(RECORDS)  # first, so that what is folded meanwhile is seen in the log
        broken = self.log.look(self.folder, self.run, self._several_small)
        found = ((recorded(name, self.run), (f"{RECORDS}/{name}", size)) for name, size in listed.items())
        named = {key(*of): name for of, name in found if of is not None}
        return {own: name for own, name in named.items() if not self.log.holds(own)}, broken

    def _folded_since(self, own: int) -> Record | OutputError | None:
        """A record that was listed and is gone: in the log by now, withdrawn (None), or lost."""
        self.log.look(self.folder, self.run, self._several_small)
        if self.log.holds(own):
            return self.log.find(own)
        return OutputError(f"{self.path}: the record of shard {shard_of(own)} is gone; run the job again")

    def tally(self) -> Tally:
        """The records that count, added up; those that are damaged are done again. Of files of the log of which every
        record counts, the sum that they hold is taken: a million records are not read one by one.
        """
        loose, _ = self._look()
        tally, whole = Tally(), self.log.sums(map(shard_of, loose))
        for said in whole.values():
            tally.join(said)
        for record in self._records(lambda name, error: None, loose, but=whole):
            tally.add(record)
        return tally

    def committed(self) -> int:
        """How many shards have a record."""
        loose, _ = self._look()
        return len({*self.log.shards().tolist(), *map(shard_of, loose)})

    def several(self, function: Callable[[T], S], items: Iterable[T], count: int = READERS) -> Iterator[S]:
        """Results in the order of the items; from a store, which answers late, so many are fetched at a time."""
        return map(function, items) if self.folder.local else machine.several(function, items, count)

    def _several_small(self, function: Callable[[T], S], items: Iterable[T]) -> Iterator[S]:
        """`several`, of records and files of the log."""
        return self.several(function, items, RECORD_READERS)

    def _record(self, named: tuple[str, int]) -> Record | OutputError | None:
        """The record in a file of a name and size, read once: what it says is final. None if it is gone."""
        if (known := self._known.get(named)) is not None:
            return known
        name, _ = named
        try:
            record = Record.from_json(self.folder.read(name))
            if (record.run, record.name) != (self.run, name):
                raise ValueError(f"it says shard {record.shard} of run {record.run!r}")
            if not self.folder.local:
                self._known[named] = record
            return record
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            return OutputError(f"{self.path}/{name} is no commit record ({error}); run the job again")

    def locate(self, record: Record, listed: Mapping[str, Mapping[str, int]] | None = None) -> str | None:
        """Where a record's file is: still an attempt, or published; None if it is nowhere or has another size.

        The attempt's name is the record's alone; the published one may be taken by an earlier run's file of that size.

        Args:
            listed: Folder -> listing, to save a request a file.
        """
        for name in (f"{ATTEMPTS}/{record.file}", self.part(record.shard)):
            parent, _, base = name.rpartition("/")
            size = listed[parent].get(base) if listed is not None else self.folder.size(name)
            if size == record.size:
                return name
        return None

    def listings(self) -> dict[str, dict[str, int]]:
        """What lies in ``data/``, among the attempts, and among the summaries."""
        return {name: self.folder.listing(name) for name in ("data", ATTEMPTS, SUMMARIES)}

    def lost_summary(self, record: Record, listed: Mapping[str, Mapping[str, int]]) -> str | None:
        """The first summary of a record that is gone, empty or cut; None if all are whole."""
        sizes = record.summary_bytes or (None,) * len(record.summary)
        for name, size in zip(record.summary, sizes, strict=True):
            found = listed[SUMMARIES].get(name, 0)
            if not found or found != (size or found):
                return f"{SUMMARIES}/{name}"
        return None

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The committed shards' tables, in order, one at a time.

        Args:
            columns: Only these.

        Raises:
            OutputError: A record's file is missing, or no table (any more).
        """
        listed = self.listings()
        for record in self.records():
            name = self.locate(record, listed)
            gone = OutputError(f"{self.path}: the file of shard {record.shard} is gone or cut; run the job again")
            if name is None:
                raise gone
            try:
                table = parquet.read(self.folder, name, columns)
            except FileNotFoundError:
                raise gone from None
            except pa.ArrowInvalid as error:
                reason = str(error).splitlines()[0]
                raise OutputError(
                    f"{self.path}: {name} is damaged ({reason}); delete it and run the job again"
                ) from None
            yield table

    def summaries(self) -> Iterator[dict[str, Any]]:
        """The stage's summaries, in shard order; a shard that had to be split left several."""
        for record in self.records():
            for name in record.summary:
                yield read_summary(self.folder, name)

    def status(self) -> Status:
        """The state of the run, from any shell or machine that can read the folder."""
        tally = self.tally()
        progress = self._last_progress()
        held = lock.holder(self.folder)
        alive = held is not None and not held["stale"]
        complete = tally.shards == int(self.plan["shards"]) and self.folder.exists(SUCCESS)
        state = "running" if alive else "complete" if complete else "incomplete"
        counted = replace(
            progress,
            rows=int(self.plan["rows"]),
            shards=int(self.plan["shards"]),
            rows_ok=tally.ok,
            rows_failed=tally.failed,
            rows_duplicate=tally.duplicates,
            shards_done=tally.shards,
        )
        if state == "incomplete" and counted.phase == "complete":  # it was; files or records of it are lost since
            counted = replace(counted, phase="interrupted")
        if not alive:
            counted = replace(counted, rows_active=0, workers=0, rows_per_second=0.0, seconds_left=None)
        kept = {key: held[key] for key in ("host", "pid", "silent_s")} if held is not None and alive else None
        notes = tuple(self.plan.get("notes") or ())
        return Status(state, counted, kept, tally.errors, tally.measures, notes)

    def _last_progress(self) -> Progress:
        try:
            return Progress(**json.loads(self.folder.read(PROGRESS)))
        except (FileNotFoundError, ValueError, TypeError):
            return Progress("starting")

    def save_progress(self, progress: Progress) -> None:
        """Leave a snapshot for `status`."""
        self.check()
        self.folder.write(PROGRESS, json.dumps(vars(progress)).encode())

    def open_file(self, name: str, mode: str = "rb") -> Any:
        """Open a file below the folder, for instance ``report.html``; parents are made when writing."""
        if "r" in mode:
            return self.folder.open(name)
        self.check()
        if self.folder.local:
            self.folder.fs.makedirs(self.folder.path(name).rpartition("/")[0], exist_ok=True)
        return self.folder.fs.open(self.folder.path(name), mode)

    def shard_named(self, name: str) -> int | None:
        """The shard of this plan that a file in ``data/`` has the name of; None: it is no shard's."""
        if (match := PART.fullmatch(name)) is None:
            return None
        shard = int(match[1])
        return shard if shard < int(self.plan["shards"]) and f"data/{name}" == self.part(shard) else None
