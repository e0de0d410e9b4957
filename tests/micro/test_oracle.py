"""The oracle's scoring rules, and (with its weights) that it reads held-out pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from micro import MODELS, oracle, world
from micro.world import Thing


def reading(*things: Thing) -> oracle.Reading:
    return oracle.Reading(things, "white")


STAR = Thing("star", "red", "plain", "small", 12, 30, 9)
RING = Thing("ring", "blue", "striped", "large", 48, 32, 9)


def test_bound_needs_all_attributes_on_one_object():
    swapped = [{"shape": "star", "color": "blue"}, {"shape": "ring", "color": "red"}]
    right = [{"shape": "star", "color": "red"}, {"shape": "ring", "color": "blue"}]
    assert oracle.score(reading(STAR, RING), swapped).bound == 0
    assert oracle.score(reading(STAR, RING), right).bound == 1
    assert oracle.score(reading(STAR), right).bound == 0.5


def test_one_thing_fulfils_one_request():
    assert oracle.score(reading(STAR), [{"shape": "star"}] * 2).bound == 0.5
    assert oracle.score(reading(STAR, STAR), [{"shape": "star"}] * 2, count=2).success
    assert not oracle.score(reading(STAR, STAR, STAR), [{"shape": "star"}] * 2, count=2).success


def test_relation_is_from_first_to_second_and_needs_both():
    asked = [{"shape": "star"}, {"shape": "ring"}]
    assert oracle.score(reading(RING, STAR), asked, "left of").success
    assert not oracle.score(reading(RING, STAR), asked, "right of").success
    assert oracle.score(reading(STAR), asked, "left of").relation is False


def test_no_object_is_a_reading():
    found = oracle.score(reading(), [{"shape": "star"}], count=1)
    assert found.bound == 0
    assert not found.success


def test_cells_decode_to_the_objects_that_made_them():
    import torch

    from micro import data

    scene = world.sample_scene(12, "heldout")
    cells = torch.full((1, 27, 8, 8), -9.0)
    for t in scene.things:
        col, row = int(t.x // 8), int(t.y // 8)
        cells[0, :4, row, col] = torch.tensor([9, t.x / 8 - col - 0.5, t.y / 8 - row - 0.5, np.log(t.r / 8)])
        start = 4
        for field, names in data.FIELDS.items():
            cells[0, start + names.index(getattr(t, field)), row, col] = 9
            start += len(names)
    (found,) = oracle._decode(cells, torch.eye(5)[:1])
    assert {(t.shape, t.color, t.texture, t.size) for t in found.things} == {
        (t.shape, t.color, t.texture, t.size) for t in scene.things
    }
    assert sorted(t.x for t in found.things) == pytest.approx(sorted(t.x for t in scene.things), abs=1e-4)


def test_held_out_pictures_are_read():
    judge = oracle.Oracle.load()
    scenes = [world.sample_scene(i, "heldout") for i in range(200)]
    found = oracle.accuracy(judge, np.stack([world.render(s) for s in scenes]), scenes)
    assert found["color"] >= 0.98
    assert found["shape"] >= 0.97
    assert found["texture"] >= 0.96


@pytest.mark.parametrize("kind", ["frequent", "rare", "never"])
def test_a_combination_that_models_never_saw_is_read_as_well(kind):
    """Or else what is drawn right counts as wrong: a judge of training pictures alone read 54 % of never-seen ones."""
    combos = [combo for combo in world.combinations(kind) for _ in range(3)]
    scenes = [world.compose(np.random.default_rng([23, n]), [combo]) for n, combo in enumerate(combos)]
    asked = [[dict(zip(("shape", "color", "texture"), combo, strict=True))] for combo in combos]
    readings = oracle.Oracle.load().read(np.stack([world.render(scene) for scene in scenes]))
    right = [oracle.score(found, one).success for found, one in zip(readings, asked, strict=True)]
    assert np.mean(right) >= 0.95


def test_every_combination_is_taught_alike():
    things = [thing for index in range(400) for thing in oracle.every_scene(index).things]
    kinds = [world.rarity(thing.shape, thing.color, thing.texture) for thing in things]
    for kind in ("frequent", "rare", "never"):
        assert kinds.count(kind) / len(kinds) == pytest.approx(len(world.combinations(kind)) / 256, abs=0.05)


def test_foreign_and_truncated_folders_are_named(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        oracle.Oracle.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(OSError, match="not an oracle's"):
        oracle.Oracle.load(tmp_path)
    (tmp_path / "config.json").write_bytes((MODELS / "oracle" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((MODELS / "oracle" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(OSError, match=f"{tmp_path}: no oracle can be loaded"):
        oracle.Oracle.load(tmp_path)
