"""The ranks that share a prompt, and what they exchange: thin wrappers of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..runtime.device import index_constant
from .dealing import Dealing, Runs

DIMENSION = "cp"
"""The dimension of a mesh over which tokens are dealt out."""


@dataclass(frozen=True)
class Pending:
    """A collective under way.

    Attributes:
        finish: waits for it (on CUDA: has the current stream wait) and returns its result.
    """

    finish: Callable[[], Tensor]

    def then(self, change: Callable[[Tensor], Tensor]) -> Pending:
        """The same, and its result changed."""
        return Pending(lambda: change(self.finish()))


@dataclass(frozen=True)
class Ranks:
    """A process group as context parallel sees it.

    Attributes:
        name: of the group, by which a compiled graph refers to it. size: P. rank: of this process in it.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        """The dimension "cp" of a mesh.

        Raises:
            TypeError: no mesh. ValueError: a mesh without that dimension; those that it has are named.
        """
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is {type(mesh).__name__}: give a DeviceMesh, {_WAY_OUT}")
        names = mesh.mesh_dim_names or ()
        if DIMENSION not in names:
            raise ValueError(
                f"the mesh has the dimensions {names or 'without names'} but none is named {DIMENSION!r}: give one, "
                f"{_WAY_OUT}"
            )
        return cls.named(mesh.get_group(DIMENSION).group_name)

    @classmethod
    def named(cls, name: str) -> Ranks:
        """The process group of that name."""
        group = _group_of(name)
        return cls(name, dist.get_world_size(group), dist.get_rank(group))

    @property
    def group(self) -> dist.ProcessGroup:
        return _group_of(self.name)

    # ---- collectives -------------------------------------------------------------------------------------------------

    def all_gather(self, share: Tensor) -> Pending:
        """Everybody's ``share``, of equal shapes, stacked along a new first dimension."""
        share = share.contiguous()
        out = share.new_empty((self.size, *share.shape))
        work = self._begin("all-gather", _all_gather, out.view(-1), share.view(-1))
        return Pending(lambda: self._finished("all-gather", work, out, share))

    def all_to_all(self, parts: Tensor) -> Pending:
        """``parts`` [P, ...], of which part r goes to rank r: what everybody has sent here, stacked likewise."""
        parts = parts.contiguous()
        out = torch.empty_like(parts)
        work = self._begin("all-to-all", dist.all_to_all_single, out.view(-1), parts.view(-1))
        return Pending(lambda: self._finished("all-to-all", work, out, parts))

    def sum(self, t: Tensor) -> Pending:
        """The sum of everybody's tensor, in place."""
        work = self._begin("all-reduce", dist.all_reduce, t)
        return Pending(lambda: self._finished("all-reduce", work, t))

    def _begin(self, name: str, collective: Callable[..., Any], *tensors: Tensor) -> Any:
        with self._explained(name):
            return collective(*tensors, group=self.group, async_op=True)

    def _finished(self, name: str, work: Any, out: Tensor, *held: Tensor) -> Tensor:
        """``held``: what the collective reads, kept until it is done."""
        with self._explained(name):
            work.wait()
        return out

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{name} on rank {self.rank} of {self.size} did not get through ({error}): another rank has ended, "
                "failed or fallen behind; its own error says why. How long ranks wait for each other is set by "
                "torch.distributed.init_process_group(timeout=...)"
            ) from error

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def gather_tokens(self, share: Tensor, dealing: Dealing, dim: int = 2) -> Pending:
        """The tensor of all tokens along ``dim``, from everybody's share."""
        if self.size == 1:
            return Pending(lambda: share)
        gathered = self.all_gather(dealing.padded(share, dim))
        return gathered.then(lambda t: dealing.restore(t, dim % share.dim()))

    def pick_tokens(self, share: Tensor, dealing: Dealing, tokens: tuple[int, ...], dim: int = 2) -> Pending:
        """Some tokens, by number and in that order, of a tensor that is dealt out along ``dim``: on every rank."""
        slots, held = _held_of(dealing.runs[self.rank], tokens)
        source = index_constant(held, share.device)
        if self.size == 1:
            return Pending(lambda: share.index_select(dim, source))
        shape = list(share.shape)
        shape[dim] = len(tokens)
        out = share.new_zeros(shape)
        if held:
            out.index_copy_(dim, index_constant(slots, share.device), share.index_select(dim, source))
        return self.sum(out)

    # ---- agreement ---------------------------------------------------------------------------------------------------

    def agree(self, facts: Mapping[str, int], device: torch.device) -> None:
        """ValueError unless every rank has the same facts; names the first that differs, on both ranks. Waits for
        all."""
        mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
        everybody = self.all_gather(mine).finish().tolist()
        for rank, theirs in enumerate(everybody):
            for (name, value), other in zip(facts.items(), theirs, strict=True):
                if value != other:
                    raise ValueError(
                        f"rank {self.rank} has {name} {value} but rank {rank} {other}: all ranks of the mesh's "
                        f"{DIMENSION!r} dimension run the same prompt, in the same order"
                    )


@lru_cache(maxsize=256)
def _held_of(runs: Runs, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of some tokens, those in a rank's runs: (their places in the list, their places in the rank's share)."""
    slots, held, begin = [], [], 0
    for first, end in runs:
        for slot, token in enumerate(tokens):
            if first <= token < end:
                slots.append(slot)
                held.append(begin + token - first)
        begin += end - first
    return tuple(slots), tuple(held)


_WAY_OUT = (
    'torch.distributed.init_device_mesh("cuda", (ranks,), mesh_dim_names=("cp",)), '
    "in processes that torchrun has started"
)

_group_of: Callable[[str], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group  # type: ignore[assignment]

# all_gather_into_tensor has another name from torch 2.13 on.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
