"""One schedule from a seed: drivers, workers, users and the store go wrong; then all is calm, and one more run ends it.

What has to hold, whatever happened: everything ends; a run that says ``complete`` has published every planned row once
with its value, and `verify` says so; nobody takes the folder from a driver that shows that it lives; a driver that has
lost it changes nothing more. What may happen is that a run fails, and says why.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import machine, storage
from pipeline.contract import Column, StageInfo, StageSpec
from pipeline.input.files import InputFile, list_files
from pipeline.input.rows import FileScan
from pipeline.input.source import Source
from pipeline.output import dataset, fold, log, parquet, planfile
from pipeline.output import lock as locks
from pipeline.output.commit import RECORDS, Record, recorded
from pipeline.output.dataset import Output
from pipeline.output.lock import Lock
from pipeline.output.planfile import OutputError
from pipeline.output.verify import verify
from pipeline.run import dispatch, driver, plan, reporter
from pipeline.run.draft import Draft, RunSpec, draft
from pipeline.run.driver import Finished, PlanMismatch, RunError, RunResult, run
from pipeline.run.survey import Survey, survey
from pipeline.storage import DIGEST_BYTES, Folder, checksum
from tests.simulation import planning
from tests.simulation.planning import Inputs
from tests.simulation.pool import FORMS, Fleet, SimPool, made
from tests.simulation.store import CALM, Bucket, Weather
from tests.simulation.world import Host, Process, Simulated, Thread, World, current

OUT = "sim://out"
FOREIGN = "out/data/part-00007-of-00009.parquet"
LINES = 3 * 200
END_S = 20_000.0
STARTS = 8
RENEW_S = 20.0
"""Twice what it is elsewhere: most of what is asked of the store is whether one still holds the folder."""
UNASKED = 4
"""Changes that a thread may make for which it has once asked leave: a file set aside, and another put in its place."""

PARQUET = 8
"""Of so many schedules one has the log's files in the format that they have elsewhere."""
TASKS = 12
"""Of so many schedules one is planned by tasks on workers."""
ONCE = 0.75
"""Of the schedules, in so many the store refuses a taken name at the end of an upload: files get theirs at once."""
GROWING = 0.15
"""Of the schedules that are not planned by tasks, in so many the user asks for a part of the rows first."""
VERIFIED = 5
"""Of so many schedules one is verified at its end; all are compared with what was planned."""


class Wrong(AssertionError):
    """Something happened that must not."""


class Lengths:
    """The stage that is planned; its rows are made by `tests.simulation.pool.made`."""

    @staticmethod
    def describe(factor: float) -> StageInfo:
        return StageInfo((Column("length", "float64"),))


@lru_cache(1)
def _input() -> Source:
    path = Path(tempfile.mkdtemp(prefix="latentmill-simulation-")) / "in.txt"
    path.write_text("".join(f"line {i}\n" for i in range(LINES)))
    return Source((str(path),), columns={"text": "text"})


@lru_cache(1)
def _folder() -> Source:
    """A folder of files, to be planned by tasks; what they hold is `tests.simulation.planning`'s."""
    path = Path(tempfile.mkdtemp(prefix="latentmill-simulation-"))
    (path / "0.txt").write_text("line 0\n")
    return Source((str(path),), columns={"text": "text"})


@lru_cache(1024)
def _surveyed(limit: int, rows: int, ends: tuple[int, ...]) -> tuple[Survey, list[Any], list[Any]]:
    totals, files = Survey(), list[tuple[Any, FileScan]]()
    source = _drafted(1.0, limit, rows).source
    cut = survey(source, rows, limit, totals, lambda file, scan: files.append((file, scan)), ends=ends)
    return totals, files, list(cut)


@lru_cache(1024)
def _drafted(factor: float, limit: int, rows: int) -> Draft:
    return draft(_spec(factor, limit, rows, None))


@lru_cache(1024)
def _drafted_tasks(factor: float, rows: int) -> Draft:
    return draft(_spec(factor, None, rows, None))


