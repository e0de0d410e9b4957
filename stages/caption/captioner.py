"""A model of transformers that says what pictures show, batched; what is drawn for a row is the row's own.

Legend: B rows, L tokens so far, N new tokens, V words of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stages.caption.prompts import SIDE, Prompter
from stages.caption.settings import CaptionSettings
from stages.engine.device import free_bytes
from stages.engine.randomness import row_generator
from stages.models.clip import Place, load_weights
from stages.models.copies import here
from stages.models.memory import power_of_two, rows_in

if TYPE_CHECKING:
    from PIL.Image import Image

CPU_BATCH = 8
LIKELIEST = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": None, "top_p": None, "top_k": None,
    "forced_eos_token_id": None,
}  # fmt: skip
"""`generate` told to take the likeliest token of those that `Choice` leaves it, whatever the model's folder says. A
forced end (Florence-2's folders ask for one) would make a caption that was cut look whole."""


class PictureRefused(ValueError):
    """A model's processor does not take a picture; of a batch it does not say which."""


@dataclass(frozen=True)
class Caption:
    """Of a picture.

    Attributes:
        text: Without marks and surrounding space.
        tokens: As many were made, the closing one not counted.
        truncated: It came to no end within the limit.
        finite: No score that it was chosen by was NaN.
    """

    text: str
    tokens: int
    truncated: bool
    finite: bool


class Choice:
    """A processor of logits that sees where the new tokens begin, and leaves of each row's scores the token that the
    row's own numbers pick.

    The token is the first at which the probabilities, in float64 and in the vocabulary's order, add up to more than
    the row's number (inversion of the distribution function). So it depends on nothing but the row.

    Args:
        u_BN: Uniform numbers, float64; None: the scores are left as they are.
        temperature: Of the probabilities.
        top_p: See `stages.caption.settings.Captioning.top_p`.

    Attributes:
        start: Tokens before the first new one.
        nan_BN: Of each new token, for each row, whether it was chosen by scores that are no numbers.
    """

    def __init__(self, u_BN: torch.Tensor | None, temperature: float = 1.0, top_p: float | None = None) -> None:
        from transformers import TopPLogitsWarper

        self.u_BN, self.temperature = u_BN, temperature
        self.nucleus = None if top_p is None else TopPLogitsWarper(top_p)
        self.start: int | None = None
        self.nan_BN: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        self.nan_BN.append(scores.isnan().any(-1))
        if self.u_BN is None:
            return scores
        drawn_BV = scores / self.temperature
        if self.nucleus is not None:
            drawn_BV = self.nucleus(input_ids, drawn_BV)
        u_B1 = self.u_BN[:, input_ids.shape[1] - self.start, None].to(scores.device)
        below_BV = drawn_BV.double().softmax(-1).cumsum(-1)
        chosen_B1 = (below_BV <= u_B1 * below_BV[:, -1:]).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B1, 0.0)


class Captioner:
    """Pictures to captions.

    Args:
        settings: Model, question, and how tokens are chosen.
        device: Where it runs.

    Raises:
        ModelError: See `stages.caption.prompts.Prompter`; weights are missing.
    """

    def __init__(self, settings: CaptionSettings, device: str) -> None:
        from transformers import AutoModelForImageTextToText

        self.settings, self.device, self.dtype = settings, device, getattr(torch, settings.dtype)
        self.prompter = Prompter(settings)
        place = Place(here(settings.model), settings.revision)
        model = load_weights(
            AutoModelForImageTextToText, place, settings.allow_pickle, dtype=self.dtype, trust_remote_code=False
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.ends = torch.tensor(sorted(_ends(self.model)), dtype=torch.int64)
        self.batch = settings.batch_size or self._fitting_batch()

    @torch.inference_mode()
    def captions(self, pictures: list[Image], keys: list[str]) -> list[Caption]:
        """One for each RGB picture; all that is random about row b is drawn from (seed, keys[b]).

        Raises:
            PictureRefused: The processor does not take one of them.
        """
        settings = self.settings
        try:
            given = self.prompter(pictures)
        except Exception as error:  # whatever a processor says of a picture's shape
            raise PictureRefused(" ".join(str(error).split())[:300]) from None
        choice = Choice(self._numbers(keys), settings.temperature or 1.0, settings.top_p)
        ids_BN = self._generate(given, choice)
        nan_BN = torch.stack(choice.nan_BN, 1).cpu()
        return [self._caption(ids_N, nan_N) for ids_N, nan_N in zip(ids_BN, nan_BN, strict=True)]

    def _numbers(self, keys: list[str]) -> torch.Tensor | None:
        if self.settings.temperature is None:
            return None
        count = self.settings.max_tokens
        drawn = [
            torch.rand(count, dtype=torch.float64, generator=row_generator(self.settings.seed, key, "caption"))
            for key in keys
        ]
        return torch.stack(drawn)

    def _generate(self, given: Any, choice: Choice, **options: Any) -> torch.Tensor:
        """The new tokens (B, N), on the CPU."""
        given = given.to(self.device, self.dtype)
        ids_BL = self.model.generate(
            **given, max_new_tokens=self.settings.max_tokens, logits_processor=[choice], **LIKELIEST, **options
        )
        new: torch.Tensor = ids_BL[:, choice.start :].cpu()
        return new

    def _caption(self, ids_N: torch.Tensor, nan_N: torch.Tensor) -> Caption:
        ended = torch.isin(ids_N, self.ends).nonzero().flatten().tolist()
        tokens = ended[0] if ended else len(ids_N)
        text = self.prompter.tokenizer.decode(ids_N[:tokens], skip_special_tokens=True).strip()
        return Caption(text, tokens, not ended, not bool(nan_N[: tokens + 1].any()))

    @torch.inference_mode()
    def _fitting_batch(self) -> int:
        """By the free memory of a GPU: what a picture costs is the difference of two and of one, with all tokens."""
        from PIL import Image

        if not self.device.startswith("cuda"):
            return CPU_BATCH
        full = {"min_new_tokens": self.settings.max_tokens}
        grey = Image.new("RGB", (2 * SIDE, 2 * SIDE), "grey")

        def peak(rows: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._generate(self.prompter([grey] * rows), Choice(None), **full)
            return torch.cuda.max_memory_allocated()

        each = max(1, peak(2) - peak(1))
        return power_of_two(rows_in(free_bytes(torch.device(self.device)) or 0, each))


def _ends(model: Any) -> set[int]:
    """Tokens that close a caption: those that the model's folder names, and BLIP's, which says them elsewhere."""
    told = model.generation_config.eos_token_id
    found = set(told) if isinstance(told, (list, tuple)) else {told}
    found.add(getattr(model.config.get_text_config(), "sep_token_id", None))
    return {int(token) for token in found if token is not None}
