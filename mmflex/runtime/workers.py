"""Processes that compile kernels side by side, and leave them on disk.

Compilers hold Python's lock for most of their time, so threads would wait for each other. Processes are new ones, not
forked (a fork has no use of CUDA) and not of `multiprocessing` (which runs the caller's main module again).
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch

from .kernels.listing import ListedKernel
from .recorded import RecordedCall

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mmflex.runtime.workers import serve; serve()"


_PATIENCE = 30.0
"""Seconds for the processes to finish kernels that nobody waits for any more."""


def _settings() -> dict[str, Any]:
    """Settings of PyTorch by which Inductor finds compiled code on disk; without what a program has changed in
    `torch._inductor.config`."""
    matmul = torch.backends.cuda.matmul
    return {
        "threads": torch.get_num_threads(),  # kernels of a CPU are written for a number of threads
        "dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        ),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "matmul": {name: getattr(matmul, name) for name in _MATMUL},
    }  # fmt: skip


_MATMUL = ("fp32_precision", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def _set(settings: dict[str, Any]) -> None:
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    enabled, warn = settings["deterministic"]
    torch.use_deterministic_algorithms(enabled, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = settings["fill"]  # type: ignore[attr-defined]
    for name, value in settings["matmul"].items():
        setattr(torch.backends.cuda.matmul, name, value)


class Workers:
    """Compiles listed kernels in processes of its own::

        with Workers(3) as workers:
            workers.submit(calls)
            for failure in workers.wait():
                print(failure)

    Args:
        count: of the processes. They start at once, and have ended when the ``with`` block has.
    """

    def __init__(self, count: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mmflex compiles")
        self._results: list[Future[str]] = []
        self._closing = False
        try:
            for _ in range(count):
                self._start()
        except OSError:
            self.__exit__()
            raise

    def _start(self) -> None:
        worker = _Worker()
        self._all.append(worker)
        self._idle.put(worker)

    def submit(self, calls: Sequence[RecordedCall]) -> None:
        """Starts compiling the kernels of these calls: first those that attend, which take longest.

        Raises:
            What `RecordedCall.kernels` raises, and pickle where a call cannot be handed to a process. ValueError: its
            patterns are defined in ``__main__``.
        """
        tasks: dict[Any, tuple[bool, str, bytes, int]] = {}
        for call in calls:
            text = pickle.dumps(call)
            if b"__main__" in text:
                raise ValueError("a pattern is defined in __main__, which other processes do not have: use a module")
            for number, kernel in enumerate(call.kernels()):
                tasks.setdefault(kernel.key, (kernel.plans, kernel.name, text, number))
        for _, name, text, number in sorted(tasks.values(), key=lambda task: task[0]):
            self._results.append(self._threads.submit(self._compile, name, text, number))

    def wait(self) -> list[str]:
        """Waits for all of it. Kernels that could not be compiled, and why."""
        results, self._results = self._results, []
        return [failure for failure in (result.result() for result in results) if failure]

    def _compile(self, name: str, call: bytes, number: int) -> str:
        worker = self._idle.get()
        reason = worker.ask((name, call, number))
        if worker.broken and worker.answered and not self._closing:
            try:
                self._start()  # in its place, for the kernels to come
            except OSError as error:
                reason += f"; no other could be started: {error}"
                self._idle.put(worker)  # which says so for each of them
        else:
            self._idle.put(worker)
        return f"{name}: {reason}" if reason else ""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing = True
        for result in self._results:
            result.cancel()
        for worker in self._all:
            worker.close()
        end = time.monotonic() + _PATIENCE
        for worker in self._all:
            worker.wait(max(0.0, end - time.monotonic()))
        self._threads.shutdown()
        for worker in self._all:
            worker.free()


class _Worker:
    """One process. It ends by itself when its input does, so also with the process that started it."""

    def __init__(self) -> None:
        # Kernels come one at a time, so its compilers need no processes of their own.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `free`
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.broken = self.answered = False
        self._send(_settings())

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended: `ask` says so
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def ask(self, task: tuple[str, bytes, int]) -> str:
        """Why a kernel could not be compiled; "" if it was."""
        assert self.process.stdout is not None
        self._send(task)
        try:
            reason = str(pickle.load(self.process.stdout))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            self.broken = True
            return self._last_words()
        self.answered = True
        return reason

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with code {code}" + (f": {lines[-1][:300]}" if lines else "")

    def close(self) -> None:
        """Has nothing more to do: it ends once it has finished its kernel."""
        assert self.process.stdin is not None
        with suppress(OSError):  # of what was still to be written
            self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Waits for its end, not for ever. Files that a compiler is writing would be cut short."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def free(self) -> None:
        """Closes the other ends of its streams."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


# ---- in the process --------------------------------------------------------------------------------------------------


def serve() -> None:
    """Compiles what comes in on standard input, until it ends."""
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever compilers print
    _set(pickle.load(source))
    while True:
        try:
            name, call, number = pickle.load(source)
        except EOFError:
            os._exit(0)  # taking down the interpreter and a GPU's context would keep the other process waiting
        pickle.dump(_compiled(name, call, number), answers)
        answers.flush()


def _compiled(name: str, call: bytes, number: int) -> str:
    """Why a kernel could not be compiled; "" if it was."""
    try:
        device, kernels = _kernels(call)
        kernel = kernels[number]
        if kernel.name != name:
            raise RuntimeError(f"kernel {number} is {kernel.name} in this process")
        kernel.compile(device)
    except Exception as error:  # compilers fail in many ways
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:300]}"
    return ""


@lru_cache(maxsize=64)
def _kernels(call: bytes) -> tuple[torch.device, list[ListedKernel]]:
    recorded: RecordedCall = pickle.loads(call)
    return recorded.device, recorded.kernels()
