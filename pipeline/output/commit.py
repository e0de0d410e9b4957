"""The commit protocol: an attempt's file first, checked and durable, then the record that makes it the shard.

Steps, each a function so that a reader (or a fault test) can stop between any two: `Attempt` writes
``attempts/<run>-e<epoch>-<shard>.<token>.parquet`` and syncs it; `check_attempt` reads the footer back; `write_summary`
leaves what the stage wants kept; `write_record` creates ``records/<run>-<shard>.json`` unless there is one. Whoever
dies before the last step has changed nothing; whoever comes second finds the record, and its own attempt is swept.
(`pipeline.record` says why the parts of an index are committed otherwise.)

On a store, where a copy costs, the first attempt at a shard is written under its final name, whose end the store
refuses if the name is taken. Who is refused finds the record of who took it, or (who took it died before there was
one) has the shard done again, as an attempt like those on a disk: `publish` puts it in the other's place.

A shard may be committed again: because rows of it had failed (they are done anew, those that were well stay as they
were), or because its file was lost. That is its next generation, another file and another record,
``<run>-<shard>.g1.json``. The highest generation counts; `publish` then puts its file in the place of the one before.

Records do not stay: `pipeline.output.log` says where they go, and which of a shard counts.

A run is a plan: each has an id of its own, which every name bears, so that what a worker of an earlier plan leaves in
the same folder, however late, counts for nothing. Plans of older code have none, nor have their names. The epoch is
that of the driver which gave the work out (`pipeline.output.lock`): a later one sweeps what earlier ones left.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.failures import Fault
from pipeline.input.files import OWN
from pipeline.output import parquet
from pipeline.output.lock import latest_epoch
from pipeline.output.planfile import planned_run
from pipeline.storage import Folder, Upload

ATTEMPTS, RECORDS, SUMMARIES = f"{OWN}/attempts", f"{OWN}/records", f"{OWN}/summaries"
NAMED_ERRORS, LONGEST_ERROR = 20, 300
ATTEMPT_KEY = "latentmill.attempt"
"""In the footer of a file that was written under its final name."""
_RECORD = re.compile(r"(?:([0-9a-f]+)-)?(\d{6,})(?:\.g(\d+))?\.json")
_EPOCH = re.compile(r"(?:[0-9a-f]{12}-)?e(\d+)-")


class CommitError(OSError):
    """What was written is not what reads back."""


class Taken(OSError):
    """Another attempt's file has the shard's final name; nothing was committed."""

    fault = Fault.TRANSIENT

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is an attempt's that may never be committed")


class Superseded(RuntimeError):
    """The folder belongs to another run, or to a later driver, by now; nothing was committed."""

    fault = Fault.CHANGED


@dataclass(frozen=True)
class Record:
    """A shard's commit record. The shard exists exactly when this does and the file matches it.

    Attributes:
        shard: Number of the shard.
        attempt: Token of the attempt that won.
        file: Name of the winning attempt's file; if it was written under its final name, that.
        size: Its bytes.
        checksum: Its BLAKE2b digest, hex.
        rows_ok, rows_failed, rows_duplicate: Rows in it by status.
        started, seconds: When work on it began (Unix time), and how long it took.
        worker: Host and process that did it.
        measures: Numeric stage column -> ``{"n", "sum", "min", "max"}`` over rows with status ok.
        errors: The commonest reasons of failed rows (`fold_errors`) -> count; at most 20.
        summary: Names of the stage's summary files (npz), in row order; empty without.
        summary_bytes: Their sizes; empty for older code.
        run: Id of the run; empty in a folder that older code planned.
        epoch: Of the driver that gave the work out; 0 for older code.
        made_with: Versions of the worker's packages, as the card tells them; empty for older code.
        generation: How many commits of the shard came before: some rows had failed, or a file was lost.
        replaced: Bytes of the file that this one is made from and replaces; 0 for the first generation.
    """

    shard: int
    attempt: str
    file: str
    size: int
    checksum: str
    rows_ok: int
    rows_failed: int
    started: float
    seconds: float
    worker: str
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    run: str = ""
    epoch: int = 0
    summary_bytes: tuple[int, ...] = ()
    made_with: str = ""
    rows_duplicate: int = 0

    generation: int = 0
    replaced: int = 0

    @property
    def rows(self) -> int:
        return self.rows_ok + self.rows_failed + self.rows_duplicate

    @property
    def name(self) -> str:
        """Where it lies in the output folder."""
        return record_name(self.shard, self.run, self.generation)

    @staticmethod
    def from_json(data: bytes | str) -> Record:
        plain = dict(json.loads(data))
        tuples = {name: tuple(plain.get(name, ())) for name in ("summary", "summary_bytes")}
        return Record(**{**plain, **tuples})

    def to_json(self) -> str:
        return json.dumps(vars(self))


def attempt_name(run: str, epoch: int, shard: int, rest: str) -> str:
    """The name of a file that a worker makes of a shard."""
    return "-".join(filter(None, (run, f"e{epoch}", f"{shard:06d}{rest}")))


def epoch_of(name: str) -> int:
    """The epoch that an attempt's or summary's name bears; 0 if it has none."""
    match = _EPOCH.match(name)
    return int(match[1]) if match else 0


def record_name(shard: int, run: str, generation: int = 0) -> str:
    later = f".g{generation}" if generation else ""
    return f"{RECORDS}/{run}-{shard:06d}{later}.json" if run else f"{RECORDS}/{shard:06d}{later}.json"


def recorded(name: str, run: str) -> tuple[int, int] | None:
    """Shard and generation that a file among the records is for; None if it is no record of this run."""
    match = _RECORD.fullmatch(name)
    return (int(match[2]), int(match[3] or 0)) if match and (match[1] or "") == run else None


class Attempt:
    """A Parquet file being written. It counts for nothing before a record names it.

    Args:
        path: Among the attempts, or the shard's final name.
        token: Tells it from all other attempts; of one that is written under its final name.

    Raises:
        Taken: Another file has the final name.
    """

    def __init__(self, folder: Folder, path: str, schema: pa.Schema, token: str | None = None) -> None:
        try:
            self._upload = folder.begin(path, once=token is not None)
        except FileExistsError:
            raise Taken(path) from None
        self._folder, self._path, self._token, self.rows = folder, path, token, 0
        self._writer = pq.ParquetWriter(
            self._upload,
            schema,
            compression="zstd",
            use_dictionary=False,  # doubles the time to write floats
            write_statistics=[f.name for f in schema if not pa.types.is_nested(f.type)],
        )

    def add(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        self.rows += rows.num_rows

    def close(self) -> tuple[int, str]:
        """Write the footer and make the file durable: (bytes, checksum).

        Raises:
            Taken: Another file has the final name.
        """
        if self._token is not None:
            self._writer.add_key_value_metadata({ATTEMPT_KEY: self._token})  # so that no two end with the same bytes
        self._writer.close()
        end(self._upload, self._folder, self._path)
        return self._upload.size, self._upload.checksum

    def abandon(self) -> None:
        """Give up, and leave nothing behind if that can be helped."""
        self._upload.abandon()
        if self._token is None:
            self._folder.remove(self._path)


def end(upload: Upload, folder: Folder, path: str) -> None:
    """Make a file that has been written durable.

    Raises:
        Taken: Another file has the name, and this one was begun to be refused then.
    """
    try:
        upload.close()
    except FileExistsError:  # this one, if a first answer was lost
        if folder.end(path, upload.size) != upload.tail:
            raise Taken(path) from None


def check_attempt(folder: Folder, path: str, size: int, rows: int) -> None:
    """Read the footer back.

    Raises:
        CommitError: The file's size or row count is not what was written.
    """
    end = None if folder.local else folder.end(path, size)
    if end is None and (found := folder.size(path)) != size:
        raise CommitError(f"{path}: {found} bytes are there, {size} were written")
    try:
        stored = parquet.rows(end) if end is not None else None
        if stored is None:
            with parquet.opened(folder, path) as file:
                stored = file.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise CommitError(f"{path}: cannot be read back ({error})") from None
    if stored != rows:
        raise CommitError(f"{path}: {stored} rows on disk, {rows} were written")


def write_summary(folder: Folder, name: str, arrays: Mapping[str, np.ndarray]) -> int:
    """Leave a stage's summary of a shard beside its record; returns its bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    folder.write(f"{SUMMARIES}/{name}", buffer.getvalue())
    return len(buffer.getvalue())


