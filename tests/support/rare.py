"""Concepts, methods and an inverted dataset for tests of rare-concepts, around models of random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stages.rare.settings import NoiseMethod, RareConceptsSettings
from stages.rare.stage import RareConcepts

METHODS = [
    {"method": "random"},
    {"method": "slerp"},
    {"method": "linear"},
    {"method": "nao", "points": 8, "iterations": 20},
    {"method": "seed-select", "iterations": 2, "steps": 3},
    {"method": "seed-select", "name": "from-slerp", "start": "slerp", "iterations": 1},
]

LABELS = [method.get("name", method["method"]) for method in METHODS]

OPTIONS = {"steps": 4, "guidance": 3.0, "slots": 3, "inversion": {"method": "ddim"}}


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def rows(labels=LABELS, concepts=("star", "ring"), count: int = 2) -> list[dict]:
    return [
        {
            "id": f"{name}/{label}/{number}",
            "name": name,
            "prompt": f"a red {name}",
            "pictures": [png(10 * index + i, (20, 16)) for i in range(3)],
            "method": label,
            "number": str(number),
        }
        for index, name in enumerate(concepts)
        for label in labels
        for number in range(count)
    ]


def stage(folder: str, clip: str, methods=METHODS, **changes) -> RareConcepts:
    return RareConcepts(settings(folder, clip, methods, **changes))


def settings(folder: str, clip: str, methods=METHODS, **changes) -> RareConceptsSettings:
    return RareConceptsSettings(model=folder, methods=methods, encoder=clip, **{"device": "cpu", **OPTIONS, **changes})


def method(name: str, **options) -> NoiseMethod:
    (found,) = RareConceptsSettings(methods=[{"method": name, **options}]).methods
    return found


def by_id(made) -> dict[str, dict]:
    made = list(made)
    found = {row["id"]: row for row in made}
    assert len(found) == len(made)
    return found


def inverted(folder: Path, unet: str, *, methods=("lbo",), by: str = "concept", **config: str) -> str:
    (folder / "data").mkdir(parents=True)
    shape = [("id", pa.string()), (by, pa.string()), ("latent", pa.list_(pa.float32(), 4)), ("status", pa.string())]
    note = {
        "stage": "stages.inversion.stage:InvertImages",
        "models": {"unet": {"fingerprint": unet}},
        "config": {"methods": [{"method": name} for name in methods], **config},
    }
    schema = pa.schema(shape, metadata={"latentmill": json.dumps(note)})
    made = [
        {"id": f"p{i}", by: "star" if i < 5 else "ring", "latent": [i] * 4, "status": "failed" if i == 1 else "ok"}
        for i in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(made, schema), folder / "data" / "part-00000-of-00001.parquet")
    (folder / "_SUCCESS").write_text("{}")
    return str(folder)
