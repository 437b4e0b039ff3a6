"""Which kernels a computation runs, found out by running it on tensors without memory ("meta").

No value is read back while an attention is planned, so shapes alone say what will be launched. Within `listing` meta
tensors take the way of a device's tensors, and a kernel that would be launched is noted down instead: with its
arguments, from which it can be compiled, here or in another process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch

try:
    import triton
except ImportError:  # CPU builds of torch come without Triton
    triton = None


class ListedKernel(Protocol):
    """A kernel with the arguments that it would be launched with.

    Attributes:
        name: as people read it. key: equal for launches that are served by one compilation.
        plans: it plans rather than attends, and is compiled in less than a second or two.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> Any: ...

    @property
    def plans(self) -> bool: ...

    def compile(self, device: torch.device) -> None:
        """Compiles it; compilers leave what they made in their folders on disk."""


@dataclass(eq=False)
class Listing:
    """Kernels in the order of their first launch.

    Attributes:
        device: whose kernels. by_key: one of all that share a compilation.
    """

    device: torch.device
    by_key: dict[Any, ListedKernel] = field(default_factory=dict)

    def add(self, kernel: ListedKernel) -> None:
        self.by_key.setdefault(kernel.key, kernel)


_listing: ContextVar[Listing | None] = ContextVar("mmflex listing of kernels", default=None)


@contextmanager
def listing(device: torch.device) -> Iterator[Listing]:
    """Lists the kernels that a ``with`` block would launch on a device; all tensors in it have to be on "meta"."""
    listed = Listing(device)
    token = _listing.set(listed)
    try:
        yield listed
    finally:
        _listing.reset(token)


def current() -> Listing | None:
    """The list that is being made; None where kernels run."""
    return _listing.get()


def device_of(t: torch.Tensor) -> torch.device:
    """Where a tensor is, and within `listing` where it would be."""
    listed = _listing.get()
    return t.device if listed is None or not t.is_meta else listed.device


@dataclass(eq=False)
class TritonKernel:
    """A kernel of `jit` and the arguments of a launch, on "meta"."""

    name: str
    key: Any
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    plans: bool = True

    def compile(self, device: torch.device) -> None:
        _make_launcher(self.binary(device))

    def binary(self, device: torch.device) -> Any:
        """Compiled for the GPU; Triton also remembers it for this process."""
        with torch.cuda.device(device):
            return self.kernel.compiled(*self.args, **self.options)


def _make_launcher(binary: Any) -> None:
    """Has a kernel's launcher on disk, too: up to version 3.6 Triton gives one per signature to the C compiler."""
    triton.runtime.driver.active.launcher_cls(binary.src, binary.metadata)


@cache
def makes_launchers() -> bool:
    """Whether this Triton's launchers are compiled."""
    return triton is not None and tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)


def compile_with_launchers(kernels: Sequence[ListedKernel], device: torch.device) -> None:
    """Compiles the kernels among these that Triton compiles, one by one (it holds Python's lock: threads would wait for
    each other), and their launchers meanwhile: the C compiler is a process of its own."""
    with ThreadPoolExecutor(thread_name_prefix="mmflex launchers") as threads:
        made = [
            threads.submit(_make_launcher, kernel.binary(device))
            for kernel in kernels
            if isinstance(kernel, TritonKernel)
        ]
    for launcher in made:
        launcher.result()


if triton is not None:

    class _Kernel(triton.JITFunction):  # type: ignore[misc]
        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            listed = _listing.get()
            if listed is None:
                return super().run(*args, grid=grid, warmup=warmup, **options)
            listed.add(TritonKernel(self.__name__, self._key(args, options), self, args, options))
            return None

        def compiled(self, *args: Any, **options: Any) -> Any:
            """Compiled for arguments like these, not launched."""
            return super().run(*args, grid=(1,), warmup=True, **options)

        def _key(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            """What Triton compiles anew for."""
            plain = {name: value for name, value in options.items() if name not in self.arg_names}
            values = {**dict(zip(self.arg_names, args, strict=False)), **options}
            kinds = tuple(
                values[p.name] if p.is_constexpr else _kind(values[p.name], not p.do_not_specialize)
                for p in self.params
            )
            return self, kinds, tuple(sorted(plain.items()))


def _kind(value: Any, specialised: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, specialised and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value.bit_length() > 31, specialised and (value == 1, value % 16 == 0)
    return type(value)


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` of a kernel that can be listed; arguments as there."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return triton.jit(**options)  # type: ignore[no-any-return]
    return lambda function: _Kernel(function, **options)
