"""Pictures that methods of inversion are compared on, as rows of the stage: held-out scenes of the world, photographs.

Nothing here is shipped: photographs come from scikit-image, or from Debian packages that the user unpacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from micro import photographs, world

PHOTOGRAPHS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
               "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
               "rocket.jpg")  # fmt: skip
LEARNT_FROM = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")
"""What the miniature autoencoder of 16 channels was trained on (`micro.photographs`)."""


def world_rows(count: int) -> list[dict[str, Any]]:
    """Held-out scenes with their captions."""
    return [
        {
            "id": f"world-{i}",
            "image": Image.fromarray(world.picture(i, "heldout")),
            "prompt": world.caption_of(i, "heldout"),
        }
        for i in range(count)
    ]


def without_captions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pictures under the empty prompt."""
    return [{**row, "prompt": ""} for row in rows]


def photograph_rows(tiles: int, left_out: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Fourteen photographs inside scikit-image and quarters of them; no caption describes them.

    Args:
        left_out: Of `PHOTOGRAPHS`.
    """
    import skimage

    rows: list[dict[str, Any]] = []
    for file in PHOTOGRAPHS:
        if file in left_out:
            continue
        picture = Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB")
        name = file.partition(".")[0]
        rows.append({"id": name, "image": picture, "prompt": ""})
        side = min(picture.size) // 2
        for tile in range(tiles):
            left, top = (tile % 2) * side, (tile // 2 % 2) * side
            rows.append(
                {"id": f"{name}-{tile}", "image": picture.crop((left, top, left + side, top + side)), "prompt": ""}
            )
    return rows


def crop_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """So many crops of the held-out photographs of the packages that `micro.photographs` names, unpacked in a folder;
    file by file in turn, so that fewer crops still show every file."""
    files = photographs.files(folder, "photograph", heldout=True)
    each = -(-count // len(files))
    crops = [photographs.crops(file, each) for file in files]
    return [
        {"id": f"{files[i % len(files)].stem}-{i}", "image": Image.fromarray(crops[i % len(files)][i // len(files)]),
         "prompt": ""}
        for i in range(count)
    ]  # fmt: skip
