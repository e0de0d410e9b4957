"""OVI against a plain loop: one row at a time, torch.optim.AdamW, autograd, the model of transformers itself."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.contract import Fit
from stages.engine.randomness import row_normal
from stages.engine.room import Room
from stages.engine.solver import Occupancy, solve
from stages.engine.stopping import StoppingRule
from stages.models.memory import Live
from stages.models.vision_tower import VisionTower, halved_products, sharing
from stages.ovi.constraints import ExactSearch, Whitening
from stages.ovi.problem import OviProblem, Parametrization, stopping_rule
from stages.ovi.settings import OVI, Constraint, Direct, Stop
from tests.support.vision_towers import clip_model, full_model

IDS = [f"p{i}" for i in range(9)]
PUBLISHED = OVI(recipe="published")


@pytest.fixture(scope="module")
def model():
    return clip_model()


def text(row_id, width=24):
    return row_normal((width,), 5, [row_id], "text")[0]


def inverted(problem, given=None, room=None):
    return {r["id"]: r for r in solve(problem, rows() if given is None else given, room=room)}


def rows(ids=IDS, width=24):
    return [{"id": i, "text": text(i, width).numpy()} for i in ids]


def gaussian(width=24, n=400):
    x = row_normal((width,), 3, [f"b{i}" for i in range(n)]) @ row_normal((width,), 4, [f"m{i}" for i in range(width)])
    x = x / width**0.5 + 0.5
    mean, covariance = x.double().mean(0), torch.cov(x.double().mT)
    return x, mean, covariance


def plain_loop(model, row_id, steps, tokens, extra=lambda z: 0.0, seed=0, stop=lambda cosine: False, batch=1):
    """Cross the Gap's loop for one prompt, its loss a part of the mean over so many."""
    width = getattr(model, "vision_model", model).embeddings.embed_dim
    t = nn.functional.normalize(text(row_id), dim=-1)
    w = nn.Parameter(0.02 * row_normal((tokens, width), seed, [row_id], "tokens"))
    adam = torch.optim.AdamW([w], lr=2e-2, weight_decay=0.01)
    for step in range(steps):
        z = full_model(model, w)[0]
        cosine = nn.functional.cosine_similarity(z, t, dim=0)
        if stop(cosine.item()):
            return z.detach(), step
        adam.zero_grad()
        ((1 - cosine + extra(z)) / batch).backward()
        adam.step()
    with torch.no_grad():
        return full_model(model, w)[0], steps


@pytest.mark.parametrize("slots", [1, 4, 9, 32])
@pytest.mark.parametrize("poll", [1, 3])
def test_published_recipe_equals_the_plain_loop(model, slots, poll):
    ids = list(IDS)
    random.Random(slots).shuffle(ids)
    settings = PUBLISHED.model_copy(update={"slots": slots, "steps": 100})
    problem = OviProblem(Parametrization.tokens(VisionTower(model, 4)), settings)
    out = {r["id"]: r for r in solve(problem, rows(ids), poll=poll)}
    assert len(out) == len(IDS)
    for row_id in IDS if slots == 4 else IDS[:3]:
        z, _ = plain_loop(model, row_id, 100, 4, batch=64)
        assert (torch.from_numpy(out[row_id]["embedding"]) - z).abs().max() <= 1e-4
        assert out[row_id]["steps"] == 100
        assert out[row_id]["passes"] == 101
        cosine = nn.functional.cosine_similarity(z, text(row_id), dim=0).item()
        assert out[row_id]["text_cosine"] == pytest.approx(cosine, abs=1e-4)
        assert out[row_id]["text_cosine"] > 0.3  # it went somewhere


