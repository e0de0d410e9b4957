"""OVI against a plain loop: one row at a time, torch.optim.AdamW, autograd, the model of transformers itself."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from stages.engine.randomness import row_normal
from stages.engine.solver import Occupancy, solve
from stages.engine.stopping import StoppingRule
from stages.ovi.problem import (
    PUBLISHED,
    ExactSearch,
    Inversion,
    Settings,
    Space,
    VisionTower,
    Whitening,
    token_of_patch,
)

IDS = [f"p{i}" for i in range(9)]


def clip_model(seed=0, patches=16):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=8,
        image_size=8 * int(patches**0.5), projection_dim=24, initializer_range=0.3,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def siglip_model():
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return SiglipVisionModel(config).eval()


@pytest.fixture(scope="module")
def model():
    return clip_model()


def text(row_id, width=24):
    return row_normal((width,), 5, [row_id], "text")[0]


def inverted(problem, given=None):
    return {r["id"]: r for r in solve(problem, rows() if given is None else given)}


def rows(ids=IDS, width=24):
    return [{"id": i, "text": text(i, width).numpy()} for i in ids]


def gaussian(width=24, n=400):
    x = row_normal((width,), 3, [f"b{i}" for i in range(n)]) @ row_normal((width,), 4, [f"m{i}" for i in range(width)])
    x = x / width**0.5 + 0.5
    mean, covariance = x.double().mean(0), torch.cov(x.double().mT)
    return x, mean, covariance


class Features(nn.Module):
    """Stands where the patch convolution stood; gives the tokens as its feature map."""

    def __init__(self, side):
        super().__init__()
        self.side, self.weight, self.w = side, torch.zeros(1), None

    def forward(self, pixels):
        stretched = nn.functional.interpolate(self.w.mT, size=self.side**2, mode="nearest")
        return stretched.view(len(self.w), -1, self.side, self.side)


def full_model(model, w):
    """The model's own forward, with its patch embedding bypassed."""
    vision = getattr(model, "vision_model", model)
    embeddings = vision.embeddings
    kept = embeddings.patch_embedding
    side = int(embeddings.num_patches**0.5)
    embeddings.patch_embedding = Features(side)
    embeddings.patch_embedding.w = w
    try:
        out = model(pixel_values=torch.zeros(len(w), 3, embeddings.image_size, embeddings.image_size))
        return out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output
    finally:
        embeddings.patch_embedding = kept


def plain_loop(model, row_id, steps, tokens, extra=lambda z: 0.0, seed=0, stop=lambda cosine: False):
    """Cross the Gap's loop for one prompt."""
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
        (1 - cosine + extra(z)).backward()
        adam.step()
    with torch.no_grad():
        return full_model(model, w)[0], steps


def test_nearest_interpolation():
    for patches, tokens in [(16, 1), (16, 3), (49, 4), (256, 7)]:
        x = torch.arange(tokens, dtype=torch.float32).view(1, 1, -1)
        wanted = nn.functional.interpolate(x, size=patches, mode="nearest").flatten().long()
        assert torch.equal(token_of_patch(patches, tokens), wanted)


@pytest.mark.parametrize("build", [clip_model, siglip_model])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_tower_equals_the_models_forward(build, tokens):
    model = build()
    tower = VisionTower(model, tokens)
    w = torch.randn(5, tokens, tower.width)
    assert (tower(w) - full_model(model, w)).abs().max() < 1e-5
    assert not any(p.requires_grad for p in model.parameters())


