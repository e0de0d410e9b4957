"""Warm starts: the tokens of a prompt that is solved already, for the prompts near it (ours).

Legend: B rows, M solved prompts, E embedding width, P tokens, D the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.contract import Row
from stages.engine.passthrough import in_batches


@dataclass(frozen=True)
class WarmStarts:
    """Tokens of prompts that are solved already, to start from the ones of the nearest prompt (ours)."""

    t_ME: torch.Tensor
    tokens_MPD: np.ndarray

    @staticmethod
    def open(path: str, shape: tuple[int, int], text: Callable[[list[str]], torch.Tensor]) -> WarmStarts:
        """Read an earlier job's output; `shape` is (P, D), `text` embeds prompts.

        Raises:
            ValueError: It stores no tokens, or tokens of another shape.
        """
        import pyarrow.compute as pc
        import pyarrow.dataset as ds

        data = ds.dataset(f"{path.rstrip('/')}/data", format="parquet")
        if "tokens" not in data.schema.names:
            raise ValueError(f"{path}: holds no tokens to start from; run its job with `store_tokens: true`")
        kept = (pc.field("status") == "ok") & pc.field("tokens").is_valid()
        table = data.to_table(["prompt", "tokens"], filter=kept)
        size = data.schema.field("tokens").type.list_size
        if not len(table) or size != shape[0] * shape[1]:
            raise ValueError(f"{path}: holds tokens of {size} numbers, {shape[0]} x {shape[1]} are needed")
        flat = table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        t_ME = nn.functional.normalize(text(table["prompt"].to_pylist()), dim=-1)
        return WarmStarts(t_ME, flat.reshape(-1, *shape))

    def __call__(self, rows: Iterable[Row], batch: int) -> Iterator[Row]:
        """The rows, each with the `start` that the prompt nearest to it offers; so many of them at once."""
        return in_batches(rows, batch, self._started)

    def _started(self, rows: list[Row]) -> Iterator[Row]:
        t_BE = torch.from_numpy(np.stack([row["text"] for row in rows])).float()
        nearest_B = (t_BE @ self.t_ME.mT).argmax(1).tolist()
        return ({**row, "start": self.tokens_MPD[m]} for row, m in zip(rows, nearest_B, strict=True))
