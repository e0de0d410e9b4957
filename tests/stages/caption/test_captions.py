"""Captions are what the library's own `generate` says of one picture alone, whatever others stand beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.contract import Row
from stages.caption.prompts import Prompter
from stages.caption.settings import CaptionSettings
from stages.caption.stage import CaptionPictures
from stages.engine.randomness import row_generator
from stages.models.clip import ModelError
from tests.support import tiny_captioners, tiny_kandinsky

TOKENS = 12
SIZES = [(16, 16), (16, 32), (24, 24), (40, 20), (16, 16), (33, 17), (18, 50), (20, 20)]
CHATS = {"blip": False, "florence2": False, "llava": True, "idefics3": True}
KINDS = list(CHATS)
ASKED = {"blip": None, "florence2": "<CAPTION>", "llava": "What is here?", "idefics3": "What is here?"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("captioners")
    return {kind: getattr(tiny_captioners, f"build_{kind}")(folder / kind) for kind in KINDS}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def stage(models: dict[str, str], kind: str, **more: Any) -> CaptionPictures:
    told = {"model": models[kind], "max_tokens": TOKENS, "question": ASKED[kind], "seed": 3, "device": "cpu"}
    return CaptionPictures(CaptionSettings(**{**told, **more}))


def said(made: CaptionPictures) -> list[Row]:
    rows = [{"id": f"row-{number}", "image": picture} for number, picture in enumerate(pictures())]
    done = {row["id"]: row for row in made(rows)}
    return [done[row["id"]] for row in rows]


def by_hand(folder: str, kind: str) -> tuple[Any, Any, Callable[[Image.Image], Any]]:
    """The library's processor and model, and its inputs for one picture, as its documentation has them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = ASKED[kind]
    if CHATS[kind]:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    words = {} if text is None else {"text": text}
    return processor, model, lambda picture: processor(images=picture, return_tensors="pt", **words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_the_librarys_own_whatever_stands_beside_it(models: dict[str, str], kind: str) -> None:
    wanted = []
    processor, model, ask = by_hand(models[kind], kind)
    for picture in pictures():
        given = ask(picture)
        ids_L = model.generate(**given, max_new_tokens=TOKENS, do_sample=False, forced_eos_token_id=None)[0]
        start = given["input_ids"].shape[1] if CHATS[kind] else 1  # of the others one token says that a text begins
        new, end = ids_L[start:].tolist(), 3 if kind == "blip" else 2
        words = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        wanted.append((words, new.index(end) if end in new else TOKENS, end not in new))
    for batch in (1, 8):
        for row, (words, tokens, truncated) in zip(said(stage(models, kind, batch_size=batch)), wanted, strict=True):
            if words:
                assert (row["status"], row["caption"]) == ("ok", words)
                assert (row["caption_tokens"], row["caption_truncated"]) == (tokens, truncated)
            else:
                assert row["status"] == "failed"
                assert "says nothing" in row["error"]
    assert len({words for words, *_ in wanted}) > 2
    assert {truncated for *_, truncated in wanted} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_captions_depend_on_seed_and_row_alone(models: dict[str, str], kind: str) -> None:
    alone, together, other = (
        [row.get("caption") for row in said(stage(models, kind, batch_size=batch, temperature=1.5, seed=seed))]
        for batch, seed in ((1, 3), (8, 3), (8, 4))
    )
    assert alone == together
    assert alone != other
    assert alone != [row.get("caption") for row in said(stage(models, kind, batch_size=8))]


@pytest.mark.parametrize("top_p", [None, 0.6])
def test_a_drawn_token_is_where_the_rows_number_falls(models: dict[str, str], top_p: float | None) -> None:
    rows = said(stage(models, "llava", temperature=1.5, top_p=top_p))
    processor, model, ask = by_hand(models["llava"], "llava")
    for row, picture in list(zip(rows, pictures(), strict=True))[:3]:
        given = ask(picture)
        numbers = torch.rand(TOKENS, dtype=torch.float64, generator=row_generator(3, row["id"], "caption"))
        ids, new = given.pop("input_ids"), []
        mask = given.pop("attention_mask")
        for number in numbers.tolist():  # no cache, no batch, no `generate`
            with torch.no_grad():
                logits_V = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0, -1].double()
            logits_V[model.config.image_token_id] = -torch.inf  # the folder's `suppress_tokens`
            p_V = (logits_V / 1.5).softmax(0).numpy()
            if top_p is not None:
                order = np.argsort(-p_V)
                p_V[order[1 + np.searchsorted(np.cumsum(p_V[order]), top_p) :]] = 0
            token = int(np.searchsorted(np.cumsum(p_V) / p_V.sum(), number, side="right"))
            new.append(token)
            if token == 2:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert mask.all()
        ended = new[-1] == 2
        assert row["caption"] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (row["caption_tokens"], row["caption_truncated"]) == (len(new) - ended, not ended)


