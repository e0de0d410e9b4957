"""Methods of inversion side by side on a model, the miniature Stable Diffusion unless told otherwise: one run, one
protocol, every method that inverts it, from the same latents, and what the stock pipeline in bfloat16 makes of the
seeds. Writes results/inversion_table.json and .md beside it (of another model inversion_table_NAME) after each cell (a
method, a number of steps, a guidance, a set of pictures). Started again it goes on with the cells that are not there
yet; results of other weights are dropped.

    python -m benchmarks.inversion.table --pictures 500 --settings 50:1 20:1 10:1 --methods ddim renoise lbo
    python -m benchmarks.inversion.table --pictures 64 --settings 20:1     # every method, fewer pictures
    python -m benchmarks.inversion.table --model PATH --pictures 256 --uncaptioned 64 --photographs 64 --folder UNPACKED

Of a rectified flow: 28, 20, 8 and 4 steps, guidance 1 and the pipeline's own, with captions and without, by the methods
of `AUDIT`; photographs are crops of held-out ones (`benchmarks.inversion.pictures`), or scikit-image's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import micro
from benchmarks.inversion.pictures import LEARNT_FROM, crop_rows, photograph_rows, without_captions, world_rows
from benchmarks.inversion.stock import Stock
from benchmarks.inversion.updates import ComparedLbo
from stages.inversion.metrics import measure_pictures
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
    RfInversionMethod,
    RfSolverMethod,
    UniInvMethod,
)
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.fingerprint import digest
from stages.models.latent import LatentModel
from stages.models.pictures import fit_picture
from stages.models.settings import LatentModelSettings

RESULTS = Path(__file__).parent / "results"

SEED_ONLY: tuple[InversionMethod, ...] = (
    DdimMethod(),
    EulerMethod(),
    RfSolverMethod(),
    FireFlowMethod(),
    UniInvMethod(),
    ComparedLbo(name="lbo-1", fitted_by="anderson", passes=1, tolerance=0.0),
    LboMethod(name="lbo-1-fitted", warm_start="fitted", passes=1, tolerance=0.0),
    RenoiseMethod(),
    ComparedLbo(name="lbo-2", fitted_by="anderson", passes=2, tolerance=0.0),
    FixedPointMethod(name="fixed-point-3", iterations=3),
    FixedPointMethod(name="averaged-3", iterations=3, acceleration="averaged"),
    FixedPointMethod(name="anderson-3", iterations=3, acceleration="anderson"),
    ExactMethod(name="exact-3", iterations=3, warmup=0, tolerance=0.0),
    ComparedLbo(name="lbo-4", fitted_by="anderson", passes=4, tolerance=0.0),
    LboMethod(name="lbo-4-best", passes=4, tolerance=0.0),
    ComparedLbo(name="lbo-4-no-warm-start", fitted_by="anderson", passes=4, tolerance=0.0, warm_start="none"),
    ComparedLbo(name="lbo-4-output", fitted_by="anderson", bias="output", passes=4, tolerance=0.0, warm_start="last"),
    LboMethod(name="lbo-5-1e-2", passes=5, tolerance=1e-2),
    LboMethod(name="lbo"),
    LboMethod(name="lbo+retries", retries=2),
    LboMethod(name="lbo-10", passes=10),
    LboMethod(name="lbo-1e-3", tolerance=1e-3),
    LboMethod(name="lbo-1e-4", tolerance=1e-4),
    ComparedLbo(name="lbo-6", fitted_by="anderson", passes=6, tolerance=0.0),
    FixedPointMethod(name="anderson-1e-3", iterations=9, acceleration="anderson", tolerance=1e-3),
    FixedPointMethod(name="anderson-5", iterations=5, acceleration="anderson"),
    NewtonMethod(),
    ComparedLbo(name="lbo-jacobian-free-4", fitted_by="jacobian-free", passes=4, tolerance=0.0),
    LboMethod(name="lbo+ilb", ilb=Boost(iterations=50)),
)
EXTRA_STATE: tuple[InversionMethod, ...] = (
    LboMethod(name="lbo+replay", replay=True),
    LboMethod(name="lbo-1+shown", replay="shown", passes=1, tolerance=0.0),
    RfInversionMethod(),
    BelmMethod(),
    EdictMethod(),
    NullTextMethod(),
)
AUDIT = (
    "euler", "rf-solver", "fireflow", "uni-inv", "lbo-1", "lbo-1-fitted", "renoise", "lbo-2", "fixed-point-3",
    "averaged-3", "anderson-3", "lbo-4", "lbo-4-best", "lbo", "lbo+retries", "anderson-1e-3", "anderson-5", "lbo-6",
    "lbo+ilb", "belm",
    "edict", "lbo+replay", "lbo-1+shown", "rf-inversion",
)  # fmt: skip
"""What is compared on a rectified flow, unless `--methods` says otherwise."""
USUAL = {
    "FluxPipeline": 3.5, "ChromaPipeline": 5.0, "Flux2Pipeline": 4.0, "Flux2KleinPipeline": 4.0,
    "StableDiffusion3Pipeline": 7.0, "QwenImagePipeline": 4.0, "QwenImage21Pipeline": 1.0, "ZImagePipeline": 6.0,
    "OvisImagePipeline": 5.0,
}  # fmt: skip
"""Guidance that the pipelines take where they are told none; Z-Image's scale counts from 1 here."""
COLUMNS = {
    "psnr_decoded": "dB vs decoded", "psnr": "dB vs picture", "stock_bfloat16": "dB, stock bf16", "ssim": "SSIM",
    "latent_mse": "latent MSE", "passes": "passes a row", "seconds": "s a row", "seed_std": "seed std",
    "seed_kurtosis": "kurtosis", "seed_autocorrelation": "autocorr.",
}  # fmt: skip
MEANS = (
    "psnr", "ssim", "psnr_decoded", "stock_bfloat16", "latent_mse", "passes", "floor_psnr", "floor_ssim", "seed_std",
    "seed_kurtosis", "seed_autocorrelation",
)  # fmt: skip
"""What is averaged over rows, each with half of its 95 % confidence interval."""


