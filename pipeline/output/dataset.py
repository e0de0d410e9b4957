"""An output folder: its plan, its commit records, its state, and whether it is whole.

``OUT/data/part-*.parquet``, ``OUT/README.md`` and ``OUT/_SUCCESS`` are what readers see. ``OUT/_latentmill/`` is the
bookkeeping: ``plan.json``, ``files.parquet``, ``shards.parquet``, ``records/``, ``attempts/`` (until published),
``summaries/``, ``progress.json``, ``lock.json``, and ``set-aside/`` for files found in ``data/`` that are not its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input.files import OWN, resolve
from pipeline.input.ids import Uniqueness, digest
from pipeline.input.source import Source, SourceError
from pipeline.output import lock, parquet
from pipeline.output.commit import ATTEMPTS, RECORDS, SUMMARIES, Record, fold_errors, read_summary, record_name
from pipeline.output.schema import decode_schema, means, merge_measures
from pipeline.run.plan import Shard, expected_ids, read_shards
from pipeline.run.progress import Progress
from pipeline.storage import Folder, checksum

PLAN, PROGRESS, SUCCESS, SET_ASIDE = f"{OWN}/plan.json", f"{OWN}/progress.json", "_SUCCESS", f"{OWN}/set-aside"
READERS = 16
NAMED_PROBLEMS = 100


class OutputError(ValueError):
    """The folder is not a run's output, or is damaged; the message says what to do."""


@dataclass(frozen=True)
class Status:
    """What another shell may ask at any time.

    Attributes:
        state: ``running`` (a live lock), ``complete`` (``_SUCCESS`` is there), else ``incomplete``.
        progress: The last snapshot a run left; counts of committed shards are fresh, read from the records.
        holder: Who holds the lock: host, pid, seconds since its last sign of life. None: nobody.
        errors: Commonest reasons of failed rows -> count.
        measures: Column -> ``{"n", "mean", "min", "max"}`` over committed rows.
    """

    state: str
    progress: Progress
    holder: Mapping[str, Any] | None
    errors: Mapping[str, int]
    measures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class VerifyReport:
    """Whether an output holds every planned id exactly once, in files that match their records.

    Attributes:
        ok: Nothing is wrong and everything is there.
        planned: Planned rows; found: rows read; rows_ok, rows_failed: by status.
        problems: What is wrong, one sentence each, naming file or id and what to do; at most 100.
        foreign: Files in ``data/`` that no record names.
    """

    ok: bool
    planned: int
    found: int
    rows_ok: int
    rows_failed: int
    problems: tuple[str, ...]
    foreign: tuple[str, ...]


@dataclass
class Tally:
    """Running totals over commit records."""

    shards: int = 0
    ok: int = 0
    failed: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self._errors: Counter[str] = Counter()
        self._measures: dict[str, dict[str, float]] = {}

    def add(self, record: Record) -> None:
        self.shards += 1
        self.ok += record.rows_ok
        self.failed += record.rows_failed
        self.bytes += record.size
        self._errors.update(record.errors)
        merge_measures(self._measures, record.measures)

    @property
    def errors(self) -> dict[str, int]:
        return fold_errors(self._errors)

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        return means(self._measures)


