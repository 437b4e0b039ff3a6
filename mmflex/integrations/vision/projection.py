"""Convolutions whose kernel is the whole input: one matrix product.

Towers cut frames into patches beforehand and then run a convolution on every patch, whose output is a single pixel.
Convolution libraries do not know that case; to cuDNN it is a batch of a hundred thousand tiny pictures.
"""

from __future__ import annotations

import torch
from torch import nn


class Projection:
    """In place of a convolution's ``forward``: ``[N, channels, *kernel]`` -> ``[N, out, 1, ...]`` as one product.

    Inputs of other sizes, and convolutions with a stride, padding, dilation or groups that matter, run as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = vars(module).get("forward")
        self.inner = module.forward
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.module
        assert isinstance(conv, nn.Conv2d | nn.Conv3d)
        if x.shape[1:] != conv.weight.shape[1:] or any(conv.padding):
            return self.inner(x)
        out = nn.functional.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)
        return out.view(*out.shape, *(1,) * (x.ndim - 2))

    def remove(self) -> None:
        """Give the module its own forward back."""
        vars(self.module).pop("forward", None)
        if self.before is not None:
            self.module.forward = self.before  # type: ignore[method-assign]