@pytest.mark.parametrize("constraint", [Constraint(), Constraint(mahalanobis=0.1, neighbours=0.2, k=2, interval=1)])
def test_the_encoder_is_not_shown_empty_slots(model, constraint):
    bank, mean, covariance = gaussian()
    tower = Parametrization.tokens(VisionTower(model, 4))
    shown = []

    def encode(w):
        shown.append(len(w))
        return tower.encode(w)

    def inverted_in(slots):
        problem = OviProblem(
            replace(tower, encode=encode), OVI(slots=slots, steps=5, constraint=constraint),
            whitening=Whitening.of(mean, torch.linalg.cholesky(covariance)), search=ExactSearch(bank, 2),
        )  # fmt: skip
        return inverted(problem, rows(IDS[:3]))

    many = inverted_in(16)
    assert set(shown) == {3}
    few = inverted_in(2)
    assert set(shown) == {3, 2, 1}
    for row_id in IDS[:3]:
        assert abs(many[row_id]["embedding"] - few[row_id]["embedding"]).max() < 1e-5


def test_published_steps_are_those_of_a_mean_over_64(model):
    """Where a gradient is as small as eps, eps decides the step: the text is the embedding itself, nearly."""
    w = 0.02 * row_normal((4, 32), 0, ["p0"], "tokens")
    with torch.no_grad():
        t = full_model(model, w)[0]
    t = t + 2e-4 * t.norm() * row_normal(t.shape, 7, ["p0"], "near")[0]

    def after(recipe, steps):
        problem = OviProblem(Parametrization.tokens(VisionTower(model, 4)), OVI(recipe=recipe, slots=1))
        problem.load([0], [{"id": "p0", "text": t.numpy()}])
        for _ in range(steps):
            problem.step()
        return problem.x_B[0]

    variable = nn.Parameter(w.clone())
    adam = torch.optim.AdamW([variable], lr=2e-2, weight_decay=0.01)
    for steps in range(1, 4):
        adam.zero_grad()
        loss = 1 - nn.functional.cosine_similarity(full_model(model, variable), t[None])
        (loss.sum() / 64).backward()
        adam.step()
        moved = (variable.detach() - w).abs().max()
        assert (after("published", steps) - variable.detach()).abs().max() < 1e-2 * moved
        assert (after("early", steps) - variable.detach()).abs().max() > 1e-2 * moved


def test_published_recipe_is_the_published_recipe():
    assert (PUBLISHED.lr, PUBLISHED.weight_decay, PUBLISHED.init_std) == (2e-2, 0.01, 0.02)
    assert stopping_rule(PUBLISHED) == StoppingRule(limit=1000)
    assert PUBLISHED.constraint.mahalanobis == PUBLISHED.constraint.neighbours == 0
    assert not PUBLISHED.stopping.best


def test_rows_stop_where_the_plain_loop_stops(model):
    settings = OVI(slots=3, steps=200, stop=Stop(watch="cosine", target=0.4))
    out = inverted(OviProblem(Parametrization.tokens(VisionTower(model, 4)), settings))
    steps = set()
    for row_id in IDS[:4]:
        z, taken = plain_loop(model, row_id, 200, 4, stop=lambda cosine: cosine >= 0.4)
        assert out[row_id]["steps"] == taken
        assert (torch.from_numpy(out[row_id]["embedding"]) - z).abs().max() <= 1e-4
        steps.add(taken)
        assert out[row_id]["stopped"] == ("reached" if taken < 200 else "limit")
    assert len(steps) > 1


def test_a_row_does_not_depend_on_its_neighbours(model):
    settings = OVI(
        slots=8, steps=60, stop=Stop(watch="loss", relative=1e-3, patience=4),
        constraint=Constraint(mahalanobis=0.1, neighbours=0.2, k=2, interval=1),
    )  # fmt: skip
    bank, mean, covariance = gaussian()
    whitening = Whitening.of(mean, torch.linalg.cholesky(covariance))
    tower = VisionTower(model, 4)

    def run(slots, ids):
        problem = OviProblem(
            Parametrization.tokens(tower), settings.model_copy(update={"slots": slots}), whitening=whitening,
            search=ExactSearch(bank, 2),
        )  # fmt: skip
        return {r["id"]: torch.from_numpy(r["embedding"]) for r in solve(problem, rows(ids))}

    alone = run(1, IDS[4:5])[IDS[4]]
    full = run(8, IDS[:8])[IDS[4]]
    refilled = run(2, IDS[::-1])[IDS[4]]
    scale = alone.abs().max()
    assert (alone - full).abs().max() <= 1e-5 * max(1, scale)
    assert (alone - refilled).abs().max() <= 1e-5 * max(1, scale)


