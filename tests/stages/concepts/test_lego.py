"""Learning words: against a plain one-concept loop, against each other, and through diffusers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stages.concepts.concept import ConceptError, read_concept
from stages.concepts.draws import draw, skewed
from stages.concepts.losses import context_loss
from stages.concepts.prepare import prepare
from stages.concepts.problem import LegoProblem
from stages.concepts.settings import LearnConceptsSettings, LegoSettings, Templates
from stages.concepts.stage import LearnConcepts
from stages.engine.checkpoint import read_checkpoint, write_checkpoint
from stages.engine.solver import solve
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from stages.models.words import Encoder, encode, tokenize, word_id
from tests.support.tiny_stable_diffusion import WORDS, build, tokenizer


def opened(folder):
    return open_latent_model(LatentModelSettings(model=folder, device="cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture(scope="module")
def model(folder):
    return opened(folder)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return opened(build(tmp_path_factory.mktemp("sdxl"), "sdxl"))


def pictures(seed: int, count: int = 2) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)) for _ in range(count)]


def concept_row(number: int, **changes) -> dict:
    words = [w for w in WORDS if len(w) > 3]
    row = {
        "id": f"concept-{number}",
        "concept": "frozen in ice",
        "subject": words[number % len(words)],
        "with": pictures(2 * number, 2 + number % 2),
        "without": pictures(2 * number + 1, 2),
        "start": {"frozen": words[(number + 3) % len(words)], "ice": "thing"},
        "positive": {"frozen": ["cold", "blue"], "ice": ["plain", "cold", "small"]},
        "negative": {"frozen": ["warm", "melted"], "ice": ["red"]},
    }
    return row | changes


def learn(model, rows, settings, slots, **options):
    problem = LegoProblem(model, settings, slots=slots, max_words=4, seed=7, **options)
    ready = ({**row, "prepared": prepare(row, model, settings, Templates(), max_words=4, root="")} for row in rows)
    return {row["id"]: row for row in solve(problem, ready)}


def stage_of(folder, **options):
    return LearnConcepts(LearnConceptsSettings(model=folder, device="cpu", **options))


# --- the plain loop: one concept, the tokenizer and vocabulary table extended, torch's own AdamW


def plain_loop(folder: str, row: dict, settings: LegoSettings, seed: int) -> tuple[torch.Tensor, list[float]]:
    """What a reader of the paper would write: diffusers' textual inversion with a second set and one more loss."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    encoder, words, unet = pipe.text_encoder, pipe.tokenizer, pipe.unet
    for module in (encoder, unet, pipe.vae):
        module.requires_grad_(False).eval()
    new = ["<a>", "<b>", "<s>"]
    words.add_tokens(new)
    encoder.resize_token_embeddings(len(words), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    ids = words.convert_tokens_to_ids(new)

    def of(word):
        return table[words(word, add_special_tokens=False)["input_ids"][0]].clone()

    for token, start in zip(ids, [row["start"]["frozen"], row["start"]["ice"], row["subject"]], strict=True):
        table.data[token] = of(start)
    table.requires_grad_(True)
    frozen = table.detach().clone()
    context = {
        side: [[of(w).detach() for w in row[side][word]] for word in ("frozen", "ice")]
        for side in ("positive", "negative")
    }

    if settings.separation:
        examples = [(True, "Photo of a <s> that is <a> in <b>", p) for p in row["with"]]
        examples += [(False, "Photo of a <s>", p) for p in row["without"]]
    else:
        examples = [(True, "Photo of a <a> in <b>", p) for p in row["with"]]
    latents = []
    for _, _, picture in examples:
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        square = picture.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(square)).float().permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(pipe.vae.encode(pixels).latent_dist.mean[0] * pipe.vae.config.scaling_factor)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimiser = torch.optim.AdamW([table], lr=settings.lr, weight_decay=0.0)
    losses = []
    for step in range(settings.steps):
        drawn = draw(settings, seed, row["id"], step, torch.tensor([e[0] for e in examples]), (4, 8, 8), 1000)
        optimiser.zero_grad()
        total = 0.0
        for which, t, noise in zip(drawn.picture_K.tolist(), drawn.t_K, drawn.noise_KCHW, strict=True):
            tokens = words(examples[which][1], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
            noisy = scheduler.add_noise(latents[which][None], noise[None], t[None])
            out = unet(noisy, t, encoder(tokens)[0]).sample
            target = noise[None]
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents[which][None], noise[None], t[None])
            total = total + ((out - target) ** 2).mean() / settings.pictures
        losses.append(total.item())
        if settings.context != "none":
            for number in range(2):
                v = table[ids[number]]

                def similarity(word, v=v):
                    if settings.context == "paper":
                        return v @ word
                    return torch.cosine_similarity(v, word, dim=0) / settings.temperature

                near = sum(similarity(w).exp() for w in context["positive"][number])
                far = sum(similarity(w).exp() for w in context["negative"][number])
                total = total - settings.context_weight * torch.log(near / (near + far))
        total.backward()
        optimiser.step()
        with torch.no_grad():  # all but the new rows stay as they were
            keep = torch.ones(len(table), dtype=torch.bool)
            keep[ids] = False
            table[keep] = frozen[keep]
    return table.detach()[ids], losses


