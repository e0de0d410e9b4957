"""Folded records: of a shard one counts, the same for all who read, whatever was folded, withdrawn or came late."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import machine
from pipeline.output import fold, log
from pipeline.output.commit import RECORDS, Record
from pipeline.output.dataset import Output, Tally
from pipeline.output.failed import failed_rows
from pipeline.output.fold import Folding
from pipeline.output.log import LOG, Log, encode, key, log_name, logged
from pipeline.output.planfile import PLAN, OutputError, read_shards
from pipeline.output.publish import publish
from pipeline.output.verify import verify
from pipeline.run.committed import committed
from pipeline.run.driver import Resources, RunSpec, _worker_job, run
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Task
from pipeline.run.worker import Worker
from pipeline.storage import Folder
from tests.simulation.store import Bucket, Weather
from tests.simulation.world import Host, Simulated, World
from tests.support.faulty import commit_plain, data, spec_for
from tests.support.in_process import without_ray

LINES = [f"line {i}" for i in range(14)]
SHARDS = 7


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "FOLD_RECORDS", 3)


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    return spec_for(tmp_path, LINES, shard_rows=2)


def surveyed(output: Output) -> tuple[frozenset[int], list[str]]:
    said: list[str] = []
    found = committed(output, Reporter(None, lambda progress: said.append(progress.message or ""), 1)).done
    return found, [message for message in said if message]


def names(output: Output, place: str) -> list[str]:
    return list(output.folder.listing(place))


def folded(spec: RunSpec) -> tuple[Output, list[Record]]:
    """A run whose seven shards are committed, six of them folded; and its records as they were written."""
    output, _ = commit_plain(spec)
    written = [Record.from_json(path.read_bytes()) for path in sorted((Path(output.path) / RECORDS).iterdir())]
    assert len(written) == SHARDS
    assert surveyed(output) == (set(range(SHARDS)), [])
    assert (len(names(output, LOG)), len(names(output, RECORDS))) == (2, 1)
    return Output.open(output.path), written


def late(spec: RunSpec, output: Output, shard: int) -> Record:
    """A worker that was thought dead commits a shard."""
    task = next(Task.of(each) for each in read_shards(output.own) if each.index == shard)
    made = Worker(_worker_job(spec, output, Resources())).process(task)
    assert isinstance(made, Record)
    return made


def test_folded_records_read_as_they_were_written(spec: RunSpec) -> None:
    output, written = folded(spec)
    assert list(output.records()) == written
    assert output.committed() == SHARDS
    assert (output.status().progress.shards_done, output.status().progress.rows_ok) == (SHARDS, 14)
    rows = [row for path in sorted((Path(output.path) / LOG).iterdir()) for row in pq.read_table(path).to_pylist()]
    assert sorted(row["shard"] for row in rows) == list(range(6))
    assert all(json.loads(row["record"])["shard"] == row["shard"] for row in rows)


def test_a_folded_run_is_finished_verified_and_resumed(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    folded(spec)
    result = run(spec)
    assert (result.state, result.resumed, result.ok) == ("complete", SHARDS, 14), result.reason
    assert verify(spec.output).ok, verify(spec.output).problems
    assert [row["id"] for row in data(spec.output).to_pylist()] == [f"in.txt#{i}" for i in range(14)]
    assert list(failed_rows(Output.open(spec.output))) == []
    assert run(spec).state == "complete"


def test_a_worker_that_comes_after_the_fold_adds_what_does_not_count(spec: RunSpec) -> None:
    output, written = folded(spec)
    zombie = late(spec, output, 2)
    assert zombie.attempt != written[2].attempt
    assert names(output, RECORDS) == [f"{output.run}-000002.json", f"{output.run}-000006.json"]
    assert list(output.records()) == list(Output.open(output.path).records()) == written
    assert (output.committed(), output.status().progress.shards_done) == (SHARDS, SHARDS)
    assert [problem for problem in verify(output.path).problems if "_SUCCESS" not in problem] == []
    assert surveyed(output) == (set(range(SHARDS)), [])
    assert names(output, RECORDS) == [f"{output.run}-000006.json"]
    assert zombie.file not in names(output, "_latentmill/attempts")


def test_a_driver_that_dies_between_its_file_and_the_removal_changes_nothing(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = commit_plain(spec)
    before = list(output.records())
    with monkeypatch.context() as patch:
        patch.setattr(fold, "remove", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            surveyed(output)
    assert (len(names(output, LOG)), len(names(output, RECORDS))) == (1, SHARDS)
    assert list(Output.open(output.path).records()) == before
    assert surveyed(Output.open(output.path)) == (set(range(SHARDS)), [])
    assert len(names(output, RECORDS)) == 1
    assert list(Output.open(output.path).records()) == before


@pytest.mark.parametrize("moment", ["before the log is listed", "after it"])
def test_who_reads_while_records_are_folded_sees_each_once(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    output, _ = commit_plain(spec)
    reader, before, real = Output.open(output.path), list(output.records()), Log.look
    turns = []

    def look(self: Log, *args: Any) -> Any:
        turns.append(self)
        if len(turns) > 1 or self is not reader.log:
            return real(self, *args)
        if moment == "before the log is listed":
            surveyed(output)
            return real(self, *args)
        found = real(self, *args)
        surveyed(output)
        return found

    monkeypatch.setattr(Log, "look", look)
    assert list(reader.records()) == before


def test_a_lost_file_of_a_folded_record_is_made_again(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    output, written = folded(spec)
    (Path(output.path) / "_latentmill/attempts" / written[4].file).unlink()
    done, said = surveyed(output)
    assert (done, said) == ({0, 1, 2, 3, 5, 6}, ["the file of shard 4 is gone or cut; the shard is done again"])
    assert surveyed(Output.open(output.path)) == (done, [])  # it is said once
    late(spec, output, 4)  # what a worker of before makes of it counts no more
    assert output.committed() == 6
    result = run(spec)
    assert (result.state, result.resumed) == ("complete", 6)
    assert verify(spec.output).ok, verify(spec.output).problems
    (again,) = [record for record in Output.open(spec.output).records() if record.shard == 4]
    assert (again.generation, again.replaced) == (1, 0)
    for generation in (2, 3):  # as often as need be, no name twice
        (Path(output.path) / output.part(4)).unlink()
        assert run(spec).state == "complete"
        assert [r.generation for r in Output.open(spec.output).records()] == [0, 0, 0, 0, generation, 0, 0]
    assert verify(spec.output).ok


@pytest.mark.parametrize("harm", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_file_of_the_log_is_told_and_its_shards_are_done_again(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    without_ray(monkeypatch)
    folded(spec)
    assert run(spec).state == "complete"
    path = sorted((Path(spec.output) / LOG).iterdir())[0]
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[pq.read_metadata(path).row_group(0).column(2).data_page_offset + 200] ^= 1
    bytes_ = {"cut": content[:-9], "flipped": bytes(flipped), "empty": b""}
    path.unlink() if harm == "gone" else path.write_bytes(bytes_[harm])
    report = verify(spec.output)
    assert not report.ok
    assert any(str(path) in problem for problem in report.problems) == (harm != "gone")
    assert all(problem.endswith("run the job again") for problem in report.problems)
    assert report.found == 8
    if harm != "gone":
        with pytest.raises(OutputError, match="holds no commit records"):
            list(Output.open(spec.output).records())
    result = run(spec)
    assert (result.state, result.resumed) == ("complete", 4)
    assert verify(spec.output).ok, verify(spec.output).problems


def test_a_plan_without_an_id_folds_too(spec: RunSpec) -> None:
    output, _ = commit_plain(spec)
    path = Path(output.path) / PLAN
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "run"}))
    output = Output.open(output.path)
    worker = Worker(_worker_job(spec, output, Resources()))
    for shard in read_shards(output.own):
        worker.process(Task.of(shard))
    assert surveyed(output) == (set(range(SHARDS)), [])
    assert names(output, LOG) == ["e000000-000000.parquet", "e000000-000001.parquet"]
    assert [record.shard for record in Output.open(output.path).records()] == list(range(SHARDS))


def test_another_runs_log_counts_for_nothing_and_goes(spec: RunSpec) -> None:
    output, written = folded(spec)
    stranger = [(s, 9, replace(written[s], run="0" * 12, generation=9)) for s in range(3)]
    assert output.folder.create(log_name("0" * 12, 1, 0), encode(stranger))
    assert list(Output.open(output.path).records()) == written
    surveyed(output)
    assert [logged(name, output.run) for name in names(output, LOG)] == [(0, 0), (0, 1)]


def some_record(shard: int, generation: int, token: str, length: float) -> Record:
    return Record(shard, token, f"{token}.parquet", 7, token, 3, 2, 0.0, 0.0, "here", run="abcdef012345",
                  generation=generation, errors={f"fault {shard}": 2}, rows_duplicate=1, made_with=f"v{shard}",
                  measures={"length": {"n": 3, "sum": length, "min": length, "max": length}})  # fmt: skip


def summed(records: Iterable[Record]) -> dict[str, Any]:
    tally = Tally()
    for record in records:
        tally.add(record)
    return tally.says()


def test_sums_of_the_logs_files_are_taken_and_their_records_not_read(spec: RunSpec, tmp_path: Path) -> None:
    """And files of older code have none."""
    output, written = folded(spec)
    reader = Output.open(output.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.Row, "record", None)  # calling it fails
        assert reader.tally().says() == summed(written)
    assert len(reader.log.sums(())) == 2
    assert reader.log.sums([written[0].shard]).keys() < reader.log.sums(()).keys()
    for name in names(output, LOG):
        table = pq.read_table(tmp_path / "out" / LOG / name).drop_columns(["sum"])
        pq.write_table(table, tmp_path / "out" / LOG / name)
    older = Output.open(output.path)
    assert older.tally().says() == summed(written)
    assert older.log.sums(()) == {}
    assert older.status().progress.rows_ok == len(LINES)


def test_sums_are_those_of_the_records_that_count() -> None:
    """Of whatever the log holds: shards twice, other generations, withdrawn ones, beside records that are not in it."""
    random, taken, left = Random(0), 0, 0
    for turn in range(40):
        output = Output(Folder.at(f"memory://sums/{turn}"), {"run": "abcdef012345"})
        for number in range(5):
            named = {(random.randrange(16), int(random.random() < 0.2)) for _ in range(random.randrange(1, 4))}
            made = {of: some_record(*of, f"{number}", float(number)) for of in sorted(named)}
            rows = [(*of, None if random.random() < 0.1 else record) for of, record in made.items()]
            output.folder.create(log_name(output.run, 1, number), encode(rows))
        for shard in random.sample(range(24), 4):
            record = some_record(shard, 0, "loose", 7.0)
            output.folder.create(record.name, record.to_json().encode())
        assert output.tally().says() == summed(output.records())
        used = len(output.log.sums(()))
        taken, left = taken + used, left + 5 - used
    assert min(taken, left) > 40


@pytest.mark.parametrize("summed_up", [True, False])
def test_status_asks_a_store_for_many_files_at_a_time(summed_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells what a plain loop over all records adds up, which files say their sums or none."""
    monkeypatch.setattr(machine, "here", Simulated())
    monkeypatch.setattr(log, "LONGEST_SUM", log.LONGEST_SUM if summed_up else 0)
    world = World(0)
    bucket = Bucket(world)
    written = [some_record(shard, 0, f"{shard}", float(shard)) for shard in range(1200)]
    folded, loose = written[:800], written[800:]
    output = Output(Folder.at("sim://out", {"bucket": bucket}), {"run": "abcdef012345", "rows": 7200, "shards": 1200})
    for number in range(400):
        rows = [(record.shard, 0, record) for record in folded[number::400]]
        bucket.put(f"out/{log_name(output.run, 1, number)}", encode(rows))
    for record in loose:
        bucket.put(f"out/{record.name}", record.to_json().encode())
    bucket.weather = Weather(delay_s=0.03)
    thread = world.process(Host("node", "boot", "pid"), "reader").start(output.status)
    world.run(1e9)
    said, tally = thread.result, Tally()
    for record in written:
        tally.add(record)
    progress = said.progress
    assert (progress.rows_ok, progress.rows_failed, progress.rows_duplicate) == (tally.ok, tally.failed, 1200)
    assert (progress.shards_done, said.errors, said.measures) == (1200, tally.errors, tally.measures)
    assert bucket.requests < 810
    assert world.now < 0.03 * bucket.requests / 20


