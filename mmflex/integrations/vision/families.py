"""Vision towers of transformers that run all frames and images of a prompt as one packed sequence: a row per family.

Their attention is block-diagonal over ``cu_seqlens``: a token sees its own image or frame, or a window of it. So whole
frames can be run in any grouping. Towers that take frames as a batch (SigLIP, CLIP, InternViT, Pixtral) need no help:
their attention is one call a layer already.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """How a family's tower is fed.

    Attributes:
        layers: name of the module list that holds the layers, from the tower.
        projections: names of convolutions whose kernels do not overlap.
        windows: most layers attend within windows of a frame.
        interpolates: learned positions are resampled to each frame's size.
        merge_sizes: images bring a merge size of their own, an argument of the tower's forward.
        grid_on_device: the forward computes with ``grid_thw`` beside the embeddings; else it only looks at its values.
    """

    layers: str = "blocks"
    projections: tuple[str, ...] = ("patch_embed.proj",)
    windows: bool = False
    interpolates: bool = False
    merge_sizes: bool = False
    grid_on_device: bool = False


_QWEN2 = Tower()
_QWEN2_5 = Tower(windows=True)
_QWEN3 = Tower(interpolates=True)
_GLM4 = Tower(projections=("patch_embed.proj", "downsample"), grid_on_device=True)

TOWERS: dict[str, Tower] = {
    "qwen2_vl_vision": _QWEN2,
    "qwen2_5_vl_vision": _QWEN2_5,
    "qwen2_5_omni_vision_encoder": _QWEN2_5,
    "qwen3_vl_vision": _QWEN3,
    "qwen3_vl_moe_vision": _QWEN3,
    "qwen3_omni_moe_vision_encoder": _QWEN3,
    "qwen3_5_vision": _QWEN3,
    "qwen3_5_moe_vision": _QWEN3,
    "glm4v_vision": _GLM4,
    "glm4v_moe_vision": _GLM4,
    "video_llama_3_vision": Tower("encoder.layers", ("embeddings.patch_embedding",), merge_sizes=True),
}
"""By the ``model_type`` of the tower's config."""
