"""The batched solver against plain loops: torch.optim.AdamW one row at a time, and stopping rules written out."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from pipeline.contract import failed, ok
from stages.engine.adamw import RowAdamW
from stages.engine.randomness import row_generator, row_normal, row_seed
from stages.engine.slots import per_row, slot_mask
from stages.engine.solver import Occupancy, capture, solve
from stages.engine.stopping import REASONS, StoppingRule

D = 5


def target(row_id):
    return row_normal((D,), 7, [row_id], "target")[0]


class Quadratic:
    """Minimise |A (x - target)|^2 for each of `rounds` targets in turn, without leaving the slot."""

    def __init__(self, slots, rule, rounds=1, memory=None):
        self.rule, self.rounds, self.memory = rule, rounds, memory
        self.A = torch.linspace(0.3, 2.0, D)
        self.allocate(slots)

    def allocate(self, slots):
        self.slots = slots
        self.rows = [None] * slots
        self.x_BD = torch.zeros(slots, D)
        self.target_BD = torch.zeros(slots, D)
        self.round_B = torch.zeros(slots, dtype=torch.int64)
        self.active_B = torch.zeros(slots, dtype=torch.bool)
        self.adam = RowAdamW(self.x_BD, 0.05)
        self.stopper = self.rule.start(slots)
        self.total_B = torch.zeros(slots, dtype=torch.int64)

    def resize(self, slots):
        self.allocate(slots)

    def load(self, slots, rows):
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
            self.x_BD[slot] = row_normal((D,), 0, [row["id"]], "start")[0]
            self.target_BD[slot] = target(row["id"])
        which_B = slot_mask(self.slots, slots)
        self.adam.reset(which_B)
        self.stopper.reset(which_B)
        self.round_B[which_B] = 0
        self.total_B[which_B] = 0
        self.active_B |= which_B

    def step(self):
        if self.memory is not None and self.slots > self.memory:
            raise torch.OutOfMemoryError("pretend")
        x_BD = self.x_BD.clone().requires_grad_()
        loss_B = ((self.A * (x_BD - self.target_BD)) ** 2).sum(1)
        (grad,) = torch.autograd.grad(loss_B.sum(), x_BD)
        self.adam.step(grad, self.active_B)
        self.total_B += self.active_B
        over_B = self.stopper.update(loss_B, self.active_B)
        self.round_B += over_B
        again_B = over_B & (self.round_B < self.rounds)
        for slot in again_B.nonzero().flatten().tolist():
            self.target_BD[slot] = target(self.rows[slot]["id"] + str(int(self.round_B[slot])))
        self.adam.reset(again_B)
        self.stopper.reset(again_B)
        done_B = over_B & ~again_B
        self.active_B &= ~done_B
        return ~self.active_B

    def unload(self, slots):
        return [ok(self.rows[s], x=self.x_BD[s].clone(), steps=int(self.total_B[s])) for s in slots]


def alone(row_id, rule, rounds=1):
    """The same problem, by torch.optim.AdamW and a stopping rule in plain Python, one row."""
    A = torch.linspace(0.3, 2.0, D)
    x = row_normal((D,), 0, [row_id], "start")[0].clone().requires_grad_()
    total = 0
    for round_ in range(rounds):
        goal = target(row_id + (str(round_) if round_ else ""))
        adam = torch.optim.AdamW([x], lr=0.05)
        mark, stalled = None, 0
        for step in range(1, rule.limit + 1):
            adam.zero_grad()
            loss = ((A * (x - goal)) ** 2).sum()
            loss.backward()
            adam.step()
            total += 1
            if mark is None or loss.item() < mark - rule.relative * abs(mark):
                mark, stalled = loss.item(), 0
            else:
                stalled += 1
            if rule.absolute is not None and loss.item() <= rule.absolute and step >= rule.minimum:
                break
            if rule.patience is not None and stalled >= rule.patience and step >= rule.minimum:
                break
    return x.detach(), total


@pytest.mark.parametrize("slots", [1, 3, 16, 40])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_row_ends_where_a_plain_loop_ends(slots, rounds):
    rule = StoppingRule(limit=150, absolute=0.05, relative=1e-3, patience=5, minimum=4)
    ids = [f"r{i}" for i in range(20)]
    random.Random(slots).shuffle(ids)
    occupancy = Occupancy()
    out = {r["id"]: r for r in solve(Quadratic(slots, rule, rounds), ({"id": i} for i in ids), occupancy=occupancy)}
    assert sorted(out) == sorted(ids)
    steps = set()
    for row_id in ids:
        x, total = alone(row_id, rule, rounds)
        assert out[row_id]["steps"] == total
        assert (out[row_id]["x"] - x).abs().max() < 1e-5
        steps.add(total)
    assert len(steps) > 5  # rows really stopped at different times
    assert occupancy.rows == 20
    assert occupancy.busy_slot_steps == sum(r["steps"] for r in out.values())
    if slots == 1:
        assert occupancy.share == 1.0


def test_refilling_beats_static_batches_in_slot_steps():
    rule = StoppingRule(limit=400, absolute=0.05)
    rows = [{"id": f"r{i}"} for i in range(64)]
    occupancy = Occupancy()
    out = list(solve(Quadratic(8, rule), rows, occupancy=occupancy))
    steps = {r["id"]: r["steps"] for r in out}
    static = sum(8 * max(steps[r["id"]] for r in rows[i : i + 8]) for i in range(0, 64, 8))
    assert occupancy.slot_steps < static
    assert occupancy.share > 0.7


def test_finished_rows_do_not_change_while_they_wait():
    rule = StoppingRule(limit=100, absolute=0.05)
    rows = [{"id": f"r{i}"} for i in range(10)]
    now = {r["id"]: r["x"] for r in solve(Quadratic(4, rule), rows)}
    later = {r["id"]: r["x"] for r in solve(Quadratic(4, rule), rows, poll=7)}
    assert all(torch.equal(now[i], later[i]) for i in now)


def test_failed_rows_pass_through_and_take_no_slot():
    rows = [failed({"id": "bad"}, "no prompt"), {"id": "good"}, failed({"id": "worse"}, "no prompt")]
    out = {r["id"]: r for r in solve(Quadratic(1, StoppingRule(limit=3)), rows)}
    assert {i: r["status"] for i, r in out.items()} == {"bad": "failed", "good": "ok", "worse": "failed"}
    assert list(solve(Quadratic(2, StoppingRule(limit=3)), [])) == []


def test_rows_are_read_only_as_slots_free_up():
    read = []

    def source():
        for i in range(10):
            read.append(i)
            yield {"id": f"r{i}"}

    solving = solve(Quadratic(3, StoppingRule(limit=5)), source())
    next(solving)
    assert len(read) == 3


def test_out_of_memory_halves_the_slots_and_loses_no_row():
    rule = StoppingRule(limit=30, absolute=0.05)
    rows = [{"id": f"r{i}"} for i in range(13)]
    problem, occupancy = Quadratic(8, rule, memory=3), Occupancy()
    small = {r["id"]: r["x"] for r in solve(problem, rows, occupancy=occupancy)}
    assert (problem.slots, occupancy.restarts) == (2, 2)
    full = {r["id"]: r["x"] for r in solve(Quadratic(8, rule), rows)}
    assert small.keys() == full.keys()
    assert all((small[i] - full[i]).abs().max() < 1e-6 for i in full)
    with pytest.raises(torch.OutOfMemoryError):
        list(solve(Quadratic(2, rule, memory=0), rows))


def test_adamw_rows_keep_their_own_clock():
    torch.manual_seed(0)
    variable = torch.randn(3, 2, 4)
    adam = RowAdamW(variable, 0.1, weight_decay=0.3)
    plain = [torch.nn.Parameter(variable[i].clone()) for i in range(3)]
    optimisers = [torch.optim.AdamW([p], lr=0.1, weight_decay=0.3) for p in plain]
    for step in range(60):
        if step == 20:  # a new row moves into slot 1
            variable[1] = 2.0
            adam.reset([1])
            plain[1] = torch.nn.Parameter(torch.full((2, 4), 2.0))
            optimisers[1] = torch.optim.AdamW([plain[1]], lr=0.1, weight_decay=0.3)
        active_B = torch.tensor([True, step % 3 != 0, step < 40])
        grad = torch.randn(3, 2, 4)
        adam.step(grad, active_B)
        for i in active_B.nonzero().flatten().tolist():
            plain[i].grad = grad[i].clone()
            optimisers[i].step()
    for i in range(3):
        assert (variable[i] - plain[i]).abs().max() < 1e-5
    assert adam.steps_B.tolist()[0::2] == [60, 40]


def test_adamw_takes_a_learning_rate_per_row():
    variable = torch.zeros(2, 3)
    adam = RowAdamW(variable, lambda steps_B: 0.1 / (1 + steps_B), weight_decay=0.0)
    grad = torch.ones(2, 3)
    adam.step(grad, torch.tensor([True, False]))
    adam.step(grad)
    assert torch.allclose(variable[:, 0], torch.tensor([-0.15, -0.1]), atol=1e-6)
    adam.step(grad, lr_B=torch.tensor([0.0, 1.0]))
    assert torch.allclose(variable[:, 0], torch.tensor([-0.15, -1.1]), atol=1e-6)


def test_stopping_reasons():
    stopper = StoppingRule(limit=4, absolute=0.1, relative=0.01, patience=2).start(4)
    values = [[1.0, 1.0, 1.0, 1.0], [0.05, 0.999, 0.8, float("nan")], [9, 0.998, 0.7, 9], [9, 9, 0.6, 9]]
    active_B = torch.ones(4, dtype=torch.bool)
    for value in values:
        active_B = active_B & ~stopper.update(torch.tensor(value), active_B)
    assert [REASONS[r] for r in stopper.reason_B.tolist()] == ["reached", "stalled", "limit", "diverged"]
    assert stopper.steps_B.tolist() == [2, 3, 4, 2]
    assert torch.allclose(stopper.best_B, torch.tensor([0.05, 0.998, 0.6, 1.0]))
    stopper.reset([1])
    assert stopper.steps_B.tolist() == [2, 0, 4, 2]
    assert REASONS[stopper.reason_B[1]] == "running"


def test_stopping_rule_refuses_nonsense():
    with pytest.raises(ValueError, match="limit"):
        StoppingRule(limit=0)
    with pytest.raises(ValueError, match="patience"):
        StoppingRule(limit=3, patience=0)


def test_random_numbers_belong_to_the_row():
    a = row_normal((3,), 1, ["x", "y"])
    assert torch.equal(a[1:], row_normal((3,), 1, ["y"]))
    assert torch.equal(a[0], torch.randn(3, generator=row_generator(1, "x")))
    assert len({row_seed(s, i, p) for s in (0, 1) for i in ("a", "b") for p in ("", "noise")}) == 8
    assert row_normal((3,), 1, []).shape == (0, 3)


def test_capture_needs_cuda():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is at hand")
    with pytest.raises(RuntimeError, match="CUDA"):
        capture(lambda: None)


def test_a_recording_that_runs_out_is_out_of_memory_and_no_lost_device(monkeypatch):
    """CUDA refuses a recording that broke off and hides why: the solver would not halve, the guard end the worker."""

    class Recording:
        def __init__(self, graph, stream, capture_error_mode):
            assert (stream, capture_error_mode) == (side, "thread_local")

        def __enter__(self):
            recording.append(True)

        def __exit__(self, *given):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def step():
        if recording and runs_out:
            raise torch.OutOfMemoryError("pretend")

    side = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "is_available": lambda: True, "Stream": lambda: side, "current_stream": lambda: side,
        "stream": lambda one: nullcontext(), "CUDAGraph": lambda: None, "graph": Recording,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    recording, runs_out = [], True
    with pytest.raises(torch.OutOfMemoryError, match="does not fit"):
        capture(step)
    recording, runs_out = [], False
    with pytest.raises(RuntimeError, match="during capture") as caught:
        capture(step)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    torch.manual_seed(0)
    goal = torch.randn(8, 5, device="cuda")
    start = torch.randn(8, 5, device="cuda")
    active_B = torch.arange(8, device="cuda") % 2 == 0

    def build():
        variable = start.clone()
        adam = RowAdamW(variable, 0.05)

        def step():
            adam.step(2 * (variable - goal), active_B)

        return variable, adam, step

    eager, _, step = build()
    captured, adam, other = build()
    replay = capture(other)
    captured.copy_(start)
    adam.reset(torch.ones(8, dtype=torch.bool, device="cuda"))
    for _ in range(50):
        step()
        replay()
    assert (eager - captured).abs().max().item() < 1e-6


def test_per_row_broadcasts():
    assert per_row(torch.ones(3), torch.zeros(3, 2, 4)).shape == (3, 1, 1)
