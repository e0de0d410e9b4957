"""Learning words: against a plain one-concept loop, and against each other."""

from __future__ import annotations

import hashlib
import json
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from stages.concepts.draws import draw
from stages.concepts.prepare import prepare
from stages.concepts.problem import LegoProblem
from stages.concepts.settings import LegoSettings, Templates
from stages.concepts.templates import OBJECT
from stages.engine import gradients
from stages.engine.adamw import RowAdamW
from stages.engine.gradients import RowGradient
from stages.engine.solver import solve
from tests.support.concepts import concept_row, learn, opened
from tests.support.tiny_stable_diffusion import build

NEW = {"templates", "flip", "posterior"}
TEXTS = {
    None: ["Photo of a {}"],
    "object": list(OBJECT),
    ("a red {}", "small {} thing"): ["a red {}", "small {} thing"],
}


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
        examples = [(True, "<s> that is <a> in <b>", p) for p in row["with"]]
        examples += [(False, "<s>", p) for p in row["without"]]
    else:
        examples = [(True, "<a> in <b>", p) for p in row["with"]]

    @cache
    def posterior(which, mirrored):
        picture = examples[which][2]
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        square = picture.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        square = ImageOps.mirror(square) if mirrored else square
        pixels = torch.from_numpy(np.array(square)).float().permute(2, 0, 1)[None] / 127.5 - 1
        return pipe.vae.encode(pixels).latent_dist

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimiser = torch.optim.AdamW([table], lr=settings.lr, weight_decay=0.0)
    losses = []
    for step in range(settings.steps):
        drawn = draw(settings, seed, row["id"], step, torch.tensor([e[0] for e in examples]), (4, 8, 8), 1000)
        optimiser.zero_grad()
        total = 0.0
        for k, (which, t, noise) in enumerate(zip(drawn.picture_K.tolist(), drawn.t_K, drawn.noise_KCHW, strict=True)):
            prompt = TEXTS[settings.templates][int(drawn.template_K[k])].format(examples[which][1])
            tokens = words(prompt, padding="max_length", return_tensors="pt")["input_ids"]
            found = posterior(which, bool(drawn.flip_K[k]))
            z = found.mean[0]
            if settings.posterior == "sample":
                z = z + (0.5 * found.logvar[0]).exp() * drawn.posterior_KCHW[k]
            z = z * pipe.vae.config.scaling_factor
            noisy = scheduler.add_noise(z[None], noise[None], t[None])
            out = unet(noisy, t, encoder(tokens)[0]).sample
            target = noise[None]
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(z[None], noise[None], t[None])
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


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A model that reads the longest of the official texts, letter by letter."""
    folder = build(tmp_path_factory.mktemp("long"), length=32)
    return folder, opened(folder)


@pytest.mark.parametrize(
    "script",
    [
        {"separation": False, "context": "none", "templates": "object", "flip": True, "posterior": "sample"},
        {"templates": ("a red {}", "small {} thing"), "flip": True, "posterior": "sample"},
        {"templates": ("a red {}", "small {} thing"), "posterior": "mean"},
        {"flip": True},
    ],
    ids=["textual inversion", "Lego", "templates alone", "flips alone"],
)
def test_templates_flips_and_posterior_samples_are_what_a_plain_loop_trains_on(long, script):
    """In slots beside other concepts."""
    folder, model = long
    settings = LegoSettings(steps=8, window=8, context_weight=0.05, **script)
    rows = [concept_row(i) for i in range(3)]
    words = 3 if settings.separation else 2
    found = learn(model, rows, settings, slots=2)["concept-1"]
    expected, losses = plain_loop(folder, rows[1], settings, seed=7)
    assert np.abs(found["embeddings"][:words] - expected.numpy()[:words]).max() < 1e-4
    assert json.loads(found["curve"])[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["pictures"] == 3 + 2 * settings.separation
    without = settings.model_copy(update=dict.fromkeys(NEW))
    plain = learn(model, rows[1:2], without, slots=1)["concept-1"]
    assert np.abs(plain["embeddings"] - found["embeddings"]).max() > 1e-3


def test_a_job_without_them_is_settled_described_and_checkpointed_as_before(model, tmp_path):
    """Nothing is drawn, and the file of a checkpoint keeps the name that it had before there were any (7f29c01)."""
    settings = LegoSettings(steps=2, window=2)
    assert not settings.model_dump().keys() & NEW
    learned = learn(model, [concept_row(0)], settings, slots=1, checkpoints=str(tmp_path))["concept-0"]
    assert not json.loads(learned["settings"]).keys() & (NEW - {"templates"})
    prepared = prepare(concept_row(0), model, settings, Templates(), max_words=4, root="")
    described = ["concept-0", 7, settings.model_dump(), prepared.tokens, 32, prepared.with_I.tolist()]
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
    z_ICHW, ids_EIT, which_EIT = prepared.as_they_are()
    for tensor in (z_ICHW, prepared.start_VE, *ids_EIT, *which_EIT, *prepared.positive, *prepared.negative):
        digest.update(tensor.contiguous().numpy().tobytes())
    assert [file.name for file in tmp_path.iterdir()] == [f"concept-0-{digest.hexdigest()}.safetensors"]


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


def test_the_vocabulary_is_never_touched(model):
    before = model.pipeline.text_encoder.get_input_embeddings().weight.clone()
    learn(model, [concept_row(0)], LegoSettings(steps=5, window=5), slots=2)
    after = model.pipeline.text_encoder.get_input_embeddings()
    assert torch.equal(before, after.weight)
    assert not after._forward_hooks


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
    ready[1]["prepared"].z_IFCHW.fill_(float("nan"))
    problem = LegoProblem(model, settings, slots=2, max_words=4, seed=7)
    learned = {row["id"]: row for row in solve(problem, ready)}
    assert "lower lr" in learned["concept-1"]["error"]
    alone = learn(model, rows[:1], settings, slots=1)["concept-0"]["embeddings"]
    assert np.abs(learned["concept-0"]["embeddings"] - alone).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_killed_run_goes_on_from_its_checkpoints_and_ends_equal(folder, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(gradients, "FLOAT16_SCALE", 2.0**36)  # the first steps overflow, and are no updates
    model = opened(folder, dtype)
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


def test_the_networks_are_not_shown_empty_slots(model, monkeypatch):
    shown = []
    forward = type(model).forward

    def seen(self, z, t, condition):
        shown.append(len(z))
        return forward(self, z, t, condition)

    monkeypatch.setattr(type(model), "forward", seen)
    settings = LegoSettings(steps=2, window=2, pictures=4)
    learn(model, [concept_row(0)], settings, slots=3)
    assert shown == [4, 4]


def test_checkpoints_belong_to_their_settings(model, tmp_path):
    row = concept_row(0)
    for lr in (1e-3, 2e-3):
        learn(model, [row], LegoSettings(steps=2, window=2, lr=lr), slots=1, checkpoints=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_float16_keeps_the_gradient_of_a_real_latents_mean(tmp_path, monkeypatch, kind):
    """A tiny latent's loss is a mean over 64 times fewer numbers than Stable Diffusion's 4 x 64 x 64: weighted so."""
    folder = build(tmp_path, kind)
    settings = LegoSettings(steps=10, window=5, context="none", pictures=4)
    losses, step = LegoProblem.losses, RowAdamW.step
    monkeypatch.setattr(LegoProblem, "losses", lambda self, *drawn: tuple(x / 64 for x in losses(self, *drawn)))

    def first(dtype, scaled=True):
        """Of each concept's first update, (B, V E); a step that overflows is made again with the same draws."""
        model = opened(folder, dtype)
        problem = LegoProblem(model, settings, slots=2, max_words=4, seed=7)
        if not scaled:
            problem.gradient = RowGradient(2)
        seen = {}

        def kept(self, grad, active_B=None, lr_B=None):
            for b in active_B.nonzero().flatten().tolist():
                seen.setdefault(b, grad[b].flatten().double())

        monkeypatch.setattr(RowAdamW, "step", kept)
        rows = [concept_row(0), concept_row(1)]
        problem.load(
            [0, 1], [{**r, "prepared": prepare(r, model, settings, Templates(), max_words=4, root="")} for r in rows]
        )
        drawn = problem._draws([0, 1])
        monkeypatch.setattr(problem, "_draws", lambda learning: drawn)
        while len(seen) < 2:
            problem.step()
        monkeypatch.setattr(RowAdamW, "step", step)
        return torch.stack([seen[0], seen[1]])

    reference = first("float32")
    cosine_B = torch.nn.functional.cosine_similarity(first("float16"), reference, dim=1)
    assert cosine_B.min() > 0.999
    lost_B = torch.nn.functional.cosine_similarity(first("float16", scaled=False), reference, dim=1)
    assert lost_B.min() < 0.999
