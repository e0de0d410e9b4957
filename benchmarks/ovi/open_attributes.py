"""Why a conditional mean loses where a prompt leaves an attribute open: its length, or that it is an average?

For single objects of the miniature world, prompts that name the colour and prompts that leave it open, with true
pictures of each; the conditional mean by `linear`'s algebra on a bank of captioned pictures, as it is and at the length
of a picture's embedding, beside the mean of the true pictures and one of them. What is drawn is read by the oracle.

    OMP_NUM_THREADS=1 python -m benchmarks.ovi.open_attributes [--rows 2000] [--prompts 20] [--steps 20]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from torch.nn.functional import normalize

import micro
from benchmarks.ovi.setting import RESULTS, embed, interval, machine
from index import joint
from micro import world
from micro.oracle import Oracle, score
from stages.decode.settings import DecodeSettings, Decoding
from stages.decode.stage import DecodeEmbeddings
from stages.models import clip

TRUE = 16
"""Pictures of a prompt."""


def scenes(combination: world.Combination, colours: tuple[str, ...], seed: int) -> list[world.Scene]:
    """Pictures of one object, its colour one of these; place, size and background vary."""
    shape, _, texture = combination
    rng = np.random.default_rng(seed)
    return [world.compose(rng, [(shape, colours[n % len(colours)], texture)]) for n in range(TRUE)]


def chosen(count: int) -> list[world.Combination]:
    """Textured objects of every shape and colour, in a random order."""
    every = [one for one in world.combinations("frequent") if one[2] != "plain" and one[0] not in ("heart", "moon")]
    return [every[n] for n in np.random.default_rng(1).permutation(len(every))[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = str(micro.MODELS / "prior")
    texts, images = clip.TextEncoder(model), clip.ImageEncoder(model)
    bank_NE = embed(images, [world.sample_scene(n) for n in range(options.rows)])
    sums = joint.Accumulator(clip.text_width(model), bank_NE.shape[1])
    sums.add(texts([world.caption_of(n) for n in range(options.rows)]).numpy(), bank_NE)
    regression = joint.Fit.of(sums.pairs()).under()
    length = float(np.linalg.norm(bank_NE, axis=1).mean())
    settings = DecodeSettings(
        encoder=model, decode=Decoding(model=str(micro.MODELS / "decoder"), steps=options.steps)
    )  # fmt: skip
    draw, oracle = DecodeEmbeddings(settings, device="cpu"), Oracle.load()
    result: dict[str, object] = {"machine": machine(), **vars(options), "ridge": regression.ridge}
    for kind in ("named", "open"):
        combinations = chosen(options.prompts)
        prompts, asked, true = [], [], []
        for number, one in enumerate(combinations):
            words = f"{one[2]} {one[1]} {one[0]}" if kind == "named" else f"{one[2]} {one[0]}"
            prompts.append(f"a {words}")
            asked.append({"shape": one[0], "texture": one[2], **({"color": one[1]} if kind == "named" else {})})
            colours = (one[1],) if kind == "named" else tuple(world.COLORS)
            true.append(torch.from_numpy(embed(images, scenes(one, colours, number))).double())
        z_BE = regression(texts(prompts))
        true_BKE = torch.stack(true)
        mean_BE = true_BKE.mean(1)
        cosines_BK = torch.einsum("be,bke->bk", normalize(z_BE, dim=-1), normalize(true_BKE, dim=-1))
        told: dict[str, object] = {
            "length of linear, of a picture's": interval(z_BE.norm(dim=-1).numpy() / length),
            "length of the mean of true pictures": interval(mean_BE.norm(dim=-1).numpy() / length),
            "cosine of linear to that mean": interval(torch.cosine_similarity(z_BE, mean_BE).numpy()),
            "cosine of linear to a true picture": interval(cosines_BK.mean(1).numpy()),
            "cosine of two true pictures": interval(_alike(true_BKE)),
        }
        for name, given_BE in {
            "linear": z_BE,
            "linear, rescaled": normalize(z_BE, dim=-1) * length,
            "mean of true pictures": mean_BE,
            "that, rescaled": normalize(mean_BE, dim=-1) * length,
            "a true picture": true_BKE[:, 0],
        }.items():
            rows = [{"id": f"{kind}-{b}", "embedding": z_E.float().numpy()} for b, z_E in enumerate(given_BE)]
            drawn = {row["id"]: row["image"] for row in draw(rows)}
            readings = oracle.read([drawn[row["id"]] for row in rows])
            bound = [score(reading, [objects]).bound for reading, objects in zip(readings, asked, strict=True)]
            told[f"bound, {name}"] = interval(np.asarray(bound, float))
        result[f"colour {kind}"] = told
        (RESULTS / "open_attributes.json").write_text(json.dumps(result, indent=2) + "\n")
        print(kind, json.dumps(told, indent=2), flush=True)


def _alike(true_BKE: torch.Tensor) -> np.ndarray:
    u_BKE = normalize(true_BKE, dim=-1)
    count = u_BKE.shape[1]
    alike: np.ndarray = ((u_BKE.sum(1).square().sum(-1) - count) / (count * (count - 1))).numpy()
    return alike


if __name__ == "__main__":
    main()
