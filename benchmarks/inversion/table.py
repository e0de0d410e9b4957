"""Methods of inversion side by side on a model, the miniature Stable Diffusion unless told otherwise: one run, one
protocol, every method that inverts it, from the same latents. Writes results/inversion_table.json and .md beside it
(of another model inversion_table_NAME); a line replaces that of an earlier run only.

    python -m benchmarks.inversion.table --pictures 500 --settings 50:1 20:1 10:1 --methods ddim renoise lbo
    python -m benchmarks.inversion.table --pictures 64 --settings 20:1     # every method, fewer pictures
    python -m benchmarks.inversion.table --model micro:flux --pictures 256 --settings 28:1 20:1 8:1 4:1
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import micro
from benchmarks.inversion.updates import ComparedLbo
from micro import world
from stages.inversion.settings import (
    BelmMethod,
    Boost,
    DdimMethod,
    EdictMethod,
    EulerMethod,
    ExactMethod,
    FireFlowMethod,
    FixedPointMethod,
    InversionMethod,
    InvertImagesSettings,
    LboMethod,
    NewtonMethod,
    NullTextMethod,
    RenoiseMethod,
    RfSolverMethod,
    UniInvMethod,
)
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.settings import LatentModelSettings

RESULTS = Path(__file__).parent / "results"

SEED_ONLY: tuple[InversionMethod, ...] = (
    DdimMethod(),
    EulerMethod(),
    RfSolverMethod(),
    FireFlowMethod(),
    UniInvMethod(),
    ComparedLbo(name="lbo-1", fitted_by="anderson", passes=1, tolerance=0.0),
    RenoiseMethod(),
    ComparedLbo(name="lbo-2", fitted_by="anderson", passes=2, tolerance=0.0),
    FixedPointMethod(name="fixed-point-3", iterations=3),
    FixedPointMethod(name="averaged-3", iterations=3, acceleration="averaged"),
    FixedPointMethod(name="anderson-3", iterations=3, acceleration="anderson"),
    ExactMethod(name="exact-3", iterations=3, warmup=0, tolerance=0.0),
    ComparedLbo(name="lbo-4", fitted_by="anderson", passes=4, tolerance=0.0),
    ComparedLbo(name="lbo-4-no-warm-start", fitted_by="anderson", passes=4, tolerance=0.0, warm_start="none"),
    ComparedLbo(name="lbo-4-output", fitted_by="anderson", bias="output", passes=4, tolerance=0.0, warm_start="last"),
    LboMethod(name="lbo"),
    LboMethod(name="lbo-1e-3", tolerance=1e-3),
    LboMethod(name="lbo-1e-4", tolerance=1e-4),
    ComparedLbo(name="lbo-6", fitted_by="anderson", passes=6, tolerance=0.0),
    FixedPointMethod(name="anderson-1e-3", iterations=9, acceleration="anderson", tolerance=1e-3),
    FixedPointMethod(name="anderson-5", iterations=5, acceleration="anderson"),
    NewtonMethod(),
    ComparedLbo(name="lbo-gauss-newton-6", fitted_by="gauss-newton", passes=6, tolerance=0.0),
    ComparedLbo(name="lbo-adam-6", fitted_by="adam", passes=6, tolerance=0.0),
    ComparedLbo(name="lbo-jacobian-free-4", fitted_by="jacobian-free", passes=4, tolerance=0.0),
    LboMethod(name="lbo+ilb", ilb=Boost(steps=50)),
)
EXTRA_STATE: tuple[InversionMethod, ...] = (
    LboMethod(name="lbo+replay", replay=True),
    BelmMethod(),
    EdictMethod(),
    NullTextMethod(),
)
COLUMNS = {
    "psnr_decoded": "dB vs decoded", "psnr": "dB vs picture", "ssim": "SSIM", "latent_mse": "latent MSE",
    "passes": "passes a row", "seconds": "s a row", "seed_std": "seed std", "seed_kurtosis": "kurtosis",
    "seed_autocorrelation": "autocorr.",
}  # fmt: skip


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


PHOTOGRAPHS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
               "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
               "rocket.jpg")  # fmt: skip


def photograph_rows(tiles: int) -> list[dict[str, Any]]:
    """Fourteen photographs inside scikit-image and quarters of them; no caption describes them."""
    import skimage

    rows: list[dict[str, Any]] = []
    for file in PHOTOGRAPHS:
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


def measure(
    model: LatentModel, methods: tuple[InversionMethod, ...], rows: list[dict[str, Any]], steps: int,
    guidance: float, slots: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for method in methods:
        settings = InvertImagesSettings(methods=(method,), steps=steps, guidance=guidance, slots=slots, pictures=False)
        stage = InvertImages(settings, model)
        started = time.perf_counter()
        done = list(stage([{**row, "method": method.label} for row in rows]))
        seconds = (time.perf_counter() - started) / len(rows)
        good = [row for row in done if row["status"] == "ok"]
        made: dict[str, Any] = {
            "method": method.label,
            "steps": steps,
            "guidance": guidance,
            "rows": len(rows),
            "failed": len(rows) - len(good),
        }
        if good:
            for row in good:
                row["passes"] = row["forwards"] + row["backwards"]
            names = (
                "psnr",
                "ssim",
                "psnr_decoded",
                "latent_mse",
                "passes",
                "floor_psnr",
                "floor_ssim",
                "seed_std",
                "seed_kurtosis",
                "seed_autocorrelation",
            )
            made |= {name: float(np.mean([row[name] for row in good])) for name in names}
            made["psnr_decoded_ci"] = half_width([row["psnr_decoded"] for row in good])
        yield {**made, "seconds": seconds}


def half_width(values: list[float]) -> float:
    """Half of the 95 % confidence interval of a mean."""
    return float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for key in dict.fromkeys((r["rows_of"], r["steps"], r["guidance"]) for r in results):
        own = [r for r in results if (r["rows_of"], r["steps"], r["guidance"]) == key]
        floor = next(r for r in own if "floor_psnr" in r)
        most = max(r["rows"] for r in own)
        lines += [f"\n### {key[0]}: {key[1]} steps, guidance {key[2]:g} ({most} pictures)\n"]
        lines += ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [
            f"| *autoencoder alone (floor)* | | {floor['floor_psnr']:.2f} | {floor['floor_ssim']:.4f} |" + " |" * 6
        ]
        for state in (False, True):
            if state and any(r["extra_state"] for r in own):
                lines += ["| *with extra state:* |" + " |" * len(COLUMNS)]
            for r in (r for r in own if r["extra_state"] == state):
                cells = [f"{r[name]:.4g}" if name in r else "diverged" for name in COLUMNS]
                if "psnr_decoded_ci" in r:
                    cells[0] += f" ± {r['psnr_decoded_ci']:.2g}"
                mark = f" ({r['failed']} failed)" if r["failed"] else ""
                mark += f" (first {r['rows']})" if r["rows"] < most else ""
                lines.append(f"| {r['method']}{mark} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is of."""
    return line["rows_of"], line["steps"], line["guidance"], line["method"]