@pytest.mark.parametrize(
    ("separation", "context", "skew"), [(True, "normalised", 0.0), (True, "paper", 0.0), (False, "none", 0.5)]
)
def test_one_concept_equals_a_plain_textual_inversion_loop(folder, model, separation, context, skew):
    settings = LegoSettings(steps=50, window=25, separation=separation, context=context, context_weight=0.05, skew=skew)
    row = concept_row(1)
    learned = learn(model, [row], settings, slots=1)[row["id"]]
    expected, losses = plain_loop(folder, row, settings, seed=7)
    words = 3 if separation else 2  # without separation no prompt holds the subject's token
    vectors = learned["embeddings"][:words]
    start = prepare(row, model, settings, Templates(), max_words=4, root="").start_VE.numpy()[:words]
    assert np.abs(vectors - start).max() > 0.02  # it has moved
    assert np.abs(vectors - expected.numpy()[:words]).max() < 1e-4
    curve = json.loads(learned["curve"])
    assert [point["step"] for point in curve] == [25, 50]
    assert curve[0]["loss"] == pytest.approx(np.mean(losses[:25]), rel=1e-4)
    assert curve[1]["loss"] == pytest.approx(np.mean(losses[25:]), rel=1e-4)


def test_v_prediction_equals_the_plain_loop(tmp_path):
    folder = build(tmp_path / "v", prediction="v_prediction")
    settings = LegoSettings(steps=10, window=10)
    row = concept_row(0)
    learned = learn(opened(folder), [row], settings, slots=1)[row["id"]]
    assert np.abs(learned["embeddings"][:3] - plain_loop(folder, row, settings, 7)[0].numpy()).max() < 1e-4


def test_eight_concepts_in_one_batch_equal_eight_single_runs(model):
    settings = LegoSettings(steps=50, window=50)
    rows = [concept_row(i) for i in range(8)]
    together = learn(model, rows, settings, slots=8)
    for row in rows:
        alone = learn(model, [row], settings, slots=1)[row["id"]]["embeddings"]
        assert np.abs(together[row["id"]]["embeddings"] - alone).max() < 1e-4
    assert np.abs(together["concept-0"]["embeddings"] - together["concept-1"]["embeddings"]).max() > 1e-2


def test_a_refilled_slot_changes_nothing(model):
    settings = LegoSettings(steps=12, window=4)
    rows = [concept_row(i) for i in range(5)]
    together, refilled = learn(model, rows, settings, slots=5), learn(model, rows, settings, slots=2)
    for i in together:
        assert np.abs(together[i]["embeddings"] - refilled[i]["embeddings"]).max() < 1e-5


def test_sdxl_learns_both_encoders_words(sdxl):
    settings = LegoSettings(steps=20, window=10)
    rows = [concept_row(i) for i in range(3)]
    together = learn(sdxl, rows, settings, slots=3)
    for row in rows:
        prepared = prepare(row, sdxl, settings, Templates(), max_words=4, root="")
        vectors = together[row["id"]]["embeddings"]
        assert vectors.shape == (4, 32 + 24)
        moved = np.abs(vectors[:3] - prepared.start_VE.numpy())
        assert moved[:, :32].max(1).min() > 1e-3
        assert moved[:, 32:].max(1).min() > 1e-3
        assert np.abs(vectors - learn(sdxl, [row], settings, slots=1)[row["id"]]["embeddings"]).max() < 1e-4


