"""Small random image encoders, and their own forward on tokens instead of pixels."""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel


def clip_model(seed=0, patches=16):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=8,
        image_size=8 * int(patches**0.5), projection_dim=24, initializer_range=0.3,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def siglip_model():
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return SiglipVisionModel(config).eval()


class Features(nn.Module):
    """Stands where the patch convolution stood; gives the tokens as its feature map."""

    def __init__(self, side):
        super().__init__()
        self.side, self.weight, self.w = side, torch.zeros(1), None

    def forward(self, pixels):
        stretched = nn.functional.interpolate(self.w.mT, size=self.side**2, mode="nearest")
        return stretched.view(len(self.w), -1, self.side, self.side)


def full_model(model, w):
    """The model's own forward, with its patch embedding bypassed."""
    vision = getattr(model, "vision_model", model)
    embeddings = vision.embeddings
    kept = embeddings.patch_embedding
    side = int(embeddings.num_patches**0.5)
    embeddings.patch_embedding = Features(side)
    embeddings.patch_embedding.w = w
    try:
        out = model(pixel_values=torch.zeros(len(w), 3, embeddings.image_size, embeddings.image_size))
        return out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output
    finally:
        embeddings.patch_embedding = kept
