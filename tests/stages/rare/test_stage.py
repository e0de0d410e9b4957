"""The stage of rare-concepts on every kind of row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.engine.randomness import row_generator
from stages.models.families import read_geometry
from stages.models.fingerprint import describe_model
from stages.rare.stage import RareConcepts
from tests.support.rare import LABELS, METHODS, by_id, inverted, picture, png, rows, settings, stage


def test_every_method_gives_every_row_once_with_declared_columns(folder: str, clip: str) -> None:
    given = rows()
    columns = {c.name: c for c in RareConcepts.describe(settings(folder, clip, candidates=2)).columns}
    done = by_id(stage(folder, clip, candidates=2)(given))
    assert set(done) == {row["id"] for row in given}
    for name, row in done.items():
        assert row["status"] == "ok", (name, row["error"])
        made = set(row) - {"id", "name", "pictures", "status", "error"}
        assert made <= set(columns), made - set(columns)
        for key in made:
            if columns[key].kind == "tensor":
                assert np.shape(row[key]) == columns[key].shape, key
        assert row["image"].size == (16, 16)
        assert row["score"] == pytest.approx(row["clip_score"]) == pytest.approx(max(row["candidate_scores"]))
        assert (row["concept"], row["method"], row["number"]) == (*name.split("/")[:2], int(name[-1]))
        assert ("references" in row) == (row["number"] == 0)
        parents = json.loads(row["parents"])
        wanted = {"random": 0, "slerp": 2}.get(row["method"], 3)
        assert len(parents) == wanted
        assert all(np.isfinite(parent["psnr"]) for parent in parents)
        assert ("select_loss" in row) == (row["method"] in ("seed-select", "from-slerp"))
    assert done["star/seed-select/0"]["select_loss"] < done["star/seed-select/0"]["select_start"]
    pictures = [row["image"].tobytes() for row in done.values()]
    assert len(set(pictures)) == len(pictures)


def test_a_row_does_not_depend_on_the_rows_beside_it(folder: str, clip: str) -> None:
    methods = METHODS[:4]
    together = by_id(stage(folder, clip, methods, candidates=3)(rows(LABELS[:4])))
    alone = stage(folder, clip, methods, candidates=3, slots=2)
    for row in rows(LABELS[:4])[::3]:
        (own,) = alone([row])
        # Adam turns the last digits of inverted seeds into steps of its own size where a gradient is next to zero.
        close = 5e-3 if row["method"] == "nao" else 1e-4
        np.testing.assert_allclose(own["latent"], together[row["id"]]["latent"], atol=close)
        wanted = together[row["id"]]["candidate_scores"]
        np.testing.assert_allclose(own["candidate_scores"], wanted, atol=0.2 if row["method"] == "nao" else 1e-2)
    other = by_id(stage(folder, clip, methods, candidates=3, seed=1)(rows(LABELS[:4])))
    assert all(np.abs(other[i]["latent"] - together[i]["latent"]).max() > 1e-3 for i in together)


def test_the_kept_candidate_is_the_best_and_the_first_score_decides(folder: str, clip: str) -> None:
    given = rows(["random"], count=6)
    single = {c: by_id(stage(folder, clip, METHODS[:1], candidates=c)(given)) for c in (1, 4)}
    for name in single[1]:  # candidate 0 of four is the only one of one
        assert single[4][name]["candidate_scores"][0] == pytest.approx(single[1][name]["score"], abs=1e-3)
        assert single[4][name]["score"] >= single[1][name]["score"] - 1e-3
    assert any(single[4][i]["score"] > single[1][i]["score"] + 1e-3 for i in single[1])
    for name, row in single[4].items():  # where its noise comes from
        assert row["candidate"] == int(np.argmax(row["candidate_scores"]))
        key = f"{name.split('/')[0]}/{row['number']}"
        z_CHW = torch.randn(
            row["latent"].shape, generator=row_generator(row["job_seed"], key, str(row["candidate"]))
        )  # fmt: skip
        np.testing.assert_array_equal(row["latent"], z_CHW.numpy().astype(row["latent"].dtype))
    by_picture = by_id(stage(folder, clip, METHODS[:1], candidates=4, scores=["image", "text"])(given))
    assert all(row["score"] == pytest.approx(row["clip_image"]) for row in by_picture.values())
    assert any(by_picture[i]["clip_image"] > single[4][i]["clip_image"] + 1e-3 for i in by_picture)


def test_bad_rows_say_what_to_do_and_the_others_go_on(folder: str, clip: str, tmp_path: Path) -> None:
    def row(name: str, method: str, **values) -> dict:
        plain = {"id": f"{name}/{method}/0", "name": name, "prompt": "a star", "pictures": [png(1), png(2)]}
        return plain | {"method": method, "number": "0"} | values

    picture(5).save(tmp_path / "good.png")
    given = [
        row("good", "slerp", pictures=["good.png", png(1)]),
        row("no-prompt", "random", prompt=" "),
        row("unheard", "unheard-of"),
        row("one", "slerp", pictures=[png(1)]),
        row("one", "random", pictures=[png(1)]),
        row("none", "random", pictures=None),
        row("gone", "random", pictures=["not-there.png"]),
        row("text", "linear", pictures='["good.png", "good.png"'),
    ]
    done = by_id(stage(folder, clip, root=str(tmp_path))(given))
    errors = {name: row["error"] for name, row in done.items()}
    assert errors.pop("good/slerp/0") is None
    assert errors.pop("one/random/0") is None
    assert json.loads(done["good/slerp/0"]["parents"])[0]["id"] in ("good.png", "picture 1")
    for name, said in {
        "no-prompt/random/0": "'prompt' is empty", "unheard/unheard-of/0": "no method 'unheard-of'",
        "one/slerp/0": "at least 2 pictures", "none/random/0": "needs pictures", "gone/random/0": "does not exist",
        "text/linear/0": "no valid JSON",
    }.items():  # fmt: skip
        assert re.search(said, errors.pop(name) or "")
    assert not errors
    (alone,) = stage(folder, clip, METHODS[:1], scores=["text"])([row("none", "random", pictures=None)])
    assert alone["status"] == "ok"  # a prompt is enough for the baseline


def test_a_seed_that_overflows_fails_its_own_row(folder: str, clip: str) -> None:
    wild = [METHODS[0], {"method": "seed-select", "iterations": 1, "lr": 1e39, "steps": 3}]
    done = by_id(stage(folder, clip, wild)(rows(["random", "seed-select"])))
    for row in done.values():
        if row["method"] == "random":
            assert row["status"] == "ok"
        else:
            assert "seed-select: a seed is not finite" in row["error"]


def test_running_out_of_memory_halves_the_pictures_at_once(folder: str, clip: str) -> None:
    own = stage(folder, clip, METHODS[:1], slots=2)
    assert own.shrink()
    assert own.slots == own.inversion.slots == 1
    assert not own.shrink()


def test_the_stage_names_what_it_was_made_with(folder: str, clip: str, tmp_path: Path) -> None:
    own = describe_model(folder, None, "unet")["fingerprint"]
    seeds = inverted(tmp_path / "out", own)
    described = RareConcepts.describe(settings(folder, clip, seeds=seeds, scores=("image", "oracle")))
    assert {"unet", "vae", "text_encoder", "clip_image", "oracle", "seeds"} <= set(described.models)
    assert "clip_text" not in described.models
    (tmp_path / "out" / "_SUCCESS").write_text("{} ")
    again = RareConcepts.describe(settings(folder, clip, seeds=seeds, scores=("image", "oracle")))
    assert again.models["seeds"]["fingerprint"] != described.models["seeds"]["fingerprint"]
    assert read_geometry(settings(folder, clip)).latent_shape in [column.shape for column in described.columns]


def test_the_oracle_ranks_where_the_concept_says_what_it_is(folder: str, clip: str) -> None:
    own = stage(folder, clip, METHODS[:1], candidates=2, scores=["oracle"])
    # A judge that finds every object in pictures that are bright on the whole.
    seen = SimpleNamespace(shape="star", color="red", texture="plain", size="small")

    def read(pictures):
        return [SimpleNamespace(things=(seen,) if np.asarray(p).mean() > level else ()) for p in pictures]

    own.judge.oracle = SimpleNamespace(read=read)
    given = [{**row, "objects": [{"shape": "star"}]} for row in rows(["random"], ["star"], 8)]
    level = -1.0
    brightness = [np.asarray(row["image"]).mean() for row in own(given)]
    level = float(np.median(brightness))
    done = list(own(given))
    assert {row["success"] for row in done} == {True, False}
    for row in done:
        assert row["score"] == float(row["success"]) == max(row["candidate_scores"])
        assert row["success"] == bool(np.asarray(row["image"]).mean() > level)
    (bad,) = own([rows(["random"], ["star"], 1)[0]])
    assert "needs the column 'objects'" in bad["error"]


def test_a_prompt_that_is_cut_says_so(folder: str, clip: str) -> None:
    """As in the other jobs; counted by a tokenizer of its own."""
    from transformers import CLIPTokenizer

    given = rows(labels=("random",), count=1)
    given[1]["prompt"] = "a red ring " * 60
    done = by_id(stage(folder, clip, candidates=1)(given))
    count = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
    for row in given:
        made = done[row["id"]]
        tokens = len(count(row["prompt"])["input_ids"])
        assert (made["prompt_tokens"], made["prompt_truncated"]) == (tokens, tokens > 16)
    assert [row["prompt_truncated"] for row in done.values()] == [False, True]


def test_guides_draw_the_same_seeds_in_other_ways(folder: str, clip: str) -> None:
    guides = ["plain", {"method": "r2f", "until": 1.0}, "aapb", "compose"]
    given = [
        {
            **row,
            "id": f"{row['name']}/{row['method']}/{guide}/{row['number']}",
            "guide": guide,
            "prompt": "a blue heart",
        }
        for row in rows(["random", "slerp"], ["star", "ring"])
        for guide in ("plain", "r2f", "aapb", "compose")
    ]
    for row in given:
        row |= {"anchor": "a blue circle", "parts": [["a blue circle", "a circle"]]} if row["name"] == "star" else {}
    asked = {"guides": guides, "candidates": 2, "scores": ["text"]}
    done = by_id(stage(folder, clip, METHODS[:2], **asked)(given))
    columns = {c.name for c in RareConcepts.describe(settings(folder, clip, METHODS[:2], **asked)).columns}
    for name, row in done.items():
        concept, method, guide, number = name.split("/")
        if concept == "ring" and guide != "plain":
            needed = "parts" if guide == "compose" else "anchor"
            assert row["error"].startswith(f"concept ring: {guide} needs the column '{needed}'")
            continue
        assert row["status"] == "ok", row["error"]
        assert set(row) - {"id", "name", "pictures", "parts", "status", "error"} <= columns
        assert (row["concept"], row["method"], row["guide"], row["number"]) == (concept, method, guide, int(number))
        assert row["anchor"] == ("a blue circle" if guide in ("r2f", "aapb") else None)
        assert ("references" in row) == ((number, guide) == ("0", "plain"))
    own = {guide: done[f"star/slerp/{guide}/1"] for guide in ("plain", "r2f", "aapb", "compose")}
    assert len({row["image"].tobytes() for row in own.values()}) == 4
    plain = by_id(stage(folder, clip, METHODS[:2], candidates=2, scores=["text"])(
        [{**row, "prompt": "a blue heart"} for row in rows(["slerp"], ["star"])]
    ))["star/slerp/1"]  # fmt: skip
    np.testing.assert_allclose(plain["candidate_scores"], own["plain"]["candidate_scores"], atol=1e-2)
    one = [row for row in given if row["id"] == "star/slerp/aapb/1"]
    (alone,) = stage(folder, clip, METHODS[:2], guides=guides, candidates=2, scores=["text"])(one)
    np.testing.assert_allclose(alone["candidate_scores"], own["aapb"]["candidate_scores"], atol=1e-2)


def test_a_row_of_a_guide_that_the_job_has_not_says_which_there_are(folder: str, clip: str) -> None:
    (row,) = rows(["random"], ["star"], 1)
    (made,) = stage(folder, clip, METHODS[:1], guides=["plain"])([row | {"guide": "r2f"}])
    assert made["error"] == "no guide 'r2f': the job has plain"
