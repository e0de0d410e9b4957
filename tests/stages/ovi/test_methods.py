"""Every prompt-to-embedding method against what it should be, computed another way."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from index.reference import Reference
from pipeline.contract import failed
from stages.engine.randomness import row_generator, row_normal
from stages.models import clip
from stages.ovi.context import Context
from stages.ovi.methods import build
from stages.ovi.settings import EARLY, OVI, Constraint, Direct, Retrieval, Stop, TextEmbedding, TrainedPrior
from stages.ovi.warm_starts import WarmStarts
from tests.support.tiny_kandinsky import LENGTH, WIDTH, build_prior, build_reference

PROMPTS = ["photo of a red star", "blue circle", "a striped green ring", "plain small heart", "robot in ice"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return build_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def context(prior, tmp_path_factory):
    text, image = clip.TextEncoder(prior), clip.ImageEncoder(prior)
    reference = Reference.open(
        build_reference(tmp_path_factory.mktemp("made"), prior), encoder=clip.identity(prior, "image")
    )
    return Context(
        model=prior, revision=None, device="cpu", seed=3, vision=lambda: image.model, text=text, reference=reference
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(context):
    text_BE = context.text(PROMPTS)
    return [
        {"id": f"p{i}", "prompt": p, "text": t.numpy()} for i, (p, t) in enumerate(zip(PROMPTS, text_BE, strict=True))
    ]


def run(method, context, rows):
    return {row["id"]: row for row in build(method, context)(iter(rows))}


def test_text_embeddings_are_the_pipelines(prior, rows):
    from diffusers import KandinskyV22PriorPipeline

    pipe = KandinskyV22PriorPipeline.from_pretrained(prior)
    wanted = pipe._encode_prompt(PROMPTS, "cpu", 1, False)[0]
    got = torch.from_numpy(np.stack([row["text"] for row in rows]))
    assert (got - wanted).abs().max() < 1e-5


def test_image_encoder_is_the_pipelines(prior):
    from diffusers import KandinskyV22PriorPipeline

    pipe = KandinskyV22PriorPipeline.from_pretrained(prior)
    encoder = clip.ImageEncoder(prior)
    assert torch.allclose(encoder.zero_embedding(), pipe.get_zero_embed()[0], atol=1e-5)
    assert clip.embedding_width(prior) == WIDTH
    assert clip.vision_width(prior) == 32


def test_text_embedding_raw_and_rescaled(context, rows):
    raw = run(TextEmbedding(), context, rows)
    scaled = run(TextEmbedding(rescale=True), context, rows)
    norms = np.linalg.norm(context.reference.index.vectors_NE.astype(np.float64), axis=1)
    for row in rows:
        np.testing.assert_array_equal(raw[row["id"]]["embedding"], row["text"])
        z = scaled[row["id"]]["embedding"]
        assert np.linalg.norm(z) == pytest.approx(norms.mean(), rel=1e-5)
        np.testing.assert_allclose(z / np.linalg.norm(z), row["text"] / np.linalg.norm(row["text"]), atol=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_retrieval_is_the_mean_of_the_nearest(context, rows, k):
    bank = np.array(context.reference.index.vectors_NE)
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    got = run(Retrieval(k=k), context, rows)
    for row in rows:
        nearest = np.argsort(-(unit @ row["text"]))[:k]
        np.testing.assert_allclose(got[row["id"]]["embedding"], bank[nearest].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="300 rows"):
        build(Retrieval(k=301), context)
    with pytest.raises(ValueError, match="lower k"):
        build(OVI(constraint=Constraint(neighbours=1.0, k=301)), context)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_trained_prior_is_the_pipeline_one_prompt_at_a_time(context, prior, rows, batch):
    from diffusers import KandinskyV22PriorPipeline

    pipe = KandinskyV22PriorPipeline.from_pretrained(prior)
    got = run(TrainedPrior(steps=3, guidance=2.0, batch=batch), context, rows)
    for row in rows:
        generator = row_generator(3, row["id"], "prior")
        wanted = pipe(row["prompt"], num_inference_steps=3, guidance_scale=2.0, generator=generator).image_embeds[0]
        np.testing.assert_allclose(got[row["id"]]["embedding"], wanted.numpy(), atol=1e-4)


def test_a_prior_without_time_embedding_equals_one_whose_time_token_nobody_sees(context, rows, tmp_path):
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer

    torch.manual_seed(5)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": WIDTH}
    short = PriorTransformer(**shape, num_embeddings=LENGTH, additional_embeddings=3)
    nn.init.normal_(short.positional_embedding)
    nn.init.normal_(short.prd_embedding)
    short.save_pretrained(tmp_path)
    long = PriorTransformer(**shape, num_embeddings=LENGTH, additional_embeddings=4).eval()
    own = {k: v for k, v in short.state_dict().items() if "time" not in k and k != "positional_embedding"}
    long.load_state_dict(own, strict=False)
    at = LENGTH + 1  # the time token stands behind the text embedding
    position = short.positional_embedding.detach()
    long.positional_embedding.data = torch.cat([position[:, :at], position[:, :1], position[:, at:]], dim=1)
    long.causal_attention_mask[:, :at, at] = -10000.0
    long.causal_attention_mask[:, at + 1 :, at] = -10000.0
    pipe = KandinskyV22PriorPipeline.from_pretrained(context.model)
    t_BE, states, mask = pipe._encode_prompt(PROMPTS, "cpu", 1, False)
    noise = row_normal((WIDTH,), 3, [row["id"] for row in rows], "prior")
    with torch.no_grad():
        wanted = long(noise, 0, t_BE, states, mask).predicted_image_embedding
    got = run(TrainedPrior(prior=str(tmp_path)), context, rows)
    for row, z in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(got[row["id"]]["embedding"], z.numpy(), atol=1e-4)
        assert got[row["id"]]["passes"] == 1


def test_constraints_pull_towards_the_images(context, rows):
    free = run(OVI(steps=40, slots=2, stop=Stop()), context, rows)
    near = run(OVI(steps=40, slots=2, stop=Stop(), constraint=Constraint(neighbours=2.0, k=3)), context, rows)
    typical = run(OVI(steps=40, slots=2, stop=Stop(), constraint=Constraint(mahalanobis=0.5)), context, rows)

    def mean(found, measure):
        return np.mean([measure(torch.from_numpy(row["embedding"])[None]) for row in found.values()])

    def nearest(z):
        return float(context.reference.neighbours(z, 3).cos_BK.mean())

    def distance(z):
        return float(context.reference.mahalanobis(z)) / WIDTH

    assert mean(near, nearest) > mean(free, nearest) + 0.05
    assert mean(typical, distance) < mean(free, distance) - 0.05
    assert all(free[i]["passes"] == 41 for i in free)
    assert context.occupancy["ovi"].rows == 3 * len(rows)


def test_direct_needs_no_encoder_and_stops(context, rows):
    got = run(Direct(), context, rows)
    for row in rows:
        found = got[row["id"]]
        assert found["passes"] == 0
        assert 5 < found["steps"] <= 200
        assert found["mahalanobis"] < float(context.reference.mahalanobis(torch.from_numpy(row["text"])[None])) / WIDTH


def test_a_target_cosine_stops_a_row(context, rows):
    got = run(OVI(steps=300, stop=Stop(target=0.6)), context, rows)
    reached = [row for row in got.values() if row["stopped"] == "reached"]
    assert len(reached) >= 3
    assert all(row["text_cosine"] >= 0.6 and row["steps"] < 300 for row in reached)
    assert len({row["steps"] for row in reached}) > 1


def test_failed_rows_pass_every_method(context, rows):
    mixed = [failed({"id": "bad", "prompt": "x"}, "no"), *rows]
    for method in (
        TextEmbedding(rescale=True), Retrieval(k=2), TrainedPrior(steps=2), Direct(steps=2), OVI(steps=2)
    ):  # fmt: skip
        got = run(method, context, mixed)
        assert len(got) == len(mixed)
        assert got["bad"]["error"] == "no"


def test_warm_starts_take_the_tokens_of_the_nearest_prompt(context, rows, tmp_path):
    (tmp_path / "data").mkdir()
    tokens = np.arange(2 * 4 * 32, dtype=np.float32).reshape(2, -1)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), 4 * 32)
    table = {"prompt": [PROMPTS[3], PROMPTS[1]], "tokens": flat, "status": ["ok", "ok"]}
    pq.write_table(pa.table(table), tmp_path / "data" / "part-00000-of-00001.parquet")
    starts = WarmStarts.open(str(tmp_path), (4, 32), context.text)
    got = {row["id"]: row["start"] for row in starts(rows)}
    np.testing.assert_array_equal(got["p1"].ravel(), tokens[1])
    np.testing.assert_array_equal(got["p3"].ravel(), tokens[0])
    run(OVI(steps=2, warm_start=str(tmp_path)), context, rows)
    with pytest.raises(ValueError, match="3 x 32"):
        run(OVI(steps=2, tokens=3, warm_start=str(tmp_path)), context, rows)


def test_methods_say_what_they_lack(context, prior):
    poor = Context(prior, None, "cpu", 0, context.vision, context.text, None)
    for method in (Retrieval(), Direct(), TextEmbedding(rescale=True), OVI(constraint=Constraint(neighbours=1.0))):
        with pytest.raises(ValueError, match="reference"):
            build(method, poor)
    with pytest.raises(ValueError, match="prior pipeline"):
        build(TrainedPrior(model="/nowhere"), poor)
    with pytest.raises(ValueError, match="PriorTransformer"):
        build(TrainedPrior(prior="/nowhere"), poor)


def test_early_stopping_is_the_default(context, rows):
    assert OVI().stopping == EARLY
    assert OVI(constraint=Constraint(mahalanobis=0.1)).stopping == Stop()
    assert OVI(stop=Stop()).stopping == OVI(recipe="published").stopping == Stop()
    got = run(OVI(steps=200), context, rows)
    assert any(row["stopped"] == "stalled" and 5 <= row["steps"] < 200 for row in got.values())


def test_published_recipe_cannot_be_bent():
    assert OVI(recipe="published").limit == 1000
    with pytest.raises(ValidationError, match="fixes steps, lr"):
        OVI(recipe="published", steps=10, lr=0.1)
    with pytest.raises(ValidationError, match="stop"):
        OVI(recipe="published", stop=Stop(patience=3))


def test_encoders_name_what_is_missing(tmp_path):
    with pytest.raises(clip.ModelError, match="nowhere"):
        clip.TextEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(clip.ModelError, match="nowhere"):
        clip.identity(str(tmp_path / "nowhere"), "image")
