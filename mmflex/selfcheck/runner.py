"""Spreads checks over processes: compiling kernels takes the time, and each process compiles on one core."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from ..runtime.backends import BACKENDS, why_not
from .groups import GROUPS
from .jobs import Job, Options
from .report import Report, cores, facts

JOB_SECONDS = 900
"""A process that has not answered for so long is ended."""

MOST_WORKERS = 16
"""Each holds a few GiB of memory, on a GPU too."""

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called with how many checks are done, how many there are, and the last one's row."""


def check(
    *,
    device: str = "auto",
    backends: Sequence[str] | None = None,
    long: bool = False,
    thorough: bool = False,
    only: str = "",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Is mmflex right on this machine?

    Runs every kind of launch on every backend that can run here, with the lowering forced, and compares output,
    log-sum-exp and block lists with token masks and float64 softmax that do not go through the compiler; then sampled
    rows of long prompts, values that are not finite, and calls in a row. ``mmflex check`` prints what it finds.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        backends: names; None for all that can run on the device.
        long: also prompts of a million tokens, on a GPU with 80 GB or more.
        thorough: every work with every kind of prompt on every backend: several times as many kernels.
        only: checks whose group or name contains this.
        workers: processes; None for one a core, at most 16.
        progress: called after every check.

    Returns:
        A report: ``ok``, ``rows``, ``facts``; ``str()`` of it is a table, ``save(path)`` writes JSON.

    Raises:
        ValueError, RuntimeError: a backend or device that is unknown, or cannot run here.
    """
    begin = time.perf_counter()
    options = _options(device, backends, long, thorough)
    jobs = [job for group in GROUPS.values() for job in group.jobs(options)]
    jobs = [job for job in jobs if only in f"{job.group}, {job.name}"]
    if not jobs:
        raise ValueError(f"only={only!r} names no check: parts of names are, for example, 'lowerings' or 'residues'")
    batches = _batches(jobs)
    count = min(workers or min(MOST_WORKERS, cores()), len(batches))
    rows = _run(batches, count, options.device, len(jobs), progress)
    order = {(job.group, job.name): number for number, job in enumerate(jobs)}
    rows.sort(key=lambda row: order[row["group"], row["name"]])
    return Report(rows, {**facts(options.device), "workers": count, "seconds": round(time.perf_counter() - begin, 1)})


def _options(device: str, backends: Sequence[str] | None, long: bool, thorough: bool) -> Options:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}: use 'auto', 'cpu' or 'cuda'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device is 'cuda', but PyTorch sees no CUDA device here")
    for name in backends or ():
        reason = why_not(name, device, 64, torch.bfloat16)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    can = [name for name in BACKENDS if why_not(name, device, 64, torch.bfloat16) is None]
    return Options(device, tuple(backends or can), long, thorough)


def _batches(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs that share kernels together; what takes longest first."""
    shared: dict[Any, list[Job]] = {}
    for number, job in enumerate(jobs):
        shared.setdefault(job.kernels or number, []).append(job)
    return sorted(shared.values(), key=lambda batch: -max(job.weight for job in batch))


def _run(
    batches: list[list[Job]], workers: int, device: str, total: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """Rows of all jobs, in the order in which they are done."""
    waiting: queue.SimpleQueue[list[Job]] = queue.SimpleQueue()
    for batch in batches:
        waiting.put(batch)
    rows: list[dict[str, Any]] = []
    lock, stop = threading.Lock(), threading.Event()

    def done(job: Job, answer: dict[str, Any]) -> None:
        row = {"group": job.group, "name": job.name, **job.settings, **answer}
        with lock:
            rows.append(row)
            if progress is not None:
                progress(len(rows), total, row)

    def work() -> None:
        with contextlib.closing(_Process(device, max(1, cores() // workers))) as process:
            while not stop.is_set():
                try:
                    batch = waiting.get_nowait()
                except queue.Empty:
                    return
                for job in batch:
                    if not stop.is_set():
                        done(job, process.ask(job))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:  # the user's interrupt
        stop.set()
        _Process.end_all()
        raise
    return rows


class _Process:
    """A worker process, begun anew where it has died."""

    _alive: set[subprocess.Popen[str]] = set()  # noqa: RUF012

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)

    def ask(self, job: Job) -> dict[str, Any]:
        """What the process answers; a verdict of its own where it does not."""
        if self.process is None:
            self.process = self._begun()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(JOB_SECONDS, process.kill)
        timer.start()
        try:
            print(json.dumps({"group": job.group, "settings": job.settings, "device": self.device}),
                  file=process.stdin, flush=True)  # fmt: skip
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if line:
            return json.loads(line)
        status = process.wait()
        self._forget()
        reason = f"no answer in {JOB_SECONDS} s" if late else f"its process ended with status {status}"
        unknown = dict.fromkeys(("seconds", "cpu_seconds", "kernels"))
        return {"verdict": f"FAILED: {reason}; {self._last_words()}", **unknown}

    def _begun(self) -> subprocess.Popen[str]:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        ours = {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment = {**os.environ, **threads, **ours}
        command = [sys.executable, "-m", "mmflex.selfcheck.worker"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment)
        self._alive.add(process)
        return process

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read()[-600:].strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _forget(self) -> None:
        if self.process is not None:
            self._alive.discard(self.process)
            self.process = None

    def close(self) -> None:
        process = self.process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            self._forget()
        self.errors.close()

    @classmethod
    def end_all(cls) -> None:
        for process in tuple(cls._alive):
            process.kill()
