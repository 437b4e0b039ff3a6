"""Folders that vLLM serves a model of random weights from: a config, and for images a processor and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

SEVEN_B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 1 << 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
"""The shape of Qwen2.5-7B, and of the language model of Qwen2.5-VL-7B."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip


def text_folder(**shape: Any) -> str:
    """A Qwen2 by its config alone, for ``load_format="dummy"``."""
    from transformers import Qwen2Config

    folder = Path(mkdtemp(prefix="mmflex-served-"))
    config = Qwen2Config(**{**SEVEN_B, **shape}, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    return str(folder)


def save_weights(folder: str, device: str) -> None:
    """Random weights for `text_folder`, as transformers draws them: vLLM's own dummy weights are so small that logits
    are nearly equal."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def byte_tokens() -> dict[str, int]:
    """The vocabulary of `save_processor`: 256 bytes, then `SPECIAL`."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: number for number, token in enumerate([*alphabet, *SPECIAL])}


def save_tokenizer(folder: str | Path) -> Any:
    """A tokenizer whose tokens are bytes, written into a model's folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(byte_tokens(), []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def vision_config(text: dict[str, Any], vision: dict[str, Any], sections: list[int], **other: Any) -> Any:
    """A Qwen2.5-VL config for the tokens of `save_processor`."""
    from transformers import Qwen2_5_VLConfig

    tokens = byte_tokens()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        **other,
    )


def save_processor(folder: str | Path) -> Any:
    """Qwen2.5-VL's processor with that tokenizer, written into a model's folder; needs torchvision."""
    from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = save_tokenizer(folder)
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * (1 << 18)}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=Qwen2Tokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>"),
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template="{{ messages }}",
    )
    processor.save_pretrained(folder)
    return processor


def vision_folder() -> str:
    """A Qwen2.5-VL of 7B shape with its whole vision tower, by its config alone, and a processor."""
    folder = Path(mkdtemp(prefix="mmflex-served-"))
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16}
    text = {name: value for name, value in SEVEN_B.items() if name != "rope_parameters"}
    config = vision_config(
        text, vision, [16, 24, 24], architectures=["Qwen2_5_VLForConditionalGeneration"], dtype="bfloat16"
    )
    config.save_pretrained(folder)
    save_processor(folder)
    return str(folder)