def _spec(factor: float, limit: int | None, rows: int, bucket: Bucket | None) -> RunSpec:
    """Without a limit it is planned by tasks."""
    stage = StageSpec("tests.simulation.schedule:Lengths", {"factor": factor})
    source = _folder() if limit is None else _input()
    return RunSpec(stage, source, OUT, {"factor": factor}, shard_rows=rows, limit=limit, keep=("text",),
                   storage_options={"bucket": bucket})  # fmt: skip


def _add_up(finished: Finished) -> None:
    """What follows the last shard: a product, made of all tables."""
    lengths = [value for part in finished.tables(["length"]) for value in part["length"].to_pylist()]
    with finished.output.open_file("sums/total", "wb") as file:
        file.write(b"%d %d" % (len(lengths), sum(filter(None, lengths))))


def _draft(spec: RunSpec) -> Draft:
    if spec.limit is None:
        return _drafted_tasks(spec.stage.params["factor"], spec.shard_rows)
    return _drafted(spec.stage.params["factor"], spec.limit, spec.shard_rows)


def _listed(source: Source, *rest: Any) -> Iterator[InputFile]:
    return planning.listed(source) if source.path == _folder().path else list_files(source, *rest)


def _check_input(source: Source, folder: Folder, limit: int | None) -> Any:
    return plan.check_input(source, folder, limit) if limit is None else {}


def _survey(source: Source, every: int, limit: int | None, totals: Survey, seen: Any, *rest: Any) -> Iterator[Any]:
    if limit is None:
        yield from survey(source, every, limit, totals, seen, *rest)
        return
    *_, ends = rest
    known, files, shards = _surveyed(limit, every, tuple(ends))
    for file, scan in files:
        seen(file, scan)
    yield from shards
    vars(totals).update(vars(replace(known, notes=[])))


def _batches(folder: Folder, name: str) -> Iterator[pa.RecordBatch]:
    yield from _parsed(folder.open(name).read())


@lru_cache(1024)
def _parsed(content: bytes) -> list[pa.RecordBatch]:
    """The plan's tables are the same in many schedules."""
    return _whole(content).to_batches()  # type: ignore[no-any-return]