def test_what_counts_is_what_a_plain_model_says(tmp_path: Path) -> None:
    """Records, folds, withdrawals and late attempts at random, read at every turn; and a reader that saw it all."""
    random, folder = Random(0), Folder.at(str(tmp_path))
    output = Output(folder, {"run": "abcdef012345", "shards": 3})
    standing: dict[int, dict[int, Record]] = {shard: {} for shard in range(3)}  # those that are not withdrawn
    highest, pending = dict.fromkeys(range(3), -1), list[Record]()

    def put(shard: int, generation: int) -> Record:
        token = f"{random.getrandbits(48):012x}"
        record = some_record(shard, generation, token, float(int(100 * random.random())))
        folder.create(record.name, record.to_json().encode())
        return record

    folding = Folding(replace(output, log=Log()))
    for turn in range(120):
        shard = random.randrange(3)
        do = random.choice(("commit", "fold", "withdraw", "late"))
        if do == "commit" and not standing[shard]:
            highest[shard] += 1
            standing[shard][highest[shard]] = put(shard, highest[shard])
            pending.append(standing[shard][highest[shard]])
        elif do == "fold":
            for record in pending:  # some that have been withdrawn among them, as a driver's that has lost the folder
                folding.add(record)
            pending.clear()
        elif do == "withdraw" and standing[shard]:
            generation, _ = standing[shard].popitem()
            folding.withdraw(shard, generation)
            folding.close()
        elif do == "late" and highest[shard] >= 0:  # finds its record, or makes one that is none
            put(shard, highest[shard])
        if random.random() < 0.05:
            folding, pending = Folding(replace(output, log=Log())), []
            folding._output.log.look(folder, output.run, map)
        expected = [max(found.items())[1] for found in standing.values() if found]
        for reader in (output, Output(folder, output.plan)) if turn % 10 == 9 else (output,):
            assert list(reader.records()) == expected, f"turn {turn}: {do} {shard}"
            assert reader.committed() == len(expected)
            assert reader.tally().says() == summed(expected)
    assert min(highest.values()) > 3
    assert len(names(output, LOG)) > 10


