"""What OVI's settings do along the optimisation: tokens P, compact tokens, lambda of both constraints, stopping rules.

The weights of the constraints are swept with compact tokens, which are as good here and cost a tenth.
Every setting is followed step by step, once; stopping rules are then judged on the recorded paths. Fidelity is the
cosine to the embedding of the prompt's true picture, which no rule may look at.

    python -m benchmarks.ovi.sweeps [--model FOLDER] [--prompts 24] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.ovi.setting import FIGURES, RESULTS, World, asked, cosine, interval, machine, open_world, rows_of
from pipeline.contract import Row
from stages.engine.stopping import StoppingRule
from stages.models.vision_tower import VisionTower
from stages.ovi.constraints import ReferenceSearch
from stages.ovi.methods import whitening_of
from stages.ovi.problem import OviProblem, Parametrization
from stages.ovi.settings import OVI, Constraint, Stop


def swept(tokens: int = 4, compact: bool = True, **constraint: float) -> OVI:
    """OVI that does not stop by itself; slots and steps are those of the sweep."""
    return OVI(tokens=tokens, compact=compact, stop=Stop(), constraint=Constraint.model_validate(constraint))


SWEEPS: dict[str, dict[str, OVI]] = {
    "tokens": {f"P = {p}": swept(p, compact=False) for p in (1, 4, 16)}
    | {f"P = {p}, compact": swept(p) for p in (4, 16)},
    "mahalanobis": {f"lambda {w:g}": swept(mahalanobis=w) for w in (0.02, 0.1, 0.5, 2.0)},
    "neighbours": {
        f"lambda {w:g}, k = {k}": swept(neighbours=w, k=k, interval=1) for w in (0.5, 1.0, 3.0) for k in (1, 8)
    },
    "neighbours of the text": {
        f"lambda {w:g}, k = {k}": swept(neighbours=w, k=k, interval=0) for w in (0.5, 1.0, 3.0) for k in (1, 8)
    },
    "both": {
        f"Mahalanobis {m:g}, neighbours of the text {w:g}": swept(mahalanobis=m, neighbours=w, k=8, interval=0)
        for m in (0.02, 0.1)
        for w in (1.0, 3.0)
    },
}
MEASURES = ("true", "text", "mahalanobis")


@dataclass(frozen=True)
class Trajectory:
    """Along the steps (T) of each prompt (B): cosine to the true picture, to the text, Mahalanobis distance over E."""

    true_TB: np.ndarray
    text_TB: np.ndarray
    mahalanobis_TB: np.ndarray


def follow(setting: World, rows: list[Row], true_BE: torch.Tensor, steps: int, method: OVI) -> Trajectory:
    """Take `steps` updates of all rows at once, evaluating every iterate."""
    method = method.model_copy(update={"slots": len(rows), "steps": steps})
    tower = VisionTower(setting.context.vision(), method.tokens, method.compact)
    reference = setting.context.reference
    assert reference is not None
    search = ReferenceSearch(reference, method.constraint.k) if method.constraint.neighbours else None
    whitening = whitening_of(method, setting.context)
    problem = OviProblem(Parametrization.tokens(tower), method, whitening=whitening, search=search)
    problem.load(list(range(len(rows))), rows)
    evaluations = []
    for _ in range(steps + 1):
        problem.step()
        evaluations.append((cosine(problem.z_BE, true_BE), *problem.report_B4[:, 1:3].T.numpy().copy()))
    true_TB, text_TB, mahalanobis_TB = (np.stack(part) for part in zip(*evaluations, strict=True))
    return Trajectory(true_TB, text_TB, mahalanobis_TB)


def stopped_at(value_TB: np.ndarray, rule: StoppingRule) -> np.ndarray:
    """The step at which the solver's own rule would stop each row of a recorded path."""
    values = torch.from_numpy(np.ascontiguousarray(value_TB)).float()
    stopper = rule.start(values.shape[1])
    active_B = torch.ones(values.shape[1], dtype=torch.bool)
    at_B = np.full(values.shape[1], len(values) - 1)
    for step, value_B in enumerate(values):
        done_B = stopper.update(value_B, active_B)
        at_B[done_B.numpy()] = step
        active_B &= ~done_B
    return at_B


