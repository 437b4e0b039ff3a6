"""Memory over many calls of ever-new specs, layouts and shapes: ``python -m benchmarks.memory [--calls 3000]``.

What mmflex keeps between calls is bounded: the process must not grow once its caches are full. Prints resident memory
as the calls go by and writes JSON; the growth is that of the second half.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from pathlib import Path
from typing import Any

import torch

import mmflex
from mask_builders import AShape, BlockTopK, Grid, QBoundary, VerticalSlash


def resident_mb() -> float:
    """Resident memory of this process in MB (Linux)."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def call(number: int) -> None:
    """One call with a spec, a layout and a shape that no other call has."""
    generator = torch.Generator().manual_seed(number)
    frames, words = 4 + number % 13, 60 + number % 97
    layout = mmflex.TokenLayout.from_segments([("text", words), ("video", (frames, 4, 5)), ("text", 30 + number % 7)])
    spec = [
        VerticalSlash(10 + number % 301, 16 + number % 47),
        Grid(7 + number % 211, rows=number % 3 == 0, local=16 + number % 59),
        QBoundary({"video": AShape(number % 83, 1 + number), "text": BlockTopK(1 + number % 5, 16)}),
        AShape(number, 17 + number),
    ]
    q, k, v = (torch.randn(1, h, layout.length, 16, generator=generator) for h in (4, 2, 2))
    if number % 2:
        mmflex.attention(q, k, v, spec, layout=layout, backend="reference")
    else:  # layouts of text are kept by mmflex itself
        mmflex.attention(q, k, v, [spec[0], spec[3]] * 2, backend="reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    marks: list[dict[str, Any]] = []
    for number in range(args.calls):
        call(number)
        if (number + 1) % max(1, args.calls // 10) == 0:
            marks.append({"calls": number + 1, "resident_mb": resident_mb()})
            print(f"{number + 1:6} calls {marks[-1]['resident_mb']:8.1f} MB", flush=True)
    half = marks[len(marks) // 2 - 1]
    growth = marks[-1]["resident_mb"] - half["resident_mb"]
    mmflex.clear_caches()
    cleared = resident_mb()
    print(f"second half: {growth:+.1f} MB; after clear_caches(): {cleared:.1f} MB")
    facts = {"torch": torch.__version__, "machine": platform.machine(), "marks": marks, "growth_mb": growth}
    args.json.write_text(json.dumps(facts | {"cleared_mb": cleared}, indent=1) + "\n")


if __name__ == "__main__":
    main()
