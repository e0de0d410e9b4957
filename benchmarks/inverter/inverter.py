"""The latent inversion module on the miniature world: does a picture give back the text latent it was drawn from?

    python -m benchmarks.inverter.inverter [--prompts 4000] [--steps 5000]

Pictures are drawn by the frozen model from world captions that name every attribute, the inverter is trained on most of
them. On the held-out ones: error and cosine of the text latent beside the mean latent; attributes that the oracle finds
again in pictures drawn from the inverted latent; PSNR of DDIM inversion and regeneration without a caption, under the
inverted latent and under the empty prompt; and on concepts, the steps that a warm start saves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.concepts.ablation import MODEL, targets, training_row
from micro import world
from micro.oracle import Oracle
from stages.concepts.draws import draw as draw_step
from stages.concepts.prepare import prepare
from stages.concepts.problem import LegoProblem
from stages.concepts.settings import LegoSettings, Templates
from stages.engine.randomness import row_generator
from stages.inverter.model import InverterShape
from stages.inverter.settings import Training
from stages.inverter.training import Pairs, split, text_conditions, train_inverter
from stages.inverter.warm_start import warm_start
from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.pictures import encode_pictures, to_picture
from stages.models.sampler import sample
from stages.models.settings import LatentModelSettings

RESULTS = Path(__file__).parent / "results"


def draw(model: LatentModel, text_BTK: torch.Tensor, ids: list[str], steps: int, guidance: float) -> torch.Tensor:
    """z_0 of pictures drawn under text latents, each from noise of its own."""
    empty = text_conditions(model, [""])[0]
    parts = []
    for at in range(0, len(ids), 50):
        some = text_BTK[at : at + 50]
        condition = {"text_BLE": some, "null_text_BLE": empty.expand(len(some), -1, -1)}
        generators = [row_generator(0, i, "picture") for i in ids[at : at + 50]]
        parts.append(model.draw(condition, steps=steps, guidance=guidance, generators=generators))
    return torch.cat(parts)


@torch.no_grad()
def round_trip(model: LatentModel, z_BCHW: torch.Tensor, text_BTK: torch.Tensor, steps: int) -> torch.Tensor:
    """DDIM inversion to noise and DDIM sampling back, both under the same text latent, without guidance."""
    schedule, predict = model.schedule(steps), model.predictor()
    z, condition = z_BCHW, {"text_BLE": text_BTK}
    for k in range(steps):
        step = schedule.at(torch.full((len(z),), k))
        z = step.explicit(z, predict(z, step.t_B, condition))
    return sample(predict, schedule, z, condition)


def psnr(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> list[float]:
    """dB of pictures in [-1, 1]."""
    error = (a_BCHW.clamp(-1, 1) - b_BCHW.clamp(-1, 1)).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).tolist()


def kept(oracle: Oracle, before: list[Any], after: list[Any]) -> dict[str, Any]:
    """Share of single-object pictures whose object is found again with its attribute (before: what the oracle saw)."""
    first, second = oracle.read(before), oracle.read(after)
    pairs = [(a.things[0], b.things) for a, b in zip(first, second, strict=True) if len(a.things) == 1]
    shares = {f: float(np.mean([any(getattr(t, f) == getattr(a, f) for t in b) for a, b in pairs])) for f in
              ("color", "shape", "texture", "size")}  # fmt: skip
    return shares | {"pictures": len(pairs)}


@torch.no_grad()
def steady_loss(problem: LegoProblem, draws: int) -> float:
    """Noise-prediction loss of all concepts on pictures, timesteps and noise that never change."""
    losses = []
    filled = [b for b, slot in enumerate(problem.held) if slot is not None]
    for number in range(draws):
        drawn = [
            draw_step(
                problem.settings, 1, slot.row["id"], number, slot.prepared.with_I, problem.latent_shape,
                problem.loss.timesteps,
            )
            for slot in problem.held
            if slot is not None
        ]  # fmt: skip
        losses.append(problem.losses(filled, drawn)[0][filled].mean())
    return float(torch.stack(losses).mean())


def warm_starts(
    model: LatentModel, inverter: Any, concepts: int, steps: int, every: int = 10, draws: int = 16
) -> dict[str, Any]:
    """Loss of concepts learned from an unrelated word and from the inverter's start, the same noise for both."""
    settings = LegoSettings(steps=steps, window=steps, lr=6e-3, context="none")
    kinds = targets()
    rows = [training_row(kinds[n % len(kinds)], n // len(kinds), 4) for n in range(concepts)]
    curves: dict[str, list[float]] = {}
    for name in ("unrelated word", "inverter"):
        problem = LegoProblem(model, settings, slots=concepts, max_words=3, seed=0)
        ready = []
        for row in rows:
            prepared = prepare(row, model, settings, Templates(), max_words=3, root="")
            if name == "inverter":
                start_VE = warm_start(
                    problem.encoders, inverter, *prepared.as_they_are(), prepared.start_VE, steps=100, lr=settings.lr
                )
                prepared = replace(prepared, start_VE=start_VE)
            ready.append({**row, "prepared": prepared})
        problem.load(range(concepts), ready)
        curves[name] = [steady_loss(problem, draws)]
        for step in range(1, steps + 1):
            problem.step()
            if step % every == 0:
                curves[name].append(steady_loss(problem, draws))
    reached = [n for n, loss in enumerate(curves["inverter"]) if loss <= curves["unrelated word"][-1]]
    return {
        "steps between two points": every,
        "curves": curves,
        "steps_to_the_cold_start_s_last_loss": reached[0] * every if reached else None,
        "cold_steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder; left out: the shipped miniature")
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--concepts", type=int, default=6)
    parser.add_argument("--concept-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, oracle = open_latent_model(LatentModelSettings(model=options.model or MODEL, device="cpu")), Oracle.load()
    began = time.process_time()
    prompts = [world.caption_of(n, "heldout", detail="full") for n in range(options.prompts)]
    text = torch.cat([text_conditions(model, prompts[at : at + 100])[0] for at in range(0, len(prompts), 100)])
    with torch.no_grad():
        z = draw(model, text, [str(n) for n in range(len(prompts))], options.sampling_steps, options.guidance)
        pictures = [to_picture(x) for at in range(0, len(z), 100) for x in model.decode(z[at : at + 100])]
    encoded = encode_pictures(model, pictures)
    drawn = time.process_time()
    share = options.held_out / options.prompts
    settings = Training(steps=options.steps, batch_size=32, lr=1e-3, noise_rows=2, held_out=share)
    latent = (int(z.shape[1]), int(z.shape[2]), int(z.shape[3]))
    shape = InverterShape(latent=latent, text=(text.shape[1], text.shape[2]), patch=2, width=128, layers=4, heads=4)
    pairs = Pairs(encoded.numpy().astype(np.float16), prompts)
    inverter, measures = train_inverter(model, pairs, shape, settings, seed=0, report=print)
    trained = time.process_time()
    held = split(len(prompts), share, 0)[1]
    with torch.no_grad():
        inverted, _ = inverter(encoded[held])
        mean = inverter.mean_TK.expand_as(inverted).contiguous()
        ids = [f"again {n}" for n in held]
        again = {}
        for name, latent_text in (("inverted latent", inverted), ("true latent", text[held]), ("mean latent", mean)):
            z_again = draw(model, latent_text, ids, options.sampling_steps, options.guidance)
            drawn_again = [to_picture(x) for x in model.decode(z_again)]
            again[name] = kept(oracle, [pictures[n] for n in held], drawn_again)
        some = encoded[held[:32]]
        decoded = model.decode(some)
        empty = text_conditions(model, [""])[0].expand(len(some), -1, -1)
        free = {
            name: float(np.mean(psnr(model.decode(round_trip(model, some, condition, 20)), decoded)))
            for name, condition in (
                ("inverted latent", inverted[:32]),
                ("empty prompt", empty),
                ("caption", text[held[:32]]),
            )
        }
    found = {
        "settings": {k: str(v) for k, v in vars(options).items()},
        "measures": measures,
        "attributes_found_again": again,
        "psnr_without_caption": free,
        "warm_start": warm_starts(model, inverter, options.concepts, options.concept_steps),
        "cpu_seconds": {"drawing": drawn - began, "training": trained - drawn, "rest": time.process_time() - trained},
        "load_average": os.getloadavg(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "inverter.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