# --- words and prompts


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts_with_new_words_encode_as_in_diffusers(kind, model, sdxl, tmp_path):
    """The same vectors added to diffusers' own pipeline by load_textual_inversion give the same condition."""
    from diffusers import DiffusionPipeline

    frozen = {"sd": model, "sdxl": sdxl}[kind]
    frozen.pipeline.save_pretrained(tmp_path)
    encoders = frozen.text_encoders
    words = ["<frozen-1>", "<frozen-2>"]
    new_BVE = torch.randn((2, 2, sum(e.width for e in encoders)), generator=torch.Generator().manual_seed(1))
    prompts = ["a <frozen-1> star in <frozen-2>", "photo of a robot that is<frozen-2>, <frozen-1>!"]
    tokens = [[tokenize(e, p, words) for p in prompts] for e in encoders]
    ids, which = ([torch.stack([pair[i] for pair in one]) for one in tokens] for i in (0, 1))
    ours, pooled = encode(encoders, ids, which, new_BVE)
    for b, prompt in enumerate(prompts):
        pipe = DiffusionPipeline.from_pretrained(tmp_path)
        parts = new_BVE[b].split([e.width for e in encoders], dim=-1)
        for suffix, part in zip(("", "_2"), parts, strict=False):
            for word, vector in zip(words, part, strict=True):
                pipe.load_textual_inversion(
                    {word: vector},
                    tokenizer=getattr(pipe, f"tokenizer{suffix}"),
                    text_encoder=getattr(pipe, f"text_encoder{suffix}"),
                )
        made = pipe.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.allclose(ours[b], made[0][0], atol=1e-5)
        if kind == "sdxl":
            assert torch.allclose(pooled[b], made[2][0], atol=1e-5)


def test_the_vocabulary_is_never_touched(model):
    before = model.pipeline.text_encoder.get_input_embeddings().weight.clone()
    learn(model, [concept_row(0)], LegoSettings(steps=5, window=5), slots=2)
    after = model.pipeline.text_encoder.get_input_embeddings()
    assert torch.equal(before, after.weight)
    assert not after._forward_hooks


def test_tokenize_refuses_what_it_cannot_place():
    encoder = Encoder(tokenizer(), torch.nn.Identity())
    with pytest.raises(ValueError, match="<b>, which is none of <a>"):
        tokenize(encoder, "photo of a <b>", ["<a>"])
    with pytest.raises(ValueError, match="shorten it"):
        tokenize(encoder, "red " * 30, [])
    assert word_id(encoder, "striped") == tokenizer()("striped", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ValueError, match="not one"):
        word_id(encoder, "zebra")


# --- losses and draws


@pytest.mark.parametrize("form", ["paper", "normalised"])
def test_context_loss_is_the_printed_formula(form):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn((2, 3, 5), generator=generator, dtype=torch.float64, requires_grad=True)
    near = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)
    far = torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)
    counts = [[(4, 2), (1, 3), (0, 2)], [(2, 2), (0, 0), (3, 1)]]
    near_there, far_there = (
        torch.tensor([[[m < pair[side] for m in range(4)] for pair in row] for row in counts]) for side in (0, 1)
    )
    loss = context_loss(v, near, far, near_there, far_there, form, 0.5)
    expected = []
    for b in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for i, (p, n) in enumerate(counts[b]):
            if p and n:

                def weight(word, b=b, i=i):
                    if form == "paper":
                        return math.e ** (v[b, i] @ word)
                    return math.e ** (v[b, i] @ word / v[b, i].norm() / word.norm() / 0.5)

                close = sum(weight(near[b, i, m]) for m in range(p))
                away = sum(weight(far[b, i, m]) for m in range(n))
                total = total - torch.log(close / (close + away))
        expected.append(total)
    assert torch.allclose(loss, torch.stack(expected), atol=1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), v)
    (reference,) = torch.autograd.grad(sum(expected), v)
    assert torch.allclose(grad, reference, atol=1e-10)


def test_context_loss_survives_zero_vectors_and_large_products():
    v = torch.zeros((1, 2, 3), requires_grad=True)
    words = torch.full((1, 2, 1, 3), 1e3)
    none = torch.zeros((1, 2, 1), dtype=torch.bool)
    some = ~none
    for form in ("paper", "normalised"):
        (grad,) = torch.autograd.grad(context_loss(v, words, words, none, none, form).sum(), v)
        assert torch.equal(grad, torch.zeros_like(v))
    assert context_loss(v + 1e3, words, -words, some, some, "paper").item() == pytest.approx(0, abs=1e-6)