def _whole(content: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


@lru_cache(1024)
def _named(content: bytes) -> frozenset[tuple[int, int]]:
    """Shards and generations that a file of the log names."""
    try:
        rows = log._table(content).to_pylist()
    except (pa.ArrowException, OSError):
        return frozenset()
    return frozenset((row["shard"], row["generation"]) for row in rows)


_logged, _table, _counted = lru_cache(4096)(log._File.of), lru_cache(4096)(log._table), lru_cache(4096)(parquet.rows)
_recorded, _plan = lru_cache(4096)(Record.from_json), lru_cache(256)(planfile._plan)
"""Records, plans and files of the log are looked at by many; the footers of attempts are the same in many schedules."""


def _packed(table: pa.Table) -> bytes:
    """A file of the log that says when it is damaged, in another format than Parquet, which takes longest."""
    rows = json.dumps(table.to_pydict()).encode()
    return hashlib.blake2b(rows, digest_size=DIGEST_BYTES).digest() + rows


@lru_cache(4096)
def _unpacked_whole(content: bytes) -> pa.Table:
    if hashlib.blake2b(content[DIGEST_BYTES:], digest_size=DIGEST_BYTES).digest() != content[:DIGEST_BYTES]:
        raise pa.ArrowInvalid("damaged")
    return pa.table(json.loads(content[DIGEST_BYTES:]), schema=log._SCHEMA)


def _unpacked(content: bytes, columns: tuple[str, ...] = tuple(log._SCHEMA.names)) -> pa.Table:
    return _unpacked_whole(content).select(list(columns))


_url_to_fs = fsspec.url_to_fs


def _opened(url: str, **options: Any) -> tuple[Any, str]:
    """A bucket's filesystem is made once: fsspec takes longer to make one than for what most who ask for it do."""
    return (options["bucket"].files, "out") if url == OUT else _url_to_fs(url, **options)


class _Rows(planfile._Rows):
    """The plan's tables, too."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._upload = folder, name, folder.begin(name)
        self._schema, self._rows = schema, list[tuple[Any, ...]]()

    def _flush(self) -> None:
        raise AssertionError("no simulated plan is as long")

    def close(self) -> None:
        self._upload.write(_encoded(self._schema, tuple(self._rows)))
        self._upload.close()


@lru_cache(1024)
def _encoded(schema: pa.Schema, rows: tuple[tuple[Any, ...], ...]) -> bytes:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink)
    return sink.getvalue()


class _Meters:
    """Prometheus hears nothing."""

    def __init__(self, output: str, planned: int) -> None: ...

    def committed(self, *rows: int) -> None: ...

    def ended(self, outcome: object) -> None: ...

    def retried(self, tasks: int = 1) -> None: ...

    def turn(self, *state: int) -> None: ...


@contextmanager
def simulated() -> Iterator[None]:
    """The runtime's code finds the simulated world under it: machine, Ray and the scan of the input."""
    with (
        patch.object(machine, "here", Simulated()),
        patch.multiple(driver, connected=lambda *args: nullcontext(False), Pool=SimPool, Meters=_Meters, draft=_draft,
                       check_input=_check_input, is_heavy=lambda source, limit: limit is None,
                       scan_elsewhere=planning.scanned),
        patch.multiple(plan, survey=_survey, list_files=_listed, scanned_again=planning.scanned_again),
        patch("pipeline.run.survey.list_files", _listed),
        patch.dict(sys.modules, ray=planning.Ray),
        patch.object(parquet, "batches", _batches),
        patch.object(parquet, "rows", _counted),
        patch.object(log, "_table", _table),
        patch.object(log._File, "of", _logged),
        patch.object(Record, "from_json", _recorded),
        patch.object(planfile, "_Rows", _Rows),
        patch.object(planfile, "_plan", _plan),
        patch.object(fsspec, "url_to_fs", _opened),
        patch.object(storage, "PART_BYTES", 16),
        patch.object(locks, "POLL_S", 8.0),
        patch.object(locks, "RENEW_S", RENEW_S),
        patch.multiple(dataset, READERS=4, RECORD_READERS=4),
        patch.object(dispatch, "TICK_S", 10.0),
        patch.object(reporter, "SAVE_S", 60.0),
    ):  # fmt: skip
        yield


@dataclass
class _Attempted:
    """A driver that was started."""

    process: Process
    thread: Thread


class Schedule:
    """A world in which a user wants one dataset.

    Of a thousand, 800 have 1 - 4 shards, 165 have 1 - 20, 28 have 1 - 60 and 7 have 1 - 200: what goes wrong mostly
    does so among few, and among many who reads several records at a time or folds them.

    Attributes:
        seed: All of it follows from this.
        claims: How many runs said that the dataset was complete.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.world = seed, World(seed)
        self.random = self.world.random
        self.bucket = Bucket(self.world)
        self.bucket.watch = self._watch
        many = self.random.random()
        most = 4 if many < 0.8 else 20 if many < 0.965 else 60 if many < 0.993 else 200
        self.shards, self.rows = self.random.randint(1, most), self.random.randint(1, 3)
        self.hosts = [self._host(i) for i in range(4)]
        self.fleet = self.bucket.fleet = Fleet(self.world, self.hosts[3])  # type: ignore[attr-defined]
        self.inputs = Inputs(self.random, self.shards * self.rows, self.random.random() < 1 / TASKS)
        planning.settle(self.world, self.inputs, self.fleet)
        self.products = self.random.random() < 0.15
        self.total = self.limit = self.shards * self.rows
        self.growth = Random(-1 - seed)  # by itself: other schedules are what they were
        self.bucket.once = self.growth.random() < ONCE
        if not self.inputs.tasks and self.total > 1 and self.growth.random() < GROWING:
            self.limit = self.growth.randint(1, self.total - 1)
        self.factor, self.claims, self.drivers = 1.0, 0, list[_Attempted]()
        self._taken: list[tuple[float, int]] = []
        self._renewed: dict[int, tuple[float, Process | None]] = {}
        self._late: dict[Thread, set[tuple[str, str]]] = {}
        self._rash: dict[Process, str] = {}
        self.found: Wrong | None = None
        self._swept = False
        self.last = False
        self.disturbed = 0.0
        self._published: dict[Process, float] = {}
        self._damaged: set[Any] = set()

    def _host(self, number: int) -> Host:
        """Machines with clocks that go wrong; two of them may be containers of one."""
        same = number and self.random.random() < 0.3
        name = "node0" if same else f"node{number}"
        ahead = self.random.choice((0.0, 0.0, 130.0, -130.0, 1e6, -1e6))
        return Host(name, f"boot-{name}", f"pid:[{number}]", ahead, self.random.choice((1.0, 1.0, 0.98, 1.02)))

    def run(self) -> None:
        """All of it.

        Raises:
            Wrong, Endless: Something that must not happen did.
        """
        chance = self.random
        rates = (0.0, 0.0, 0.005, 0.03)
        self.bucket.weather = Weather(
            refused=chance.choice(rates), lost=chance.choice(rates), crash=chance.choice((0.0, 0.0, 0.002, 0.01)),
            stall=chance.choice((0.0, 0.0, 0.003, 0.01)), delay_s=chance.choice((0.01, 0.03, 0.3)),
        )  # fmt: skip
        span = chance.choice((20.0, 100.0, 1000.0))
        for _ in range(chance.choice((1, 1, 2, 3))):
            self.world.call(chance.random() * span, self._start)
        for _ in range(chance.choice((0, 0, 1, 3))):
            action = chance.choice((self._kill, self._kill, self._interrupt, self._outage, self._stall, self._stall,
                                    self._damage, self._damage, self._anew))  # fmt: skip
            self.world.call(chance.random() * span * 1.5, action)
        if self.inputs.tasks and chance.random() < 0.15:
            self.world.call(chance.random() * span, self._edit)
        if self.limit < self.total:
            for _ in range(self.growth.choice((0, 1, 1, 2))):
                self.world.call(self.growth.random() * span * 1.5, self._more)
        self.world.call(2 * span, self._calm)
        probed = Lock._probed if chance.random() < 0.1 else lambda *args: True  # fourteen requests that harm nobody
        as_it_is = self.seed % PARQUET == 0
        log_format = nullcontext() if as_it_is else patch.multiple(log, _packed=_packed, _table=_unpacked)
        with (
            patch.object(fold, "FOLD_RECORDS", chance.choice((1, 3, 8, 1000))),
            patch.object(Lock, "_probed", probed),
            log_format,
        ):
            self._lives()

    def _lives(self) -> None:
        try:
            self._to_the_end()
            self._no_stranger()
            self.last, self.limit = True, self.total
            if "out/_latentmill/plan.json" in self.bucket.objects:
                self.inputs.put_back(json.loads(self.bucket.objects["out/_latentmill/plan.json"])["rows"])
            last = self._start()
            self._to_the_end()
            if isinstance(last.thread.error, OutputError) and self._swept:
                last = self._start()
                self._to_the_end()
            if not isinstance(last.thread.result, RunResult) or last.thread.result.state != "complete":
                raise Wrong(f"a last run in calm weather ended with {last.thread.result or last.thread.error!r}")
        finally:
            self.world.close()

    def _to_the_end(self) -> None:
        self.world.run(self.world.now + END_S)
        if self.found:
            raise self.found

    def _start(self) -> _Attempted:
        """A driver starts."""
        host = self.random.choice(self.hosts[:3])
        process = self.world.process(host, "driver", self._pid(host))
        process.on_death.append(self._again)
        process.on_stall.append(lambda: self._stands(process))
        self.drivers.append(_Attempted(process, process.start(self._drive, self.factor)))
        return self.drivers[-1]

    def _pid(self, host: Host) -> int | None:
        """Containers number their processes each for themselves: the first of each is number 1."""
        taken = any(each.process.alive and each.process.pid == 1 and each.process.host == host for each in self.drivers)
        return None if taken else 1

    def _again(self) -> None:
        """Somebody starts a driver that has ended once more, for as long as there is bad weather."""
        if self.bucket.weather is not CALM and len(self.drivers) < STARTS and self.random.random() < 0.8:
            self.world.call(self.world.now + 150 * self.random.random(), self._start)

    def _drive(self, factor: float) -> RunResult:
        process, begun = current().process, self.world.now
        options: dict[str, Any] = {"finish": _add_up, "products": ("sums",)} if self.products else {}
        again = self.fleet.moody and (self.last or self.random.random() < 0.5)
        try:
            spec = _spec(factor, None if self.inputs.tasks else self.limit, self.rows, self.bucket)
            result = run(spec, max_failed_fraction=1.0, retry_failed=again, **options)
        except (OutputError, locks.OutputLocked, RunError, PlanMismatch, OSError, KeyboardInterrupt):
            self._sweep()
            process.die()  # it has ended, and said why
            raise
        except Exception as error:
            self._wrong(f"a driver ended with {type(error).__name__}: {error}", error)
            raise
        if result.state == "complete":
            self.claims += 1
            if self.disturbed <= begun and factor == self.factor and not self._overtaken(process):
                self.world.process(self.hosts[0], "reader").start(self._look)
        process.alive = False
        if result.state != "complete":
            self._again()
        return result

    def _epoch(self, process: Process) -> int:
        """The last one that a driver had the folder in; 0: it never had it."""
        return max((epoch for epoch, (_, owner) in self._renewed.items() if owner is process), default=0)

    def _overtaken(self, process: Process) -> bool:
        """Whether a driver had the folder when it published, or found all published, and stood still before it could
        say so while another took the folder: what is there now is the other's."""
        mine = self._epoch(process)
        published = self._published.get(process)
        if published is None:
            return any(when < process.woke and epoch > mine for when, epoch in self._taken)
        return any(when > published and epoch > mine for when, epoch in self._taken)

    def _look(self) -> None:
        """The dataset is what was planned, after a run that said so."""
        try:
            self._compare()
        except Wrong as wrong:
            self._wrong(str(wrong), wrong)

    def _compare(self) -> None:
        objects, options = self.bucket.objects, {"bucket": self.bucket.still()}
        if "out/_SUCCESS" not in objects:
            raise Wrong("a run said complete, and _SUCCESS is not there")
        output = Output.open(OUT, options)
        if output.plan["config"]["factor"] != self.factor:
            raise Wrong("a run said complete, and the plan is another's")
        planned = output.plan["rows"]
        if not self.inputs.tasks and planned != self.limit:
            raise Wrong(f"a run said complete, and {planned} rows are planned, not {self.limit}")
        lines = self.inputs.lines(planned)[:planned]
        cuts = self._cuts([step["rows"] for step in planfile.steps(output.plan)])
        shards = len(cuts)
        for number, (start, stop) in enumerate(cuts):
            name, some = f"out/{output.part(number)}", lines[start:stop]
            own = tuple((file, line, line + 1) for file, line in some)
            forms = {made(output.plan["schema"], self.factor, own, form=form)[0] for form in range(FORMS)}
            found, (_, table) = objects.get(name, b""), made(output.plan["schema"], self.factor, own)
            if found not in forms and not (found and self._alike(_whole(found), table)):
                state = "not what was planned" if found else "missing"
                raise Wrong(f"{name} is {state} after a run that said complete")
        if self.products and (self.last or not self.fleet.moody):
            found = objects.get("out/sums/total", b"")
            if found != b"%d %d" % (len(lines), self.factor * sum(line for _, line in lines)):
                raise Wrong(f"what finish made says {found!r} of {len(lines)} rows after a run that said complete")
        if self.last:
            self._recorded(output, shards)
        if self.last and self.seed % VERIFIED == 0:
            report = verify(OUT, options)
            if not report.ok:
                raise Wrong(f"verify, after a run that said complete: {report.problems[:3]}")

    def _recorded(self, output: Output, shards: int) -> None:
        """There is a record for each shard, of the very bytes that are published, and readers see no other file."""
        objects, records = self.bucket.objects, list(output.records())
        if [record.shard for record in records] != list(range(shards)):
            raise Wrong("the records are not one for each shard after a run that said complete")
        names = {f"out/{output.part(record.shard)}": record for record in records}
        for name, record in names.items():
            if checksum(io.BytesIO(objects[name])) != record.checksum:
                raise Wrong(f"{name} holds other bytes than its record says after a run that said complete")
        self._no_stranger()

    def _no_stranger(self) -> None:
        """Readers of what is complete see no file but the run's, whoever wrote one since."""
        objects = self.bucket.objects
        if "out/_SUCCESS" not in objects or "out/_latentmill/plan.json" not in objects:
            return
        output = Output.open(OUT, {"bucket": self.bucket.still()})
        own = {f"out/{output.part(shard)}" for shard in range(output.plan["shards"])}
        seen = {name for name in objects if fnmatchcase(name, f"out/{output.parts}")}
        if strange := seen - own - {FOREIGN}:
            raise Wrong(f"readers see {min(strange)}, which is not the run's, in a folder that is complete")

    def _cuts(self, reached: list[int]) -> list[tuple[int, int]]:
        """First and last row of each shard of a plan that went so far each time."""
        starts = {row for start, end in zip([0, *reached], reached, strict=False)
                  for row in range(start, end, self.rows)}  # fmt: skip
        return list(pairwise([*sorted(starts), reached[-1]]))

    def _alike(self, found: pa.Table, planned: pa.Table) -> bool:
        """Whether a shard holds its rows; some may have failed and not been done again."""
        if self.last or not self.fleet.moody:
            return found.equals(planned)
        rows = zip(found.to_pylist(), planned.to_pylist(), strict=True)
        return all(row == {**full, "status": row["status"], **({"length": None, "error": "not now"}
                           if row["status"] == "failed" else {})} for row, full in rows)  # fmt: skip

    def _watch(self, process: Process | None, verb: str, path: str, content: bytes) -> None:
        """Whether a change is one that may be made."""
        if process is None or process.name != "driver":
            return
        now = self.world.now
        if verb.startswith("remove") and path.startswith(f"out/{RECORDS}/") and not self._may_go(path):
            self._wrong(f"a record goes that no file of the log has: {path}")
        if verb == "remove too":
            return
        if path == "out/_SUCCESS" and verb != "remove":
            self._published[process] = now
        if path.startswith("out/_latentmill/locks/"):
            epoch = int(path.rpartition("/")[2].removesuffix(".json"))
            if verb == "remove":  # its own: it has seen that the holder woke
                if self._renewed.get(epoch, (0.0, None))[1] is process:
                    del self._renewed[epoch]
                    self._rash.pop(process, None)
                    self._taken = [taken for taken in self._taken if taken[1] != epoch]
                return
            if verb == "create":
                before, holder = self._renewed.get(epoch - 1, (-1e9, None))
                patience = locks.LEASE_S / 1.05 - 1
                if holder is not None and holder.alive and holder is not process and now - before < patience:
                    self._rash[process] = (
                        f"a driver took the folder {now - before:.0f} s after the holder's sign of life"
                    )
                self._taken.append((now, epoch))
            self._renewed[epoch] = (-1e9 if b'"done": true' in content else now, process)
            return
        if process in self._rash:
            self._wrong(f"{self._rash[process]}, and goes on: {verb} {path}")
        mine = self._epoch(process)
        lost = min(((when, epoch) for when, epoch in self._taken if epoch > mine), default=None)
        if not mine or lost is None or now < max(lost[0] + self._notice(lost[1]), process.woke):
            return
        late = self._late.setdefault(current(), set())
        late.add((verb, path))
        if len(late) > UNASKED:
            self._wrong(f"a driver that lost the folder {now - lost[0]:.0f} s ago goes on: {verb} {path}")

    def _notice(self, epoch: int) -> float:
        """Seconds in which a driver may go by what it knew before an epoch was taken: none, if that was taken after a
        lease in which the driver gave no sign of life; else who took it will see that, and give it back."""
        _, taker = self._renewed.get(epoch, (0.0, None))
        return 1.1 * locks.RENEW_S if taker is None or taker in self._rash else 0.0

    def _may_go(self, path: str) -> bool:
        """Whether a record is another run's, damaged, or has been folded or withdrawn, also into a file that somebody
        has damaged since."""
        objects = self.bucket.objects
        run = json.loads(objects.get("out/_latentmill/plan.json", b'{"run": null}'))["run"]
        of, place = recorded(path.rpartition("/")[2], run), f"out/{log.LOG}/"
        files = (name for name in objects if name.startswith(place) and log.logged(name[len(place) :], run))
        return of is None or of in self._damaged or any(of in _named(objects[name]) for name in files)

    def _wrong(self, what: str, cause: BaseException | None = None) -> None:
        if self.found is None:
            self.found = Wrong(f"at {self.world.now:.0f} s: {what}")
            self.found.__cause__ = cause

    def _kill(self) -> None:
        living = [each for each in self.drivers if each.process.alive]
        if living:
            self.random.choice(living).process.die()

    def _interrupt(self) -> None:
        for each in self.drivers:
            each.process.interrupt()

    def _outage(self) -> None:
        self.bucket.away = self.world.now + 300 * self.random.random()

    def _stall(self) -> None:
        names = ("driver",) if self.random.random() < 0.7 else ("worker",)
        living = [process for process in self.world.processes if process.alive and process.name in names]
        if living:
            self.random.choice(living).stall(500 * self.random.random())

    def _stands(self, process: Process) -> None:
        """Something stands still; whoever waits for it may start another driver."""
        if process.name == "driver" and process.stalled - self.world.now > 60 and len(self.drivers) < STARTS:
            if self.inputs.tasks and "out/_latentmill/plan.json" not in self.bucket.objects:
                self._edit()
            self.world.call(self.world.now + 60 * self.random.random(), self._start)

    def _damage(self) -> None:
        """A user, or a cleaner, does something to the folder's files."""
        places = ("/data/", "/attempts/", "/records/", "/log/", "/summaries/", "/sums/", "README", "progress",
                  "_SUCCESS")  # fmt: skip
        names = [name for name in self.bucket.objects if any(place in name for place in places)]
        self.disturbed = self.world.now + 1e-9
        if not names or "out/_latentmill/plan.json" not in self.bucket.objects:
            return
        what = self.random.choice(("remove", "cut", "foreign"))
        if what == "foreign":
            self.bucket.put(FOREIGN, b"not ours")
            return
        name = self.random.choice(sorted(names))
        if f"/{log.LOG}/" in name:
            self._damaged |= set(_named(self.bucket.objects[name]))
        if what == "remove":
            del self.bucket.objects[name]
        else:
            self.bucket.put(name, self.bucket.objects[name][: len(self.bucket.objects[name]) // 2])

    def _more(self) -> None:
        """The user wants more rows, whoever is at work on the folder."""
        self.limit = self.growth.randint(self.limit, self.total)
        self.disturbed = self.world.now + 1e-9
        self.world.call(self.world.now + 60 * self.growth.random(), self._start)

    def _edit(self) -> None:
        """A user adds a line to a file of the input."""
        self.inputs.version = 1

    def _anew(self) -> None:
        """The user stops the driver, deletes the folder or its plan, and wants other values, cut otherwise; workers may
        go on."""
        for each in self.drivers:
            each.process.die()
        self.factor *= 10
        self.rows = self.growth.randint(1, 3)
        published = any(not name.startswith("out/_latentmill/") for name in self.bucket.objects)
        whole = published or self.random.random() < 0.5
        for name in list(self.bucket.objects):
            if name.endswith("plan.json") or (whole and name.startswith("out/")):
                del self.bucket.objects[name]
        self._taken.clear()
        self._renewed.clear()
        self.world.call(self.world.now + 50 * self.random.random(), self._start)

    def _sweep(self) -> None:
        """Where a late worker has put a file into the folder that the user has deleted, he deletes it again."""
        objects = self.bucket.objects
        late = [name for name in objects if name.startswith("out/data/")]
        self._swept = bool(late) and "out/_latentmill/plan.json" not in objects
        for name in late if self._swept else ():
            del objects[name]

    def _calm(self) -> None:
        self.bucket.weather, self.bucket.away, self.fleet.calm = CALM, 0.0, True


@contextmanager
def _at_the_end() -> Iterator[None]:
    """What a schedule leaves is collected once, behind it: to look for it all the time took a fifth of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def outcome(seed: int) -> tuple[int, str | None, int]:
    """A seed, what is wrong with its schedule, and how many runs in it said that they were complete."""
    with simulated(), _at_the_end():
        schedule = Schedule(seed)
        try:
            schedule.run()
        except AssertionError as error:
            return seed, f"{type(error).__name__}: {error}", schedule.claims
    return seed, None, schedule.claims
