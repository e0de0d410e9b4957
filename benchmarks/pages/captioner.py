"""A small BLIP trained on the miniature world, so that the page of `caption` shows captions that a model learned.

None is shipped: the job takes any folder, and this one is as good as a page needs (`pictures.py` asks for it).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from micro import world

WIDTH, LAYERS, HEADS, PATCH, LONGEST = 96, 2, 4, 8, 24
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def processor_of(captions: list[str]) -> Any:
    """BLIP's own processor, for the world's pictures and words."""
    from transformers import BertTokenizer, BlipImageProcessorPil, BlipProcessor

    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower())})
    vocab = {word: number for number, word in enumerate([*SPECIAL, *words])}
    return BlipProcessor(BlipImageProcessorPil(size={"height": world.SIZE, "width": world.SIZE}), BertTokenizer(vocab))


def untrained(words: Any) -> Any:
    """A BLIP of half a million weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS}  # fmt: skip
    text = BlipTextConfig(
        vocab_size=len(words), max_position_embeddings=LONGEST, encoder_hidden_size=WIDTH,
        bos_token_id=words.convert_tokens_to_ids("[DEC]"), sep_token_id=words.sep_token_id,
        pad_token_id=words.pad_token_id, eos_token_id=words.sep_token_id, **sizes,
    )  # fmt: skip
    vision = BlipVisionConfig(image_size=world.SIZE, patch_size=PATCH, **sizes)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def train(folder: Path, rows: int = 4000, steps: int = 300, batch: int = 24, lr: float = 2e-3) -> Path:
    """Train one into a folder, unless it is there: on pictures of one thing, each by its full caption.

    Losses are printed; it takes about a minute of a processor.
    """
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    scenes = [index for index in range(4 * rows) if len(world.sample_scene(index).things) == 1][:rows]
    captions = [world.caption_of(index, detail="full") for index in scenes]
    pictures = world.pictures(scenes, workers=1)
    processor = processor_of(captions)
    model = untrained(processor.tokenizer)
    start = processor.tokenizer.convert_tokens_to_ids("[DEC]")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        chosen = rng.integers(len(scenes), size=batch)
        told = processor(images=list(pictures[chosen]), text=[captions[i] for i in chosen], padding=True,
                         truncation=True, max_length=LONGEST, return_tensors="pt")  # fmt: skip
        ids_BL = told["input_ids"].clone()
        ids_BL[:, 0] = start
        labels_BL = ids_BL.masked_fill(told["attention_mask"] == 0, -100)
        loss = model(
            pixel_values=told["pixel_values"], input_ids=ids_BL, attention_mask=told["attention_mask"], labels=labels_BL
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"captioner {step:5d} {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
