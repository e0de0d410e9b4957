"""From a picture back to the text latent it was drawn from: a small transformer, trained on the model's own pictures.

A frozen text-to-image model draws pictures from known prompts; the inverter learns to give back the text encoder's
output from the picture's VAE latent. One pass a picture then gives a condition without a caption, and a start for new
words. Ours: summaries of Lego speak of such a module, the paper's figures don't show it.

Legend: B pictures, C H W latents, N patches, T text positions, K width of the text condition, P width of SDXL's pooled
condition (0 without), D width of the transformer.
"""

from __future__ import annotations

import torch
from pydantic import model_validator
from torch import nn

from pipeline.access import filesystem as filesystem_of
from stages.inverter.settings import Network

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class InverterShape(Network):
    """What an inverter maps from and to, and how large it is."""

    latent: tuple[int, int, int]
    """(C, H, W) of the pictures' latents."""
    text: tuple[int, int]
    """(T, K) of the text condition."""
    pooled: int = 0
    """P; 0 where the model has no pooled condition."""

    @model_validator(mode="after")
    def _fits(self) -> InverterShape:
        if self.latent[1] % self.patch or self.latent[2] % self.patch:
            raise ValueError(f"patch {self.patch} does not divide latents of {self.latent[1]} x {self.latent[2]}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class TextInverter(nn.Module):
    """Patches of the latent and one query a text position go through a transformer; the queries become the text latent.

    What it predicts is standardised by the training latents' mean and deviation, which it keeps.
    """

    def __init__(self, shape: InverterShape) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape.latent
        patches = (height // shape.patch) * (width // shape.patch)
        self.patches = nn.Conv2d(channels, shape.width, shape.patch, stride=shape.patch)
        self.places = nn.Parameter(torch.randn(1, patches, shape.width) * 0.02)
        self.queries = nn.Parameter(torch.randn(1, shape.text[0] + (shape.pooled > 0), shape.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(shape.width), enable_nested_tensor=False)
        self.head = nn.Linear(shape.width, shape.text[1])
        self.pooled_head = nn.Linear(shape.width, shape.pooled) if shape.pooled else None
        self.mean_TK: torch.Tensor
        self.std_TK: torch.Tensor
        self.mean_P: torch.Tensor
        self.std_P: torch.Tensor
        for name, size in (("TK", shape.text), ("P", (shape.pooled,))):
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"std_{name}", torch.ones(size))

    def forward(self, z_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text condition (B, T, K), and the pooled one (B, P) where there is one."""
        patches_BND = self.patches(z_BCHW).flatten(2).transpose(1, 2) + self.places
        queries_BTD = self.queries.expand(len(z_BCHW), -1, -1)  # a last one where there is a pooled condition
        out_BTD = self.body(torch.cat([patches_BND, queries_BTD], 1))[:, patches_BND.shape[1] :]
        text_BTK = self.head(out_BTD[:, : self.shape.text[0]]) * self.std_TK + self.mean_TK
        if self.pooled_head is None:
            return text_BTK, None
        return text_BTK, self.pooled_head(out_BTD[:, -1]) * self.std_P + self.mean_P

    def save(self, folder: str) -> None:
        """Write config.json and model.safetensors into a folder, local or remote."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        for name, data in ((CONFIG, self.shape.model_dump_json().encode()), (WEIGHTS, save(tensors))):
            filesystem, path = filesystem_of(f"{folder.rstrip('/')}/{name}")
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            with filesystem.open(path, "wb") as file:
                file.write(data)

    @staticmethod
    def load(folder: str, device: torch.device | str = "cpu") -> TextInverter:
        """Read an inverter; a finished ``train-inverter`` output works as well as its ``inverter`` folder.

        Raises:
            ValueError: There is none.
        """
        from safetensors.torch import load

        for place in (folder, f"{folder.rstrip('/')}/inverter"):
            filesystem, path = filesystem_of(f"{place.rstrip('/')}/{WEIGHTS}")
            if filesystem.exists(path):
                config = filesystem.cat_file(f"{path.rpartition('/')[0]}/{CONFIG}")
                inverter = TextInverter(InverterShape.model_validate_json(config))
                inverter.load_state_dict(load(filesystem.cat_file(path)))
                return inverter.to(device).eval().requires_grad_(False)
        raise ValueError(f"no trained inverter in {folder}: run a train-inverter job and name its output folder")
