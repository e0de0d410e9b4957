"""What the output folder holds of a run at its start: which shards count, and which are to be done again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.output.commit import recorded
from pipeline.output.dataset import SET_ASIDE, Output, Tally
from pipeline.output.fold import Folding
from pipeline.output.leftovers import Leftovers
from pipeline.output.planfile import OutputError, read_shards
from pipeline.output.publish import set_aside
from pipeline.run.reporter import Reporter
from pipeline.run.tasks import Again, Task


@dataclass(frozen=True)
class Committed:
    """What earlier starts of a run committed.

    Attributes:
        tally: Of the shards that count; grows with the run.
        done: Which they are.
        again: Those of the others that were committed before.
        taken: Those of the others whose final name holds a file that is nobody's.
        placed: What counts lies in ``data/``. A late worker's may not, though the run was complete, where what counted
            before is lost.
    """

    tally: Tally
    done: frozenset[int] = frozenset()
    again: Mapping[int, Again] = field(default_factory=dict)
    taken: frozenset[int] = frozenset()
    placed: bool = True

    def tasks(self, output: Output) -> Iterator[Task]:
        """A task for each shard that is not done."""
        named = output.named_at_commit and not output.folder.local  # as a copy of a store's folder is
        for shard in read_shards(output.own):
            if shard.index not in self.done:
                once = named and shard.index not in self.again and shard.index not in self.taken
                yield Task.of(shard, self.again.get(shard.index), output.part(shard.index) if once else None)


def committed(output: Output, reporter: Reporter, retry_failed: bool = False) -> Committed:
    """Look at what is there.

    Records whose file or summary is lost are withdrawn; those of earlier generations, losers and strangers go.

    Args:
        retry_failed: Shards with failed rows do not count as done.
    """
    listed = output.listings()
    for name in set_aside(output, listed["data"]):
        reporter.phase("planning", message=f"data/{name} is not this run's; it was moved to {SET_ASIDE}")
    tally, done, again, placed = Tally(), set[int](), dict[int, Again](), True
    folding = Folding(output)
    leftovers, nobodys = Leftovers(output, listed), set(listed["data"]) if output.named_at_commit else set()

    def withdraw(shard: int, generation: int, why: str) -> None:
        folding.withdraw(shard, generation)
        reporter.phase("planning", message=f"{why}; the shard is done again")

    def damaged(name: str, error: OutputError) -> None:
        of = recorded(name.rpartition("/")[2], output.run)
        if of is None:
            output.check()
            output.folder.remove(name)
            reporter.phase("planning", message=f"{name} holds no commit records; its shards are done again")
        else:
            withdraw(*of, f"{name} is no commit record")

    for record in output.records(damaged, superseded=True):
        of = record.shard, record.generation
        file = output.locate(record, listed)
        if record.shard in done or record.shard in again:
            folding.withdraw(*of)
        elif file is None:
            withdraw(*of, f"the file of shard {record.shard} is gone or cut")
        elif lost := output.lost_summary(record, listed):
            withdraw(*of, f"{lost}, the summary of shard {record.shard}, is gone or cut")
        else:
            leftovers.spare(record)
            folding.add(record)
            if retry_failed and record.rows_failed:
                later = record.generation + 1
                again[record.shard] = Again(file, record.size, later, record.summary, record.summary_bytes)
                continue
            tally.add(record)
            done.add(record.shard)
            nobodys.discard(record.file)
            placed = placed and file == output.part(record.shard)
    folding.close()
    leftovers.remove()
    for shard, latest in output.log.generations(done).items():
        known = again.get(shard, Again("", 0, 0, (), ()))
        again[shard] = replace(known, generation=max(known.generation, latest + 1))
    taken = {shard for shard in map(output.shard_named, nobodys) if shard is not None}
    return Committed(tally, frozenset(done), again, frozenset(taken - done), placed)
