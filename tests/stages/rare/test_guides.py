"""Rules of drawing by more than a prompt, each against a plain loop over diffusers' own networks and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.models.families import open_latent_model
from stages.models.latent import LatentModel
from stages.models.sampler import sample
from stages.models.settings import SamplingSettings
from stages.rare.guides import Texts, anchor_steps, blend_weight, check_guide, drawn_by, lacks, read_texts
from stages.rare.settings import AapbGuide, ComposeGuide, Guide, PlainGuide, R2fGuide
from tests.support import tiny_flows, tiny_stable_diffusion

STEPS, W = 5, 3.0
PROMPT, ANCHOR = "a blue heart", "a blue circle"
TEXTS = [Texts(PROMPT, ANCHOR), Texts("a red star", "a star")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_stable_diffusion.build(tmp_path_factory.mktemp("guided"))


@pytest.fixture(scope="module")
def model(folder: str) -> LatentModel:
    return open_latent_model(SamplingSettings(model=folder, device="cpu"))


def noise(model: LatentModel, rows: int) -> torch.Tensor:
    return torch.randn((rows, *model.geometry.latent_shape), generator=torch.Generator().manual_seed(7))


def drawn(model: LatentModel, guide: Guide, texts: list[Texts], guidance: float = W, **more) -> torch.Tensor:
    with torch.no_grad():
        predict, told = drawn_by(guide, model, texts, guidance=guidance, steps=STEPS, **more)
        return sample(predict, model.schedule(STEPS), noise(model, len(texts)), told)


Blend = Callable[[int, Callable[[str], torch.Tensor]], torch.Tensor]


def plain_loop(folder: str, z: torch.Tensor, guided: Blend) -> torch.Tensor:
    """One picture by diffusers' DDIM; `guided` makes the noise of step n (0: the first) of a text's noise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for n, t in enumerate(scheduler.timesteps):

            def eps(text: str, z: torch.Tensor = z, t: torch.Tensor = t) -> torch.Tensor:
                ids = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
                return pipe.unet(z, t, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample

            z = scheduler.step(guided(n, eps), int(t), z, eta=0.0).prev_sample
    return z


def cfg(null: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return null + W * (own - null)


def closed_form(null: torch.Tensor, text: torch.Tensor, anchor: torch.Tensor, w: float) -> float:
    """g in float64, by least squares: the one whose guided score is nearest to the text's own."""
    s_0, s_T, s_A = (one.double().flatten().numpy() for one in (null, text, anchor))
    fixed, moving = s_0 + w * (s_T - s_0), w * (s_A - s_T)
    (g,), *_ = np.linalg.lstsq(moving[:, None], s_T - fixed, rcond=None)
    return float(g)


def r2f(n: int, eps) -> torch.Tensor:
    return cfg(eps(""), eps(ANCHOR if n in (0, 2) else PROMPT))


def aapb(n: int, eps) -> torch.Tensor:
    null, text, anchor = eps(""), eps(PROMPT), eps(ANCHOR)
    g = closed_form(null, text, anchor, W)
    return cfg(null, (1 - g) * text + g * anchor)


def fixed(n: int, eps) -> torch.Tensor:
    return cfg(eps(""), 0.7 * eps(PROMPT) + 0.3 * eps(ANCHOR))


def composed(n: int, eps) -> torch.Tensor:
    null = eps("")
    return null + W * (0.5 * (eps("a heart") - null) + 0.5 * (eps("blue") - null))


def contrasted(n: int, eps) -> torch.Tensor:
    null = eps("ugly")
    return null + W * (eps(PROMPT) - null + 0.5 * (eps("a blue ring") - eps("a ring")) + 0.5 * (eps("a heart") - null))


PARTS = Texts(PROMPT, parts=(("a heart", None), ("blue", None)))
CONTRASTS = Texts(PROMPT, parts=(("a blue ring", "a ring"), ("a heart", None)))


@pytest.mark.parametrize(
    ("guide", "texts", "loop", "negative"),
    [
        (PlainGuide(), TEXTS[0], lambda n, eps: cfg(eps(""), eps(PROMPT)), None),
        (R2fGuide(until=0.6), TEXTS[0], r2f, None),
        (AapbGuide(), TEXTS[0], aapb, None),
        (AapbGuide(g=0.3), TEXTS[0], fixed, None),
        (ComposeGuide(whole=0, weight=0.5), PARTS, composed, None),
        (ComposeGuide(weight=0.5), CONTRASTS, contrasted, "ugly"),
    ],
    ids=["plain", "r2f", "aapb", "aapb-fixed", "compose", "compose-contrast"],
)
def test_each_guide_is_its_plain_loop(folder: str, model, guide: Guide, texts: Texts, loop: Blend, negative) -> None:
    made = drawn(model, guide, [texts], negative=negative)
    torch.testing.assert_close(made, plain_loop(folder, noise(model, 1), loop), rtol=1e-4, atol=1e-4)
    if not isinstance(guide, PlainGuide):
        assert (made - drawn(model, PlainGuide(), [texts], negative=negative)).abs().max() > 1e-3


@pytest.mark.parametrize("guide", [R2fGuide(), AapbGuide(), AapbGuide(g=0.3)])
def test_a_row_does_not_depend_on_the_rows_beside_it(model, guide: Guide) -> None:
    together = drawn(model, guide, TEXTS)
    torch.testing.assert_close(together[:1], drawn(model, guide, TEXTS[:1]), rtol=1e-4, atol=1e-4)


def test_the_anchor_is_shown_in_turn_and_then_no_more() -> None:
    assert anchor_steps(10, 0.5, 2) == {9, 7, 5}
    assert anchor_steps(10, 0.4, 1) == {9, 8, 7, 6}
    assert anchor_steps(10, 1.0, 3) == {9, 6, 3, 0}
    assert anchor_steps(4, 0.1, 2) == frozenset()


def test_the_closed_form_leaves_the_prompt_s_score_nearest_and_is_zero_where_texts_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    null, text, anchor = torch.randn((3, 4, 2, 3, 3), generator=generator)
    anchor[3] = text[3]
    g = blend_weight(null, text, anchor, 7.5)
    assert g[:3].tolist() == pytest.approx([closed_form(null[i], text[i], anchor[i], 7.5) for i in range(3)], rel=1e-4)
    assert g[3] == 0


@pytest.mark.parametrize("kind", ["flux-dev", "sd35-medium", "qwen-image"])
def test_guides_on_rectified_flows(tmp_path: Path, kind: str) -> None:
    """Euler's steps over the velocities of each text, one at a time; Qwen's are rescaled after guidance."""
    model = open_latent_model(SamplingSettings(model=tiny_flows.build(tmp_path, kind), device="cpu"))
    told = model.geometry.guiding == "told"
    guide: Guide = AapbGuide(g=0.3) if told else AapbGuide()
    sigmas = [0.0, *model.schedule(STEPS).sigma_S.tolist()]
    z = noise(model, 1)
    every = model.condition([PROMPT, ANCHOR, ""])
    with torch.no_grad():
        for n in range(STEPS, 0, -1):

            def v(row: int, z: torch.Tensor = z, t: float = 1000 * sigmas[n]) -> torch.Tensor:
                own = {name: value[row : row + 1] for name, value in every.items()}
                return model.predictor(W if told else 1.0)(z, torch.tensor([t]), own)

            text, anchor = v(0), v(1)
            g = 0.3 if told else closed_form(v(2), text, anchor, W)
            blend = (1 - g) * text + g * anchor
            step = blend if told else cfg(v(2), blend)
            if kind == "qwen-image":
                step = rescaled_by_token(step, blend)
            z = z + (sigmas[n - 1] - sigmas[n]) * step
    torch.testing.assert_close(drawn(model, guide, TEXTS[:1]), z, rtol=1e-3, atol=1e-3)


def rescaled_by_token(step: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Each 2x2 patch as long as under the text."""
    step, patches = step.clone(), range(0, step.shape[-1], 2)
    for y in patches:
        for x in patches:
            own, wanted = step[..., y : y + 2, x : x + 2], text[..., y : y + 2, x : x + 2]
            step[..., y : y + 2, x : x + 2] = own * wanted.norm() / own.norm()
    return step


def test_what_a_guide_lacks_is_said_in_one_sentence(model, tmp_path: Path) -> None:
    bare = Texts(PROMPT)
    assert lacks(PlainGuide(), bare) is None
    assert lacks(R2fGuide(), TEXTS[0]) is None
    assert "column 'anchor'" in str(lacks(AapbGuide(), bare))
    assert "anchor is the prompt itself" in str(lacks(R2fGuide(), Texts(PROMPT, PROMPT)))
    assert "column 'parts'" in str(lacks(ComposeGuide(), bare))
    assert read_texts("x", {"prompt": PROMPT, "parts": '["a", ["b", "c"]]'}).parts == (("a", None), ("b", "c"))
    with pytest.raises(ValueError, match=r"concept x: the column 'parts' holds 3; write a text, or a pair"):
        read_texts("x", {"prompt": PROMPT, "parts": [3]})
    check_guide(AapbGuide(), model.geometry, W)
    with pytest.raises(ValueError, match="guides: aapb: guidance 1 leaves the negative prompt out"):
        check_guide(AapbGuide(), model.geometry, 1.0)
    flux = open_latent_model(SamplingSettings(model=tiny_flows.build(tmp_path, "flux-dev"), device="cpu")).geometry
    for guide in (AapbGuide(), ComposeGuide()):
        with pytest.raises(ValueError, match=r"guides: .* is not guided by a negative prompt"):
            check_guide(guide, flux, W)
    check_guide(AapbGuide(g=0.3), flux, W)
    check_guide(R2fGuide(), flux, W)
