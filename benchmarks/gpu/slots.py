"""What a row takes and how many fit, by family, kind of work and card: counted on the meta device, without a GPU.

    python -m benchmarks.gpu.slots

Prints the table of docs/performance.md. Weights are in bf16, the autoencoder in fp32; what is left beside
them is shared out by `stages.models.memory.rows_on`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from stages.inversion.settings import InvertImagesSettings
from stages.models.families import open_without_weights
from stages.models.memory import power_of_two, row_bytes, rows_on, weight_bytes
from tests.support import full_size
from tests.support.tiny_stable_diffusion import tokenizer

GIGA = 10**9
CARDS = (24, 40, 80)
TEXT_ENCODERS = {
    "SD1.5": 0.123, "SDXL": 0.818, "SD3.5-medium": 5.58, "SD3.5-large": 5.58, "FLUX.1-dev": 4.88, "Qwen-Image": 8.29,
    "Z-Image-Turbo": 4.02,
}  # fmt: skip
"""Billions of parameters, as published."""
COLUMNS = {
    "inversion": "predict", "its gradients": "gradient", "encoding": "encode", "decoding": "decode", "ILB": "boost",
    "seed-select": "select", "Lego": "gradient",
}  # fmt: skip
LEGO_PICTURES = 4


def main() -> None:
    names = sys.argv[1:] or list(TEXT_ENCODERS)
    print(f"| model | weights, GB | {' | '.join(COLUMNS)} |")
    print("|---|---|" + "---|" * len(COLUMNS), flush=True)
    for name in names:
        print(line(name), flush=True)


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
    cells, told = [], dict[str, int]()
    for column, work in COLUMNS.items():
        if column == "Lego" and unet is None:
            cells.append("")
            continue
        each = told.setdefault(work, row_bytes(model, work)) * (LEGO_PICTURES if column == "Lego" else 1)
        fits = []
        for card in CARDS:
            rows = rows_on(card * GIGA, weights, each)
            fits.append(str(power_of_two(rows) if column in ("inversion", "Lego") and rows else min(rows, 999)))
        cells.append(f"{each / GIGA:.2g} GB: {', '.join(fits)}")
    return f"| {name} | {weights / GIGA:.1f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
