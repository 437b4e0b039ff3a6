"""Retrieval and variable tracking: needles in running text, in the manner of RULER.

A prompt is one piece of running text, runs of counters, with lines of three tokens hidden in it:

    retrieval   ``FACT key value``; asked is the value of a key
    tracking    ``SET x0 value``, later ``COPY x1 x0``, later ``COPY x2 x1``; asked is the value of a copy: of x1
                ("hops-1") or x2 ("hops-2")

It ends with questions, ``QUESTION key``, answered at the key. Every question is about a chain of its own (a fact is a
chain of one line). Distractors: chains that nobody asks for, and names in the filler that get no value there. Names and
values of a prompt are all different, so every question has one answer.

Prompts of a batch differ in everything but their length and kinds of questions. Nothing here loops over tokens, lines
or prompts, or waits for the device, so training can draw its prompts there.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mmflex.evaluation import vocabulary as ids
from mmflex.evaluation.vocabulary import SIZE

HOPS = 2
"""Copies in a chain of variable tracking. Following one takes a layer."""
LINES = 32
"""Lines that a prompt has room for at most, if its questions need no more."""
MENTIONS = 8
"""Names that stand in the filler, at most."""
_KINDS = {"retrieval": ("retrieval",), "tracking": tuple(f"hops-{hop}" for hop in range(1, HOPS + 1))}
_SLOT = 4  # tokens that a line takes, with one of filler


@dataclass(frozen=True)
class Cut:
    """What the prompts of a batch have in common.

    Attributes:
        task: "retrieval" or "tracking".
        tokens: length of a prompt.
        kinds: per question: "retrieval", or "hops-1" to "hops-2".
        chains: asked and unasked ones.
        mentions: names in the filler.
    """

    task: str
    tokens: int
    kinds: tuple[str, ...]
    chains: int
    mentions: int

    @property
    def links(self) -> int:
        """Lines of a chain."""
        return HOPS + 1 if self.task == "tracking" else 1

    @property
    def hops(self) -> tuple[int, ...]:
        """Copies between a question's name and the line that has its value."""
        return tuple(int(kind.removeprefix("hops-")) if self.task == "tracking" else 0 for kind in self.kinds)

    @property
    def length(self) -> int:
        """Tokens of running text with its lines, between ``BOS`` and the questions."""
        return self.tokens - 1 - 2 * len(self.kinds)


@dataclass(frozen=True)
class Index:
    """The tables of a cut, int64, on one device.

    Attributes:
        template: token ids ``[N]`` with zeros where the text and the questions' names go.
        text: places of the running text ``[L]``.
        predicted: places of text whose next token is text ``[L - 1]``.
        slots: places where a line can begin ``[S]``.
        rows: places of the questions' names ``[Q]``.
        asked: the lines that assign them, numbered chain by chain ``[Q]``.
        segment: number of the slot that a token is in ``[N]``; S for what is behind the last one.
        heads: ids of a line's first token, by link ``[links]``.
    """

    template: Tensor
    text: Tensor
    predicted: Tensor
    slots: Tensor
    rows: Tensor
    asked: Tensor
    segment: Tensor
    heads: Tensor


@dataclass(frozen=True)
class Sample:
    """A batch of B prompts, and what training may know about it. C chains of ``links`` lines, asked ones first.

    Attributes:
        cut, index: what the prompts share.
        tokens: ids ``[B, N]``.
        answers: token ids ``[B, Q]``; `depths` of the lines that have their values, 0 to 1 ``[B, Q]``.
        places: of the last token of each line, which is its value or source ``[B, C, links]``.
        names: numbers of the names that the lines assign ``[B, C, links]``; link j copies link j - 1.
        values: numbers of the chains' values ``[B, C]``.
    """

    cut: Cut
    index: Index
    tokens: Tensor
    answers: Tensor
    depths: Tensor
    places: Tensor
    names: Tensor
    values: Tensor


