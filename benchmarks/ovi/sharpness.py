"""How sharp the kernel of `kernel` should be: what generalised cross-validation expects on the captions that it is
fitted to, and the cosine to the true pictures' embeddings of prompts that are in no bank.

OMP_NUM_THREADS=1 python -m benchmarks.ovi.sharpness REFERENCE [REFERENCE ...] [--sharpness 0.05,0.1,0.2,0.35,0.7,1.4]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ovi.priors import FIDELITY, opened
from benchmarks.ovi.setting import RESULTS, asked, cosine, interval, rows_of
from stages.ovi import kernel
from stages.ovi.settings import Kernel

PROMPTS = 128


def measured(reference: str, sharpnesses: list[float]) -> list[dict[str, Any]]:
    """A line for each sharpness, and one for `linear` (null)."""
    setting = opened(reference)
    bank, captions = setting.context.need_captions(Kernel())
    given = {kind: asked(setting, kind, PROMPTS) for kind in FIDELITY}
    texts = {
        kind: torch.stack([torch.from_numpy(row["text"]) for row in rows_of(setting, of.prompts)])
        for kind, of in given.items()
    }
    lines: list[dict[str, Any]] = []
    for sharpness in [None, *sharpnesses]:
        features: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double
        fit = captions.fit
        if sharpness is not None:
            features, fit = kernel.features_and_fit(bank, captions, Kernel(sharpness=sharpness))
        regression, expected = fit.under(), fit.score(fit.ridge)
        found = {
            kind: interval(cosine(regression(features(t_BT)), given[kind].true_BE)) for kind, t_BT in texts.items()
        }
        lines.append({"rows": fit.rows, "sharpness": sharpness, "expected": expected, "ridge": fit.ridge, **found})
        told = " | ".join(f"{mean:.3f} ± {half:.3f}" for mean, half in found.values())
        print(f"| {fit.rows} | {sharpness} | {expected:.2f} | {told} |", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("references", nargs="+", help="captioned")
    parser.add_argument("--sharpness", default="0.05,0.1,0.2,0.35,0.7,1.4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked_for = [float(one) for one in options.sharpness.split(",")]
    lines = [line for reference in options.references for line in measured(reference, asked_for)]
    (RESULTS / "sharpness.json").write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
