"""`--limit` that grows: what a folder holds stays as it is, byte for byte, and further rows come behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.output.dataset import Output
from pipeline.output.planfile import OutputError, read_shards
from pipeline.output.verify import verify
from pipeline.run.draft import PlanError, RunSpec
from pipeline.run.driver import Finished, run
from pipeline.run.plan import PlanMismatch, _place
from tests.pipeline.run.test_retry import LINES, crashes, moody, start, undisturbed
from tests.support.faulty import data
from tests.support.in_process import without_ray
from tests.support.plain_stages import spec_of

__all__ = ["moody"]


def files(output: str) -> dict[str, tuple[int, bytes]]:
    """When each published file was written, and its bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(output).glob("data/*")}


def counted(output: str) -> list[int]:
    return [shard.rows for shard in read_shards(Output.open(output).own)]


def test_a_limit_grows_and_goes(moody: RunSpec) -> None:
    """Each start does the further rows alone; what is there at each is what an undisturbed run of that limit gives."""
    expected, before, all_seen = undisturbed(moody), {}, []
    for limit, shards in ((3, [3]), (8, [3, 5]), (13, [3, 5, 5]), (14, [3, 5, 5, 1]), (None, [3, 5, 5, 1, 5, 1])):
        spec = replace(moody, limit=limit)
        result, seen = start(spec)
        rows = sum(shards)
        assert (result.state, result.planned, result.ok) == ("complete", rows, rows)
        assert result.resumed == len(before)
        assert counted(moody.output) == shards
        assert data(moody.output).equals(expected.slice(0, rows))
        assert verify(moody.output).ok, verify(moody.output).problems
        now = files(moody.output)
        assert {name: now[name] for name in before} == before
        assert len(now) == len(shards)
        before, all_seen = now, all_seen + seen
        assert sum(int(one["count"][0]) for one in Output.open(moody.output).summaries()) == rows
        assert json.loads((Path(moody.output) / "_SUCCESS").read_text())["rows"] == rows
        assert start(spec)[1] == []
    assert sorted(all_seen) == sorted(expected["id"].to_pylist())
    assert sorted(before) == [
        "part-00000-of-00001.parquet", "part-00001-of-00002.parquet", "part-00002-of-00003.parquet",
        "part-00003-of-00004.parquet", "part-00004-of-00006.parquet", "part-00005-of-00006.parquet",
    ]  # fmt: skip
    assert not (Path(moody.output) / "_latentmill/set-aside").exists()


