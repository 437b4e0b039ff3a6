"""Processes that stand for GPUs: started once for a test module, each a rank of gloo process groups on the CPU."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

TIMEOUT = 60
"""Seconds that ranks wait for each other."""


class RankPool:
    """``size`` ranks in one process group. Functions that they run are named ``module:function`` and take a mesh first:
    of all ranks, or of the first few (the others are left out)."""

    def __init__(self, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        file = tempfile.mktemp(prefix="mmflex-ranks-")
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, size, file, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, ranks: int | tuple[int, int], function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returns on each rank.

        Args:
            ranks: of a mesh ("cp",); a pair: of a mesh ("cp", "tp").
            function: of an importable module. args: picklable.

        Raises:
            RankError: on some rank; holds what every rank raised.
        """
        count = ranks if isinstance(ranks, int) else ranks[0] * ranks[1]
        for pipe in self.pipes[:count]:
            pipe.send((function, ranks, args))
        answers = [_answer(pipe) for pipe in self.pipes[:count]]
        failed = [answer for good, answer in answers if not good]
        if failed:
            raise RankError(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.terminate()


def _answer(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return False, ("EOFError", "the process has ended", "the process has ended")


class RankError(AssertionError):
    """What ranks raised: ``errors`` as (type name, message, traceback)."""

    def __init__(self, errors: list[tuple[str, str, str]]) -> None:
        super().__init__("\n".join(error[2] for error in errors))
        self.errors = errors


def _serve(rank: int, size: int, file: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timeout)
    meshes = {shape: _mesh(shape, rank, timeout) for shape in _shapes(size)}
    while (task := pipe.recv()) is not None:
        function, ranks, args = task
        try:
            with torch.no_grad():
                pipe.send((True, function(meshes[ranks], *args)))
        except BaseException as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


def _shapes(size: int) -> list[int | tuple[int, int]]:
    """Meshes that functions can ask for."""
    return [*range(1, size + 1), *((n, 2) for n in range(1, size // 2 + 1)), (1, size)]


def _mesh(shape: int | tuple[int, int], rank: int, timeout: datetime.timedelta) -> Any:
    """A mesh of the first ranks. Called by all: they make all groups together, in the same order."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    sizes = (shape,) if isinstance(shape, int) else shape
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    lines = [ranks.movedim(d, -1).reshape(-1, sizes[d]).tolist() for d in range(len(sizes))]
    own = []
    for of_dimension in lines:
        groups = {tuple(line): dist.new_group(line, timeout=timeout) for line in of_dimension}
        own += [group for line, group in groups.items() if rank in line]
    if rank >= ranks.numel():
        return None
    names = ("cp", "tp")[: len(sizes)]
    return DeviceMesh.from_group(own[0] if len(own) == 1 else own, "cpu", mesh=ranks, mesh_dim_names=names)
