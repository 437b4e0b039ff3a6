"""How the text model is trained: retrieval and variable tracking, read out layer by layer."""

import random
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decoder import Decoder, rms
from mmflex.evaluation import texts
from mmflex.evaluation import vocabulary as ids
from mmflex.evaluation.vocabulary import SIZE

JUMPS = 8
"""Gaps in the positions of a prompt, on average."""


def jumps(sample: texts.Sample, widest: int, generator: torch.Generator) -> Tensor:
    """Positions with random gaps of up to ``widest`` in front of some lines and of the questions, int64 ``[B, N]``.

    So the model cannot count on distances and works at lengths that it was not trained on. A fifth of the prompts have
    none, as in evaluation.
    """
    batch, length = sample.tokens.shape
    device, slots = sample.tokens.device, len(sample.index.slots)
    chance, size, some = (
        torch.rand(batch, width, generator=generator, device=device) for width in (slots + 1, slots + 1, 1)
    )
    chance[:, -1] = 0
    gaps = torch.where((chance < JUMPS / slots) & (some >= 0.2), size * widest, 0).long()
    return torch.arange(length, device=device) + gaps.cumsum(1)[:, sample.index.segment]


class Text:
    """Retrieval and variable tracking in turn, for Qwen2; between the first two lengths the longest chains alone.

    Losses (weights): the answers (1); the next token of running text (0.1); and read-outs of the residual stream
    (0.3 each), which put every step of a chain into a layer of its own:

        assigned   after layer 2, at the end of each line: the name that the line assigns
        asked      after layer 2, at each question and at the end of each copy: the name whose value is wanted there
        value      after layer 2, at the end of each fact or first line: its value
        hop-j      after layer 2 + j, at the end of each j-th copy: the value of its chain

    Each layer from the third on then has both sides of a match and what it shall fetch. The end of a copy needs two
    names at once, so assigned names have a table of their own; the other read-outs use the token embeddings. Without
    them what is asked for is lost in the first layer: token embeddings are small beside what it adds.
    """

    kind = "text"
    tasks = ("retrieval", "tracking")
    lengths = (256, 256, 512, 1024, 2048, 4096, 8192)
    widest = (512, 512, 1024, 2048, 4096, 4096, 4096)
    patience = 0.3
    questions = (6, 6, 8, 12, 16, 16, 20)
    weights = {  # noqa: RUF012
        "answer": 1.0,
        "assigned": 0.3,
        "asked": 0.3,
        "value": 0.3,
        **{f"hop-{hop}": 0.3 for hop in range(1, texts.HOPS + 1)},
        "text": 0.1,
    }

    def __init__(self, model: Any, generator: torch.Generator, seed: int, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.generator, self.dtype = model, generator, dtype
        self.choose, self.gap = random.Random(seed), self.widest[0]
        self.decoder = Decoder(model.model, dtype, compiled)
        self.names = nn.Linear(model.config.hidden_size, SIZE, bias=False).to(generator.device)
        self.extra = list(self.names.parameters())
        self.cuts = [
            [texts.cut(task, length, questions) for task in self.tasks]
            for length, questions in zip(self.lengths, self.questions, strict=True)
        ]
        # A layer that learns to answer short chains is too early for the longest ones, which are then not learned
        # beside them; by themselves, once there is such a layer, they move it back in half a minute.
        tracking = self.cuts[1][1]
        self.cuts[1] = [replace(tracking, kinds=(f"hops-{texts.HOPS}",) * len(tracking.kinds))]

    def draw(self, level: int, batch: int, reached: int) -> texts.Sample:
        """A batch of prompts as long as those of a level, with the gaps of the level that is reached."""
        self.gap = self.widest[reached]
        return texts.draw(self.choose.choice(self.cuts[level]), batch, self.generator)

    def kinds_of(self, sample: texts.Sample) -> tuple[str, ...]:
        """The kinds of the questions, the same for all prompts of a batch."""
        return sample.cut.kinds

    def embed(self, sample: texts.Sample) -> Tensor:
        """Input embeddings ``[B, N, hidden]``, float32."""
        return F.embedding(sample.tokens, self.model.model.embed_tokens.weight)

    def losses(self, sample: texts.Sample, gaps: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, and which answers are right, bool ``[B, Q]``."""
        index, (batch, length) = sample.index, sample.tokens.shape
        if gaps:
            positions = jumps(sample, self.gap, self.generator)
        else:
            positions = torch.arange(length, device=sample.tokens.device).expand(batch, -1)
        stages = self.decoder(self.embed(sample), positions)
        table = self.model.model.embed_tokens.weight.to(self.dtype)
        keys, values = table[ids.KEYS : ids.KEYS + SIZE], table[ids.VALUES : ids.VALUES + SIZE]

        def after(layer: int, places: Tensor) -> Tensor:
            """The residual stream after a layer, normalised, ``[B, places, hidden]``."""
            h = stages[min(layer, len(stages) - 1) - 1]
            return rms(h.gather(1, places[..., None].expand(-1, -1, h.shape[-1])))

        def entropy(h: Tensor, names: Tensor, right: Tensor) -> Tensor:
            logits = F.linear(h.to(self.dtype), names).float()
            return F.cross_entropy(logits.flatten(0, 1), right.flatten())

        rows = index.rows.expand(batch, -1)
        wanted = torch.cat([rows, sample.places[..., 1:].flatten(1)], 1)
        wanted_names = torch.cat([sample.tokens.gather(1, rows) - ids.KEYS, sample.names[..., :-1].flatten(1)], 1)
        last = stages[-1]
        answers = F.linear(last.index_select(1, index.rows).to(self.dtype), table).float()
        losses = {
            "answer": F.cross_entropy(answers.flatten(0, 1), sample.answers.flatten()),
            "assigned": entropy(
                after(2, sample.places.flatten(1)), self.names.weight.to(self.dtype), sample.names.flatten(1)
            ),
            "asked": entropy(after(2, wanted), keys, wanted_names),
            "text": entropy(last.index_select(1, index.predicted), table, sample.tokens[:, index.predicted + 1]),
        }
        for hop in range(sample.cut.links):
            name = f"hop-{hop}" if hop else "value"
            losses[name] = entropy(after(2 + hop, sample.places[..., hop]), values, sample.values)
        return losses, answers.argmax(-1) == sample.answers
