"""A tiny prior, a reference made with it, and prompts with their text embeddings."""

import pytest

from index.reference import Reference
from stages.models import clip
from stages.ovi.context import Context
from tests.support.prompt_methods import PROMPTS
from tests.support.tiny_kandinsky import build_prior, build_reference


@pytest.fixture(scope="session")
def prior(tmp_path_factory):
    return build_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def context(prior, tmp_path_factory):
    text, image = clip.TextEncoder(prior), clip.ImageEncoder(prior)
    reference = Reference.open(
        build_reference(tmp_path_factory.mktemp("made"), prior), encoder=clip.identity(prior, "image")
    )
    return Context(
        model=prior, revision=None, device="cpu", seed=3, vision=lambda: image.model, text=text, reference=reference
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(context):
    text_BE = context.text(PROMPTS)
    return [
        {"id": f"p{i}", "prompt": p, "text": t.numpy()} for i, (p, t) in enumerate(zip(PROMPTS, text_BE, strict=True))
    ]