@dataclass(frozen=True)
class Output:
    """An output folder with a plan in it.

    Attributes:
        folder: Where it is.
        plan: The stored plan (``rows``, ``shards``, ``columns``, ``config``, ``models``, ``created`` ...).
    """

    folder: Folder
    plan: Mapping[str, Any]

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

    def part(self, shard: int) -> str:
        """The published name of a shard."""
        total = int(self.plan["shards"])
        width = max(5, len(str(total)))
        return f"data/part-{shard:0{width}d}-of-{total:0{width}d}.parquet"

    def records(self) -> Iterator[Record]:
        """The commit records, in shard order; a few are read at a time."""
        names = [name for name in self.folder.listing(RECORDS) if re.fullmatch(r"\d+\.json", name)]
        names.sort(key=lambda name: int(name[:-5]))
        pending = (f"{RECORDS}/{name}" for name in names)
        if self.folder.local:
            yield from map(self.record, pending)
            return
        with ThreadPoolExecutor(READERS) as pool:
            window = deque(pool.submit(self.record, name) for name in islice(pending, READERS))
            while window:
                yield window.popleft().result()
                window.extend(pool.submit(self.record, name) for name in islice(pending, 1))

    def record(self, name: str) -> Record:
        """A commit record by its file's name.

        Raises:
            OutputError: It is none.
        """
        try:
            return Record.from_json(self.folder.read(name))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{self.path}/{name} is no commit record ({error}); delete it and run the job again"
            raise OutputError(problem) from None

    def locate(self, record: Record, listed: Mapping[str, Mapping[str, int]] | None = None) -> str | None:
        """Where a record's file is: published, or still an attempt; None if it is nowhere or has another size.

        Args:
            listed: Folder -> listing, to save a request a file.
        """
        for name in (self.part(record.shard), f"{ATTEMPTS}/{record.file}"):
            parent, _, base = name.rpartition("/")
            size = listed[parent].get(base) if listed is not None else self.folder.size(name)
            if size == record.size:
                return name
        return None

    def listings(self) -> dict[str, dict[str, int]]:
        """What lies in ``data/`` and among the attempts."""
        return {name: self.folder.listing(name) for name in ("data", ATTEMPTS)}

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The committed shards' tables, in order, one at a time.

        Args:
            columns: Only these.

        Raises:
            OutputError: A record's file is missing.
        """
        listed = self.listings()
        for record in self.records():
            name = self.locate(record, listed)
            if name is None:
                raise OutputError(f"{self.path}: the file of shard {record.shard} is gone or cut; run the job again")
            yield parquet.read(self.folder, name, columns)

    def summaries(self) -> Iterator[dict[str, Any]]:
        """The stage's summaries, in shard order; a shard that had to be split left several."""
        for record in self.records():
            for name in record.summary:
                yield read_summary(self.folder, name)

    def status(self) -> Status:
        """The state of the run, from any shell or machine that can read the folder."""
        tally = Tally()
        for record in self.records():
            tally.add(record)
        progress = self._last_progress()
        held = lock.holder(self.folder)
        alive = held is not None and not held["stale"]
        complete = self.folder.exists(SUCCESS)
        state = "running" if alive else "complete" if complete else "incomplete"
        counted = replace(
            progress,
            rows=int(self.plan["rows"]),
            shards=int(self.plan["shards"]),
            rows_ok=tally.ok,
            rows_failed=tally.failed,
            shards_done=tally.shards,
        )
        if not alive:
            counted = replace(counted, rows_active=0, workers=0, rows_per_second=0.0, seconds_left=None)
        kept = {key: held[key] for key in ("host", "pid", "silent_s")} if held is not None and alive else None
        return Status(state, counted, kept, tally.errors, tally.measures)

    def _last_progress(self) -> Progress:
        try:
            return Progress(**json.loads(self.folder.read(PROGRESS)))
        except (FileNotFoundError, ValueError, TypeError):
            return Progress("starting")

    def save_progress(self, progress: Progress) -> None:
        """Leave a snapshot for `status`."""
        self.folder.write(PROGRESS, json.dumps(asdict(progress)).encode())

    def open_file(self, name: str, mode: str = "rb") -> Any:
        """Open a file below the folder, for instance ``report.html``; parents are made when writing."""
        if "r" in mode:
            return self.folder.open(name)
        if self.folder.local:
            self.folder.fs.makedirs(self.folder.path(name).rpartition("/")[0], exist_ok=True)
        return self.folder.fs.open(self.folder.path(name), mode)

    def is_published(self, name: str) -> bool:
        """Whether a file in ``data/`` has the name of one of this plan's shards."""
        match = re.fullmatch(r"part-(\d+)-of-(\d+)\.parquet", name)
        return bool(match) and f"data/{name}" == self.part(int(match[1])) and int(match[1]) < int(self.plan["shards"])  # type: ignore[index]


def own_folder(folder: Folder) -> Folder:
    return replace(folder, root=folder.path(OWN))