def cut(task: str, tokens: int, questions: int) -> Cut:
    """The cut of prompts of exactly ``tokens`` tokens.

    Args:
        task: "retrieval" or "tracking".
        tokens: length of a prompt.
        questions: how many are asked; kinds take turns.

    Raises:
        ValueError: there are not names or room enough for the lines that are asked for.
    """
    kinds = tuple(_KINDS[task][j % len(_KINDS[task])] for j in range(questions))
    links = HOPS + 1 if task == "tracking" else 1
    slots = (tokens - 1 - 2 * questions) // _SLOT
    # Twice the room of the lines asked for, and two more, so that they can be had at any depth.
    most, shortest = SIZE // links, (2 * links * questions + 2) * _SLOT + 2 * questions + 1
    if questions > most:
        raise ValueError(f"{questions} questions need more than {SIZE} names in {task}: ask at most {most}")
    if tokens < shortest:
        raise ValueError(f"{questions} questions of {task} need {shortest} tokens, more than {tokens}: ask fewer")
    chains = max(questions, min(LINES, slots // 2) // links)
    return Cut(task, tokens, kinds, chains, min(MENTIONS, (slots - chains * links) // 2))


@lru_cache(maxsize=1024)
def tables(cut: Cut, device: torch.device | str = "cpu") -> Index:
    """The tables of a cut."""
    slots = cut.length // _SLOT
    text = 1 + torch.arange(cut.length)
    template = torch.zeros(cut.tokens, dtype=torch.long)
    template[0] = ids.BOS
    rows = cut.length + 2 + 2 * torch.arange(len(cut.kinds))
    template[rows - 1] = ids.QUESTION
    asked = cut.links * torch.arange(len(cut.kinds)) + torch.tensor(cut.hops)
    segment = ((torch.arange(cut.tokens) - 1).clamp_min(0) // _SLOT).clamp_max(slots)
    heads = torch.tensor([ids.SET] + [ids.COPY] * HOPS if cut.task == "tracking" else [ids.FACT])
    parts = (template, text, text[:-1], 1 + _SLOT * torch.arange(slots), rows, asked, segment, heads)
    return Index(*(part.to(device) for part in parts))


def _slots(cut: Cut, score: Tensor, depth: float | None) -> tuple[Tensor, Tensor]:
    """Numbers of the slots of the lines ``[B, C, links]``, rising along a chain, and of the mentions ``[B, M]``.

    Args:
        cut: how many of each.
        score: random numbers from 0 to 1 ``[B, S]``; every selection takes the slots with the lowest ones.
        depth: where the asked chains begin. Their first lines are among the slots around there, their other lines
            anywhere behind, for which there is always room.
    """
    batch, number = score.shape
    if depth is None:
        order, asked = score.argsort(-1), score[:, :0].view(batch, 0, cut.links).long()
    else:
        questions, slot = len(cut.kinds), torch.arange(number, device=score.device)
        width, behind = questions + 2, 2 * questions * (cut.links - 1)
        low = round(depth * (number - width - behind))
        high = low + width
        first = (score + 2 * ((slot < low) | (slot >= high))).argsort(-1)[:, :questions]
        later = (score + 2 * (slot < high)).argsort(-1)[:, : questions * (cut.links - 1)]
        asked = torch.cat([first[..., None], later.view(batch, questions, -1).sort(-1).values], -1)
        order = score.scatter(1, asked.flatten(1), 2.0).argsort(-1)
    lines = (cut.chains - asked.shape[1]) * cut.links
    others = order[:, :lines].view(batch, -1, cut.links).sort(-1).values
    return torch.cat([asked, others], 1), order[:, lines : lines + cut.mentions]


def draw(cut: Cut, batch: int, generator: torch.Generator, *, depth: float | None = None) -> Sample:
    """Draw a batch of prompts on the generator's device.

    Args:
        cut: what they share.
        batch: B.
        generator: where the contents come from.
        depth: where the lines with the values that are asked for shall be, 0 (start) to 1 (end); None: anywhere.
    """
    device, index = generator.device, tables(cut, str(generator.device))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    def below(limit: int, *shape: int) -> Tensor:
        return (uniform(*shape) * limit).long()

    tokens = index.template.expand(batch, -1).clone()
    number = torch.arange(cut.length, device=device)
    start = torch.where((uniform(cut.length) < 1 / 16) | (number == 0), number, 0).cummax(1).values
    tokens[:, index.text] = ids.COUNTERS + (below(SIZE, cut.length).gather(1, start) + number - start) % SIZE

    slot, spare = _slots(cut, uniform(len(index.slots)), depth)
    begins, lines = index.slots[slot], cut.chains * cut.links
    names = uniform(SIZE).argsort(-1)[:, :lines].view(batch, cut.chains, cut.links)
    values = uniform(SIZE).argsort(-1)[:, : cut.chains]
    ends = torch.cat([ids.VALUES + values[..., None], ids.KEYS + names[..., :-1]], -1)
    for offset, content in enumerate((index.heads.expand_as(names), ids.KEYS + names, ends)):
        tokens.scatter_(1, (begins + offset).flatten(1), content.flatten(1))
    mentioned = names.flatten(1).gather(1, below(lines, cut.mentions))
    tokens.scatter_(1, index.slots[spare] + 1, ids.KEYS + mentioned)
    tokens[:, index.rows] = ids.KEYS + names.flatten(1)[:, index.asked]
    questions = len(cut.kinds)
    return Sample(
        cut=cut,
        index=index,
        tokens=tokens,
        answers=ids.VALUES + values[:, :questions],
        depths=(begins[:, :questions, 0] + 2).float() / (cut.tokens - 1),
        places=begins + 2,
        names=names,
        values=values,
    )


def processed(sample: Sample) -> dict[str, Tensor]:
    """A sample as a tokenizer would return it."""
    return {"input_ids": sample.tokens, "attention_mask": torch.ones_like(sample.tokens)}
