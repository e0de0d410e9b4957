"""The miniature world: determinism, the declared long tail, captions that agree with their scenes, prompt sets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from micro import prompts, world


def test_a_picture_depends_on_seed_and_index_alone():
    once, again = world.picture(5, "heldout"), world.picture(5, "heldout")
    assert once.shape == (64, 64, 3)
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert not np.array_equal(once, world.picture(6, "heldout"))
    assert not np.array_equal(once, world.picture(5, "train"))
    assert not np.array_equal(once, world.picture(5, "heldout", seed=1))


def test_the_pool_draws_what_one_process_draws():
    pooled = world.pictures(range(2000), "heldout", workers=2)
    assert all(np.array_equal(pooled[i], world.picture(i, "heldout")) for i in (0, 777, 1999))


def test_rarities_partition_all_combinations():
    kinds = [world.combinations(kind) for kind in ("frequent", "rare", "never")]
    assert sum(map(len, kinds)) == len(world.SHAPES) * len(world.COLORS) * len(world.TEXTURES)
    assert len(set().union(*kinds)) == sum(map(len, kinds))


def test_training_scenes_hold_rare_combinations_five_times_and_never_ones_not_at_all():
    first = world.RARE_SEEN * len(world.combinations("rare"))
    seen = Counter(
        (t.shape, t.color, t.texture) for i in range(first + 3000) for t in world.sample_scene(i, "train").things
    )
    assert {combo: seen[combo] for combo in world.combinations("rare")} == dict.fromkeys(
        world.combinations("rare"), world.RARE_SEEN
    )
    assert not any(seen[combo] for combo in world.combinations("never"))


def test_objects_stay_inside_and_apart_and_relations_are_clear():
    for i in range(300):
        things = world.sample_scene(i, "heldout").things
        for t in things:
            assert t.r < t.x < 64 - t.r
            assert t.r < t.y < 64 - t.r
        for a in range(len(things)):
            for b in range(a):
                gap = np.hypot(things[a].x - things[b].x, things[a].y - things[b].y)
                assert gap > things[a].r + things[b].r
        if len(things) == 2:
            dx, dy = abs(things[0].x - things[1].x), abs(things[0].y - things[1].y)
            assert abs(dx - dy) >= 8


def test_full_captions_name_every_attribute():
    for i in range(200):
        scene = world.sample_scene(i, "heldout")
        text = world.caption_of(i, "heldout", detail="full")
        assert text.endswith(f"on a {scene.background} background")
        for t in scene.things:
            assert t.color in text
            assert t.shape in text
            assert t.texture == "plain" or t.texture in text


def test_wordings_vary():
    assert len({world.caption_of(3, "heldout", wording=w) for w in range(20)}) > 5


def test_relations_are_seen_from_the_first_object():
    left = world.Thing("star", "red", "plain", "small", 10, 30, 8)
    right = world.Thing("ring", "blue", "plain", "small", 50, 34, 8)
    assert world.relation_of(left, right) == "left of"
    assert world.relation_of(right, left) == "right of"
    high = world.Thing("ring", "blue", "plain", "small", 12, 5, 8)
    assert world.relation_of(high, left) == "above"
    assert world.relation_of(left, high) == "below"


def test_scenes_survive_json():
    scene = world.sample_scene(9, "heldout")
    assert world.Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize("category", prompts.CATEGORIES)
def test_prompt_sets_are_whole(category):
    chosen = prompts.load(category)
    assert len(chosen) == 300
    assert len({p.id for p in chosen}) == 300
    for p in chosen:
        for asked in p.objects:
            assert asked["shape"] in p.prompt
            assert asked.get("texture", "plain") == "plain" or asked["texture"] in p.prompt
            assert asked.get("color", "") in p.prompt
        if p.relation:
            assert prompts._PHRASES[p.relation] in p.prompt


@pytest.mark.parametrize("kind", ["rare", "never"])
def test_tail_prompts_ask_for_the_tail(kind):
    for p in prompts.load(kind):
        asked = p.objects[0]
        assert world.rarity(asked["shape"], asked["color"], asked["texture"]) == kind


def test_unknown_prompt_set_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no prompt set 'color'.*colour"):
        prompts.load("color")
