"""Which files of a network's folder are read: the rules of `from_pretrained`, told before anything is read.

People have weights whole or in shards, as safetensors or as pickles, and in variants (``fp16``, ``ema``) beside the
plain files or without them. What is fingerprinted and what is loaded go by the same choice.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from stages.models.files import Files, LocalFiles, files_of

STEMS = {"safetensors": ("model", "diffusion_pytorch_model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}
"""How weight files begin: transformers' own way or diffusers', by their ending."""


class WeightsError(ValueError):
    """A network's weights are there, but not in a form that is read; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """What is read of a folder.

    Attributes:
        files: Names, shards in order.
        variant: Which of several sets they are; None: the plain one.
        pickled: They are pickles.
    """

    files: tuple[str, ...]
    variant: str | None
    pickled: bool

    @property
    def options(self) -> dict[str, Any]:
        """What makes `from_pretrained` read them."""
        return {"variant": self.variant, "use_safetensors": not self.pickled}


def weights_of(
    path: str,
    revision: str | None = None,
    subfolder: str = "",
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Weights:
    """The weights of a network.

    Args:
        path, revision, subfolder: See `stages.models.files.files_of`.
        variant: The one to take where it is there; else the plain files.
        allow_pickle: Read pickles where there is nothing else.

    Raises:
        FileNotFoundError: There is no network, or there are no weights.
        WeightsError: There are pickles alone and they are not allowed, or several variants and no plain files.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    return choose(files_of(path, revision, subfolder), where, variant, allow_pickle)


def choose(files: Files, where: str, variant: str | None, allow_pickle: bool) -> Weights:
    """See `weights_of`. Safetensors before pickles; the variant, then the plain files, then the only variant there."""
    sets = {suffix: _sets(files, suffix) for suffix in STEMS}
    if not any(sets.values()):
        raise FileNotFoundError(f"no weights in {where}: neither safetensors nor a .bin file")
    allowed = {suffix: found for suffix, found in sets.items() if suffix == "safetensors" or allow_pickle}
    for suffix, found in allowed.items():
        for of in dict.fromkeys((variant, None)):
            if of in found:
                return Weights(found[of], of, suffix == "bin")
    for suffix, found in allowed.items():
        if len(found) > 1:
            raise WeightsError(
                f"{where} holds its weights in several variants and no plain ones: say which with `variant`: "
                f"{', '.join(sorted(map(str, found)))}"
            )
        for of, names in found.items():
            return Weights(names, of, suffix == "bin")
    pickles = sets["bin"]
    names = pickles.get(variant) or pickles.get(None) or next(iter(pickles.values()))
    raise WeightsError(
        f"{where} holds its weights as pickles alone ({', '.join(names)}), and a pickle can run anything when it is "
        "read. "
        f"Convert them once:\n  {_conversion(files, where, names)}\nor set `allow_pickle: true`, if you trust its maker"
    )


def _sets(files: Files, suffix: str) -> dict[str | None, tuple[str, ...]]:
    """The sets of weight files with one ending: variant -> names."""
    found: dict[str | None, tuple[str, ...]] = {}
    for stem in STEMS[suffix]:
        whole: dict[str | None, list[str]] = {}
        shards: dict[str | None, list[str]] = {}
        for name in sorted(files.names):
            match = re.fullmatch(rf"{stem}(?:\.(\w+))?(-\d{{5}}-of-\d{{5}})?\.{suffix}", name)
            if match:
                (shards if match.group(2) else whole).setdefault(match.group(1), []).append(name)
        # Where there are both, transformers reads the whole file and diffusers the shards.
        for kind in (shards, whole) if stem.startswith("diffusion") else (whole, shards):
            for variant, there in kind.items():
                names = there if kind is whole else _shards(files, stem, suffix, variant, there)
                found.setdefault(variant, tuple(names))
    return found


def _shards(files: Files, stem: str, suffix: str, variant: str | None, there: list[str]) -> list[str]:
    """The shards that the index names: others may lie beside them, of a model that was saved there before."""
    names = [f"{stem}.{suffix}.index.json"]
    if variant is not None:
        names = [f"{stem}.{suffix}.index.{variant}.json", f"{stem}.{variant}.{suffix}.index.json"]
    index = next((name for name in names if name in files.names), None)
    if index is None or not isinstance(files, LocalFiles):
        return there
    return sorted(set(json.loads(files.text(index))["weight_map"].values()))


def _conversion(files: Files, where: str, names: tuple[str, ...]) -> str:
    """A command line that writes a folder's pickles as one safetensors file beside them."""
    folder = str(files.folder) if isinstance(files, LocalFiles) else where
    stem = names[0].partition(".")[0].partition("-")[0]
    target = f"{'model' if stem == 'pytorch_model' else stem}.safetensors"
    code = (
        "import torch, safetensors.torch as s; "
        f"s.save_file({{k: v.clone().contiguous() for f in {list(names)} "
        f"for k, v in torch.load('{folder}/' + f, weights_only=True).items()}}, "
        f"'{folder}/{target}', metadata={{'format': 'pt'}})"
    )
    return f"python -c {shlex.quote(code)}"
