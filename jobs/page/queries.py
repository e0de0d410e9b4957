"""What a reference is searched with: its own encoders, checked to be the same weights as when it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from index.reference import Reference
    from stages.models import clip


def encoder(reference: Reference, role: Literal["text", "image"]) -> clip.TextEncoder | clip.ImageEncoder:
    """The reference's encoder of texts or of pictures: takes a list of them, gives embeddings (B, E).

    Raises:
        ValueError: There is none, or it has changed.
    """
    from transformers.utils import logging

    from index.reference import require_encoder
    from stages.models import clip

    logging.disable_progress_bar()  # of loading weights, which takes a moment
    key = "encoder" if role == "image" else "text_encoder"
    made_with = reference.facts[key]
    if made_with is None:
        raise ValueError(
            f"{reference.path}: no {role} encoder belongs to this reference, so it cannot be searched by {role}; "
            f"make it again with `{key}:` set"
        )
    place, revision = made_with["path"], made_with["revision"] or None
    # Whoever made the reference has allowed them, where they are pickles: the weights must be the same as then.
    require_encoder(reference.path, made_with, clip.identity(place, role, revision, allow_pickle=True))
    return (clip.ImageEncoder if role == "image" else clip.TextEncoder)(place, revision, allow_pickle=True)
