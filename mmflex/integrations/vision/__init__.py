"""Vision towers of transformers models: exact attention in one call a layer, layers compiled, frames in chunks.

`VisionPatch` changes the towers of the families in `TOWERS` that a model holds. What a tower computes stays the same to
rounding.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..fused import FusedLayers
from ..masks import forget_previous, previous_implementation, remember_previous
from .attention import VISION_NAME, register
from .families import TOWERS, Tower
from .projection import Projection
from .tower import CHUNK_PATCHES, ChunkedTower

__all__ = ["CHUNK_PATCHES", "TOWERS", "VISION_NAME", "Tower", "VisionPatch", "vision_towers"]


def vision_towers(root: nn.Module) -> list[tuple[Any, Tower]]:
    """The towers inside a model that mmflex knows, each with its row of `TOWERS`. A class that is not transformers'
    own, or has another forward, is none of them."""
    from transformers import PreTrainedModel

    found = []
    for module in root.modules():
        if not isinstance(module, PreTrainedModel) or module.config.model_type not in TOWERS:
            continue
        if str(type(module).forward.__module__).startswith("transformers.models."):
            found.append((module, TOWERS[module.config.model_type]))
    return found


class VisionPatch:
    """What was done to the towers of a model.

    Args:
        root: a transformers model, or a module that holds one; without a known tower nothing changes.
        fuse: as in `FusedLayers`.
        chunk: patches that a tower is given at a time.
    """

    def __init__(self, root: nn.Module, *, fuse: bool | None = None, chunk: int = CHUNK_PATCHES) -> None:
        self.replaced: list[Any] = []
        self.attention: list[tuple[Any, str]] = []
        towers = vision_towers(root)
        if towers:
            register()
        for module, row in towers:
            previous = module.config._attn_implementation or "eager"
            if previous == VISION_NAME:  # a config that another patched model shares
                previous = previous_implementation(module.config) or "sdpa"
            remember_previous(module.config, previous)
            self.attention.append((module, previous))
            # not by set_attn_implementation, which imports a package for every name with "flash" in it
            module.config._attn_implementation = VISION_NAME
            self.replaced += [Projection(module.get_submodule(name)) for name in row.projections]
            layers = module.get_submodule(row.layers)
            self.replaced.append(FusedLayers(list(layers.children()), fuse))
            self.replaced.append(ChunkedTower(module, row, chunk))

    def remove(self) -> None:
        """Undo what the constructor did."""
        for part in reversed(self.replaced):
            part.remove()
        for module, previous in self.attention:
            if forget_previous(module.config):
                module.config._attn_implementation = previous
        self.replaced, self.attention = [], []
