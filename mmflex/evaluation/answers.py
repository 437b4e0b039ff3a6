"""The answers of a method as they come in, by question; and prompts in parts that fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .methods import Fitted
from .report import Row, Score
from .samples import Prompts


class Answers:
    """What one method answered at one task and length.

    Attributes:
        right: per question. kinds, depths, seeds: of the questions; depths as numbers of ``bins`` parts of the prompt.
        fitted, ran: the setting, and the density of what ran (mean over layers and heads); per seed.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.right: list[bool] = []
        self.kinds: list[str] = []
        self.depths: list[int] = []
        self.seeds: list[int] = []
        self.fitted: list[Fitted] = []
        self.ran: list[float] = []

    def add(self, asked: Prompts, logits: Tensor, seed: int) -> None:
        """logits [B, Q, vocabulary] at the questions of some prompts."""
        self.right += (logits.argmax(-1) == asked.answers.to(logits.device)).flatten().tolist()
        self.kinds += [kind for prompt in asked.kinds for kind in prompt]
        self.depths += (asked.depths.float() * self.bins).long().clamp(0, self.bins - 1).flatten().tolist()
        self.seeds += [seed] * asked.answers.numel()

    def row(
        self, dense: Answers, *, method: str, label: str, target: float | None, task: str, tokens: int, backend: str
    ) -> Row:
        """What is reported of them, beside the answers of dense attention to the same questions."""
        by_depth = self._by(self.depths)
        pairs = list(zip(dense.right, self.right, strict=True))

        def mean(name: str) -> float:
            return sum(getattr(f.measured, name) for f in self.fitted) / len(self.fitted)

        return Row(
            method=method,
            label=label,
            settings=tuple(f.setting.text for f in self.fitted),
            task=task,
            tokens=tokens,
            target=target,
            over=any(f.over for f in self.fitted),
            backend=backend,
            planned=mean("density"),
            ran=sum(self.ran) / len(self.ran),
            pairs=mean("pairs"),
            error=mean("error"),
            estimates=mean("estimates"),
            score=Score.of(self.right),
            kinds=self._by(self.kinds),
            depths=tuple(by_depth.get(i, Score(0, 0)) for i in range(self.bins)),
            seeds={str(seed): score for seed, score in self._by(self.seeds).items()},
            lost=sum(here and not there for here, there in pairs),
            gained=sum(there and not here for here, there in pairs),
        )

    def _by(self, keys: Sequence[Any]) -> dict[Any, Score]:
        found: dict[Any, list[bool]] = defaultdict(list)
        for key, right in zip(keys, self.right, strict=True):
            found[key].append(right)
        return {key: Score.of(found[key]) for key in sorted(found)}


def split(asked: Prompts, most: int) -> list[Prompts]:
    """Prompts in parts of at most ``most``. Inputs hold prompt after prompt, with as many rows for each."""
    batch = len(asked.rows)
    if batch <= most:
        return [asked]
    for name, tensor in asked.inputs.items():
        if len(tensor) % batch:
            raise ValueError(f"{name} has {len(tensor)} rows for {batch} prompts, which can't be split: use prompts=1")

    def part(tensor: Tensor, first: int) -> Tensor:
        rows = len(tensor) // batch
        return tensor[first * rows : (first + most) * rows]

    return [
        Prompts(
            inputs={name: part(tensor, first) for name, tensor in asked.inputs.items()},
            rows=part(asked.rows, first),
            answers=part(asked.answers, first),
            kinds=asked.kinds[first : first + most],
            depths=part(asked.depths, first),
        )
        for first in range(0, batch, most)
    ]
