"""Training on from the shipped weights: the corpus on a device, the losses, and what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from micro import MODELS, assemble, clip, data, flows, further, oracle, t5, world
from micro.training import Recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> further.Corpus:
    path = tmp_path_factory.mktemp("corpus") / "corpus.npz"
    further.draw(MODELS, 300, torch.device("cpu"), 1, path)
    return further.Corpus.load(path, torch.device("cpu"))


def test_a_corpus_holds_what_the_training_split_does(corpus: further.Corpus, tmp_path: Path) -> None:
    pipeline = assemble.load("flux")
    captions = data.split_captions(tmp_path, "train", 300, 6)
    np.testing.assert_array_equal(corpus.clip_ids, clip.tokenize_all(pipeline.tokenizer, captions))
    np.testing.assert_array_equal(corpus.t5_ids, t5.tokenize_all(pipeline.tokenizer_2, captions))
    np.testing.assert_array_equal(corpus.labels, data.split_labels(tmp_path, "train", 300))
    with torch.no_grad():
        x_BCHW = pipeline.vae.decode(corpus.latents[:4].float() / pipeline.vae.config.scaling_factor
                                     + pipeline.vae.config.shift_factor).sample  # fmt: skip
    drawn = np.stack([world.picture(i) for i in range(4)]).transpose(0, 3, 1, 2) / 127.5 - 1
    error = np.square(x_BCHW.numpy() - drawn).mean((1, 2, 3))
    assert (10 * np.log10(4 / error) > 28).all()
    batch = corpus.pick(16, np.random.default_rng(0), dropout=0.0)
    rows = [int((corpus.latents.float() == z).flatten(1).all(1).nonzero()[0, 0]) for z in batch.latents]
    for row, own, ids in zip(rows, batch.labels, batch.clip_ids, strict=True):
        assert torch.equal(corpus.labels[row], own)
        assert (corpus.clip_ids[row].long() == ids).all(1).any()
    assert set(rows[:8]) <= set(corpus.pairs.tolist())


def test_the_cells_loss_is_that_of_a_plain_loop() -> None:
    labels = np.stack([data.labels(world.sample_scene(i)) for i in range(600, 640)])
    torch.manual_seed(0)
    cells = torch.randn(40, data.GRID, data.GRID, 4 + sum(len(v) for v in data.FIELDS.values()), dtype=torch.float64)
    cell, total, count, held = world.SIZE / data.GRID, 0.0, 0, np.zeros((40, data.GRID, data.GRID))
    for b, things in enumerate(labels):
        for thing in things[things[:, 0] >= 0]:
            column, row = int(thing[4] // cell), int(thing[5] // cell)
            held[b, row, column] = 1
            count += 1
            at = cells[b, row, column].numpy()
            off = np.abs(at[1:3] - (thing[4:6] / cell - [column, row] - 0.5))
            total += np.where(off < 0.1, off**2 / 0.2, off - 0.05).mean() + abs(at[3] - np.log(thing[6] / cell))
            start = 4
            for k, values in enumerate(data.FIELDS.values()):
                logits = at[start : start + len(values)]
                total += np.log(np.exp(logits).sum()) - logits[int(thing[k])]
                start += len(values)
    said = cells[..., 0].numpy()
    total += (np.logaddexp(0, said) - held * said).sum()
    assert float(oracle.cell_loss(cells, labels)) == pytest.approx(total / count, rel=1e-6)
    assert torch.equal(oracle.cell_loss(cells, torch.from_numpy(labels)), oracle.cell_loss(cells, labels))


@pytest.mark.parametrize("name", further.NAMES)
def test_a_model_goes_on_and_is_written_as_its_pipeline(name: str, corpus: further.Corpus, tmp_path: Path) -> None:
    kept = further.opened(name, MODELS, torch.device("cpu")).text.state_dict()
    made = further.go_on(name, MODELS, corpus, Recipe(steps=2, batch=4, lr=1e-4, warmup=1), tmp_path)
    assert all(torch.equal(value, kept[key]) for key, value in made.text.state_dict().items())
    further.write(name, MODELS, made, tmp_path / name)
    again, shipped = assemble.load(name, tmp_path / name), assemble.load(name)
    moved = [(a - b).abs().max() for a, b in zip(again.transformer.parameters(), shipped.transformer.parameters(),
                                                 strict=True)]  # fmt: skip
    assert 0 < max(moved) < 0.01


def test_the_guidance_is_learnt_after_all_else(corpus: further.Corpus, tmp_path: Path) -> None:
    """What one pass says at guidance 3 comes nearer to what two say, of a model that never knew of guidance."""
    teacher = further.opened("flux", MODELS, torch.device("cpu"))
    with torch.no_grad():
        teacher.transformer.time_text_embed.guidance_embedder.linear_2.weight.zero_()
    rng = np.random.default_rng(3)
    z_BCHW, clip_ids, t5_ids = corpus.pick(64, rng, dropout=0.0).shown
    torch.manual_seed(0)
    sigma_B = torch.full((64,), 0.7)
    noisy_BCHW, _ = flows.noised(z_BCHW, sigma_B)
    scale_B = torch.full((64,), 3.0)

    @torch.no_grad()
    def error(student: flows.Flow) -> float:
        said = teacher.text(clip_ids, t5_ids)
        nothing = teacher.text(corpus.nothing[0], corpus.nothing[1][:, : t5_ids.shape[1]])
        wanted_BCHW = flows.guided(teacher, noisy_BCHW, sigma_B, said, nothing, scale_B)
        v_BCHW = student.velocity(noisy_BCHW, sigma_B, said.hidden, said.pooled, scale_B)
        return float((v_BCHW - wanted_BCHW).square().mean())

    before = error(teacher)
    recipe = Recipe(steps=12, batch=32, lr=1e-3, warmup=2, ema=0.8)
    after = error(further.guide(teacher, corpus, recipe, tmp_path))
    assert after < 0.8 * before
