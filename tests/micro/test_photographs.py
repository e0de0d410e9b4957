"""Crops of free pictures: splits by file, squares of the stated sides, transparency, what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from micro import photographs, train


@pytest.fixture
def unpacked(tmp_path):
    nature = tmp_path / "mate-backgrounds" / "usr" / "share" / "backgrounds" / "mate" / "nature"
    stamps = tmp_path / "tuxpaint" / "usr" / "share" / "tuxpaint" / "stamps" / "animals"
    for folder in (nature, stamps):
        folder.mkdir(parents=True)
    ramp = np.linspace(0, 255, 200 * 150 * 3).astype(np.uint8).reshape(150, 200, 3)
    for i in range(12):
        Image.fromarray(np.roll(ramp, i, 2)).save(nature / f"view{i}.jpg")
        cutout = np.dstack([ramp, np.zeros(ramp.shape[:2], np.uint8)])
        Image.fromarray(cutout).save(stamps / f"stamp{i}.png")
    return tmp_path


def test_no_file_is_in_both_splits_and_none_is_lost(unpacked):
    for kind in ("photograph", "drawing"):
        trained, heldout = (set(photographs.files(unpacked, kind, heldout)) for heldout in (False, True))
        assert not trained & heldout
        names = {p.name for p in trained | heldout}
        assert {f"{'view' if kind == 'photograph' else 'stamp'}{i}" for i in range(12)} <= {n[:-4] for n in names}
        assert ("astronaut.png" in names) == (kind == "photograph")


def test_crops_are_squares_out_of_the_picture_and_the_same_every_time(unpacked):
    path = next(unpacked.rglob("view3.jpg"))
    crops = photographs.crops(path, 5)
    assert crops.shape == (5, 64, 64, 3)
    assert np.array_equal(crops, photographs.crops(path, 5))
    assert len(np.unique(crops.reshape(5, -1), axis=0)) == 5
    whole = np.asarray(Image.open(path)).astype(int)
    assert (np.diff(crops.astype(int).mean((2, 3)), axis=1) > -2).all()  # still brighter downwards: not mixed up
    assert crops.min() >= whole.min() - 8
    assert crops.max() <= whole.max() + 8


def test_what_is_transparent_becomes_one_colour(unpacked):
    crops = photographs.crops(next(unpacked.rglob("stamp1.png")), 3)
    assert len(np.unique(crops.reshape(-1, 3), axis=0)) == 1


def test_pictures_too_large_to_decode_are_left_out(unpacked, monkeypatch):
    monkeypatch.setattr(photographs, "_MOST_PIXELS", 200 * 150)
    paths = photographs.files(unpacked, "drawing", heldout=False)
    Image.new("RGB", (201, 150)).save(paths[0])
    assert len(photographs.split(unpacked, unpacked, "drawing", heldout=False, each=2)) == 2 * (len(paths) - 1)


def test_the_training_says_at_once_that_photographs_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path), "--only", "autoencoder16"])
    with pytest.raises(SystemExit):
        train.main()
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "pictures") in message
    assert "micro/photographs.py" in message
    assert list(tmp_path.iterdir()) == []
