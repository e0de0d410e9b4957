"""Learned words in prompts: what diffusers makes of them, counted, fingerprinted, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages.models.captions import token_counts
from stages.models.families import open_latent_model, read_geometry
from stages.models.settings import LatentModelSettings
from stages.models.words import encode, tokenize
from tests.support import tiny_stable_diffusion
from tests.support.card_lines import check_card_lines

PROMPT = "red <frozen-1> star"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: tiny_stable_diffusion.build(tmp_path_factory.mktemp(kind) / kind, kind) for kind in ("sd", "sdxl")}


def settings(folder: str, *words: Path) -> LatentModelSettings:
    told = {"words": [str(word) for word in words]} if words else {}
    return LatentModelSettings.model_validate({"model": folder, "device": "cpu", **told})


def written(file: Path, width: int, token: str = "<frozen-1>", rows: int = 1) -> Path:
    vector = torch.randn((rows, width), generator=torch.Generator().manual_seed(width))
    save_file({token: vector}, file)
    return file


@pytest.mark.parametrize(("kind", "widths"), [("sd", [32]), ("sdxl", [32, 24])])
def test_a_prompt_means_what_it_would_with_the_words_in_the_vocabulary(
    folders: dict[str, str], tmp_path: Path, kind: str, widths: list[int]
) -> None:
    """Against the hook that learning itself uses, which leaves the vocabulary alone."""
    files = [written(tmp_path / f"{number}.safetensors", width) for number, width in enumerate(widths)]
    model, plain = open_latent_model(settings(folders[kind], *files)), open_latent_model(settings(folders[kind]))
    vectors = [torch.randn((1, width), generator=torch.Generator().manual_seed(width)) for width in widths]
    tokens = [tokenize(encoder, PROMPT, ["<frozen-1>"]) for encoder in plain.text_encoders]
    ids, which = ([pair[part][None] for pair in tokens] for part in (0, 1))
    wanted = plain.text_condition(*encode(plain.text_encoders, ids, which, torch.cat(vectors, dim=1)[None]))
    found = model.condition([PROMPT])
    for name in wanted.keys() & {"text_BLE", "pooled_BE"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["text_BLE"], plain.condition([PROMPT])["text_BLE"], atol=1e-2)
    assert token_counts([PROMPT], model.readers)[0]["prompt_tokens"] == 5  # start, red, the word, star, end
    check_card_lines(model, PROMPT)


def test_words_count_in_the_fingerprint_of_the_encoder_that_knows_them(folders: dict[str, str], tmp_path: Path) -> None:
    def prints(*words: Path) -> dict[str, str]:
        found = read_geometry(settings(folders["sdxl"], *words)).fingerprints()
        return {part: known["fingerprint"] for part, known in found.items()}

    first, second = written(tmp_path / "1.safetensors", 32), written(tmp_path / "2.safetensors", 24)
    assert "words" not in settings(folders["sdxl"]).model_dump()
    plain, told = prints(), prints(first, second)
    assert {part for part in plain if plain[part] != told[part]} == {"text_encoder", "text_encoder_2"}
    save_file({"<frozen-1>": torch.ones(1, 24)}, second)
    changed = prints(first, second)
    assert {part for part in plain if changed[part] != told[part]} == {"text_encoder_2"}


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("sd", [("a", 33, "<x>", 1)], "<x> in .* is 33 wide and of another model; in .* words are 32 wide"),
        ("sd", [("a", 32, "<x>", 3)], "one word of one vector is what is read"),
        ("sd", [("a", 32, "<x>", 1), ("b", 32, "<x>", 1)], "<x> stands in two files"),
        ("sdxl", [("a", 32, "<x>", 1)], "<x> is there for 1 of the 2 text encoders.*learned_embeds_2"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    folders: dict[str, str], tmp_path: Path, kind: str, files: list[Any], message: str
) -> None:
    words = [written(tmp_path / f"{name}.safetensors", *rest) for name, *rest in files]
    with pytest.raises(ValueError, match=message):
        read_geometry(settings(folders[kind], *words))


def test_a_file_that_is_none_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pickle.bin").write_bytes(b"pickle")
    for name in ("pickle.bin", "gone.safetensors"):
        with pytest.raises(ValueError, match="is no safetensors file that can be read"):
            read_geometry(settings(folders["sd"], tmp_path / name))
    open_latent_model(settings(folders["sd"], written(tmp_path / "own.safetensors", 32, "<mine>")))
    with pytest.raises(ValueError, match=r"red</w> in .* cannot be taken in"):
        open_latent_model(settings(folders["sd"], written(tmp_path / "known.safetensors", 32, "red</w>")))


def learnt(
    folder: Path, model: str, tokens: tuple[str, ...] = ("frozen-1", "frozen-2"), width: int = 32,
    beside: tuple[Path, ...] = (),
) -> Path:  # fmt: skip
    """What a finished `learn-concepts` run leaves, as far as words go; of one whose prompts held the words `beside`."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    (folder / "_SUCCESS").write_text("{}")
    config = settings(model, *beside).model_dump(mode="json")
    note = {"config": config, "models": read_geometry(settings(model, *beside)).fingerprints()}
    table = pa.table({"id": ["frozen"]}).replace_schema_metadata({"latentmill": json.dumps(note)})
    pq.write_table(table, folder / "data/part-00000-of-00001.parquet")
    for number, token in enumerate(tokens):
        own = folder / "concepts/frozen" / token
        own.mkdir(parents=True)
        vector = torch.randn((1, width), generator=torch.Generator().manual_seed(number))
        save_file({f"<{token}>": vector}, own / "learned_embeds.safetensors")
    return folder