def order(line: dict[str, Any]) -> tuple[Any, ...]:
    """World first, many steps first, methods as listed above."""
    listed = [method.label for method in (*SEED_ONLY, *EXTRA_STATE)]
    return line["rows_of"] != "world", line["guidance"], -line["steps"], listed.index(line["method"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(micro.MODELS / "stable-diffusion"))
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--tiles", type=int, default=4, help="of each photograph; -1: no photographs")
    parser.add_argument(
        "--settings", nargs="+", default=["50:1", "20:1", "10:1", "4:1", "20:3", "20:7.5"], help="steps:guidance"
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="*", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = LatentModelSettings(model=options.model)
    model = open_latent_model(settings)
    kind = "diffusion" if model.geometry.grid is None else "flow"
    shipped = Path(settings.model) == micro.MODELS / "stable-diffusion"
    name = "inversion_table" if shipped else f"inversion_table_{Path(settings.model).name}"
    sets = {"world": world_rows(options.pictures)} if options.pictures else {}
    if options.tiles >= 0:
        sets["photographs"] = photograph_rows(options.tiles)
    file = RESULTS / f"{name}.json"
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"] if file.exists() else []
    for subject, rows in sets.items():
        for setting in options.settings:
            steps, guidance = int(setting.split(":")[0]), float(setting.split(":")[1])
            if subject == "photographs" and guidance > 1:
                continue  # without a caption guidance changes nothing
            for methods, extra in ((SEED_ONLY, False), (EXTRA_STATE, True)):
                fit = (m for m in methods if kind in m.inverts)
                chosen = tuple(m for m in fit if not options.methods or m.label in options.methods)
                if guidance > 1:
                    chosen = tuple(m for m in chosen if not isinstance(m, NullTextMethod))
                for result in measure(model, chosen, rows, steps, guidance, options.slots):
                    line = {**result, "rows_of": subject, "extra_state": extra}
                    results = [r for r in results if of(r) != of(line)] + [line]
                    print(json.dumps(line), flush=True)
            results.sort(key=order)
            RESULTS.mkdir(exist_ok=True)
            load = os.getloadavg()[0]
            note = f"{options.threads} threads; load average of the machine at the end {load:.1f}"
            file.write_text(json.dumps({"note": note, "results": results}, indent=1))
            (RESULTS / f"{name}.md").write_text(f"# Methods of inversion\n\n{note}.\n{table(results)}")


if __name__ == "__main__":
    main()
