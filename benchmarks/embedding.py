"""Embedding throughput beside a plain transformers loop; on a GPU, the real encoders' share of the matrix peak.

    python -m benchmarks.embedding                      # ViT-B/32 shape, random weights, on this machine
    python -m benchmarks.embedding --gpu                # ViT-L/14 and ViT-bigG/14 shapes, float16, on a GPU

clip-retrieval's own inference is no opponent on a machine without a GPU's libraries: installing it pulls torch's CUDA
build. Its loop is the plain one here: the model's processor a picture, in the loop, then the model a batch.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stages.embed import Embed

RESULTS = Path(__file__).with_name("results")

SHAPES: dict[str, dict[str, int]] = {
    "ViT-B/32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "patch_size": 32, "projection_dim": 512},
    "ViT-L/14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                 "patch_size": 14, "projection_dim": 768},
    "ViT-bigG/14": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16,
                    "patch_size": 14, "projection_dim": 1280},
}  # fmt: skip


def save_random(name: str, folder: str, dtype: torch.dtype) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(**SHAPES[name], image_size=224)
    CLIPVisionModelWithProjection(config).to(dtype).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def flop_a_picture(name: str) -> float:
    """Multiplications and additions of the matrix products, forward."""
    shape = SHAPES[name]
    tokens, width = (224 // shape["patch_size"]) ** 2 + 1, shape["hidden_size"]
    layer = tokens * width * (4 * width + 2 * shape["intermediate_size"]) + 2 * tokens**2 * width
    return 2 * shape["num_hidden_layers"] * layer


def pictures(count: int) -> list[bytes]:
    """JPEGs of 512x384 with structure at several scales."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((512, 384))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out


def rows(data: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, jpeg in enumerate(data):
        yield {"id": str(number), "image": Image.open(io.BytesIO(jpeg)).convert("RGB")}


def plain(model: Any, processor: Any, data: list[bytes], batch: int, device: str, dtype: torch.dtype) -> np.ndarray:
    out = []
    with torch.inference_mode():
        for start in range(0, len(data), batch):
            opened = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in data[start : start + batch]]
            pixels = processor(images=opened, return_tensors="pt").pixel_values.to(device, dtype)
            out.append(model(pixel_values=pixels).image_embeds.float().cpu().numpy())
    return np.concatenate(out)


def peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: the practical peak."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - begun)


def measure(name: str, count: int, batch: int | None, device: str, threads: int, rounds: int) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    precision = "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, precision)
    data = pictures(count)
    with tempfile.TemporaryDirectory() as folder:
        save_random(name, folder, dtype)
        stage = Embed(folder, precision=precision, batch_size=batch, threads=threads, device=device)
        model = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype).to(device).eval()
        processor = CLIPImageProcessor.from_pretrained(folder)
    size = stage.batch_size
    spent = {"latentmill": 0.0, "plain loop": 0.0, "encoder alone": 0.0}
    pixels = torch.zeros(size, 3, 224, 224, device=device)
    list(stage(rows(data[:size])))
    plain(model, processor, data[:size], size, device, dtype)
    for _ in range(rounds):
        begun = time.perf_counter()
        ours = np.stack([row["embedding"] for row in sorted(stage(rows(data)), key=lambda row: int(row["id"]))])
        spent["latentmill"] += time.perf_counter() - begun
        begun = time.perf_counter()
        theirs = plain(model, processor, data, size, device, dtype)
        spent["plain loop"] += time.perf_counter() - begun
        begun = time.perf_counter()
        with torch.inference_mode():
            for _ in range(count // size):
                stage.encoder.embed(pixels).cpu()
        spent["encoder alone"] += time.perf_counter() - begun
    done = {"latentmill": count, "plain loop": count, "encoder alone": count // size * size}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "precision": precision, "batch": size,
        "threads": threads, "torch threads": torch.get_num_threads(),
        "pictures/s": {kind: rounds * done[kind] / seconds for kind, seconds in spent.items()},
        "largest difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()), "load": os.getloadavg()[0],
    }  # fmt: skip
    if device == "cuda":
        flops = flop_a_picture(name) * result["pictures/s"]["latentmill"]
        result["share of the matrix peak"] = flops / peak(device, dtype)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run without --gpu")
    names = ["ViT-L/14", "ViT-bigG/14"] if arguments.gpu else ["ViT-B/32"]
    device = "cuda" if arguments.gpu else "cpu"
    count = arguments.pictures or (8192 if arguments.gpu else 128)
    result = {name: measure(name, count, None, device, arguments.threads, rounds=3) for name in names}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / ("embedding-gpu.json" if arguments.gpu else "embedding.json")
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
