"""Pictures and what is asked of them, as a model's own processor lays them out. Loads no weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from stages.caption.settings import Captioning
from stages.models.clip import ModelError
from stages.models.copies import here

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "Describe this picture in one sentence."
"""Of models that chat."""
TASK = "<CAPTION>"
"""Of Florence-2."""
SIDE = 512
"""Of the grey picture that a processor is tried on."""


class Prompter:
    """A model's processor, told what to ask.

    Raises:
        ModelError: There is no such model, it makes no text of pictures, or its processor does without pictures, lacks
            a library or wants a question.
    """

    def __init__(self, settings: Captioning) -> None:
        from transformers import AutoConfig, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

        name = settings.model
        try:
            where, options = here(name), {"revision": settings.revision, "trust_remote_code": False}
            self.config = AutoConfig.from_pretrained(where, **options)
            if self.config.model_type not in KNOWN:
                raise ModelError(
                    f"{name}: a {self.config.model_type} does not say what a picture shows; name a model such as BLIP, "
                    "Florence-2, LLaVA, Qwen2-VL or SmolVLM"
                )
            # Pillow's arithmetic, whether or not torchvision is installed: captions must not depend on that.
            self.processor: Any = AutoProcessor.from_pretrained(where, backend="pil", **options)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"{name}: no model of pictures and text can be loaded: {_reason(error)}") from None
        if not hasattr(self.processor, "image_processor") or not hasattr(self.processor, "tokenizer"):
            raise ModelError(f"{name}: its processor is a {type(self.processor).__name__}, of pictures or text alone")
        self.tokenizer = self.processor.tokenizer
        if not self.config.is_encoder_decoder:  # the new tokens of all rows begin at one place
            self.tokenizer.padding_side = "left"
        self.question = settings.question or self._usual_question()
        self._tried(name)

    @property
    def chats(self) -> bool:
        return getattr(self.processor, "chat_template", None) is not None

    def _usual_question(self) -> str | None:
        if self.chats:
            return QUESTION
        return TASK if hasattr(self.processor, "task_prompts_without_inputs") else None

    def _tried(self, name: str) -> None:
        from PIL import Image

        try:
            self([Image.new("RGB", (SIDE, SIDE), "grey")])
        except Exception as error:  # whatever a processor says that is told too little
            advice = "" if self.question else "; it may want a `question`"
            raise ModelError(f"{name}: its processor does not take a picture so: {_reason(error)}{advice}") from None

    def __call__(self, pictures: list[Image]) -> Any:
        """What the model is given of a batch of RGB pictures."""
        options: dict[str, Any] = {"padding": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.chats:
                return self.processor.apply_chat_template(
                    [self._conversation(picture) for picture in pictures], add_generation_prompt=True, tokenize=True,
                    return_dict=True, return_tensors="pt", processor_kwargs=options,
                )  # fmt: skip
            text = {} if self.question is None else {"text": [self.question] * len(pictures), **options}
            return self.processor(images=pictures, return_tensors="pt", **text)

    def _conversation(self, picture: Image | None) -> list[dict[str, Any]]:
        shown = {"type": "image"} if picture is None else {"type": "image", "image": picture}
        return [{"role": "user", "content": [shown, {"type": "text", "text": self.question}]}]

    def text(self) -> str:
        """What stands beside the picture, with the marks of the model's chats; "" where nothing does."""
        if not self.chats:
            return self.question or ""
        told: str = self.processor.apply_chat_template(
            self._conversation(None), add_generation_prompt=True, tokenize=False
        )
        return told


def _reason(error: Exception) -> str:
    """A library's message in one line."""
    if "trust_remote_code" in str(error):
        return "its folder brings code, which is never run here; take its version in transformers' own layout"
    return " ".join(str(error).split())[:300] or type(error).__name__