def test_files_of_the_log_are_unpacked_as_their_shards_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, random = Folder.at(str(tmp_path)), Random(1)
    order = sorted(range(3000), key=lambda shard: shard + random.randrange(60))  # as workers commit them
    order.append(order.pop(7))  # one late one
    for number in range(30):
        part = order[number * 100 : (number + 1) * 100]
        rows = [(s, 0, Record(s, "", "", 1, "", 1, 0, 0.0, 0.0, "", run="abcdef012345")) for s in part]
        folder.create(log_name("abcdef012345", 1, number), encode(rows))
    output, opened, real = Output(folder, {"run": "abcdef012345", "shards": 3000}), [], log._File.rows
    monkeypatch.setattr(log._File, "rows", lambda self: opened.append(self.order) or real(self))
    seen = []
    for record in output.records():
        seen.append(record.shard)
        assert len(opened) <= record.shard / 100 + 4
    assert seen == list(range(3000))


def test_what_a_driver_folds_it_knows_as_one_who_reads_it(tmp_path: Path) -> None:
    """Each file is laid into what is known, without sorting a million keys anew; a plain set says what is."""
    folder, run, random = Folder.at(str(tmp_path)), "0123456789ab", Random(0)
    mine, named, withdrawn = Log(), set[int](), set[int]()
    for number in range(40):
        chosen = random.sample([(shard, generation) for shard in range(30) for generation in range(3)], 5)
        content = encode((shard, generation, None) for shard, generation in chosen)
        name = log_name(run, 1, number)
        assert folder.create(name, content)
        mine.take(folder, run, name, content)
        named |= {key(*of) for of in chosen}
        withdrawn |= {key(*of) for of in chosen}
        assert (mine._keys.tolist(), mine._withdrawn) == (sorted(named), withdrawn)
        assert all(mine.holds(own) == (own in named) for own in (key(s, g) for s in range(31) for g in range(3)))
    other = Log()
    assert not other.look(folder, run, map)
    assert other._keys.tolist() == mine._keys.tolist()
    assert other.generations(()) == mine.generations(())


