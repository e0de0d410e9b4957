"""What a row takes and how many fit, by family, kind of work and card: counted on the meta device, without a GPU.

Where a backward pass is in it, a second figure is of blocks that are computed again; rows are then told of the first
where one fits, else of the second, as `stages.models.memory.fitting` does.

    python -m benchmarks.gpu.slots

Prints the table of docs/performance.md. Weights are in bf16, the autoencoder in fp32; what is left beside
them is shared out by `stages.models.memory.rows_on`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import networks
from stages.inversion.settings import InvertImagesSettings
from stages.models.families import open_without_weights
from stages.models.memory import power_of_two, row_bytes, rows_on, weight_bytes
from stages.models.vision_tower import VisionTower
from tests.support import full_size
from tests.support.tiny_stable_diffusion import tokenizer

GIGA = 10**9
CARDS = (24, 40, 80)
TEXT_ENCODERS = {
    "SD1.5": 0.123, "SDXL": 0.818, "SD3.5-medium": 5.58, "SD3.5-large": 5.58, "FLUX.1-dev": 4.88, "Chroma1-HD": 4.76,
    "FLUX.2-klein-4B": 4.02, "FLUX.2-klein-9B": 8.19, "FLUX.2-dev": 24.01, "Qwen-Image": 8.29, "Qwen-Image-2.1": 8.77,
    "Z-Image-Turbo": 4.02, "Ovis-Image-7B": 1.72,
}  # fmt: skip
"""Billions of parameters, as published."""
COLUMNS = {
    "inversion": "predict", "encoding": "encode", "decoding": "decode", "ILB": "boost", "seed-select": "select",
    "Lego": "gradient",
}  # fmt: skip
LEGO_PICTURES = 4


def main() -> None:
    names = sys.argv[1:] or list(TEXT_ENCODERS)
    print(f"| model | weights, GB | {' | '.join(COLUMNS)} |")
    print("|---|---|" + "---|" * len(COLUMNS), flush=True)
    for name in names:
        print(line(name), flush=True)
    print("\n| OVI through | MB a prompt | in slots |\n|---|---|---|")
    for name in ("ViT-L/14", "ViT-bigG/14"):
        for compact in (False, True):
            print(tower_line(name, compact), flush=True)


def tower_line(name: str, compact: bool) -> str:
    """Megabytes a prompt of OVI with four tokens, and slots on each card, with the tower in fp32."""
    tower = VisionTower(networks.drawn_vision(name, "meta", torch.float32), 4, compact)
    weights = sum(4 * weight.numel() for weight in tower.model.parameters())
    each = tower.row_bytes()
    slots = [str(power_of_two(rows_on(card * GIGA, weights, each))) for card in CARDS]
    return f"| {name}, {'compact' if compact else 'all'} tokens | {each / 1e6:.0f} | {', '.join(slots)} |"


def line(name: str) -> str:
    """A row of the table: gigabytes a row, and rows at once on each card."""
    unet = {"SD1.5": "sd15", "SDXL": "sdxl"}.get(name)
    with tempfile.TemporaryDirectory() as folder:
        if unet is None:
            full_size.write_flow_configs(name, Path(folder))
        else:
            full_size.write_configs(unet, Path(folder), tokenizer(77))
        model = open_without_weights(InvertImagesSettings(model=folder, device="cpu", dtype="bfloat16"))
    weights = weight_bytes(model) + int(2 * GIGA * TEXT_ENCODERS[name])
    kept = {work: row_bytes(model, work) for work in set(COLUMNS.values())}
    for call in ("predict", "decode"):
        model.recompute(call)  # type: ignore[arg-type]
    less = {work: row_bytes(model, work) for work in kept}
    cells = []
    for column, work in COLUMNS.items():
        if column == "Lego" and unet is None:
            cells.append("")
            continue
        pictures = LEGO_PICTURES if column == "Lego" else 1
        plain, again = (pictures * each for each in (kept[work], less[work]))
        fits = []
        for card in CARDS:
            rows = rows_on(card * GIGA, weights, plain) or rows_on(card * GIGA, weights, again)
            fits.append(str(power_of_two(rows) if column in ("inversion", "Lego") and rows else min(rows, 999)))
        told = dict.fromkeys(f"{each / GIGA:.2g}" for each in sorted((plain, again), reverse=True))
        cells.append(f"{' / '.join(told)} GB: {', '.join(fits)}")
    return f"| {name} | {weights / GIGA:.1f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
