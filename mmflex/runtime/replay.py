"""Planning as one CUDA graph.

Selecting, gathering and listing is thirty to fifty small kernels, which take the host longer to launch than the device
to run: from the second call of a program on they are replayed at once. Estimates run outside: they read q and k, which
are at another address at every call. Their results are written to the graph's own tensors, or copied there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .caches import bounded
from .classify import Extremes
from .device import constants_used
from .planning import after_estimates
from .state import PlanState, PreparedLaunch

LONGEST = 1 << 18
"""Keys up to which planning is replayed: beyond, the device is the slower one, and the graph would hold memory."""

_NEW, _SECOND, _NEVER = "new", "second", "never"
"""What stands for a graph before it is captured, and where none can be."""


def stream(device: torch.device) -> int:
    """The current stream of a device (what is planned on one stream is not ready on another); -1 during a capture,
    whose graph must not read what may be gone when it is replayed."""
    if device.type != "cuda":
        return 0
    return -1 if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def follows_from_layout(state: PlanState) -> bool:
    """Whether the lists of a program follow from its layout alone (nothing is selected), and are small enough to keep.
    Not while a graph is captured: they would be allocated from its pool."""
    program = state.program
    return not program.leaves and program.layout.length <= LONGEST and stream(state.device) >= 0


def replayed(state: PlanState) -> bool:
    """Replays the steps after the estimates into ``state``; False where they have to be run one by one.

    What ``state`` then holds is overwritten by the next call with this program on the same stream.
    """
    program = state.program
    if all(step.op == "estimate" for step in program.graph.planning):
        return False  # nothing is left to do
    current = stream(state.device)
    if state.device.type != "cuda" or program.layout.length > LONGEST or current < 0:
        return False
    key = ("replay", state.device, state.batch, current)
    replay = program.memo.recall(key, _NEW)
    if replay is _NEW:  # The first call compiles kernels and moves constants to the device, which no graph may do.
        program.memo.keep(key, _SECOND)
        return False
    if replay is _SECOND:
        replay = program.memo.keep(key, _captured(state) or _NEVER)
    return False if replay is _NEVER else replay.run(state)


def inputs(state: PlanState) -> list[Tensor]:
    """What a graph of this program will read on this stream: estimates may be written there."""
    replay = state.program.memo.recall(("replay", state.device, state.batch, stream(state.device)))
    return replay.inputs if isinstance(replay, _Replay) else []


@dataclasses.dataclass(eq=False)
class _Replay:
    """A captured graph, the estimates that it reads, what it leaves, and what else it reads and has to hold."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    selections: dict[str, Tensor]
    prepared: dict[int, PreparedLaunch]
    kept: list[Any]

    def run(self, state: PlanState) -> bool:
        given = _tensors([result for result, _ in state.estimates.values()])
        if given is None or [(t.shape, t.dtype) for t in given] != [(t.shape, t.dtype) for t in self.inputs]:
            return False
        elsewhere = [(to, t) for to, t in zip(self.inputs, given, strict=True) if to is not t]
        if elsewhere:
            own = {t.untyped_storage().data_ptr() for t in self.inputs}  # results may lie in each other's inputs
            sources = [t.clone() if t.untyped_storage().data_ptr() in own else t for _, t in elsewhere]
            torch._foreach_copy_([to for to, _ in elsewhere], sources)
        self.graph.replay()
        state.selections, state.prepared = self.selections, self.prepared
        return True


def _captured(state: PlanState) -> _Replay | None:
    """A graph of the steps; None where an estimate is of an unknown type, or a pattern does what cannot be captured."""
    given = _tensors([result for result, _ in state.estimates.values()])
    if given is None:
        return None
    with torch.inference_mode(False):  # else they could not be written to in another mode
        inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]
    own = PlanState(state.program, state.device, state.batch)
    left = list(inputs)
    own.estimates = {key: (_replaced(result, left), slots) for key, (result, slots) in state.estimates.items()}
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(state.device)
    key = (state.device, current.cuda_stream)
    side, pool, _ = _pools.pop(key, None) or (torch.cuda.Stream(state.device), torch.cuda.graph_pool_handle(), None)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                with constants_used() as constants:
                    after_estimates(own)
            finally:
                graph.capture_end()
    except RuntimeError:  # a selection that reads a value back, say; a pool may be stuck in the capture that failed
        return None
    finally:
        current.wait_stream(side)
    _pools.keep(key, (side, pool, graph))
    own.gathered.clear()
    memos = (*state.program.memo.values(), *state.program.layout.memo.values())
    kept = [constants, *(entry for entry in memos if isinstance(entry, (Tensor, tuple, Extremes)))]
    return _Replay(graph, inputs, own.selections, own.prepared, kept)


_pools = bounded(64)
"""Device and stream -> where their graphs are captured, the memory that they share, and the last of them, without which
a pool would end with the programs that it served.

Sharing is safe: a graph is given only memory that nothing held when it was captured. What a replay leaves
(`_Replay.selections` and ``prepared``, all that attending reads) is held as long as its graph may be replayed, so no
other graph was ever given it. What they share is what planning needs in between, and graphs of one stream are replayed
one after another."""


def _tensors(value: Any) -> list[Tensor] | None:
    """The tensors in an estimate, in order; None for types that may hide some."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in dataclasses.fields(value) if f.init and f.name != "view"]
    if isinstance(value, (list, tuple)):
        parts = [_tensors(item) for item in value]
        return None if any(part is None for part in parts) else [t for part in parts for t in part or ()]
    return [] if value is None or isinstance(value, (bool, int, float, str)) else None


def _replaced(value: Any, tensors: list[Tensor]) -> Any:
    """The estimate with other tensors, taken from the front of the list."""
    if isinstance(value, Tensor):
        return tensors.pop(0)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init and f.name != "view"]
        return dataclasses.replace(value, **{name: _replaced(getattr(value, name), tensors) for name in names})
    if isinstance(value, (list, tuple)):
        return type(value)([_replaced(item, tensors) for item in value])
    return value
