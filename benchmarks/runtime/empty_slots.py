"""What empty slots cost: CPU seconds of a few rows in many slots, with networks that are shown the held slots alone, as
they are, and all slots, as they once were. Shipped models, one thread, in turns. Prints a table.

    python -m benchmarks.runtime.empty_slots
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.inversion.pictures import world_rows
from micro import world
from stages.engine import slots
from stages.inversion import engine, ilb
from stages.inversion.settings import InvertImagesSettings, LboMethod
from stages.inversion.stage import InvertImages
from stages.models.families import open_latent_model
from stages.models.settings import LatentModelSettings
from stages.ovi import problem
from stages.ovi.settings import OVI, InvertPromptsSettings
from stages.ovi.stage import InvertPrompts


def all_slots(enabled: bool) -> None:
    """Show networks every slot, or those that hold a row."""
    for module in (engine, ilb, problem):
        module.held = (lambda rows, device=None: None) if enabled else slots.held  # type: ignore[attr-defined]


def timed(work: Callable[[], list[dict[str, Any]]]) -> tuple[float, list[dict[str, Any]]]:
    started = time.process_time()
    done = work()
    return time.process_time() - started, sorted(done, key=lambda row: str(row["id"]))


def main() -> None:
    torch.set_num_threads(1)
    model = open_latent_model(LatentModelSettings(device="cpu"))

    def pictures(count: int, many: int) -> list[dict[str, Any]]:
        settings = InvertImagesSettings(methods=(LboMethod(),), steps=20, slots=many, pictures=False, reconstruct=False)
        return list(InvertImages(settings, model)([{**row, "method": "lbo"} for row in world_rows(count)]))

    def prompts(count: int, many: int) -> list[dict[str, Any]]:
        stage = InvertPrompts(InvertPromptsSettings(methods=(OVI(slots=many),)))
        rows = [{"id": str(i), "prompt": world.caption_of(i, "heldout"), "method": "ovi"} for i in range(count)]
        return list(stage(rows))

    print("| rows | slots | all slots shown, s | held slots shown, s | ratio | largest difference |")
    print("|---|---|---|---|---|---|")
    cases = ((prompts, "embedding", 1, 32), (pictures, "latent", 1, 16), (pictures, "latent", 40, 16))
    for work, column, count, many in cases:
        work(1, 1)
        found = []
        for enabled in (True, False):
            all_slots(enabled)
            found.append(timed(lambda: work(count, many)))  # noqa: B023
        (before, old), (now, new) = found
        apart = max(float(np.abs(a[column] - b[column]).max()) for a, b in zip(old, new, strict=True))
        name = f"{count} {work.__name__ if count > 1 else work.__name__[:-1]}"
        print(f"| {name} | {many} | {before:.2f} | {now:.2f} | {before / now:.1f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
