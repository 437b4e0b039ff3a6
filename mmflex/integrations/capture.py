"""q, k and v of every layer of a transformers model, for one prompt, one layer at a time.

The model runs its own attention, so hidden states are those of the dense model. It runs in a thread of its own and
waits in each layer's attention until the caller asks for the next layer: no layer's tensors outlive their turn.
"""

from __future__ import annotations

import contextvars
import inspect
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmflex.ir.layout import TokenLayout
from mmflex.tuning.probe import Layer, check_length

from .prefill import _why_dense
from .prompts import LayoutUnknown, token_layout
from .transformers import Patch, patched


class _Stop(Exception):
    """The caller wants no more, or the last layer is done: leave the forward pass."""


def capture(
    model: nn.Module, sample: Mapping[str, Any] | Tensor, *, layout: TokenLayout | None = None
) -> Generator[Layer | tuple[int, str]]:
    """Runs a prompt through a model and yields its layers in order.

    Args:
        model: a causal language model or vision-language model of transformers, in eval mode.
        sample: what a processor or tokenizer gives for one prompt, or input ids [1, N].
        layout: what the tokens are; read from the sample if None.

    Yields:
        `Layer` for every layer whose attention is plainly causal; ``(layer, reason)`` for one that keeps its own
        attention in a patched model too (a sliding window, an image that sees both ways). The rest of the model runs
        when the next one is asked for; stop early by closing the generator.

    Raises:
        TypeError: no attention modules that can be captured. ValueError: several prompts, padding that hides what the
        tokens are, training mode, or a sample too short or too long.
    """
    root: nn.Module = getattr(model, "_orig_mod", model)
    with _observable(root):
        yield from _Run(root, inputs_of(root, sample), layout).layers()


def check_model(root: nn.Module) -> None:
    """ValueError, TypeError or NotImplementedError for a model that `capture` cannot run: training, patched, ..."""
    with _observable(root):
        pass


@contextmanager
def _observable(root: nn.Module) -> Iterator[None]:
    """A model that keeps its own attention and shows what it is given."""
    if root.training:
        raise ValueError(f"{type(root).__name__} is in training mode: call model.eval()")
    with patched(root, {}):
        yield


def tokens_of(sample: Any) -> int:
    """Tokens of a sample; TypeError for what is none, ValueError for several prompts or a bad length."""
    given = {"input_ids": sample} if isinstance(sample, Tensor) else sample
    ids = None
    if isinstance(given, Mapping):
        ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        raise TypeError(
            f"the sample is {type(sample).__name__}: give what a processor returns (a dict with input_ids [1, N]), or "
            "input ids"
        )
    if ids.shape[0] != 1:
        raise ValueError(f"the sample holds {ids.shape[0]} prompts: a search takes one, input_ids [1, N]")
    check_length(int(ids.shape[1]))
    return int(ids.shape[1])


def inputs_of(root: nn.Module, sample: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """What the forward of a model is called with for a sample: on its device, without a cache."""
    tokens_of(sample)
    given = {"input_ids": sample} if isinstance(sample, Tensor) else dict(sample)
    given.pop("labels", None)
    device = next(root.parameters()).device
    known = inspect.signature(root.forward).parameters
    extra = {"use_cache": False, "logits_to_keep": 1, "return_dict": True}
    given |= {name: value for name, value in extra.items() if name in known}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


class _Run:
    """One forward pass in a thread, held up in every layer."""

    def __init__(self, root: nn.Module, inputs: dict[str, Any], layout: TokenLayout | None) -> None:
        self.root, self.inputs, self.given = root, inputs, layout
        self.patch: Patch = root.__dict__["_mmflex_patch"]
        self.last = max(int(module.layer_idx) for module in self.patch.modules)  # type: ignore[arg-type]
        self.found: queue.Queue[Any] = queue.Queue()
        self.go = threading.Semaphore(0)
        self.stopped = False

    def layers(self) -> Iterator[Layer | tuple[int, str]]:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._forward,), name="mmflex capture", daemon=True)
        self.patch.observer = self._observe
        thread.start()
        try:
            while (found := self.found.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
                del found
                self.go.release()
        finally:
            self.stopped = True
            self.go.release()
            thread.join()
            self.patch.observer = None

    def _forward(self) -> None:
        try:
            with torch.no_grad():
                if self.given is None:
                    self.root(**self.inputs)
                else:
                    with token_layout(self.given):
                        self.root(**self.inputs)
            self.found.put(None)
        except _Stop:
            self.found.put(None)
        except BaseException as error:
            self.found.put(error)

    def _observe(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None, kwargs: Any
    ) -> None:
        """Called in every attention layer before it computes."""
        if q.shape[2] < 2:
            return
        index = int(module.layer_idx)  # type: ignore[arg-type]
        self._hand_over(self._layer(index, module, q, k, v, mask, scaling, kwargs))
        if index == self.last:
            raise _Stop

    def _hand_over(self, found: Any) -> None:
        self.found.put(found)
        del found
        self.go.acquire()
        if self.stopped:
            raise _Stop

    def _layer(
        self,
        index: int,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scaling: float | None,
        kwargs: Any,
    ) -> Layer | tuple[int, str]:
        reason = _why_dense(module, q, k, mask, kwargs)
        padding, past, first = None, 0, 0
        if mask is not None and reason is None:
            padding, past, first = mask.padding, int(mask.q_offset), mask.kv_offset
            if mask.window is not None and mask.window < q.shape[2]:
                reason = f"a sliding window of {mask.window} tokens"
        if reason is not None:
            return index, reason
        try:
            layout = self.patch.prompt.layout(1, padding, first, past, past + q.shape[2])
        except LayoutUnknown as error:
            raise ValueError(f"which token of the sample is what cannot be told ({error}): give layout=") from error
        return Layer(index, q, k[:, :, : past + q.shape[2]], v[:, :, : past + q.shape[2]], layout, scaling)
