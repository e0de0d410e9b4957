"""The batched decoder against diffusers' pipeline, one row at a time."""

import numpy as np
import pytest
import torch

from pipeline.contract import failed
from stages.engine.randomness import row_generator, row_normal
from stages.models import kandinsky
from stages.models.decoding import Decode
from tests.support.tiny_kandinsky import WIDTH, build_decoder

IDS = [f"r{i}" for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_decoder(tmp_path_factory.mktemp("decoder"))


def rows():
    return [{"id": i, "embedding": row_normal((WIDTH,), 0, [i])[0].numpy(), "status": "ok"} for i in IDS]


def decoded(folder, batch, given=None, **options):
    negative = torch.linspace(-1, 1, WIDTH)
    decoder = kandinsky.Decoder(Decode(model=folder, steps=3, batch_size=batch, **options), negative, seed=4)
    return {row["id"]: row for row in decoder(given or rows())}


@pytest.mark.parametrize("guidance", [4.0, 1.5])
def test_pictures_are_the_pipelines(folder, guidance):
    from diffusers import KandinskyV22Pipeline

    pipe = KandinskyV22Pipeline.from_pretrained(folder)
    got = decoded(folder, 4, guidance=guidance)
    for row in rows():
        wanted = pipe(
            image_embeds=torch.from_numpy(row["embedding"])[None],
            negative_image_embeds=torch.linspace(-1, 1, WIDTH)[None], height=16, width=16, num_inference_steps=3,
            guidance_scale=guidance, generator=row_generator(4, row["id"], "decode"),
        ).images[0]  # fmt: skip
        difference = np.asarray(got[row["id"]]["image"], int) - np.asarray(wanted, int)
        assert np.abs(difference).max() <= 1


def test_pictures_do_not_depend_on_the_batch(folder):
    one, all_ = decoded(folder, 1), decoded(folder, 8)
    for i in IDS:
        assert np.abs(np.asarray(one[i]["image"], int) - np.asarray(all_[i]["image"], int)).max() <= 1
    assert np.abs(np.asarray(one["r0"]["image"], int) - np.asarray(one["r1"]["image"], int)).max() > 5


def test_bad_rows_do_not_take_the_batch_along(folder):
    given = rows()
    given[1]["embedding"] = given[1]["embedding"] * np.nan
    given[3] = failed(given[3], "earlier")
    got = decoded(folder, 8, given)
    assert {i: got[i]["status"] for i in IDS} == {"r0": "ok", "r1": "failed", "r2": "ok", "r3": "failed", "r4": "ok"}
    assert "not finite" in got["r1"]["error"]
    assert got["r3"]["error"] == "earlier"


def test_out_of_memory_halves_the_batch(folder, monkeypatch):
    whole = decoded(folder, 8)
    pictures, sizes = kandinsky.Decoder.pictures, []

    def small(self, z_BE, keys):
        sizes.append(len(keys))
        if len(keys) > 2:
            raise torch.OutOfMemoryError("pretend")
        return pictures(self, z_BE, keys)

    monkeypatch.setattr(kandinsky.Decoder, "pictures", small)
    halved = decoded(folder, 8)
    assert sizes == [5, 2, 2, 1]  # what did not fit is not tried again
    assert all(np.abs(np.asarray(whole[i]["image"], int) - np.asarray(halved[i]["image"], int)).max() <= 1 for i in IDS)


def test_what_is_no_decoder_is_refused(folder, tmp_path):
    with pytest.raises(kandinsky.DecoderError, match="nowhere"):
        kandinsky.Decoder(Decode(model=str(tmp_path / "nowhere")), torch.zeros(WIDTH))
    with pytest.raises(kandinsky.DecoderError, match="width 24"):
        kandinsky.Decoder(Decode(model=folder), torch.zeros(7))
    assert set(kandinsky.identity(Decode(model=folder))) == {"decoder_unet", "decoder_movq"}
