"""Prompts of a user's model: text, images and frames as the model's own tokenizer or processor takes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..integrations.frames import Frames


def prepare(
    model: str, text: str, frames: Frames | None = None, images: Sequence[Path] = (), *, template: bool = True
) -> tuple[dict[str, Any], Callable[[list[int]], str]]:
    """(inputs of one prompt, function from token ids to text).

    Args:
        model: folder or name of the model.
        text: the question, or a text to read.
        frames, images: stand before the text.
        template: ask as a user of the model's chat template, if it has one. Prompts with frames or images always do.

    Raises:
        ImportError: transformers' processors need torchvision, which is not installed.
    """
    import transformers

    if frames is None and not images:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        if template and getattr(tokenizer, "chat_template", None):
            # A template writes the special tokens itself: a text that it wrote must not get them again.
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
        else:
            inputs = tokenizer(text, return_tensors="pt")
        return dict(inputs), lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("transformers' processors of images and video need torchvision: pip install 'mmflex[video]'")
    processor: Any = transformers.AutoProcessor.from_pretrained(model)
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    content += [{"type": "video"}] if frames is not None else []
    content.append({"type": "text", "text": text})
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    media: dict[str, Any] = {}
    if images:
        from transformers.image_utils import load_image

        media["images"] = [[load_image(str(file)) for file in images]]  # a list for each prompt
    if frames is not None:
        media |= {"videos": [frames.pixels], "video_metadata": [frames.metadata]}
        media["do_sample_frames"] = False  # they were chosen when they were read
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if begin is not None and written.startswith(begin):
        media["add_special_tokens"] = False
    inputs = processor(text=[written], return_tensors="pt", **media)
    return dict(inputs), lambda ids: processor.decode(ids, skip_special_tokens=True)


def shortened(inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A prompt of text cut to so many tokens, out of its middle: instructions mostly stand first, questions last, and
    both stay. ``inputs``: tensors [1, N]."""
    import torch

    first, last = tokens - tokens // 2, tokens // 2
    if inputs["input_ids"].shape[1] <= tokens:
        return dict(inputs)
    return {name: torch.cat([x[:, :first], x[:, x.shape[1] - last :]], dim=1) for name, x in inputs.items()}
