"""The miniature CLIP pair: the image and text encoders of the Kandinsky prior, and of every embedding job.

Trained with the usual symmetric contrastive loss at a low, fixed temperature (which leaves a modality gap, as real
CLIPs have), together with what makes minutes on a CPU enough:

- patch tokens predict the objects under them, and each embedding predicts which attributes go together (the heads are
  thrown away);
- two batches of three see windows alone: the 5x5 patches around single objects, at their own positions (token dropping,
  as in FLIP, Li et al. 2023);
- windows, and half of a batch of whole pictures, are objects of one colour and texture. Where colour tells pictures
  apart, as at random, shapes are learned last: a linear probe found them in 54 % of the embeddings without this;
- pictures whose full captions agree are each other's positives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from micro import data, oracle, tokenizer, world
from micro.training import Recipe, pick_device, pictures_to_tensor, train

WIDTH = 128
EMBED = 128
_LOGIT_SCALE = 40.0


def build_image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=EMBED, num_hidden_layers=5,
        num_attention_heads=4, image_size=world.SIZE, patch_size=8, hidden_act="quick_gelu",
    ))  # fmt: skip


def text_config(words: CLIPTokenizer, layers: int = 4) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=EMBED,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=tokenizer.LENGTH,
        hidden_act="quick_gelu", bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip


def build_text_encoder(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(words))


def image_processor() -> CLIPImageProcessor:
    """Resize to 64 and scale to [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": world.SIZE}, crop_size={"height": world.SIZE, "width": world.SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


def tokenize_all(words: CLIPTokenizer, captions: np.ndarray) -> np.ndarray:
    """Captions of any shape -> token ids of that shape + (LENGTH,), int64."""
    ids = words(captions.reshape(-1).tolist(), padding="max_length", truncation=True, return_tensors="np").input_ids
    return ids.reshape(*captions.shape, tokenizer.LENGTH)


def train_tokens(work: Path, words: CLIPTokenizer) -> np.ndarray:
    """(n, 6, LENGTH) token ids of the training captions' wordings."""
    make = lambda: tokenize_all(words, data.split_captions(work, "train", world.TRAIN_SIZE, 6))  # noqa: E731
    return data.cached(work / "train-tokens.npy", make)


def pairings(labels_BTF: np.ndarray, grounds_B: np.ndarray) -> np.ndarray:
    """(B, n) multi-hot: which attributes occur together, the background, the count, and who stands where."""
    shape, color, texture, size = (labels_BTF[:, :, i].astype(int) for i in range(4))
    s, c, t, z = (len(v) for v in data.FIELDS.values())
    codes = [(color * s + shape, c * s), (color * t + texture, c * t), (shape * t + texture, s * t),
             (shape * z + size, s * z)]  # fmt: skip
    present = shape >= 0
    rows = np.arange(len(labels_BTF))
    blocks = []
    for code, n in codes:
        block = np.zeros((len(rows), n + 1), np.float32)
        block[rows[:, None], np.where(present, code, n)] = 1
        blocks.append(block[:, :n])
    ground = np.zeros((len(rows), len(world.BACKGROUNDS)), np.float32)
    ground[rows, grounds_B] = 1
    count = np.zeros((len(rows), data.MAX_THINGS), np.float32)
    count[rows, present.sum(1) - 1] = 1
    roles = np.zeros((len(rows), c, ROLES), np.float32)
    for b in np.nonzero(present.sum(1) == 2)[0]:
        dx, dy = labels_BTF[b, 0, 4:6] - labels_BTF[b, 1, 4:6]
        role = (0 if dx < 0 else 1) if abs(dx) >= abs(dy) else (2 if dy < 0 else 3)
        roles[b, color[b, 0], role] = 1
        roles[b, color[b, 1], role ^ 1] = 1
    return np.concatenate([*blocks, ground, count, roles.reshape(len(rows), -1)], 1)


ROLES = 4
"""Of a colour in a pair: left, right, above, below; the last ``len(COLORS) * ROLES`` entries of `pairings`."""


def role_loss(said_BN: torch.Tensor, wanted_BN: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of where each colour of a pair stands. Among all pairings it would drown."""
    said, wanted = (x[:, -len(world.COLORS) * ROLES :].reshape(-1, ROLES) for x in (said_BN, wanted_BN))
    stands = wanted.sum(1) == 1
    return F.cross_entropy(said[stands], wanted[stands]) if bool(stands.any()) else said.sum() * 0


def patch_loss(classes_BGGK: torch.Tensor, labels_BTF: np.ndarray, seen_BGG: np.ndarray) -> torch.Tensor:
    """Mean cross-entropy of naming shape, colour, texture and size of the object on or beside each seen patch."""
    side = world.SIZE / data.GRID
    centre = (np.arange(data.GRID) + 0.5) * side
    away = np.hypot(centre[None, None, None, :] - labels_BTF[:, :, 4, None, None],
                    centre[None, None, :, None] - labels_BTF[:, :, 5, None, None])  # fmt: skip
    away = np.where(labels_BTF[:, :, 0, None, None] >= 0, away - labels_BTF[:, :, 6, None, None], np.inf)
    b, row, column = np.nonzero((away.min(1) < side / 2) & seen_BGG)
    found = labels_BTF[b, away.argmin(1)[b, row, column]]
    parts = classes_BGGK[b, row, column].split([len(v) for v in data.FIELDS.values()], 1)
    wanted = torch.from_numpy(found[:, :4].astype(np.int64)).to(classes_BGGK.device)
    return torch.stack([F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(parts)]).mean()


def _alike(labels_BTF: np.ndarray) -> list[np.ndarray]:
    """Rows of single objects, a group for each colour and texture."""
    single = (labels_BTF[:, :, 0] >= 0).sum(1) == 1
    key = np.where(single, labels_BTF[:, 0, 1] * len(world.TEXTURES) + labels_BTF[:, 0, 2], -1).astype(int)
    return [np.nonzero(key == k)[0] for k in range(len(world.COLORS) * len(world.TEXTURES))]


_WINDOW = 5


def _windows(labels_BTF: np.ndarray) -> np.ndarray:
    """(B, 8, 8) bool: the `_WINDOW` x `_WINDOW` patches around each picture's first object."""
    corner = np.clip(labels_BTF[:, 0, 4:6] // (world.SIZE // data.GRID) - _WINDOW // 2, 0, data.GRID - _WINDOW)
    column, row = (corner[:, i, None] <= np.arange(data.GRID) for i in (0, 1))
    column &= np.arange(data.GRID) < corner[:, 0, None] + _WINDOW
    row &= np.arange(data.GRID) < corner[:, 1, None] + _WINDOW
    return row[:, :, None] & column[:, None, :]


def _see(image: CLIPVisionModelWithProjection, x_BCHW: torch.Tensor, seen_BGG: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Embeddings (B, E) and patch tokens (B, 8, 8, W) of pictures of which some patches, as many in each, are seen."""
    tokens = np.concatenate([np.ones((len(seen_BGG), 1), bool), seen_BGG.reshape(len(seen_BGG), -1)], 1)
    kept_BN = torch.from_numpy(np.nonzero(tokens)[1].reshape(len(tokens), -1)).to(x_BCHW.device)[..., None]
    embeddings = next(module for name, module in image.named_modules() if name.endswith("embeddings"))
    hook = embeddings.register_forward_hook(lambda module, args, out: out.gather(1, kept_BN.expand(-1, -1, WIDTH)))
    out = image(x_BCHW)
    hook.remove()
    full = out.last_hidden_state.new_zeros(len(tokens), tokens.shape[1], WIDTH)
    full = full.scatter(1, kept_BN.expand(-1, -1, WIDTH), out.last_hidden_state)
    return out.image_embeds, full[:, 1:].view(len(tokens), data.GRID, data.GRID, WIDTH)


class _Pair(nn.Module):
    def __init__(self, words: CLIPTokenizer, pairings: int) -> None:
        super().__init__()
        self.image, self.text = build_image_encoder(), build_text_encoder(words)
        self.cells = nn.Linear(WIDTH, 4 + sum(len(v) for v in data.FIELDS.values()))
        self.patches = nn.Linear(WIDTH, sum(len(v) for v in data.FIELDS.values()))
        self.image_reads, self.text_reads = nn.Linear(EMBED, pairings), nn.Linear(EMBED, pairings)


def train_clip(work: Path, recipe: Recipe) -> tuple[CLIPVisionModelWithProjection, CLIPTextModelWithProjection]:
    device = pick_device()
    count = world.TRAIN_SIZE
    pictures, labels = data.split_pictures(work, "train", count), data.split_labels(work, "train", count)
    grounds = np.asarray(data.split_backgrounds(work, "train", count))
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    captions = train_tokens(work, words)
    torch.manual_seed(2)
    pair = _Pair(words, pairings(labels[:2], grounds[:2]).shape[1]).to(device)

    groups = _alike(np.asarray(labels))

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        windowed, group = rng.uniform() < 2 / 3, groups[rng.integers(len(groups))]
        alike = len(rows) if windowed else len(rows) // 2
        rows = np.sort(np.concatenate([group[rows[:alike] % len(group)], rows[alike:]]))
        seen = _windows(labels[rows]) if windowed else np.ones((len(rows), data.GRID, data.GRID), bool)
        image_embeds, patches = _see(pair.image, pictures_to_tensor(pictures[rows], device), seen)
        ids = torch.from_numpy(captions[rows, rng.integers(6, size=len(rows))]).to(device)
        said = pair.text(ids[:, : int((ids != words.pad_token_id).sum(1).max()) + 1]).text_embeds
        image, text = F.normalize(image_embeds, dim=1), F.normalize(said, dim=1)
        logits = _LOGIT_SCALE * image @ text.T
        full = captions[rows, 0]
        same = torch.from_numpy((full[:, None] == full[None]).all(2)).to(device, torch.float32)
        same = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        wanted = torch.from_numpy(pairings(labels[rows], grounds[rows])).to(device)
        reads = F.binary_cross_entropy_with_logits(pair.image_reads(image * EMBED**0.5), wanted)
        reads = reads + F.binary_cross_entropy_with_logits(pair.text_reads(text * EMBED**0.5), wanted)
        helped = patch_loss(pair.patches(patches), labels[rows], seen)
        if not windowed:
            helped = helped + 0.5 * oracle.cell_loss(pair.cells(patches), labels[rows])
        return loss + 10 * reads + helped

    averaged = train("clip", pair, loss_of, count, recipe, work, seed=2)
    return averaged.image, averaged.text


@torch.no_grad()
def embed_pictures(model: CLIPVisionModelWithProjection, pictures: np.ndarray, batch: int = 200) -> torch.Tensor:
    """(n, E) float32 on the CPU, raw projections."""
    device = next(model.parameters()).device
    parts = (pictures_to_tensor(pictures[i : i + batch], device) for i in range(0, len(pictures), batch))
    return torch.cat([model(part).image_embeds.float().cpu() for part in parts])


@torch.no_grad()
def embed_tokens(model: CLIPTextModelWithProjection, ids: np.ndarray, batch: int = 400) -> torch.Tensor:
    """(n, E) float32 on the CPU, raw projections of (n, LENGTH) token ids."""
    device = next(model.parameters()).device
    parts = (torch.from_numpy(ids[i : i + batch]).to(device) for i in range(0, len(ids), batch))
    return torch.cat([model(part).text_embeds.float().cpu() for part in parts])


def geometry(image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """Retrieval and mean cosines of n matched embeddings (n, E): what shows the modality gap."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    n = len(image)
    cross = text @ image.T
    off = ~torch.eye(n, dtype=torch.bool)
    return {
        "text_to_image_r1": float((cross.argmax(1) == torch.arange(n)).float().mean()),
        "image_to_text_r1": float((cross.argmax(0) == torch.arange(n)).float().mean()),
        "cos_matched": float(cross.diagonal().mean()),
        "cos_text_image": float(cross[off].mean()),
        "cos_image_image": float((image @ image.T)[off].mean()),
        "cos_text_text": float((text @ text.T)[off].mean()),
        "gap": float((image.mean(0) - text.mean(0)).norm()),
    }