def read_summary(folder: Folder, name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(folder.read(f"{SUMMARIES}/{name}")), allow_pickle=False) as arrays:
        return dict(arrays)


def check_current(folder: Folder, run: str, epoch: int, shard: int) -> None:
    """To be asked before a shard is committed, or a file gets its final name.

    Raises:
        Superseded: The folder holds another plan by now, or none; or a later driver has it.
    """
    if (now := planned_run(folder)) != run:
        found = "holds no plan any more" if now is None else f"was planned anew (run {now})"
        raise Superseded(f"{folder.url} {found}; what run {run or '(unnamed)'} made of shard {shard} is not committed")
    if (latest := latest_epoch(folder)) > epoch:
        raise Superseded(f"{folder.url} is held by a later driver (epoch {latest}); what a worker of epoch {epoch} "
                         f"made of shard {shard} is not committed")  # fmt: skip


def write_record(folder: Folder, record: Record) -> Record:
    """Commit: the record appears as a whole, and only if the shard has none.

    Returns:
        The record that stands: this one, or the one of an attempt that was faster.
    """
    if folder.create(record.name, record.to_json().encode()):
        return record
    return Record.from_json(folder.read(record.name))


def find_record(folder: Folder, shard: int, run: str) -> Record | None:
    """A shard's first record, if it is there and has not been folded."""
    try:
        return Record.from_json(folder.read(record_name(shard, run)))
    except FileNotFoundError:
        return None


class Reasons:
    """Why rows failed. Reasons that differ in nothing but numbers count together, in the words of the first."""

    def __init__(self) -> None:
        self._counts, self._words = Counter[str](), dict[str, str]()

    def add(self, reason: str, count: int = 1) -> None:
        kind = re.sub(r"\d+", "#", reason)[:LONGEST_ERROR]
        self._words.setdefault(kind, reason[:LONGEST_ERROR])
        self._counts[kind] += count

    @property
    def rows(self) -> int:
        return self._counts.total()

    def commonest(self) -> dict[str, int]:
        return {self._words[kind]: count for kind, count in self._counts.most_common(NAMED_ERRORS)}


def fold_errors(errors: Mapping[str, int]) -> dict[str, int]:
    """The commonest `Reasons`."""
    reasons = Reasons()
    for reason, count in errors.items():
        reasons.add(reason, count)
    return reasons.commonest()