def test_what_a_folder_says_of_generating_changes_no_choice(models: dict[str, str], tmp_path: Path) -> None:
    """Florence-2's folders ask for beams and a forced end, Qwen2-VL's for sampling."""
    from shutil import copytree

    copytree(models["florence2"], tmp_path / "f")
    file = tmp_path / "f/generation_config.json"
    told = json.loads(file.read_text()) | {"num_beams": 3, "do_sample": True, "temperature": 0.01, "top_k": 1}
    file.write_text(json.dumps(told))
    plain, other = said(stage(models, "florence2")), said(stage({"florence2": str(tmp_path / "f")}, "florence2"))
    assert [row.get("caption") for row in plain] == [row.get("caption") for row in other]
    cut = [row for row in plain if row.get("caption_tokens") == TOKENS]
    assert cut
    assert all(row["caption_truncated"] for row in cut)


def test_a_picture_that_the_processor_refuses_fails_alone(models: dict[str, str], monkeypatch: Any) -> None:
    made = stage(models, "llava", batch_size=4)
    whole = Prompter.__call__

    def narrow(self: Prompter, given: list[Image.Image]) -> Any:
        if any(picture.width == 50 for picture in given):
            raise ValueError("aspect ratio must be smaller than 2")
        return whole(self, given)

    expected = [row["caption"] for row in said(made)]
    monkeypatch.setattr(Prompter, "__call__", narrow)
    rows = said(made)
    assert [row["id"] for row in rows if row["status"] == "failed"] == ["row-6"]
    assert "does not take the picture: aspect ratio" in rows[6]["error"]
    assert [row["caption"] for row in rows if row["status"] == "ok"] == [*expected[:6], expected[7]]
    assert "no picture" in next(iter(made([{"id": "a", "image": None}])))["error"]


def test_scores_that_are_no_numbers_fail_the_row(models: dict[str, str]) -> None:
    made = stage(models, "llava")
    with torch.no_grad():
        made.captioner.model.lm_head.weight.fill_(float("nan"))
    assert all(row["status"] == "failed" and "not finite in float32" in row["error"] for row in said(made))


def test_out_of_memory_halves_the_batch(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(models, "idefics3", batch_size=8)
    expected = [row.get("caption") for row in said(made)]
    generate, sizes = made.captioner.model.generate, []

    def full(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("full")
        return generate(**given)

    monkeypatch.setattr(made.captioner.model, "generate", full)
    assert [row.get("caption") for row in said(made)] == expected
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_what_the_model_is_asked_is_told(models: dict[str, str]) -> None:
    info = CaptionPictures.describe(CaptionSettings(model=models["llava"]))
    assert info.metadata["caption.prompt"] == "User: <image>Describe this picture in one sentence.Assistant:"
    assert json.loads(info.metadata["caption.generation"])["eos_token_id"] == 2
    assert (
        CaptionPictures.describe(CaptionSettings(model=models["florence2"])).metadata["caption.prompt"] == "<CAPTION>"
    )
    assert CaptionPictures.describe(CaptionSettings(model=models["blip"])).metadata["caption.prompt"] == ""


def test_a_model_that_says_nothing_of_pictures_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    prior = tiny_kandinsky.build_prior(tmp_path / "prior")

    def refused(model: str, **more: Any) -> str:
        with pytest.raises(ModelError) as error:
            CaptionPictures.describe(CaptionSettings(model=model, **more))
        return str(error.value)

    assert "no model of pictures and text" in refused(str(tmp_path / "none"))
    assert "clip_text_model does not say what a picture shows" in refused(f"{prior}/text_encoder")
    task = refused(models["florence2"], question="<OD> of a star")
    assert "should be the only content" in task


@pytest.mark.parametrize("part", ["config.json", "processor_config.json"])
def test_no_code_of_a_models_folder_is_run(models: dict[str, str], tmp_path: Path, part: str) -> None:
    """Nor is the user asked whether it may."""
    from shutil import copytree

    copytree(models["llava"], tmp_path / "m")
    (tmp_path / "m/theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    told = json.loads((tmp_path / "m" / part).read_text())
    kind = "AutoConfig" if part == "config.json" else "AutoProcessor"
    told |= {"auto_map": {kind: "theirs.C"}, "model_type": "theirs", "processor_class": "Theirs"}
    (tmp_path / "m" / part).write_text(json.dumps(told))
    with pytest.raises(ModelError, match="brings code, which is never run here"):
        CaptionPictures.describe(CaptionSettings(model=str(tmp_path / "m")))
    assert not (tmp_path / "ran").exists()