def test_an_output_stands_for_all_words_in_it(folders: dict[str, str], tmp_path: Path) -> None:
    out = learnt(tmp_path / "out", folders["sd"])
    files = sorted(out.glob("concepts/*/*/*.safetensors"))
    assert len(files) == 2
    whole, single = (open_latent_model(settings(folders["sd"], *words)) for words in ([out], files))
    prompt = ["<frozen-2> star in <frozen-1>"]
    torch.testing.assert_close(whole.condition(prompt)["text_BLE"], single.condition(prompt)["text_BLE"])
    assert whole.geometry.fingerprints() == single.geometry.fingerprints()


def test_words_learnt_on_another_model_are_refused_by_its_name(folders: dict[str, str], tmp_path: Path) -> None:
    """Also where they are as wide as this model's own."""
    other = tiny_stable_diffusion.build(tmp_path / "other", "sd", seed=1)
    out = learnt(tmp_path / "out", other)
    with pytest.raises(ValueError, match=f"learnt with '{other}', whose text encoder is not that of '{folders['sd']}'"):
        read_geometry(settings(folders["sd"], out))
    read_geometry(settings(other, out))
    with pytest.raises(ValueError, match="no finished output of a learn-concepts run"):
        read_geometry(settings(other, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="there are no words in"):
        read_geometry(settings(other, learnt(tmp_path / "empty", other, tokens=())))


def test_words_learnt_beside_other_words_are_known_by_their_model(folders: dict[str, str], tmp_path: Path) -> None:
    """A run with words of its own knew the encoder by another fingerprint, and its words were refused as another's."""
    single = written(tmp_path / "word.safetensors", 32, "<icy>")
    first = learnt(tmp_path / "first", folders["sd"], ("soft-1",))
    second = learnt(tmp_path / "second", folders["sd"], beside=(first, single))
    assert len(read_geometry(settings(folders["sd"], second)).words) == 2
    assert len(read_geometry(settings(folders["sd"], first, second, single)).words) == 4
    other = tiny_stable_diffusion.build(tmp_path / "other", "sd", seed=1)
    with pytest.raises(ValueError, match=f"learnt with '{folders['sd']}', whose text encoder is not that of '{other}'"):
        read_geometry(settings(other, second))
    single.unlink()
    with pytest.raises(ValueError, match=r"learnt beside others, without which it cannot be told .*word.safetensors"):
        read_geometry(settings(folders["sd"], second))
