"""Networks with quantised weights, by diffusers' and transformers' own quantisers: which part of a model has which."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

import torch

METHODS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""Methods that work out of a plain configuration -> the library that does it."""

Configs = Mapping[str, Mapping[str, Any]]
"""Part -> its `quantization_config`, as it stands in the configuration of a network that was saved quantised."""


def check_quantization(
    configs: Configs | None, model: str, parts: Collection[str], encoders: Collection[str], device: str, one_file: bool
) -> None:
    """Refuse what cannot be quantised so, or not here.

    Args:
        parts: The model's networks.
        encoders: Those that are networks of transformers.
        device: Where they are to run.
        one_file: It is a checkpoint of one file.

    Raises:
        ValueError: A part that is not there or stays as it is, a method that is not known, a library that is missing,
            a device that the method does not run on, a configuration that diffusers does not read.
    """
    if configs and one_file:
        raise ValueError(
            f"quantization_config: model {model!r} is one file, whose networks are not quantised while they are read; "
            "take its folder or hub id"
        )
    for part, config in (configs or {}).items():
        known = [name for name in parts if name != "vae"]  # its rounding would bound every picture
        if part not in known:
            raise ValueError(
                f"quantization_config: model {model!r} has no {part!r} that can be quantised; it has {', '.join(known)}"
            )
        method = method_of(config)
        if method not in METHODS:
            raise ValueError(
                f"quantization_config: {part} names no method that is known here: give quant_method (one of "
                f"{', '.join(METHODS)}), or load_in_4bit or load_in_8bit: true"
            )
        if not installed(METHODS[method]):
            raise ValueError(
                f"quantization_config: {part} asks for {method}, which is not installed: pip install {METHODS[method]}"
            )
        first = "cuda" if device == "auto" else device.split(",")[0]
        if method == "bitsandbytes" and torch.device(first).type == "cpu":
            raise ValueError(
                f"quantization_config: {part} asks for bitsandbytes, which diffusers runs on GPUs alone; "
                "leave out `device: cpu`, or take quant_method: torchao"
            )
        try:
            loading(configs, part, by_transformers=part in encoders)
        except Exception as why:  # whatever a configuration's class does with what it did not expect
            said = " ".join(str(why).split()) or type(why).__name__
            raise ValueError(f"quantization_config: {part}: {method} does not take this configuration: {said}") from why


def method_of(config: Mapping[str, Any]) -> str:
    """What quantises; "" where it does not say so."""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return str(config.get("quant_method") or "")


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def loading(configs: Configs | None, part: str, *, by_transformers: bool) -> dict[str, Any]:
    """What `from_pretrained` of a part is told; nothing where it is not quantised.

    Args:
        by_transformers: The network is one of transformers, whose configurations are classes of its own.
    """
    config = dict((configs or {}).get(part) or {})
    if not config:
        return {}
    config.setdefault("quant_method", method_of(config))
    if by_transformers:
        from transformers.quantizers.auto import AutoQuantizationConfig

        return {"quantization_config": AutoQuantizationConfig.from_dict(config)}
    from diffusers.quantizers import DiffusersAutoQuantizer

    return {"quantization_config": DiffusersAutoQuantizer.from_dict(config)}


def place(network: Any, device: str) -> None:
    """Bring a network to the device. Some quantised ones are read onto a GPU, and may not be told to go anywhere."""
    if network.device.type != torch.device(device).type:
        network.to(device)


def lines(configs: Configs | None, encoders: Collection[str]) -> tuple[list[str], str]:
    """Lines of Python before a pipeline is loaded, and the argument that quantises it as here.

    Args:
        encoders: Parts that are networks of transformers.
    """
    if not configs:
        return [], ""
    code = ["from diffusers.quantizers import DiffusersAutoQuantizer, PipelineQuantizationConfig"]
    if set(configs) & set(encoders):
        code.append("from transformers.quantizers.auto import AutoQuantizationConfig")
    made = []
    for part, config in configs.items():
        kind = "AutoQuantizationConfig" if part in encoders else "DiffusersAutoQuantizer"
        made.append(f"    {part!r}: {kind}.from_dict({ {**config, 'quant_method': method_of(config)} }),")
    code += ["quantized = PipelineQuantizationConfig(quant_mapping={", *made, "})"]
    return code, ", quantization_config=quantized"
