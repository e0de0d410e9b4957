"""Embedding throughput beside clip-retrieval and a plain transformers loop; on a GPU, the share of the matrix peak.

    python -m benchmarks.index.embedding           # the miniature prior's and ViT-B/32's shapes, random weights
    python -m benchmarks.index.embedding --clip-retrieval VENV/bin/python   # and clip-retrieval, in its own environment
    python -m benchmarks.index.embedding --gpu                # ViT-L/14 and ViT-bigG/14 shapes, float16, on a GPU

All read the same JPEG files and load the same folder, and take turns. What a picture costs is the difference between a
turn of all pictures and one of a quarter of them, so that starting up, which clip-retrieval's workers do anew in every
turn, counts for nobody: in seconds, and in seconds of the processor, which other work on the machine hardly changes.
clip-retrieval runs in a process of its own that keeps the model between the turns, and writes its files.
Without a GPU its environment takes torch's CPU build first; torchvision's compiled operators, which it does
not call, may then have to be left out of ``torchvision/__init__.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import micro
from stages.embed.settings import EmbedSettings
from stages.embed.stage import Embed

MICRO = Path(micro.__file__).with_name("models")
RESULTS = Path(__file__).with_name("results")

SHAPES: dict[str, dict[str, int]] = {
    "miniature": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
                  "patch_size": 8, "image_size": 64, "projection_dim": 128},
    "ViT-B/32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "patch_size": 32, "image_size": 224, "projection_dim": 512},
    "ViT-L/14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                 "patch_size": 14, "image_size": 224, "projection_dim": 768},
    "ViT-bigG/14": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16,
                    "patch_size": 14, "image_size": 224, "projection_dim": 1280},
}  # fmt: skip


# As openai/clip-vit-base-patch32 has it, without the sizes.
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "resample": 3, "do_center_crop": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "do_convert_rgb": True,
}  # fmt: skip

CLIP_RETRIEVAL = """
    import importlib.metadata, json, os, sys, time
    from clip_retrieval import clip_inference

    if __name__ == "__main__":
        model, batch, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        print("READY", *(importlib.metadata.version(name) for name in ("clip-retrieval", "transformers")), flush=True)
        for line in sys.stdin:
            source, target = json.loads(line)
            begun, before = time.perf_counter(), os.times()
            clip_inference(
                input_dataset=source, output_folder=target, input_format="files", batch_size=batch, enable_text=False,
                num_prepro_workers=workers, clip_model=f"hf_clip:{model}",
            )
            seconds, spent = time.perf_counter() - begun, sum(os.times()[:4]) - sum(before[:4])
            print()
            print("TURN", json.dumps([seconds, spent]), flush=True)
