"""Which seeds regenerate under which samplers: the table of docs/inversion.md, filled in by diffusers' pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from micro import world
from stages.inversion.metrics import measure_pictures
from stages.inversion.settings import InvertImagesSettings
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model

DOCS = Path(__file__).parents[3] / "docs" / "inversion.md"
STEPS = 20
EULER, DPM = {"class": "EulerDiscreteScheduler"}, {"class": "DPMSolverMultistepScheduler"}
PNDM = {"class": "PNDMScheduler", "skip_prk_steps": True}
INVERTED: dict[str, dict[str, Any]] = {
    "DDIM (`sampler` left out)": {},
    "`sampler: model`, Euler": {"sampler": "model", "scheduler": EULER},
    "`sampler: model`, Euler, Karras": {"sampler": "model", "scheduler": {**EULER, "use_karras_sigmas": True}},
    "`sampler: model`, DPM-Solver++, order 1": {"sampler": "model", "scheduler": {**DPM, "solver_order": 1}},
    "`sampler: model`, DPM-Solver++ 2M": {"sampler": "model", "scheduler": DPM},
    "`sampler: model`, DPM-Solver++ 2M, Karras": {"sampler": "model", "scheduler": {**DPM, "use_karras_sigmas": True}},
    "`sampler: model`, PNDM": {"sampler": "model", "scheduler": PNDM},
    "`sampler: model`, UniPC": {"sampler": "model", "scheduler": {"class": "UniPCMultistepScheduler"}},
}
DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ 1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "2M, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
HELD = 50
"""dB from which a picture counts as regenerated."""


@torch.no_grad()
def decibels() -> dict[str, list[float]]:
    """Mean dB of the regenerated pictures against the decoded latents that were inverted, by how they were inverted."""
    import diffusers

    pictures = [{"id": str(i), "image": Image.fromarray(world.picture(i, "heldout")), "prompt": "red star",
                 "method": "lbo"} for i in range(2)]  # fmt: skip
    x_BCHW = torch.stack(
        [(torch.from_numpy(world.picture(i, "heldout")) / 127.5 - 1).permute(2, 0, 1) for i in range(2)]
    )
    seeds, stocks = [], []
    for given in INVERTED.values():
        settings = InvertImagesSettings(
            device="cpu", steps=STEPS, slots=2, pictures=False, reconstruct=False, prompt="red star", **given
        )
        model = open_latent_model(settings)
        rows = sorted(InvertImages(settings, model)(pictures), key=lambda row: row["id"])
        seeds += [torch.from_numpy(row["latent"]) for row in rows]
        stocks.append(dict(model.geometry.scheduler))
    found: dict[str, list[float]] = {name: [] for name in INVERTED}
    pipe = model.pipeline
    wanted_BCHW = model.decode(model.encode(x_BCHW)).repeat(len(INVERTED), 1, 1, 1)
    for sampler, changes in DRAWN.values():
        # The noise levels and the spacing that the seed was inverted with; the rest is the class's own.
        kept = [{key: value for key, value in stock.items() if not key.startswith(("_", "use_", "solver_", "skip_"))}
                for stock in stocks]  # fmt: skip
        assert kept == kept[:1] * len(kept)  # so the seeds of all are drawn in one batch
        pipe.scheduler = getattr(diffusers, sampler).from_config({**kept[0], **changes})
        z_BCHW = pipe(["red star"] * len(seeds), num_inference_steps=STEPS, guidance_scale=1.0,
                      latents=torch.stack(seeds), output_type="latent").images  # fmt: skip
        values = measure_pictures(model.decode(z_BCHW), wanted_BCHW)["psnr"]
        for name, first, second in zip(INVERTED, values[::2], values[1::2], strict=True):
            found[name].append((first + second) / 2)
    return found


def test_the_table_in_the_docs_is_what_diffusers_draws() -> None:
    found = decibels()
    lines = [f"| inverted as | {' | '.join(DRAWN)} |", "|---" * (len(DRAWN) + 1) + "|"]
    for name, values in found.items():
        lines.append(f"| {name} | {' | '.join('yes' if v >= HELD else f'{v:.0f}' for v in values)} |")
    made = "\n".join(lines)
    shown = re.search(r"\| inverted as \|.*?(?=\n\n)", DOCS.read_text(), re.DOTALL)
    assert shown is not None, made
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[0].splitlines()]
    assert cells[0] == ["inverted as", *DRAWN], made
    assert [row[0] for row in cells[2:]] == list(found), made
    for row in cells[2:]:
        for stated, value in zip(row[1:], found[row[0]], strict=True):
            assert (stated == "yes") == (value >= HELD), made
            assert stated == "yes" or float(stated) == pytest.approx(value, abs=1.0), made