class Counted(ExactSearch):
    """Counts the rows that it is asked for."""

    rows = 0

    def __call__(self, z_BE):
        self.rows += len(z_BE)
        return super().__call__(z_BE)


@pytest.mark.parametrize("interval", [1, 5, 0])
def test_constraints_equal_a_plain_loop_in_float64_formulas(model, interval):
    bank, mean, covariance = gaussian()
    inverse = torch.linalg.inv(covariance)
    unit = nn.functional.normalize(bank, dim=-1)
    constraint = Constraint(mahalanobis=0.05, neighbours=0.5, k=3, interval=interval)
    settings = OVI(slots=4, steps=30, stop=Stop(), constraint=constraint)
    search = Counted(bank, 3)
    problem = OviProblem(
        Parametrization.tokens(VisionTower(model, 4)), settings,
        whitening=Whitening.of(mean, torch.linalg.cholesky(covariance)), search=search,
    )  # fmt: skip
    out = inverted(problem)
    assert search.rows == len(IDS) * (len(range(0, 31, interval)) if interval else 1)  # the start is evaluated too
    for row_id in IDS[:2]:
        state = {"step": 0, "near": unit[(unit @ text(row_id)).topk(3).indices]}

        def extra(z, state=state):
            if interval and state["step"] % interval == 0:
                state["near"] = unit[(unit @ z.detach()).topk(3).indices]
            state["step"] += 1
            d = z.double() - mean
            distance = (d @ inverse @ d / 24).float()
            near = nn.functional.cosine_similarity(z[None], state["near"], dim=-1).mean()
            return 0.05 * distance + 0.5 * (1 - near)

        z, _ = plain_loop(model, row_id, 30, 4, extra)
        assert (torch.from_numpy(out[row_id]["embedding"]) - z).abs().max() <= 1e-3
        d = torch.from_numpy(out[row_id]["embedding"]).double() - mean
        assert out[row_id]["mahalanobis"] == pytest.approx((d @ inverse @ d / 24).item(), rel=1e-3)
        got = out[row_id]
        parts = 1 - got["text_cosine"] + 0.05 * got["mahalanobis"] + 0.5 * (1 - got["neighbour_cosine"])
        assert got["loss"] == pytest.approx(parts, abs=1e-5)


def test_direct_finds_the_minimum_that_a_general_minimiser_finds():
    _, mean, covariance = gaussian()
    whitening = Whitening.of(mean, torch.linalg.cholesky(covariance))
    settings = Direct(slots=4, lr=0.05, constraint=Constraint(mahalanobis=0.3), steps=600, stop=Stop())
    out = inverted(OviProblem(Parametrization.direct(whitening), settings, whitening=whitening))
    for row_id in IDS[:2]:
        u = torch.zeros(24, dtype=torch.float64, requires_grad=True)
        lbfgs = torch.optim.LBFGS([u], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)
        cholesky, t = torch.linalg.cholesky(covariance), text(row_id).double()

        def objective(u=u, lbfgs=lbfgs, cholesky=cholesky, t=t):
            lbfgs.zero_grad()
            z = mean + cholesky @ u
            loss = 1 - nn.functional.cosine_similarity(z, t, dim=0) + 0.3 * u.square().mean()
            loss.backward()
            return loss

        lbfgs.step(objective)
        assert out[row_id]["loss"] == pytest.approx(objective().item(), abs=1e-4)
        assert out[row_id]["passes"] == 0


def test_warm_start_is_taken(model):
    tower = VisionTower(model, 4)
    first = inverted(OviProblem(Parametrization.tokens(tower), OVI(steps=50, stop=Stop())), rows(IDS[:2]))
    again = [{"id": i, "text": text(i).numpy(), "start": first[i]["variable"]} for i in IDS[:2]]
    warm = inverted(OviProblem(Parametrization.tokens(tower), OVI(steps=1, stop=Stop())), again)
    cold = inverted(OviProblem(Parametrization.tokens(tower), OVI(steps=1, stop=Stop())), rows(IDS[:2]))
    for i in IDS[:2]:
        assert warm[i]["text_cosine"] == pytest.approx(first[i]["text_cosine"], abs=0.05)
        assert warm[i]["text_cosine"] > cold[i]["text_cosine"] + 0.1