"""


def save_random(name: str, folder: str, dtype: torch.dtype) -> None:
    """A whole CLIP model with an image tower of full size; its text tower, which nobody asks, has one narrow layer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    shape = SHAPES[name]
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={**text, "projection_dim": shape["projection_dim"]}, vision_config=shape,
        projection_dim=shape["projection_dim"],
    )  # fmt: skip
    size = shape["image_size"]
    processor = {**PROCESSOR, "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    CLIPModel(config).to(dtype).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(str(MICRO / "prior"), subfolder="tokenizer").save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))


def flop_a_picture(name: str) -> float:
    """Multiplications and additions of the matrix products, forward."""
    shape = SHAPES[name]
    tokens, width = (shape["image_size"] // shape["patch_size"]) ** 2 + 1, shape["hidden_size"]
    layer = tokens * width * (4 * width + 2 * shape["intermediate_size"]) + 2 * tokens**2 * width
    return 2 * shape["num_hidden_layers"] * layer


def pictures(folder: Path, count: int) -> list[Path]:
    """JPEG files of 512x384 with structure at several scales."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    files = [folder / f"{number:05d}.jpg" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((512, 384)).save(file, quality=90)
    return files


def rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    for number, file in enumerate(files):
        yield {"id": str(number), "image": Image.open(file).convert("RGB")}


def plain(
    model: Any, processor: Any, files: list[Path], batch: int, device: str, dtype: torch.dtype
) -> Iterator[np.ndarray]:
    with torch.inference_mode():
        for start in range(0, len(files), batch):
            opened = [Image.open(file).convert("RGB") for file in files[start : start + batch]]
            pixels = processor(images=opened, return_tensors="pt").pixel_values.to(device, dtype)
            yield model(pixel_values=pixels).image_embeds.float().cpu().numpy()


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


class ClipRetrieval:
    """clip-retrieval's own inference in another environment, its model loaded once."""

    def __init__(self, python: str, model: str, batch: int, workers: int, work: Path) -> None:
        command = [python, "-c", textwrap.dedent(CLIP_RETRIEVAL), model, str(batch), str(workers)]
        self._log = (work / "clip-retrieval.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self._work, self._turns = work, 0
        self.versions = self._answer("READY").split()

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line[len(word) :].strip()
        raise SystemExit(f"clip-retrieval ended:\n{(self._work / 'clip-retrieval.log').read_text()[-2000:]}")

    def __call__(self, folder: Path) -> tuple[float, float, np.ndarray]:
        """Seconds, seconds of the processor, and the normalised embeddings in the order of the names."""
        assert self._process.stdin is not None
        self._turns += 1
        target = self._work / f"turn-{self._turns}"
        self._process.stdin.write(json.dumps([str(folder), str(target)]) + "\n")
        seconds, spent = json.loads(self._answer("TURN"))
        return seconds, spent, np.concatenate([np.load(file) for file in sorted((target / "img_emb").glob("*.npy"))])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def measure(
    name: str, batches: int, batch: int | None, device: str, threads: int, rounds: int, python: str | None
) -> dict[str, Any]:
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    precision = "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, precision)
    side = SHAPES[name]["image_size"]
    with tempfile.TemporaryDirectory() as place:
        work, folder = Path(place), str(Path(place) / "model")
        save_random(name, folder, dtype)
        settings = EmbedSettings(encoder=folder, precision=precision, batch_size=batch, threads=threads)
        stage = Embed(settings, device)
        model = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        size = stage.batch_size
        quarter = batches // 4 * size
        files, few = pictures(work / "pictures", batches * size), pictures(work / "few", quarter)
        rival = ClipRetrieval(python, folder, size, threads, work) if python else None

        def ours(files: list[Path]) -> np.ndarray:
            found = sorted(stage(rows(files)), key=lambda row: int(row["id"]))
            return np.stack([row["embedding"] for row in found])

        def theirs(files: list[Path]) -> np.ndarray:
            return np.concatenate(list(plain(model, processor, files, size, device, dtype)))

        def alone(files: list[Path]) -> np.ndarray:
            pixels = torch.zeros(size, 3, side, side, device=device)
            with torch.inference_mode():
                return np.concatenate([stage.encoder.embed(pixels).cpu().numpy() for _ in range(len(files) // size)])

        here = {"latentmill": ours, "plain loop": theirs, "encoder alone": alone}
        found: dict[str, np.ndarray] = {}

        def turn(kind: str, files: list[Path]) -> np.ndarray:
            """Seconds and seconds of the processor."""
            if kind == "clip-retrieval":
                assert rival is not None
                seconds, spent, found[kind] = rival(files[0].parent)
                return np.array([seconds, spent])
            begun, before = time.perf_counter(), sum(os.times()[:4])
            found[kind] = here[kind](files)
            return np.array([time.perf_counter() - begun, sum(os.times()[:4]) - before])

        kinds = [*(["clip-retrieval"] if rival is not None else []), *here]
        for kind in kinds:
            turn(kind, few)  # warm
        cost: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for number in range(rounds):
            for kind in kinds:
                less = turn(kind, few)
                a_picture = (turn(kind, files) - less) / (len(files) - quarter)
                cost[kind].append([float(1000 * value) for value in a_picture])
                print(f"{name}, round {number + 1} of {rounds}, {kind}: ms, processor ms a picture", cost[kind][-1])
        ours_BE, plain_BE = found["latentmill"], found["plain loop"]
        median = {kind: np.median(values, axis=0) for kind, values in cost.items()}
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "precision": precision,
            "pictures": len(files), "batch": size, "threads": threads, "torch threads": torch.get_num_threads(),
            "ms, processor ms a picture, a round": cost,
            "pictures/s, median of the rounds": {kind: 1000 / value[0] for kind, value in median.items()},
            "processor ms a picture, median of the rounds": {kind: float(value[1]) for kind, value in median.items()},
            "largest difference to the plain loop": float(np.abs(ours_BE - plain_BE).max() / np.abs(plain_BE).max()),
            "load": os.getloadavg()[0],
        }  # fmt: skip
        if rival is not None:
            normed_BE = found["clip-retrieval"].astype(np.float32)
            cosine_B = (ours_BE / np.linalg.norm(ours_BE, axis=1, keepdims=True) * normed_BE).sum(1)
            result["clip-retrieval"] = {"version": rival.versions[0], "transformers": rival.versions[1],
                                        "lowest cosine to ours": float(cosine_B.min())}  # fmt: skip
            rival.close()
    if device == "cuda":
        flops = flop_a_picture(name) * result["pictures/s, median of the rounds"]["latentmill"]
        result["share of the matrix peak"] = flops / peak(device, dtype)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--batches", type=int, help="default 24; 256 for the miniature shape and on a GPU")
    parser.add_argument("--batch", type=int, help="pictures a batch; default what the stage finds")
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clip-retrieval", default=None, help="python of an environment with clip-retrieval")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run without --gpu")
    names = arguments.shape or (["ViT-L/14", "ViT-bigG/14"] if arguments.gpu else ["miniature", "ViT-B/32"])
    device = "cuda" if arguments.gpu else "cpu"
    result = {}
    for name in names:
        batches = arguments.batches or (256 if arguments.gpu or name == "miniature" else 24)
        rest = (arguments.threads, arguments.rounds, arguments.clip_retrieval)
        result[name] = measure(name, batches, arguments.batch, device, *rest)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / ("embedding-gpu.json" if arguments.gpu else "embedding.json")
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
