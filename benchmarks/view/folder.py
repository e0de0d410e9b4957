"""An output folder of many rows, made without a model: random figures in the columns of ``invert-images``.

``python -m benchmarks.view.folder OUT --rows 1000000``. The pictures are 64 of 24 x 24 pixels, drawn again and again.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.contract import Column
from pipeline.input.files import OWN
from pipeline.output.commit import ATTEMPTS, Attempt, Record, write_record
from pipeline.output.dataset import Output, Tally
from pipeline.output.publish import publish
from pipeline.output.schema import encode_schema, measures, output_schema
from pipeline.storage import Folder

METHODS = ("ddim", "fixed-point", "lbo", "euler")
COLUMNS = [
    Column("prompt", "string", doc="What the picture shows."),
    Column("method", "string", doc="How it was inverted."),
    Column("psnr", "float32", doc="Regenerated picture against the picture, in dB."),
    Column("ssim", "float32", doc="The same, structural similarity."),
    Column("residual_max", "float32", doc="Largest residual of a step."),
    Column("forwards", "int64", doc="Forward passes."),
    Column("converged", "bool", doc="Whether every step did."),
    Column("latent", "tensor", shape=(4, 4, 4), dtype="float16", doc="The noise."),
    Column("picture", "image", doc="As it was fitted."),
    Column("reconstruction", "image", doc="What the latent regenerates."),
]
WORDS = ("red", "blue", "green", "small", "large", "star", "ring", "square", "cat", "bridge", "harbour", "lamp")
NUMERIC = ("psnr", "ssim", "residual_max", "forwards")


def make(out: str, rows: int, shard_rows: int, seed: int = 0) -> None:
    """Write, commit and publish the folder by the library's own functions."""
    folder = Folder.at(out)
    schema = output_schema([], COLUMNS, {})
    shards = -(-rows // shard_rows)
    plan = {
        "run": "0123456789ab", "rows": rows, "shards": shards, "schema": encode_schema(schema), "models": {},
        "config": {"job": "benchmark"}, "fingerprint": f"benchmark-{rows}-{seed}", "created": time.time(),
        "stage_columns": [{"name": c.name, "kind": c.kind, "shape": list(c.shape), "dtype": c.dtype, "doc": c.doc}
                          for c in COLUMNS],
    }  # fmt: skip
    folder.write(f"{OWN}/plan.json", json.dumps(plan).encode())
    rng = np.random.default_rng(seed)
    pictures = [picture(rng) for _ in range(64)]
    output, tally = Output(folder, plan), Tally()
    for shard in range(shards):
        count = min(shard_rows, rows - shard * shard_rows)
        table = pa.table(list(cells(rng, shard * shard_rows, count, pictures, schema)), schema=schema)
        name = f"0123456789ab-e0-{shard:06d}.0.parquet"
        attempt = Attempt(folder, f"{ATTEMPTS}/{name}", schema)
        attempt.add(table)
        size, checksum = attempt.close()
        failed = table["status"].to_pylist().count("failed")
        record = Record(shard, "0", name, size, checksum, count - failed, failed, time.time(), 1.0, "one",
                        measures(table, NUMERIC), {"the picture is cut off": failed} if failed else {},
                        run="0123456789ab")  # fmt: skip
        tally.add(write_record(folder, record))
    publish(output, tally, "benchmark", "Random figures.")


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    small.resize((24, 24), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def cells(rng: np.random.Generator, first: int, count: int, pictures: list[bytes], schema: pa.Schema) -> list[pa.Array]:
    """The columns of a shard; one row in a hundred has failed."""
    ok = rng.random(count) > 0.01
    blank = pa.array(~ok)

    def column(values: np.ndarray, name: str) -> pa.Array:
        return pa.array(values, type=schema.field(name).type, mask=~ok)

    def pictured() -> pa.Array:
        chosen = rng.integers(0, len(pictures), count)
        data = pa.array([pictures[n] for n in chosen], pa.binary())
        kind = schema.field("picture").type
        return pa.StructArray.from_arrays([data, pa.nulls(count, pa.string())], fields=list(kind), mask=blank)

    psnr = np.clip(rng.normal(31, 4, count), 8, 60)
    texts = [" ".join(WORDS[n] for n in row) for row in rng.integers(0, len(WORDS), (count, 4))]
    latent = pa.array(rng.normal(size=count * 64).astype(np.float16))
    return [
        pa.array([f"row-{n:08d}" for n in range(first, first + count)]),
        pa.array(texts),
        pa.array([METHODS[n] for n in rng.integers(0, len(METHODS), count)]),
        column(psnr.astype(np.float32), "psnr"),
        column((1 - np.exp(-psnr / 9)).astype(np.float32), "ssim"),
        column(rng.lognormal(-7, 2, count).astype(np.float32), "residual_max"),
        column(rng.integers(20, 400, count), "forwards"),
        column(rng.random(count) > 0.2, "converged"),
        pa.FixedSizeListArray.from_arrays(latent, type=schema.field("latent").type, mask=blank),
        pictured(),
        pictured(),
        pa.array(np.where(ok, "ok", "failed")),
        pa.array([None if good else f"the picture is cut off after {n % 977} bytes" for n, good in enumerate(ok)]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shard-rows", type=int, default=1000)
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    make(given.out, given.rows, given.shard_rows)


if __name__ == "__main__":
    main()