def measure(
    model: LatentModel, method: InversionMethod, rows: list[dict[str, Any]], steps: int, guidance: float, slots: int,
    stock: Stock | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One cell: a method's means over pictures."""
    settings = InvertImagesSettings(methods=(method,), steps=steps, guidance=guidance, slots=slots, pictures=False)
    stage = InvertImages(settings, model)
    started = time.perf_counter()
    done = list(stage([{**row, "method": method.label} for row in rows]))
    seconds = (time.perf_counter() - started) / len(rows)
    images = {row["id"]: row["image"] for row in rows}  # which the stage lets go of
    good = [{**row, "image": images[row["id"]]} for row in done if row["status"] == "ok"]
    for row in good:
        row["passes"] = row["forwards"] + row["backwards"]
    if stock is not None and method.extra is None:
        add_stock(stock, model, good, steps, guidance, slots)
    made: dict[str, Any] = {
        "method": method.label, "steps": steps, "guidance": guidance, "rows": len(rows),
        "failed": len(rows) - len(good), "seconds": seconds,
    }  # fmt: skip
    values = {name: [row[name] for row in good if name in row] for name in MEANS}
    made |= {name: float(np.mean(own)) for name, own in values.items() if own}
    made |= {f"{name}_ci": half_width(own) for name, own in values.items() if own}
    return made


@torch.no_grad()
def add_stock(
    stock: Stock, model: LatentModel, rows: list[dict[str, Any]], steps: int, guidance: float, slots: int
) -> None:
    """`stock_bfloat16`: dB of what the stock pipeline draws of each row's seed against the picture itself."""
    for start in range(0, len(rows), slots):
        some = rows[start : start + slots]
        seed_BCHW = torch.from_numpy(np.stack([row["latent"] for row in some])).float()
        x_BCHW = torch.stack([fit_picture(row["image"], model.geometry.picture_size, "crop") for row in some])
        made_BCHW = stock(seed_BCHW, [row["prompt"] for row in some], steps, guidance)
        for row, value in zip(some, measure_pictures(made_BCHW.cpu(), x_BCHW)["psnr"], strict=True):
            row["stock_bfloat16"] = value


def half_width(values: list[float]) -> float:
    """Half of the 95 % confidence interval of a mean."""
    return float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table for each set of pictures, number of steps and guidance."""
    lines = []
    for key in dict.fromkeys((r["rows_of"], r["steps"], r["guidance"]) for r in results):
        own = [r for r in results if (r["rows_of"], r["steps"], r["guidance"]) == key]
        most = max(r["rows"] for r in own)
        columns = {name: title for name, title in COLUMNS.items() if any(name in r for r in own)}
        lines += [f"\n### {key[0]}: {key[1]} steps, guidance {key[2]:g} ({most} pictures)\n"]
        lines += ["| method | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
        floor = next((r for r in own if "floor_psnr" in r), {})
        known = {"psnr": "floor_psnr", "ssim": "floor_ssim"}
        cells = [shown(floor, known[name]) if name in known else "" for name in columns]
        lines += ["| *autoencoder alone (floor)* | " + " | ".join(cells) + " |"]
        for state in (False, True):
            if state and any(r["extra_state"] for r in own):
                lines += ["| *with extra state:* |" + " |" * len(columns)]
            for r in (r for r in own if r["extra_state"] == state):
                cells = [shown(r, name) for name in columns]
                mark = f" ({r['failed']} failed)" if r["failed"] else ""
                mark += f" (first {r['rows']})" if r["rows"] < most else ""
                lines.append(f"| {r['method']}{mark} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(line: dict[str, Any], name: str) -> str:
    """A mean with half of its interval; nothing where it was not measured."""
    if name not in line:
        return "diverged" if line.get("failed") == line.get("rows") else ""
    said = f"{line[name]:.2f}" if name.endswith(("psnr", "psnr_decoded", "bfloat16")) else f"{line[name]:.4g}"
    return said + (f" ± {line[f'{name}_ci']:.2g}" if "psnr" in name and f"{name}_ci" in line else "")


def verdicts(results: list[dict[str, Any]]) -> str:
    """What became of the aims, for each set of pictures, number of steps and guidance: `lbo` is near the floor, as
    cheap as asked, ahead of every peer that makes no fewer passes; `lbo+ilb` is above the floor."""
    lines = [
        "\n### Aims\n",
        "| pictures | steps | guidance | `lbo` below the floor, dB | passes a step | `lbo+ilb` above the floor, dB | "
        "peers that no LBO is ahead of at as many passes |",
        "|---" * 7 + "|",
    ]
    for key in dict.fromkeys((r["rows_of"], r["steps"], r["guidance"]) for r in results):
        own = {r["method"]: r for r in results if (r["rows_of"], r["steps"], r["guidance"]) == key and "psnr" in r}
        lbo, boosted = own.get("lbo"), own.get("lbo+ilb")
        below = "" if lbo is None else f"{lbo['floor_psnr'] - lbo['psnr']:.2f} | {lbo['passes'] / key[1]:.2f}"
        above = "" if boosted is None else f"{boosted['psnr'] - boosted['floor_psnr']:.2f}"
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:g} | {below or ' | '} | {above} | {', '.join(unbeaten(own))} |")
    return "\n".join(lines) + "\n"


def unbeaten(own: dict[str, dict[str, Any]]) -> list[str]:
    """Seed-only peers for which no LBO with as many passes or fewer has more dB against the decoded latent."""
    alike = [r for name, r in own.items() if name.startswith("lbo") and not r["extra_state"] and name != "lbo+ilb"]
    peers = [r for name, r in own.items() if not name.startswith("lbo") and not r["extra_state"]]
    return [
        peer["method"]
        for peer in peers
        if not any(r["passes"] <= peer["passes"] and r["psnr_decoded"] > peer["psnr_decoded"] for r in alike)
    ]


def of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is of."""
    return line["rows_of"], line["steps"], line["guidance"], line["method"]


def order(line: dict[str, Any]) -> tuple[Any, ...]:
    """World first, many steps first, methods as listed above."""
    listed = [method.label for method in (*SEED_ONLY, *EXTRA_STATE)]
    sets = ("world", "world, no caption", "photographs")
    return sets.index(line["rows_of"]), line["guidance"], -line["steps"], listed.index(line["method"])


def written(file: Path, note: str, results: list[dict[str, Any]]) -> None:
    """The results as JSON and as a table; whoever reads meanwhile finds the ones before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = {
        file: json.dumps({"note": note, "results": results}, indent=1),
        file.with_suffix(".md"): f"# Methods of inversion\n\n{note}.\n{table(results)}{verdicts(results)}",
    }
    for target, text in made.items():
        beside = target.with_name(f".{target.name}")
        beside.write_text(text)
        beside.replace(target)


def settings_of(model: LatentModel, asked: list[str] | None) -> list[tuple[int, float]]:
    """Steps and guidance of each table."""
    if asked is not None:
        return [(int(one.split(":")[0]), float(one.split(":")[1])) for one in asked]
    if model.geometry.grid is None:
        return [(50, 1.0), (20, 1.0), (10, 1.0), (4, 1.0), (20, 3.0), (20, 7.5)]
    usual = 1.0 if model.geometry.guiding == "none" else USUAL[type(model).index]  # type: ignore[attr-defined]
    return [(steps, guidance) for guidance in dict.fromkeys((1.0, usual)) for steps in (28, 20, 8, 4)]


def methods_of(model: LatentModel, asked: list[str] | None, guidance: float) -> list[InversionMethod]:
    """The methods of a table, in its order."""
    kind = "diffusion" if model.geometry.grid is None else "flow"
    names = asked or (AUDIT if kind == "flow" else [method.label for method in (*SEED_ONLY, *EXTRA_STATE)])
    fit = [m for m in (*SEED_ONLY, *EXTRA_STATE) if kind in m.inverts and m.label in names]
    return [m for m in fit if guidance <= 1 or not isinstance(m, NullTextMethod)]


def sets_of(model: LatentModel, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The sets of pictures."""
    flow = model.geometry.grid is not None
    sets = {"world": world_rows(options.pictures)} if options.pictures else {}
    uncaptioned = options.pictures if options.uncaptioned is None else options.uncaptioned
    if flow and uncaptioned:
        sets["world, no caption"] = without_captions(world_rows(uncaptioned))
    if options.folder is not None and options.photographs:
        sets["photographs"] = crop_rows(options.folder, options.photographs)
    elif options.photographs:
        sets["photographs"] = photograph_rows(4, LEARNT_FROM if flow else ())[: options.photographs]
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(micro.MODELS / "stable-diffusion"))
    parser.add_argument("--pictures", type=int, default=500, help="of the world; 0: none")
    parser.add_argument("--uncaptioned", type=int, help="of a flow: without captions; left out: as many as with")
    parser.add_argument("--photographs", type=int, default=70, help="0: none")
    parser.add_argument("--folder", type=Path, help="where the packages that micro.photographs names are unpacked")
    parser.add_argument("--settings", nargs="+", help="steps:guidance")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--again", action="store_true", help="also the cells that are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = LatentModelSettings(model=options.model)
    model = open_latent_model(settings)
    shipped = Path(settings.model) == micro.MODELS / "stable-diffusion"
    name = "inversion_table" if shipped else f"inversion_table_{Path(settings.model).name}"
    weights = digest({part: one["fingerprint"] for part, one in model.geometry.fingerprints().items()})
    file = options.results / f"{name}.json"
    before = json.loads(file.read_text())["results"] if file.exists() else []
    results: list[dict[str, Any]] = [line for line in before if line.get("weights", weights) == weights]
    there = set() if options.again else {of(line): line["rows"] for line in results if "weights" in line}.items()
    stock = Stock(model, "bfloat16") if model.geometry.grid is not None else None
    for subject, rows in sets_of(model, options).items():
        for steps, guidance in settings_of(model, options.settings):
            if subject != "world" and guidance > 1 and model.geometry.guiding == "classifier-free":
                continue  # without a caption classifier-free guidance changes nothing
            for method in methods_of(model, options.methods, guidance):
                if ((subject, steps, guidance, method.label), len(rows)) in there:
                    continue
                line = measure(model, method, rows, steps, guidance, options.slots, stock)
                line |= {"rows_of": subject, "extra_state": method.extra is not None, "weights": weights}
                results = sorted([*(r for r in results if of(r) != of(line)), line], key=order)
                load = os.getloadavg()[0]
                note = f"{options.threads} threads; load average of the machine at the end {load:.1f}"
                written(file, note, results)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
