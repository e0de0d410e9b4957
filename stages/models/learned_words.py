"""Words that prompts may hold beside the model's own: textual inversions (Gal et al., 2022), as `learn-concepts` and
diffusers' script write them, in files that a model's tokenizers and text encoders take in when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.access import filesystem as filesystem_of
from stages.models.copies import brought, here
from stages.models.files import sha256
from stages.models.fingerprint import digest

FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""How a word's file may be called, of which the first is read; what is called otherwise is an output."""


class LearnedWord(NamedTuple):
    """A word in a file: how it stands in a prompt, and which text encoder of the pipeline knows it (0: the first)."""

    path: str
    token: str
    encoder: int

    @property
    def file(self) -> Path:
        """Its file on this machine."""
        return Path(here(self.path))

    def mark(self) -> str:
        """What tells it from any other."""
        return sha256(self.file)

    def usage(self, target: str) -> str:
        """Lines of Python that give it to a `pipe` of diffusers.

        Args:
            target: What they call the copy of one at an address.
        """
        fetched, path = brought(self.path, target)
        return "\n".join([*fetched, f'pipe.load_textual_inversion("{path}"{_of(self.encoder)})'])


def _of(encoder: int) -> str:
    """Arguments that name another text encoder than the first."""
    number = f"_{encoder + 1}"
    return f", text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}" if encoder else ""


def learned_words(paths: Sequence[str], model: str, widths: Sequence[int]) -> tuple[LearnedWord, ...]:
    """The words in files, each for the text encoder whose width its vector has.

    Args:
        paths: Of files, and of outputs of `learn-concepts`, which stand for all the words in them.
        model: Whose words they are to be, for errors.
        widths: Of a word in each of its text encoders.

    Raises:
        ValueError: A file or output is not there, holds no single word of one vector, is of another model or names a
            word twice; or a word is not there for each of the text encoders.
    """
    words = [_read(file, model, widths) for path in paths for file in _files(path)]
    for word in words:
        known = [other.encoder for other in words if other.token == word.token]
        if len(known) > len(set(known)):
            raise ValueError(f"words: {word.token} stands in two files; leave out {word.path!r} or the other")
        if len(known) < len(widths):
            raise ValueError(
                f"words: {word.token} is there for {len(known)} of the {len(widths)} text encoders of model {model!r}: "
                "name its other file too (learned_embeds.safetensors and learned_embeds_2.safetensors)"
            )
    return tuple(words)


def fingerprints_with(words: Sequence[LearnedWord], encoders: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints of text encoders that know words.

    Args:
        encoders: Text encoder -> fingerprint, without words.
    """
    found = dict(encoders)
    for number, part in enumerate(sorted(encoders)):
        if marks := [word.mark() for word in words if word.encoder == number]:
            found[part] = digest([found[part], marks])
    return found


def check_learned_with(paths: Sequence[str], model: str, widths: Sequence[int], encoders: Mapping[str, str]) -> None:
    """Refuse outputs of `learn-concepts` whose words were learnt with other text encoders: their vectors mean nothing
    in this one, though they may be as wide. A run that had words of its own in its prompts knew this encoder with them.

    Args:
        paths: As `learned_words` takes them; a file says nothing of its model.
        model: Whose words they are to be, for errors.
        widths: Of a word in each of its text encoders.
        encoders: These -> fingerprint, without words.

    Raises:
        ValueError: There is one, or it cannot be told.
    """
    import pyarrow.dataset as ds

    for path in paths:
        if not _is_output(path):
            continue
        filesystem, root = filesystem_of(path)
        data = ds.dataset(f"{root.rstrip('/')}/data", format="parquet", filesystem=filesystem)
        note = json.loads((data.schema.metadata or {}).get(b"latentmill", b"{}"))
        learnt = {part: found.get("fingerprint") for part, found in note.get("models", {}).items() if part in encoders}
        config = note.get("config", {})
        try:
            beside = [_read(file, model, widths) for own in config.get("words") or () for file in _files(own)]
        except ValueError as error:
            raise ValueError(
                f"words: those of {path} were learnt beside others, without which it cannot be told whether that was "
                f"with the text encoder of {model!r} ({error}): put these back, or learn them anew"
            ) from None
        if learnt != fingerprints_with(beside, encoders):
            name = config.get("model", "another model")
            raise ValueError(
                f"words: those of {path} were learnt with {name!r}, whose text encoder is not that of {model!r}: "
                "learn them with this model"
            )


def _is_output(path: str) -> bool:
    return not path.endswith(FILES)


def _files(path: str) -> list[str]:
    """The file, or those of a finished output's words in the order of their names."""
    if not _is_output(path):
        return [path]
    filesystem, root = filesystem_of(path)
    root = root.rstrip("/")
    if not filesystem.exists(f"{root}/_SUCCESS"):
        raise ValueError(f"words: {path} is no finished output of a learn-concepts run (no _SUCCESS in it)")
    found = sorted(filesystem.glob(f"{root}/concepts/*/*/learned_embeds*.safetensors"))
    if not found:
        raise ValueError(f"words: there are no words in {path}: no concept of that run was learnt")
    return [f"{path.rstrip('/')}/concepts/{'/'.join(file.split('/')[-3:])}" for file in found]


def _read(path: str, model: str, widths: Sequence[int]) -> LearnedWord:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(here(path), "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"words: {path!r} is no safetensors file that can be read: {error}") from None
    token, shape = next(iter(shapes.items()), ("", ()))
    if len(shapes) != 1 or len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise ValueError(f"words: {path!r} holds {shapes or 'nothing'}; one word of one vector is what is read")
    if shape[-1] not in widths:
        raise ValueError(
            f"words: {token} in {path!r} is {shape[-1]} wide and of another model; in {model!r} words are "
            f"{' and '.join(map(str, widths))} wide"
        )
    return LearnedWord(path, token, list(widths).index(shape[-1]))


def add_word(pipeline: Any, word: LearnedWord) -> None:
    """Give a pipeline the word.

    Raises:
        ValueError: Its tokenizer has that word already.
    """
    from safetensors.torch import load_file

    number = f"_{word.encoder + 1}" if word.encoder else ""
    try:
        pipeline.load_textual_inversion(
            load_file(word.file), text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"words: {word.token} in {word.path!r} cannot be taken in: {error}") from None