def test_best_keeps_the_best_look(model):
    _, mean, covariance = gaussian()
    whitening = Whitening.of(mean, torch.linalg.cholesky(covariance))
    stop = Stop(watch="mahalanobis", patience=60, best=True)
    tower = VisionTower(model, 4)

    def run(stop):
        settings = OVI(slots=4, steps=60, stop=stop)
        return inverted(OviProblem(Parametrization.tokens(tower), settings, whitening=whitening))

    best, last = run(stop), run(stop.model_copy(update={"best": False}))
    assert all(best[i]["mahalanobis"] <= last[i]["mahalanobis"] for i in IDS)
    assert any(best[i]["mahalanobis"] < last[i]["mahalanobis"] for i in IDS)


def test_lower_precision_ends_near_float32(model):
    settings = OVI(slots=4, steps=40, stop=Stop())
    tower = VisionTower(model, 4)
    exact = {r["id"]: r["text_cosine"] for r in solve(OviProblem(Parametrization.tokens(tower), settings), rows())}
    for precision in ("bfloat16", "float16"):
        problem = OviProblem(Parametrization.tokens(tower), settings.model_copy(update={"precision": precision}))
        assert problem.x_B.dtype == torch.float32
        near = {r["id"]: r["text_cosine"] for r in solve(problem, rows())}
        assert all(abs(exact[i] - near[i]) < 0.1 for i in IDS)
        assert sum(near.values()) / len(IDS) == pytest.approx(sum(exact.values()) / len(IDS), abs=0.03)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_weights_that_are_halved_once_give_what_autocast_gives(model, precision):
    """To the last bit, and the encoder itself stays what it was."""
    settings = OVI(slots=2, steps=4, stop=Stop(), precision=precision)
    before = [weight.clone() for weight in model.parameters()]
    network = halved_products(sharing(model), getattr(torch, precision))
    halved = {id(w) for w in network.parameters()} - {id(w) for w in model.parameters()}
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert halved == {id(weight) for layer in linear for weight in layer.parameters(recurse=False)}
    assert len(linear) > 6
    ours, theirs = (
        inverted(OviProblem(Parametrization.tokens(VisionTower(one, 4)), settings)) for one in (network, model)
    )
    for name, row in theirs.items():
        assert (ours[name]["embedding"] == row["embedding"]).all()
        assert (ours[name]["variable"] == row["variable"]).all()
    for weight, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
        assert weight.dtype == torch.float32


def test_a_diverged_row_fails_alone(model):
    bad = [{**r, "text": r["text"] * float("nan")} if r["id"] == IDS[2] else r for r in rows()]
    occupancy = Occupancy()
    problem = OviProblem(Parametrization.tokens(VisionTower(model, 4)), OVI(slots=3, steps=5, stop=Stop()))
    out = {r["id"]: r for r in solve(problem, bad, occupancy=occupancy)}
    assert [i for i in IDS if out[i]["status"] == "failed"] == [IDS[2]]
    assert "diverged" in out[IDS[2]]["error"]


