"""Queries of earlier chunks, for the estimates of later ones.

Patterns estimate by the last queries of a modality. The last of a prompt so far may lie in an earlier chunk: a chunk of
video frames has no text, and the question behind a film may have fewer than 64 tokens. So the last ones of every
modality are remembered from chunk to chunk, and every chunk selects what a prompt that ended there would. The last
chunk thereby selects what the whole prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmflex.compiler.program import Program

from .batch import Run


@dataclass
class Carried:
    """Attributes:
    queries: [1, Hq, L, D] of one layer. numbers: int [L], which tokens of the prompt they are, ascending.
    end: tokens of the prompt so far.
    """

    queries: Tensor
    numbers: np.ndarray
    end: int


def last_q(program: Program) -> int:
    """By how many queries the patterns of a program estimate."""
    return max((int(getattr(estimator, "last_q", 0)) for estimator, _, _ in program.estimates), default=0)


def _last_of_each(kinds: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """Of token numbers, ascending, the last ``count`` of every modality."""
    found = [numbers[kinds[numbers] == kind][-count:] for kind in np.unique(kinds[numbers])]
    return np.sort(np.concatenate(found)) if found else numbers


def estimate_from(run: Run, layer: int, q: Tensor, program: Program) -> tuple[Tensor, np.ndarray] | None:
    """The queries that a chunk of one layer estimates by and their token numbers; None where its own q [1, Hq, M, D]
    have them all. Remembers those that later chunks will want."""
    prompt, layout, count = run.prompt, run.layout, last_q(program)
    if prompt is None or layout is None or not count or not prompt.features:
        return None
    before: Carried | None = prompt.carried.pop(layer, None)
    if before is not None and before.end != run.start:
        before = None  # computed again from an earlier token on
    if before is None and run.end >= len(prompt.ids or ()):
        return None  # one chunk, or the last one behind a cached prefix
    earlier = np.empty(0, np.int64) if before is None else before.numbers
    key = (count, earlier.tobytes())
    if run.wanted is None or run.wanted[0] != key:  # the same in every layer
        kinds = layout.modality[0]
        numbers = _last_of_each(kinds, np.concatenate([earlier, np.arange(run.start, run.end)]), count)
        old = torch.as_tensor(np.searchsorted(earlier, numbers[numbers < run.start])).to(q.device)
        new = torch.as_tensor(numbers[numbers >= run.start] - run.start).to(q.device)
        run.wanted = (key, numbers, old, new)
    _, numbers, old, new = run.wanted
    parts = (
        [q.index_select(2, new)] if before is None else [before.queries.index_select(2, old), q.index_select(2, new)]
    )
    queries = torch.cat(parts, dim=2)
    if run.end < len(prompt.ids or ()):
        prompt.carried[layer] = Carried(queries, numbers, run.end)
    return (queries, numbers) if len(old) else None
