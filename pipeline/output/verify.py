"""Whether an output is whole: every planned id exactly once, in files that match their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input.files import resolve
from pipeline.input.ids import Uniqueness, digest
from pipeline.input.shards import Shard, expected_ids
from pipeline.input.source import Source, SourceError
from pipeline.output import parquet
from pipeline.output.commit import Record, recorded
from pipeline.output.dataset import SUCCESS, Output, Tally
from pipeline.output.planfile import OutputError, read_shards
from pipeline.output.products import problems as wrong_products
from pipeline.output.schema import decode_schema
from pipeline.storage import Folder, checksum

NAMED_PROBLEMS = 100
KEPT_BYTES = 32 << 20
"""A file of a store up to this size is fetched as a whole; several are at a time."""


@dataclass(frozen=True)
class VerifyReport:
    """Whether an output holds every planned id exactly once, in files that match their records.

    Attributes:
        ok: Nothing is wrong and everything is there.
        planned: Planned rows; found: rows read; rows_ok, rows_failed, rows_duplicate: by status.
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
    rows_duplicate: int = 0


def verify(
    path: str,
    storage_options: Mapping[str, Any] | None = None,
    checksums: bool = True,
    input_options: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Read the whole output and check it: records, files, sizes, checksums, products, every planned id exactly once.

    The ids of each shard are compared with the plan: with those that follow from its spans, or, where ids come from the
    input's content, with their digest. What differs from the digest is wrong whatever the input holds by now.

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

    def look(of: tuple[Shard, Record | OutputError | None]) -> tuple[Record | None, list[str], list[str]]:
        """A shard's record, the ids in its file, and what is wrong."""
        shard, record = of
        if not isinstance(record, Record):
            missing = f"shard {shard.index} ({shard.rows} rows) is not committed; run the job again"
            return None, [], [str(record or missing)]
        name = output.locate(record, listed)
        if name is None:
            return None, [], [f"the file of shard {shard.index} is missing or cut short; run the job again"]
        wrong = []
        if lost := output.lost_summary(record, listed):
            wrong.append(f"{lost}, the summary of shard {shard.index}, is missing or cut short; run the job again")
        problem, ids = _check_file(output, record, name, schema, checksums)
        if problem := problem or _check_ids(output, shard, ids, input_options):
            wrong.append(f"{name}: {problem}")
        return record, ids, wrong

    for record, ids, wrong in output.several(look, _with_records(output, problems)):
        problems += wrong
        if record is not None:
            tally.add(record)
        found += len(ids)
        unique.add(ids)
    if suspects := unique.suspects():
        problems += _twice(output, suspects, listed)
    foreign = tuple(sorted(f"data/{name}" for name in listed["data"] if output.shard_named(name) is None))
    problems += [f"{name} is not this run's; move it away, or run the job again to set it aside" for name in foreign]
    problems += [f"{problem}; run the job again" for problem in wrong_products(output, checksums)]
    if not output.folder.exists(SUCCESS):
        problems.append("the output is not published (_SUCCESS is missing); run the job again")
    planned = int(output.plan["rows"])
    shown = tuple(problems[:NAMED_PROBLEMS])
    return VerifyReport(not problems, planned, found, tally.ok, tally.failed, shown, foreign, tally.duplicates)


def _with_records(output: Output, problems: list[str]) -> Iterator[tuple[Shard, Record | OutputError | None]]:
    """The planned shards with their records, or what is wrong with these; what is wrong with the log is told."""
    damaged: dict[int, OutputError] = {}

    def tell(name: str, error: OutputError) -> None:
        of = recorded(name.rpartition("/")[2], output.run)
        if of is None:
            problems.append(str(error))
        else:
            damaged[of[0]] = error

    records = output.records(tell)
    record = next(records, None)
    for shard in read_shards(output.own):
        while record is not None and record.shard < shard.index:
            record = next(records, None)
        yield shard, record if record is not None and record.shard == shard.index else damaged.get(shard.index)


def _whole(folder: Folder, name: str, size: int) -> Any:
    """A file whose every byte is going to be read: what a store sends in one piece is kept, larger files are not."""
    kept = not folder.local and size <= KEPT_BYTES
    return pa.BufferReader(folder.read(name)) if kept else parquet.handle(folder, name)


def _check_file(
    output: Output, record: Record, name: str, schema: pa.Schema, checksums: bool
) -> tuple[str | None, list[str]]:
    """A problem with one file, if there is one, and the ids in it."""
    try:
        with _whole(output.folder, name, record.size) if checksums else parquet.handle(output.folder, name) as handle:
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
    recorded = {"ok": record.rows_ok, "failed": record.rows_failed, "duplicate": record.rows_duplicate}
    if statuses != Counter({status: count for status, count in recorded.items() if count}):
        return f"holds {dict(statuses)}, its record says {recorded}", ids
    return None, ids


def _check_ids(output: Output, shard: Shard, ids: list[str], input_options: Mapping[str, Any] | None) -> str | None:
    if shard.ids is not None and digest(ids) == shard.ids:
        return None
    source = Source.from_json(output.plan["source"], input_options).reachable()
    try:
        planned = expected_ids(resolve(source) if source.format is None else source, shard)
    except (SourceError, OSError) as error:
        return f"its ids are not the planned ones (and the input cannot be read to name them: {error})"
    if planned == ids and shard.ids is None:
        return None
    if planned == ids:
        return (
            "its ids are those of the input as it is now, but not the planned ones: the input changed during the run; "
            "put it back, delete the file and run the job again"
        )
    missing = list((Counter(planned) - Counter(ids)).elements())
    extra = list((Counter(ids) - Counter(planned)).elements())
    if not missing and not extra:
        return "its rows are not in the planned order"
    return f"{len(missing)} planned ids are missing (such as {missing[:1]}), {len(extra)} are extra ({extra[:1]})"


def _twice(output: Output, suspects: set[int], listed: Mapping[str, Mapping[str, int]]) -> list[str]:
    places: dict[str, str] = {}
    problems = []
    for record in output.records(lambda name, error: None):
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
