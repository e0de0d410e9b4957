"""Random-weight folders of models that say what they see: BLIP, Florence-2, LLaVA, and Idefics3 (SmolVLM's class)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "a", "the", "red", "blue", "green", "star", "disc", "square", "on", "in", "left", "of", "big", "small", "Describe",
    "this", "picture", "one", "sentence", "What", "is", "here", "User", "Assistant",
)  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIDE = 16
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8, "initializer_range": 0.5,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4,
}  # fmt: skip


def build_llava(folder: Path, seed: int = 0) -> str:
    """LLaVA: every picture is 16x16, four tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = _tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(vocab_size=len(words), **_ends(), **TEXT),
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    processor = LlavaProcessor(
        _pictures(), words, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _saved(LlavaForConditionalGeneration(config), processor, folder, never=(config.image_token_id,))


def build_idefics3(folder: Path, seed: int = 0) -> str:
    """Idefics3: pictures are cut into tiles of 16x16, so a wide one has more tokens than a square one."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlamaConfig,
    )

    words = _tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
                       *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)))  # fmt: skip
    torch.manual_seed(seed)
    text = LlamaConfig(vocab_size=len(words), **_ends(), **TEXT)
    config = Idefics3Config(
        vision_config=VISION, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2,
        pad_token_id=0,
    )  # fmt: skip
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": SIDE})
    processor = Idefics3Processor(pictures, words, image_seq_len=1, chat_template=CHAT)
    return _saved(Idefics3ForConditionalGeneration(config), processor, folder, never=(config.image_token_id,))


def build_blip(folder: Path, seed: int = 0) -> str:
    """BLIP: no chat template; a text is the caption's beginning."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor
    from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

    words = _bert()
    torch.manual_seed(seed)
    text = BlipTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, encoder_hidden_size=16, initializer_range=0.4,
        bos_token_id=words.convert_tokens_to_ids("[DEC]"), sep_token_id=words.sep_token_id,
        pad_token_id=words.pad_token_id, eos_token_id=words.sep_token_id,
    )  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=BlipVisionConfig(**VISION))
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), words)
    return _saved(BlipForConditionalGeneration(config), processor, folder, words.sep_token_id)


def build_florence2(folder: Path, seed: int = 0) -> str:
    """Florence-2: an encoder and a decoder; a text is a task."""
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    words = _tokenizer()
    torch.manual_seed(seed)
    vision = Florence2VisionConfig(
        depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1), patch_prenorm=(False, True),
        embed_dim=(8, 16), num_heads=(2, 2), num_groups=(2, 2), window_size=4, projection_dim=32,
        initializer_range=0.3, drop_path_rate=0.0,
    )  # fmt: skip
    text = BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.6,
        decoder_start_token_id=2, forced_bos_token_id=1, forced_eos_token_id=2, **_ends(),
    )  # fmt: skip
    config = Florence2Config(
        vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>")
    )
    pictures = _pictures()
    pictures.image_seq_length = (SIDE // 8) ** 2 + 1  # of the patches, and one of their mean
    processor = Florence2Processor(pictures, words)
    return _saved(Florence2ForConditionalGeneration(config), processor, folder)


def _pictures() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def _ends() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _tokenizer(*more: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*SPECIAL, *more, *WORDS, ":", ".", "?"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    words = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=256, extra_special_tokens={"image_token": "<image>", **{f"mark_{m}": m for m in more}},
    )  # fmt: skip
    return words


def _bert() -> Any:
    from transformers import BertTokenizer

    vocab = {
        word: i
        for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *map(str.lower, WORDS)])
    }
    return BertTokenizer(vocab=vocab)


def _saved(model: Any, processor: Any, folder: Path, end: int = 2, never: tuple[int, ...] = ()) -> str:
    with torch.no_grad():
        getattr(model, "text_decoder", model).get_output_embeddings().weight[end] *= 2  # so that some captions end
    model.generation_config.suppress_tokens = list(never) or None
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