def load_plan(folder: Folder) -> dict[str, Any] | None:
    """The plan in a folder; None if there is none.

    Raises:
        OutputError: It is damaged.
    """
    try:
        plan: dict[str, Any] = json.loads(folder.read(PLAN))
        decode_schema(plan["schema"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(f"{folder.url}/{PLAN} is damaged ({error}); name another output folder") from None
    return plan


# --- verify ----------------------------------------------------------------------------------------------------------


def verify(
    path: str,
    storage_options: Mapping[str, Any] | None = None,
    checksums: bool = True,
    input_options: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Read the whole output and check it: records, files, sizes, checksums, and every planned id exactly once.

    The ids of each shard are compared with the plan: with those that follow from its spans, or, where ids come from the
    input's content, with their digest.

    Args:
        checksums: Also compare each file's digest with its record (reads all bytes; otherwise only ids are read).
        input_options: fsspec's, to name the missing ids when they have to be read from the input.

    Raises:
        OutputError: There is no run in the folder.
    """
    output = Output.open(path, storage_options)
    problems: list[str] = []
    listed = output.listings()
    unique = Uniqueness()
    tally = Tally()
    schema = decode_schema(output.plan["schema"])
    found = 0
    records = set(output.folder.listing(RECORDS))
    for shard in read_shards(output.own):
        if record_name(shard.index).rpartition("/")[2] not in records:
            problems.append(f"shard {shard.index} ({shard.rows} rows) is not committed; run the job again")
            continue
        record = output.record(record_name(shard.index))
        name = output.locate(record, listed)
        if name is None:
            problems.append(f"the file of shard {shard.index} is missing or cut short; run the job again")
            continue
        tally.add(record)
        problem, ids = _check_file(output, record, name, schema, checksums)
        found += len(ids)
        unique.add(ids)
        problem = problem or _check_ids(output, shard, ids, input_options)
        if problem is not None:
            problems.append(f"{name}: {problem}")
    if suspects := unique.suspects():
        problems += _twice(output, suspects, listed)
    foreign = tuple(sorted(f"data/{name}" for name in listed["data"] if not output.is_published(name)))
    problems += [f"{name} is not this run's; move it away, or run the job again to set it aside" for name in foreign]
    if not output.folder.exists(SUCCESS):
        problems.append("the output is not published (_SUCCESS is missing); run the job again")
    planned = int(output.plan["rows"])
    shown = tuple(problems[:NAMED_PROBLEMS])
    return VerifyReport(not problems, planned, found, tally.ok, tally.failed, shown, foreign)


def _check_file(
    output: Output, record: Record, name: str, schema: pa.Schema, checksums: bool
) -> tuple[str | None, list[str]]:
    """A problem with one file, if there is one, and the ids in it."""
    try:
        with parquet.handle(output.folder, name) as handle:
            if checksums and checksum(handle) != record.checksum:
                return "its bytes are not those that were committed; delete it and run the job again", []
            file = pq.ParquetFile(handle)
            kind = file.schema_arrow
            stored = file.read(["id", "status"], use_threads=output.folder.local)
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read ({error}); delete it and run the job again", []
    ids, statuses = stored["id"].to_pylist(), Counter(stored["status"].to_pylist())
    if not kind.equals(schema, check_metadata=False):
        return "its columns are not the planned ones; delete it and run the job again", ids
    if (statuses["ok"], statuses["failed"]) != (record.rows_ok, record.rows_failed) or len(ids) != record.rows:
        return f"holds {dict(statuses)}, its record says {record.rows_ok} ok, {record.rows_failed} failed", ids
    return None, ids


def _check_ids(output: Output, shard: Shard, ids: list[str], input_options: Mapping[str, Any] | None) -> str | None:
    if shard.ids is not None and digest(ids) == shard.ids:
        return None
    source = Source.from_json(output.plan["source"], input_options)
    try:
        planned = expected_ids(resolve(source) if source.format is None else source, shard)
    except (SourceError, OSError) as error:
        return f"its ids are not the planned ones (and the input cannot be read to name them: {error})"
    if planned == ids:
        return None
    missing = list((Counter(planned) - Counter(ids)).elements())
    extra = list((Counter(ids) - Counter(planned)).elements())
    if not missing and not extra:
        return "its rows are not in the planned order"
    return f"{len(missing)} planned ids are missing (such as {missing[:1]}), {len(extra)} are extra ({extra[:1]})"


def _twice(output: Output, suspects: set[int], listed: Mapping[str, Mapping[str, int]]) -> list[str]:
    places: dict[str, str] = {}
    problems = []
    for record in output.records():
        name = output.locate(record, listed)
        if name is None:
            continue
        ids = parquet.read(output.folder, name, ["id"])["id"].to_pylist()
        for own, hashed in zip(ids, Uniqueness.hashes(ids, len(ids)), strict=True):
            if int(hashed) in suspects:
                if own in places:
                    problems.append(f"id {own!r} is in {places[own]} and in {name}")
                places[own] = name
    return problems


class Leftovers:
    """Attempts and summaries that no record names: those of losers, of the dead, and of strangers.

    What lies there is listed first; each record then spares its own, and `remove` deletes the rest.
    """

    def __init__(self, output: Output) -> None:
        self._folder = output.folder
        self._names = {f"{place}/{name}" for place in (ATTEMPTS, SUMMARIES) for name in output.folder.listing(place)}
        self._names |= {f"{RECORDS}/{name}" for name in output.folder.listing(RECORDS) if name.endswith(".tmp")}

    def spare(self, record: Record) -> None:
        self._names.discard(f"{ATTEMPTS}/{record.file}")
        self._names.difference_update(f"{SUMMARIES}/{name}" for name in record.summary)

    def remove(self) -> None:
        for name in sorted(self._names):
            self._folder.remove(name)