def test_constraints_need_their_statistics(model):
    space = Parametrization.tokens(VisionTower(model, 4))
    with pytest.raises(ValueError, match="statistics"):
        OviProblem(space, OVI(constraint=Constraint(mahalanobis=0.5)))
    with pytest.raises(ValueError, match="index"):
        OviProblem(space, OVI(constraint=Constraint(neighbours=0.5)))
    with pytest.raises(ValueError, match="bank has 3"):
        ExactSearch(torch.randn(3, 4), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("accelerate", ["compile", "graph"])
def test_accelerated_steps_equal_eager_ones(accelerate):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    bank, mean, covariance = gaussian()
    whitening = Whitening.of(mean, torch.linalg.cholesky(covariance), "cuda")

    def run(how):
        tower = VisionTower(clip_model().cuda(), 4)
        constraint = Constraint(mahalanobis=0.05, neighbours=0.3, k=2, interval=1)
        settings = OVI(slots=4, steps=40, stop=Stop(), constraint=constraint, accelerate=how)
        search = ExactSearch(bank.cuda(), 2)
        problem = OviProblem(Parametrization.tokens(tower), settings, whitening=whitening, search=search)
        return {r["id"]: torch.from_numpy(r["embedding"]) for r in solve(problem, rows())}

    eager, fast = run("none"), run(accelerate)
    assert all((eager[i] - fast[i]).abs().max() <= 1e-4 for i in IDS)


@pytest.mark.gpu
@pytest.mark.parametrize("constraint", [{}, {"mahalanobis": 0.05}, {"neighbours": 0.3, "k": 2, "interval": 3}])
@pytest.mark.parametrize("variable", ["compact", "direct"])
def test_light_steps_are_recorded_unasked_and_equal_the_cpu(variable, constraint):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    bank, mean, covariance = gaussian()

    def run(device):
        whitening = Whitening.of(mean, torch.linalg.cholesky(covariance), device)
        if variable == "direct":
            space, kind = Parametrization.direct(whitening), Direct
        else:
            space, kind = Parametrization.tokens(VisionTower(clip_model().to(device), 4, True)), OVI
        settings = kind(slots=4, steps=40, stop=Stop(), constraint=Constraint(**constraint))
        search = ExactSearch(bank.to(device), 2) if "neighbours" in constraint else None
        problem = OviProblem(space, settings, whitening=whitening, search=search)
        assert problem.recorded == (device == "cuda")
        return {r["id"]: torch.from_numpy(r["embedding"]) for r in solve(problem, rows())}

    cpu, card = run("cpu"), run("cuda")
    assert all((cpu[i] - card[i]).abs().max() <= 1e-3 for i in IDS)


@pytest.mark.parametrize("compact", [False, True])
def test_what_a_row_is_told_to_take_is_what_is_alive(model, compact):
    tower = VisionTower(model, 4, compact)

    def live(rows):
        w_BPD = torch.randn(rows, 4, tower.width, requires_grad=True)
        with Live() as told:
            torch.autograd.grad(tower(w_BPD).sum(), w_BPD)
        return told.peak

    assert tower.row_bytes() == pytest.approx((live(5) - live(2)) / 3, rel=0.1)


def test_slots_are_what_the_memory_takes(model, monkeypatch):
    each = VisionTower(model, 4).row_bytes()
    for free, slots in ((None, 32), (25 * each, 16), (1e6 * each, 64), (each / 2, 1)):
        monkeypatch.setattr("stages.ovi.problem.free_bytes", lambda device, free=free: free)
        space = Parametrization.tokens(VisionTower(model, 4))
        assert OviProblem(space, OVI()).slots == slots
        assert OviProblem(space, OVI(slots=3)).slots == 3


def test_a_graph_that_does_not_fit_is_recorded_of_half_the_slots(model, monkeypatch):
    """Once: who makes the next problem, here or in another worker, is told."""

    def captured(step):
        if step.__self__.slots > most:
            refused.append(step.__self__.slots)
            raise torch.OutOfMemoryError("pretend")
        return step

    refused = []
    monkeypatch.setattr("stages.ovi.problem.capture", captured)
    most = 3
    space, method = Parametrization.tokens(VisionTower(model, 4)), OVI(slots=8, steps=3, accelerate="graph")
    problem, room = OviProblem(space, method), Room()
    assert {row["status"] for row in inverted(problem, room=room).values()} == {"ok"}
    assert problem.slots == 2
    assert room.fit == Fit(2)
    refused.clear()
    again = OviProblem(space, method)
    again.forget(room.rows)
    assert {row["status"] for row in inverted(again, room=room).values()} == {"ok"}
    assert not refused
    most = 0
    problem.resize(8)
    with pytest.raises(torch.OutOfMemoryError):
        inverted(problem)
    assert refused == [8, 4, 2, 1]
