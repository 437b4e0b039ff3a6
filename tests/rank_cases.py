"""What ranks run in `test_distributed`: functions of a mesh, importable by their processes."""

from __future__ import annotations

from typing import Any

import torch

import mmflex
from mmflex.distributed import Dealing, attention, shard
from mmflex.distributed.ranks import Ranks


def mine(mesh: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [shard(t, mesh=mesh) for t in tensors]


def attend(mesh: Any, q: Any, k: Any, v: Any, spec: Any, layout: Any, options: dict[str, Any]) -> Any:
    """(tokens, output, selections and masks of the plan) of this rank."""
    from mmflex.runtime.calls import observed

    plans: list[Any] = []
    ranks = Ranks.of(mesh)
    with observed(plans.append):
        out = attention(*mine(mesh, q, k, v), spec, mesh=mesh, layout=layout, **options)
    (plan,) = plans
    tokens = Dealing.head_tail(q.shape[2], ranks.size).queries(ranks.rank).numbers
    kinds = [launch.label for launch in plan.program.launches]
    return tokens, out, plan.dense_mask(), dict(plan.selections), kinds


# ---- models ----------------------------------------------------------------------------------------------------------


def qwen_vl(**text: Any) -> Any:
    """A tiny Qwen2.5-VL of two layers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    small = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=small | text, vision_config=vision, image_token_id=100, video_token_id=101)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def video_prompt(side: str | None = None, batch: int = 1) -> dict[str, Any]:
    """40 tokens of text, ten frames of 8 x 8 and more text; with a side, the first prompt is 30 tokens shorter."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(batch):
        text = torch.randint(5, 90, (72,), generator=generator)
        before = 40 + 3 * row
        rows.append(torch.cat([text[:before], torch.full((640,), 101), text[before:]]))
    ids = torch.stack(rows)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :30] = 0
    elif side == "right":
        mask[0, -20:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": 2 * (ids == 101).int(),
        "video_grid_thw": torch.tensor([[10, 16, 16]] * batch),
        "pixel_values_videos": torch.randn(batch * 10 * 16 * 16, 3 * 2 * 4 * 4, generator=generator),
    }


def generated(mesh: Any, spec: Any, inputs: dict[str, Any], options: dict[str, Any], how: dict[str, Any]) -> Any:
    """Of one process and of this rank: (generated tokens, logits after the prompt, (queries, keys) of the plans)."""
    from mmflex.runtime.calls import observed

    model = qwen_vl()
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    got = []
    for where in ({}, {"mesh": mesh, **options}):
        sizes: list[Any] = []
        with (
            mmflex.patched(model, spec, backend="reference", **where),
            observed(lambda plan, to=sizes: to.append((plan.shape[0][2], plan.shape[1][2]))),
        ):
            tokens = model.generate(**inputs, **how)
            got.append((tokens, mmflex.last_token_logits(model, inputs), sizes))
    return got
