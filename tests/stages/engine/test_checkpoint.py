"""Checkpoints are whole or absent."""

from __future__ import annotations

import torch

from stages.engine.checkpoint import read_checkpoint, write_checkpoint


def test_checkpoints_are_whole_or_absent(tmp_path):
    path = str(tmp_path / "deep" / "x.safetensors")
    assert read_checkpoint(path) is None
    write_checkpoint(path, {"v": torch.arange(3.0)}, {"step": 3})
    tensors, meta = read_checkpoint(path)
    assert tensors["v"].tolist() == [0, 1, 2]
    assert meta == {"step": 3}
    with open(path, "r+b") as file:
        file.truncate(20)
    assert read_checkpoint(path) is None
    write_checkpoint("memory://ck/x.safetensors", {"v": torch.ones(1)}, {})
    assert read_checkpoint("memory://ck/x.safetensors")[0]["v"].item() == 1
