"""Prompts of the evaluation, by task, length and seed.

    v-niah      questions about needles in one long video
    mm-niah     the same with a quarter of the tokens text between videos, and needles in either
    retrieval   text only: facts in filler, with facts nobody asks for (as RULER's NIAH)
    tracking    text only: chains of assignments, asked at their end (as RULER's variable tracking)

A seed fully determines a batch on a CPU. `prompts` draws from odd seeds of torch's generator and training from even
ones (`training_generator`), so no prompt of the evaluation was trained on.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mmflex.evaluation import texts, videos

TASKS = ("v-niah", "mm-niah", "retrieval", "tracking")
VISION = ("v-niah", "mm-niah")


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts of equal length with Q questions each.

    Attributes:
        inputs: what ``model(**inputs)`` takes.
        rows: int64 ``[B, Q]``: the token whose next-token logits answer question j.
        answers: int64 ``[B, Q]``: the right token ids.
        kinds: ``[B][Q]``: "near", "far", "text", "retrieval", "hops-1" or "hops-2".
        depths: float32 ``[B, Q]``: where the needle's value is in the prompt, 0 (start) to 1.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    answers: Tensor
    kinds: tuple[tuple[str, ...], ...]
    depths: Tensor


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**30:
        raise ValueError(f"seed {seed} is not from 0 to {2**30 - 1}")
    return seed


def evaluation_generator(seed: int) -> torch.Generator:
    """Randomness for an evaluation batch, drawn on the CPU: the generator's odd seeds."""
    return torch.Generator().manual_seed(2 * _checked(seed) + 1)


def training_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Randomness for a training run: the generator's even seeds."""
    return torch.Generator(device).manual_seed(2 * _checked(seed))


def prompts(
    task: str,
    tokens: int,
    *,
    batch: int,
    questions: int,
    seed: int,
    device: torch.device | str = "cpu",
    depth: float | None = None,
) -> Prompts:
    """Draw a batch of evaluation prompts.

    Args:
        task: one of `TASKS`.
        tokens: length of a prompt; prompts have exactly this length.
        batch: B.
        questions: Q; the kinds of questions take turns.
        seed: determines the batch, 0 to 2^30 - 1. Drawn on the CPU, whatever the device.
        device: where the tensors go.
        depth: where the needles that are asked for are, 0 (start) to 1 (end), as near as other needles, the ends of
            videos and the rest of their chains allow; None: anywhere.

    Raises:
        ValueError: an unknown task, a depth or seed out of range, or more questions than fit into the prompt.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} is not from 0 to 1")
    if batch < 1 or questions < 1:
        raise ValueError(f"batch {batch} and questions {questions} must be at least 1")
    generator = evaluation_generator(seed)
    sample: texts.Sample | videos.Sample
    if task not in VISION:
        sample = texts.draw(texts.cut(task, tokens, questions), batch, generator, depth=depth)
        inputs = texts.processed(sample)
    else:
        cut = videos.cut(task, tokens, questions, random.Random(f"{task} {tokens} {seed}"))
        sample = videos.draw(cut, batch, generator, depth=depth)
        inputs = videos.processed(sample)
    return Prompts(
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        rows=sample.index.rows.expand(batch, -1).to(device),
        answers=sample.answers.to(device),
        kinds=(sample.cut.kinds,) * batch,
        depths=sample.depths.to(device),
    )