def test_compact_with_as_many_tokens_as_patches_is_the_full_tower():
    model = clip_model()
    w = torch.randn(3, 16, 32)
    assert torch.allclose(VisionTower(model, 16, compact=True)(w), VisionTower(model, 16)(w), atol=1e-6)
    small = VisionTower(model, 3, compact=True)
    positions = model.vision_model.embeddings.position_embedding.weight[1:]
    bands = [positions[[n for n in range(16) if n * 3 // 16 == band]].mean(0) for band in range(3)]
    assert torch.allclose(small.positions_ND, torch.stack(bands), atol=1e-6)
    assert small(torch.randn(2, 3, 32)).shape == (2, 24)


def test_tower_refuses_what_it_cannot_enter():
    with pytest.raises(TypeError, match="Linear"):
        VisionTower(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="16 patches"):
        VisionTower(clip_model(), 17)


@pytest.mark.parametrize("slots", [1, 4, 9, 32])
@pytest.mark.parametrize("poll", [1, 3])
def test_published_recipe_equals_the_plain_loop(model, slots, poll):
    ids = list(IDS)
    random.Random(slots).shuffle(ids)
    settings = replace(PUBLISHED, slots=slots, stop=StoppingRule(limit=100))
    problem = Inversion(Space.tokens(VisionTower(model, 4)), settings)
    out = {r["id"]: r for r in solve(problem, rows(ids), poll=poll)}
    assert len(out) == len(IDS)
    for row_id in IDS if slots == 4 else IDS[:3]:
        z, _ = plain_loop(model, row_id, 100, 4)
        assert (torch.from_numpy(out[row_id]["embedding"]) - z).abs().max() <= 1e-4
        assert out[row_id]["steps"] == 100
        assert out[row_id]["passes"] == 101
        cosine = nn.functional.cosine_similarity(z, text(row_id), dim=0).item()
        assert out[row_id]["text_cosine"] == pytest.approx(cosine, abs=1e-4)
        assert out[row_id]["text_cosine"] > 0.3  # it went somewhere


def test_published_recipe_is_the_published_recipe():
    assert (PUBLISHED.lr, PUBLISHED.weight_decay, PUBLISHED.init_std) == (2e-2, 0.01, 0.02)
    assert PUBLISHED.stop == StoppingRule(limit=1000)
    assert PUBLISHED.mahalanobis == PUBLISHED.neighbours == 0
    assert not PUBLISHED.best


def test_rows_stop_where_the_plain_loop_stops(model):
    settings = Settings(slots=3, watch="cosine", stop=StoppingRule(limit=200, absolute=0.6))
    out = inverted(Inversion(Space.tokens(VisionTower(model, 4)), settings))
    steps = set()
    for row_id in IDS[:4]:
        z, taken = plain_loop(model, row_id, 200, 4, stop=lambda cosine: cosine >= 0.4)
        assert out[row_id]["steps"] == taken
        assert (torch.from_numpy(out[row_id]["embedding"]) - z).abs().max() <= 1e-4
        steps.add(taken)
        assert out[row_id]["stopped"] == ("reached" if taken < 200 else "limit")
    assert len(steps) > 1


def test_a_row_does_not_depend_on_its_neighbours(model):
    settings = Settings(
        slots=8, stop=StoppingRule(limit=60, relative=1e-3, patience=4), mahalanobis=0.1, neighbours=0.2
    )
    settings = replace(settings, k=2)
    bank, mean, covariance = gaussian()
    whitening = Whitening.of(mean, torch.linalg.cholesky(covariance))
    tower = VisionTower(model, 4)

    def run(slots, ids):
        problem = Inversion(
            Space.tokens(tower), replace(settings, slots=slots), whitening=whitening, search=ExactSearch(bank, 2)
        )
        return {r["id"]: torch.from_numpy(r["embedding"]) for r in solve(problem, rows(ids))}

    alone = run(1, IDS[4:5])[IDS[4]]
    full = run(8, IDS[:8])[IDS[4]]
    refilled = run(2, IDS[::-1])[IDS[4]]
    scale = alone.abs().max()
    assert (alone - full).abs().max() <= 1e-5 * max(1, scale)
    assert (alone - refilled).abs().max() <= 1e-5 * max(1, scale)


@pytest.mark.parametrize("interval", [1, 5, 0])
def test_constraints_equal_a_plain_loop_in_float64_formulas(model, interval):
    bank, mean, covariance = gaussian()
    inverse = torch.linalg.inv(covariance)
    unit = nn.functional.normalize(bank, dim=-1)
    settings = Settings(slots=4, mahalanobis=0.05, neighbours=0.5, k=3, interval=interval, stop=StoppingRule(limit=30))
    problem = Inversion(
        Space.tokens(VisionTower(model, 4)), settings,
        whitening=Whitening.of(mean, torch.linalg.cholesky(covariance)), search=ExactSearch(bank, 3),
    )  # fmt: skip
    out = inverted(problem)
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
    settings = Settings(slots=4, lr=0.05, weight_decay=0.0, init_std=0.0, mahalanobis=0.3, stop=StoppingRule(limit=600))
    out = inverted(Inversion(Space.direct(whitening), settings, whitening=whitening))
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
    first = inverted(Inversion(Space.tokens(tower), Settings(stop=StoppingRule(limit=50))), rows(IDS[:2]))
    again = [{"id": i, "text": text(i).numpy(), "start": first[i]["variable"]} for i in IDS[:2]]
    warm = inverted(Inversion(Space.tokens(tower), Settings(stop=StoppingRule(limit=1))), again)
    cold = inverted(Inversion(Space.tokens(tower), Settings(stop=StoppingRule(limit=1))), rows(IDS[:2]))
    for i in IDS[:2]:
        assert warm[i]["text_cosine"] == pytest.approx(first[i]["text_cosine"], abs=0.05)
        assert warm[i]["text_cosine"] > cold[i]["text_cosine"] + 0.1


def test_best_keeps_the_best_look(model):
    _, mean, covariance = gaussian()
    whitening = Whitening.of(mean, torch.linalg.cholesky(covariance))
    stop = StoppingRule(limit=60, patience=60)
    settings = Settings(slots=4, watch="mahalanobis", stop=stop, best=True)
    best = inverted(Inversion(Space.tokens(VisionTower(model, 4)), settings, whitening=whitening))
    last = Inversion(Space.tokens(VisionTower(model, 4)), replace(settings, best=False), whitening=whitening)
    last = inverted(last)
    assert all(best[i]["mahalanobis"] <= last[i]["mahalanobis"] for i in IDS)
    assert any(best[i]["mahalanobis"] < last[i]["mahalanobis"] for i in IDS)


def test_lower_precision_ends_near_float32(model):
    settings = Settings(slots=4, stop=StoppingRule(limit=40))
    tower = VisionTower(model, 4)
    exact = {r["id"]: r["text_cosine"] for r in solve(Inversion(Space.tokens(tower), settings), rows())}
    for precision in ("bfloat16", "float16"):
        problem = Inversion(Space.tokens(tower), replace(settings, precision=precision))
        assert problem.x_B.dtype == torch.float32
        near = {r["id"]: r["text_cosine"] for r in solve(problem, rows())}
        assert all(abs(exact[i] - near[i]) < 0.1 for i in IDS)
        assert sum(near.values()) / len(IDS) == pytest.approx(sum(exact.values()) / len(IDS), abs=0.03)


def test_a_diverged_row_fails_alone(model):
    bad = [{**r, "text": r["text"] * float("nan")} if r["id"] == IDS[2] else r for r in rows()]
    occupancy = Occupancy()
    problem = Inversion(Space.tokens(VisionTower(model, 4)), Settings(slots=3, stop=StoppingRule(limit=5)))
    out = {r["id"]: r for r in solve(problem, bad, occupancy=occupancy)}
    assert [i for i in IDS if out[i]["status"] == "failed"] == [IDS[2]]
    assert "diverged" in out[IDS[2]]["error"]


def test_constraints_need_their_statistics(model):
    space = Space.tokens(VisionTower(model, 4))
    with pytest.raises(ValueError, match="statistics"):
        Inversion(space, Settings(mahalanobis=0.5))
    with pytest.raises(ValueError, match="index"):
        Inversion(space, Settings(neighbours=0.5))
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
        settings = Settings(slots=4, mahalanobis=0.05, neighbours=0.3, k=2, stop=StoppingRule(limit=40), accelerate=how)
        problem = Inversion(Space.tokens(tower), settings, whitening=whitening, search=ExactSearch(bank.cuda(), 2))
        return {r["id"]: torch.from_numpy(r["embedding"]) for r in solve(problem, rows())}

    eager, fast = run("none"), run(accelerate)
    assert all((eager[i] - fast[i]).abs().max() <= 1e-4 for i in IDS)