def rules(path: Trajectory, target: float) -> dict[str, np.ndarray]:
    """Name -> step at which each row stops. `target` is a cosine calibrated on the reference's own captions."""
    last = len(path.true_TB)
    every = np.arange(path.true_TB.shape[1])
    found = {f"{k} steps": np.full(len(every), k) for k in (10, 20, 30, 50, 100, 200, 400) if k < last}
    distance = 1 - path.text_TB
    for extra in (0.0, 0.05, 0.1, 0.15):
        rule = StoppingRule(limit=last, absolute=1 - target - extra)
        found[f"cosine >= {target:.2f} + {extra:.2f}"] = stopped_at(distance, rule)
    for patience in (3, 10):
        rule = StoppingRule(limit=last, patience=patience, minimum=8)
        found[f"Mahalanobis stalls for {patience}"] = stopped_at(path.mahalanobis_TB, rule)
    for gain in (0.01, 0.02):
        rule = StoppingRule(limit=last, relative=gain, patience=3, minimum=5)
        found[f"1 - cosine gains < {gain:.0%} for 3"] = stopped_at(distance, rule)
    found["best possible (looks at the true picture)"] = path.true_TB.argmax(0)
    return found


def judge(path: Trajectory, target: float) -> dict[str, dict[str, float]]:
    columns = np.arange(path.true_TB.shape[1])
    table = {}
    for name, at_B in rules(path, target).items():
        mean, half = interval(path.true_TB[at_B, columns])
        table[name] = {
            "steps": float(at_B.mean()),
            "true": mean,
            "half": half,
            "text": float(path.text_TB[at_B, columns].mean()),
        }
    return table


def plot(title: str, paths: dict[str, Trajectory], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    labels = ("cosine to the true picture", "cosine to the text", "Mahalanobis distance / E")
    for axis, measure, label in zip(axes, MEASURES, labels, strict=True):
        for name, path in paths.items():
            mean_T = getattr(path, f"{measure}_TB").mean(1)
            axis.plot(np.arange(len(mean_T)), mean_T, label=name)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--long", type=int, default=400, help="steps of the path on which stopping rules are judged")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--sweeps", default=",".join(SWEEPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = open_world(options.model, options.rows, options.cache)
    given = asked(setting, "heldout", options.prompts)
    rows = rows_of(setting, given.prompts)
    text_BE = torch.from_numpy(np.stack([row["text"] for row in rows]))
    # What a reference with captions gives: the mean cosine of a caption and its own picture.
    target = float(cosine(text_BE, given.true_BE).mean())
    file = RESULTS / "ovi_sweeps.json"
    result = json.loads(file.read_text()) if file.exists() else {"sweeps": {}}
    result |= {"machine": machine(), "prompts": options.prompts, "caption_picture_cosine": target}
    RESULTS.mkdir(exist_ok=True)

    def keep() -> None:
        file.write_text(json.dumps(result, indent=1) + "\n")

    for sweep in filter(None, options.sweeps.split(",")):
        paths = {
            name: follow(setting, rows, given.true_BE, options.steps, method) for name, method in SWEEPS[sweep].items()
        }
        result["sweeps"][sweep] = {
            name: {m: [round(float(v), 4) for v in getattr(path, f"{m}_TB").mean(1)[::5]] for m in MEASURES}
            for name, path in paths.items()
        }
        plot(f"OVI: {sweep}", paths, FIGURES / f"ovi_{sweep.replace(' ', '_')}.png")
        for name, path in paths.items():
            best = path.true_TB.mean(1)
            print(f"{sweep}: {name}: best {best.max():.4f} at {best.argmax()}, last {best[-1]:.4f}", flush=True)
        keep()
    if options.long:
        path = follow(setting, rows, given.true_BE, options.long, swept(compact=False))
        plot("OVI without constraint: the drift", {"P = 4": path}, FIGURES / "ovi_drift.png")
        result["stopping"] = judge(path, target)
        result["drift"] = {m: [round(float(v), 4) for v in getattr(path, f"{m}_TB").mean(1)[::5]] for m in MEASURES}
        for name, row in result["stopping"].items():
            print(
                f"{name}: {row['steps']:.1f} steps, true {row['true']:.4f} +- {row['half']:.4f}, text {row['text']:.3f}"
            )
        keep()


if __name__ == "__main__":
    main()