def unpublished(spec: RunSpec) -> None:
    """A start that Ctrl-C ends when all rows are there."""

    def stops(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.run.driver.publish", stops)
        assert start(spec)[0].state == "interrupted"


def test_a_run_that_was_not_over_grows(moody: RunSpec) -> None:
    expected = undisturbed(moody)

    unpublished(replace(moody, limit=7))
    result, seen = start(moody)
    assert (result.state, result.resumed, len(seen)) == ("complete", 2, 13)
    assert data(moody.output).equals(expected)
    assert verify(moody.output).ok


def test_what_a_deleted_plan_grew_to_is_nobodys(moody: RunSpec) -> None:
    expected = undisturbed(moody)
    unpublished(replace(moody, limit=3))
    unpublished(replace(moody, limit=7))
    (Path(moody.output) / "_latentmill/plan.json").unlink()
    for limit, shards in ((9, [5, 4]), (None, [5, 4, 5, 5, 1])):
        start(replace(moody, limit=limit))
        assert counted(moody.output) == shards
        assert verify(moody.output).ok
    assert data(moody.output).equals(expected)
    assert len(list(Path(moody.output).glob("_latentmill/*-plan.g*.json"))) == 1


def test_a_limit_beyond_the_input_adds_nothing(moody: RunSpec) -> None:
    start(replace(moody, limit=20))
    before = files(moody.output)
    for limit in (25, None):
        result, seen = start(replace(moody, limit=limit))
        assert (result.state, result.planned, seen) == ("complete", 20, [])
    assert files(moody.output) == before
    assert counted(moody.output) == [5, 5, 5, 5]


def test_failed_rows_of_earlier_steps_can_be_done_again(moody: RunSpec) -> None:
    expected = undisturbed(moody)
    start(replace(moody, limit=7), ["line 6", "line 9"])
    result, _ = start(moody, ["line 9"])
    assert (result.ok, result.failed) == (18, 2)
    result, seen = start(moody, retry_failed=True)
    assert (result.ok, seen) == (20, ["in.txt#6", "in.txt#9"])
    assert data(moody.output).equals(expected)


def test_what_follows_the_rows_is_made_anew(moody: RunSpec) -> None:
    def count(finished: Finished) -> None:
        with finished.output.open_file("sums/rows", "wb") as file:
            file.write(b"%d" % sum(len(table) for table in finished.tables(["id"])))

    for limit, rows in ((7, b"7"), (None, b"20")):
        start(replace(moody, limit=limit), finish=count, products=("sums",))
        assert (Path(moody.output) / "sums/rows").read_bytes() == rows
        assert f"{rows.decode()} rows in" in (Path(moody.output) / "README.md").read_text()
    assert verify(moody.output).ok


def test_fewer_rows_or_other_settings_are_refused(moody: RunSpec) -> None:
    start(replace(moody, limit=7))
    plain = files(moody.output)
    with pytest.raises(PlanMismatch, match=r"limit: was 7, is 6\n.*A limit may grow"):
        start(replace(moody, limit=6))
    with pytest.raises(PlanMismatch, match="seed: was 0, is 1"):
        start(replace(moody, limit=None, seed=1))
    with pytest.raises(PlanMismatch, match="shard_rows"):
        start(replace(moody, limit=9, shard_rows=4))
    path = Path(moody.source.path[0])
    path.write_text("".join(f"{line}\n" for line in ["another", *LINES[1:]]))
    with pytest.raises(PlanMismatch, match=r"in\.txt"):
        start(moody)
    assert files(moody.output) == plain
    path.write_text("".join(f"{line}\n" for line in LINES))
    start(moody)
    with pytest.raises(PlanMismatch, match="limit: was None, is 7"):
        start(replace(moody, limit=7))


def test_a_column_whose_type_further_rows_change_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    lines = [json.dumps({"text": f"line {i}", "n": i if i < 250 else "many"}) for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    spec = spec_of(tmp_path / "in.jsonl", tmp_path / "out", keep=["n"], shard_rows=100)
    assert run(replace(spec, limit=240)).state == "complete"
    assert run(replace(spec, limit=250)).state == "complete"
    before = files(spec.output)
    with pytest.raises(PlanError, match=r"with further rows columns would have other types \(n string, not int64\)"):
        run(spec)
    assert files(spec.output) == before
    assert run(replace(spec, limit=250)).state == "complete"
    assert len(list(Path(spec.output).glob("_latentmill/*-shards.parquet"))) == 2


def test_more_files_than_their_names_have_digits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    (tmp_path / "in.txt").write_text("line\n" * 100_000)
    spec = spec_of(tmp_path / "in.txt", tmp_path / "out", shard_rows=1)
    assert run(replace(spec, limit=2)).state == "complete"
    with pytest.raises(PlanError, match="100000 files are more than its files' names have digits for"):
        run(spec)
    assert counted(spec.output) == [1, 1]


def test_duplicates_are_told_in_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows from before and behind the limit; against a plain loop."""
    without_ray(monkeypatch)
    said = [0, 1, 0, 2, 1, 3, 0, 4, 3, 5, 6, 6]
    (tmp_path / "in.txt").write_text("".join(f"line {i}\n" for i in said))
    expected = [None if said.index(i) == row else f"in.txt#{said.index(i)}" for row, i in enumerate(said)]
    spec = spec_of(tmp_path / "in.txt", tmp_path / "out", shard_rows=3, dedupe="content")
    for limit in (4, 5, 9, None):
        assert run(replace(spec, limit=limit)).state == "complete"
        assert data(spec.output)["duplicate_of"].to_pylist() == expected[:limit]
        assert verify(spec.output).ok


def test_places_are_those_of_a_plain_loop() -> None:
    for every in (1, 3, 5):
        for ends in ([], [1], [4], [3, 4, 9], [5, 10]):
            shard, held, found = 0, 0, []
            for row in range(23):
                found.append((shard, held))
                held += 1
                if held == every or row + 1 in ends:
                    shard, held = shard + 1, 0
            assert found == [_place(row, every, ends) for row in range(23)]


def test_a_damaged_form_of_the_plan_is_named(moody: RunSpec) -> None:
    start(replace(moody, limit=7))
    start(moody)
    (grown,) = Path(moody.output).glob("_latentmill/*-plan.g1.json")
    grown.write_text(grown.read_text()[:100])
    with pytest.raises(OutputError, match=rf"{grown.name} is damaged"):
        start(moody)


@pytest.mark.fault
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_operation_of_growing_loses_and_doubles_nothing(
    moody: RunSpec, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """The next start has the further limit, or the one before where the plan had not grown."""
    expected = undisturbed(moody)
    start(replace(moody, limit=7))
    monkeypatch.setattr("pipeline.output.lock._alive", lambda content: False)
    operations = list[str]()
    for _, last in crashes(moody.output, after, lambda: start(moody)):
        operations.append(last)
        grown = list(Path(moody.output).glob("_latentmill/*-plan.g1.json"))
        if not grown:
            assert start(replace(moody, limit=7))[1] == []
            assert data(moody.output).equals(expected.slice(0, 7))
        assert start(moody)[0].state == "complete"
        assert data(moody.output).equals(expected)
        assert verify(moody.output).ok, verify(moody.output).problems
        assert len(list(Path(moody.output).glob("_latentmill/*-shards.parquet"))) == 2
    assert len(operations) > 10