def test_keys_sort_by_shard_and_then_the_latest_generation_first() -> None:
    pairs = [(shard, generation) for shard in (0, 1, 10**9) for generation in (7, 1, 0)]
    assert sorted(pairs, key=lambda pair: key(*pair)) == pairs
    assert [log.shard_of(key(*pair)) for pair in pairs] == [shard for shard, _ in pairs]


def test_a_store_that_is_away_folds_later(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding can wait: no run ends for it."""
    output, _ = commit_plain(spec)
    records, real, away = list(output.records()), Folder.create, [True]

    def create(self: Folder, name: str, content: bytes) -> bool:
        if LOG in name and away[0]:
            real(self, name, content)  # it is there, though the answer was lost
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(self, name, content)

    monkeypatch.setattr(Folder, "create", create)
    folding = Folding(output)
    for record in records[:4]:
        folding.add(record)
    assert len(names(output, RECORDS)) == SHARDS
    away[0] = False
    for record in records[4:]:
        folding.add(record)
    assert (len(names(output, LOG)), len(names(output, RECORDS))) == (2, 1)
    assert list(Output.open(output.path).records()) == records


def test_publishing_again_takes_a_published_file_whose_attempt_was_cut_meanwhile(spec: RunSpec) -> None:
    """A store copies and then deletes; what is left of an attempt after a crash in between is of no account."""
    output, tally = commit_plain(spec)
    record = next(output.records())
    attempt, part = (Path(output.path) / name for name in (f"_latentmill/attempts/{record.file}", output.part(0)))
    part.parent.mkdir()
    part.write_bytes(attempt.read_bytes())
    attempt.write_bytes(b"cut")
    assert surveyed(output)[0] == set(range(SHARDS))
    assert isinstance(tally, Tally)
    publish(output, tally, "test", "")
    assert verify(output.path).ok, verify(output.path).problems
    assert not attempt.exists()