def test_draws_are_balanced_replayable_and_skewed_as_asked():
    settings = LegoSettings(pictures=4)
    shown = torch.tensor([True, True, True, False, False])
    seen = torch.cat([draw(settings, 0, "x", s, shown, (1, 1, 1), 1000).picture_K for s in range(300)])
    assert (seen.view(-1, 4)[:, :2] < 3).all()
    assert (seen.view(-1, 4)[:, 2:] >= 3).all()
    assert torch.bincount(seen).tolist()[3:] == [300, 300]  # two of two in each step
    again = draw(settings, 0, "x", 5, shown, (1, 1, 1), 1000)
    assert torch.equal(again.noise_KCHW, draw(settings, 0, "x", 5, shown, (1, 1, 1), 1000).noise_KCHW)
    assert not torch.equal(again.noise_KCHW, draw(settings, 0, "y", 5, shown, (1, 1, 1), 1000).noise_KCHW)
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    x = skewed(u, 0.5)
    assert torch.allclose(
        x - 0.5 * torch.sin(math.pi * x) / math.pi, u, atol=1e-9
    )  # the inverse of the distribution function


# --- errors are rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"with": []}, "0 pictures with the concept"),
        ({"without": pictures(0, 1)}, "1 pictures without the concept"),
        ({"without": None}, "0 pictures without the concept"),
        ({"concept": ""}, "'concept' is empty"),
        ({"concept": "in the"}, "no content word"),
        ({"subject": None}, "a subject has no name"),
        ({"positive": {"frozen": ["cold"]}}, "no positive words for 'ice'"),
        ({"positive": ["cold"]}, "one list for 2 tokens"),
        ({"negative": {"frozen": ["warm"], "ice": ["zebra"]}}, "'zebra' is 5 tokens"),
        ({"negative": {"frozen": ["warm"], "snow": ["red"]}}, "'snow', which is no token of it"),
        ({"positive": '{"frozen": ['}, "no valid JSON"),
        ({"start": {"frozen": "zebra"}}, "'zebra' is 5 tokens"),
        ({"concept": "<frozen> <in> <the> <ice>", "positive": None}, "no positive words"),
        ({"prompt_with": "photo of a {subject}"}, "lacks {concept}"),
        ({"prompt_with": "photo of a {what} {concept}"}, "may hold {subject} and {concept} only"),
        ({"prompt_with": "{concept} " * 30}, "shorten it"),
        ({"with": [b"no picture", b"either"]}, "no readable picture"),
        ({"with": ["missing.png", "gone.png"]}, "does not exist"),
    ],
)
def test_a_bad_concept_is_an_error_row_and_the_others_go_on(folder, changes, message):
    stage = stage_of(folder, settings={"steps": 2, "window": 2}, slots=2)
    rows = {row["id"]: row for row in stage([concept_row(0), concept_row(1, **changes), concept_row(2)])}
    assert [rows[f"concept-{i}"]["status"] for i in range(3)] == ["ok", "failed", "ok"]
    assert message in rows["concept-1"]["error"]
    assert "concept-1" in rows["concept-1"]["error"]
    assert "prepared" not in rows["concept-1"]


def test_several_subjects_have_a_token_each(model):
    row = concept_row(0)
    subjects = [
        {"name": n, "with": pictures(i), "without": pictures(9 + i)} for i, n in enumerate(("red star", "robot"))
    ]
    row = {k: v for k, v in row.items() if k not in ("subject", "with", "without")} | {"subjects": subjects}
    concept = read_concept(row, Templates())
    assert concept.tokens == ("<concept-0-1>", "<concept-0-2>")
    assert concept.subject_tokens == ("<concept-0-subject-1>", "<concept-0-subject-2>")
    prompts = [prompt for _, prompt, _ in concept.examples(True)]
    assert prompts[0] == "Photo of a <concept-0-subject-1> that is <concept-0-1> in <concept-0-2>"
    assert prompts[-1] == "Photo of a <concept-0-subject-2>"
    learned = learn(model, [row], LegoSettings(steps=4, window=4), slots=1)[row["id"]]
    assert json.loads(learned["words"]) == ["frozen", "ice", "red star", "robot"]
    with pytest.raises(ConceptError, match="max_words is 3"):
        prepare(row, model, LegoSettings(), Templates(), max_words=3, root="")


