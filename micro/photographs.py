"""Pictures beside the miniature world, for the autoencoder that also handles photographs: crops of free pictures.

Nothing of them is shipped. They are read from the unpacked Debian packages mate-backgrounds, lomiri-wallpapers-16.04,
lomiri-wallpapers-20.04, plasma-workspace-wallpapers, tuxpaint-data (photographs), tuxpaint-stamps-default and
openclipart-png (drawings and cut-out objects), and from scikit-image's own pictures (photographs).

A file is in one split, so that no crop of a held-out photograph was trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from micro import data, world

Kind = Literal["photograph", "drawing"]
_PHOTOGRAPHS = (
    "backgrounds/mate/nature/*.jpg", "backgrounds/*_by_*.jpg", "tuxpaint/templates/*.jpg",
    *(f"wallpapers/{name}/contents/images/2560x1600.jpg"
      for name in ("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey",
                   "Kite", "OneStandsOut", "Path", "summer_1am")),
)  # fmt: skip
_NOT_PHOTOGRAPHS = ("Fossa_by", "Infinite-Sea_by", "Painting-Colors_by")
_DRAWINGS = ("tuxpaint/stamps/**/*.png", "openclipart/png/**/*.png")
_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
_HELDOUT_OF = 5
"""One file of so many is held out."""
_LONGEST = 1024
"""Short edge in pixels to which larger photographs are brought before they are cropped."""
_MOST_PIXELS = 40_000_000


def files(folder: Path, kind: Kind, heldout: bool) -> list[Path]:
    """The files of one split under an unpacked ``folder`` (with ``*/usr/share`` or ``usr/share``), in a fixed order.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [p for pattern in (_PHOTOGRAPHS if kind == "photograph" else _DRAWINGS)
             for p in folder.rglob(f"share/{pattern}") if not p.name.startswith(_NOT_PHOTOGRAPHS)]  # fmt: skip
    if kind == "photograph" and found:
        import skimage

        found += [Path(skimage.__file__).parent / "data" / name for name in _SKIMAGE]
    by_name = {p.parents[2].name + p.name if p.parent.name == "images" else p.name: p for p in found}
    chosen = [p for name, p in sorted(by_name.items()) if (zlib.crc32(name.encode()) % _HELDOUT_OF == 0) == heldout]
    if not chosen:
        raise FileNotFoundError(
            f"{folder}: no {kind}s; unpack the Debian packages that micro/photographs.py names into it (dpkg-deb -x)"
        )
    return chosen


def open_rgb(path: Path, rng: np.random.Generator) -> Image.Image:
    """The picture, on white or (half the time) on a random colour where it is transparent, at most `_LONGEST` wide."""
    picture: Image.Image = Image.open(path)
    picture.draft("RGB", (_LONGEST, _LONGEST))  # a JPEG is decoded at a fraction of its size
    if picture.mode == "RGB":
        return _shrunk(picture)
    picture = _shrunk(picture.convert("RGBA"))
    ground = (255, 255, 255) if rng.uniform() < 0.5 else tuple(int(v) for v in rng.integers(256, size=3))
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*ground, 255)), picture).convert("RGB")


def _shrunk(picture: Image.Image) -> Image.Image:
    factor = _LONGEST / min(picture.size)
    if factor >= 1:
        return picture
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)


def crops(path: Path, count: int, seed: int = 0) -> np.ndarray:
    """``count`` squares (n, 64, 64, 3) uint8: sides from a quarter of the short edge to all of it, log-uniform."""
    rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
    picture = open_rgb(path, rng)
    short = min(picture.size)
    out = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8)
    for i in range(count):
        side = int(np.clip(short * 0.25 ** rng.uniform(), min(world.SIZE, short), short))
        x, y = (int(rng.integers(edge - side + 1)) for edge in picture.size)
        box = (x, y, x + side, y + side)
        out[i] = np.asarray(picture.resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS, box))
    return out


def _moderate(path: Path) -> bool:
    """Whether the picture is small enough to be decoded whole: some clip art is drawn at 600 megapixels."""
    try:
        with Image.open(path) as picture:
            return picture.width * picture.height <= _MOST_PIXELS
    except Image.DecompressionBombError:
        return False


def _all_crops(paths: Sequence[Path], each: int) -> np.ndarray:
    return np.concatenate([crops(path, each) for path in paths if _moderate(path)])


def split(work: Path, folder: Path, kind: Kind, heldout: bool, each: int, most: int | None = None) -> np.ndarray:
    """(n, 64, 64, 3) uint8, memory-mapped: ``each`` crops of each of the first ``most`` files of a split."""
    name = f"{kind}s-{'heldout' if heldout else 'train'}-{each}.npy"
    return data.cached(work / name, lambda: _all_crops(_spread(files(folder, kind, heldout), most), each))


def _spread(paths: list[Path], most: int | None) -> list[Path]:
    return paths if most is None or len(paths) <= most else paths[:: -(-len(paths) // most)]


def mixed(parts: Iterable[tuple[np.ndarray, int]], rng: np.random.Generator) -> np.ndarray:
    """A batch (n, 64, 64, 3) of so many pictures of each array, mirrored at random."""
    picked = [source[np.sort(rng.integers(len(source), size=count))] for source, count in parts]
    batch = np.concatenate(picked)
    mirrored = rng.uniform(size=len(batch)) < 0.5
    batch[mirrored] = batch[mirrored, :, ::-1]
    return batch
