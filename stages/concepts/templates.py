"""Texts that the training pictures' prompts are put into, as textual inversion does: one is drawn for each picture of
each step, so that a word is learned as what the texts have in common, and not as the rest of a single sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

Named = Literal["object", "style"]

OBJECT = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip
"""For things: Gal et al., "An Image is Worth One Word" (2022), appendix; diffusers' ``examples/textual_inversion``."""

STYLE = tuple(
    f"{what} in the style of {{}}"
    for what in (
        "a painting", "a rendering", "a cropped painting", "the painting", "a clean painting", "a dirty painting",
        "a dark painting", "a picture", "a cool painting", "a close-up painting", "a bright painting",
        "a cropped painting", "a good painting", "a close-up painting", "a rendition", "a nice painting",
        "a small painting", "a weird painting", "a large painting",
    )
)  # fmt: skip
"""For styles, from the same places; two stand there twice, and are drawn twice as often."""

_LISTS = {"object": OBJECT, "style": STYLE}
_OPENING = re.compile(r"^\s*((an?|the)\s+)?((photo|picture|image)\s+of\s+)?((an?|the)\s+)?", re.IGNORECASE)


def checked(value: Any) -> Any:
    """What a job file says of templates, unless it will not do.

    Raises:
        ValueError: No list that there is, nor texts with one ``{}`` each.
    """
    if value is None or (isinstance(value, str) and value in _LISTS):
        return value
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"templates {value!r}: write object, style, or a list of texts with {{}} in each")
    for text in value:
        if not isinstance(text, str) or text.count("{}") != 1 or re.search("[{}]", text.replace("{}", "")):
            raise ValueError(
                f"templates: {text!r} must hold {{}} once, where the prompt goes, and no other braces, "
                "as 'a photo of a {}' does"
            )
    return tuple(value)


def texts(templates: Named | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The texts behind a setting; None where prompts stay as they are."""
    return _LISTS[templates] if isinstance(templates, str) else templates


def filled(prompt: str, templates: Sequence[str] | None) -> tuple[str, ...]:
    """The prompt in each text, without the opening that it brings itself: ``Photo of a red star`` is ``red star``
    there, since every text has "photo of a", or what stands for it, of its own. As it is where there are no texts.
    """
    if templates is None:
        return (prompt,)
    phrase = _OPENING.sub("", prompt)
    return tuple(text.replace("{}", phrase) for text in templates)