def test_without_separation_or_context_less_is_asked_for(folder):
    settings = {"steps": 2, "window": 2, "separation": False, "context": "none", "pictures": 3}
    stage = stage_of(folder, settings=settings)
    (row,) = stage([concept_row(0, without=None, positive=None, negative=None)])
    assert row["status"] == "ok"
    assert row["pictures"] == 2


# --- stopping and checkpoints


def test_a_concept_stops_when_its_windows_bring_nothing(model):
    settings = LegoSettings(steps=40, window=2, lr=1e-9, tolerance=0.5, patience=3)
    learned = learn(model, [concept_row(0)], settings, slots=1)["concept-0"]
    assert learned["stopped"] == "stalled"
    assert learned["steps"] < 40
    assert learned["steps"] == json.loads(learned["curve"])[-1]["step"]


def test_a_concept_whose_loss_is_not_finite_fails_alone(model):
    settings = LegoSettings(steps=4, window=2)
    rows = [concept_row(0), concept_row(1)]
    ready = [{**r, "prepared": prepare(r, model, settings, Templates(), max_words=4, root="")} for r in rows]
    ready[1]["prepared"].z_ICHW.fill_(float("nan"))
    problem = LegoProblem(model, settings, slots=2, max_words=4, seed=7)
    learned = {row["id"]: row for row in solve(problem, ready)}
    assert "lower lr" in learned["concept-1"]["error"]
    alone = learn(model, rows[:1], settings, slots=1)["concept-0"]["embeddings"]
    assert np.abs(learned["concept-0"]["embeddings"] - alone).max() < 1e-4


def test_a_killed_run_goes_on_from_its_checkpoints_and_ends_equal(model, tmp_path):
    settings = LegoSettings(steps=30, window=5, tolerance=1e-3, patience=5)
    rows = [concept_row(i) for i in range(3)]
    undisturbed = learn(model, rows, settings, slots=2)

    def start():
        problem = LegoProblem(
            model, settings, slots=2, max_words=4, seed=7, checkpoints=str(tmp_path), checkpoint_seconds=0.0
        )
        ready = ({**r, "prepared": prepare(r, model, settings, Templates(), max_words=4, root="")} for r in rows)
        return problem, ready

    problem, ready = start()
    problem.load([0, 1], [next(ready), next(ready)])
    for _ in range(13):  # then the worker dies, in the middle of a window
        problem.step()
    problem, ready = start()
    steps = problem.step

    taken = [0]

    def counted():
        taken[0] += 1
        return steps()

    problem.step = counted
    resumed = {row["id"]: row for row in solve(problem, ready)}
    for row in rows:
        mine, theirs = resumed[row["id"]], undisturbed[row["id"]]
        assert np.array_equal(mine["embeddings"], theirs["embeddings"])
        assert mine["curve"] == theirs["curve"]
        assert (mine["steps"], mine["stopped"]) == (theirs["steps"], theirs["stopped"])
    assert taken[0] <= 17 + 30
    # A third run finds all of them finished: nothing is trained again.
    problem, ready = start()
    again = {row["id"]: row for row in solve(problem, ready)}
    assert all(np.array_equal(again[i]["embeddings"], undisturbed[i]["embeddings"]) for i in again)
    assert len(again) == 3


def test_checkpoints_belong_to_their_settings(model, tmp_path):
    row = concept_row(0)
    for lr in (1e-3, 2e-3):
        learn(model, [row], LegoSettings(steps=2, window=2, lr=lr), slots=1, checkpoints=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoints_are_whole_or_absent(tmp_path):
    path = str(tmp_path / "deep" / "x.safetensors")
    assert read_checkpoint(path) is None
    write_checkpoint(path, {"v": torch.arange(3.0)}, {"step": 3})
    tensors, meta = read_checkpoint(path)
    assert tensors["v"].tolist() == [0, 1, 2]
    assert meta == {"step": 3}
    with open(path, "r+b") as file:
        file.truncate(20)
    assert read_checkpoint(path) is None
    write_checkpoint("memory://ck/x.safetensors", {"v": torch.ones(1)}, {})
    assert read_checkpoint("memory://ck/x.safetensors")[0]["v"].item() == 1
