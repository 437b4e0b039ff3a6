"""What is trained on what: prompts with random gaps between their positions, and the losses."""

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decoder import Decoder, rms
from benchmarks.text_recipe import Text
from mmflex.evaluation import models, samples, videos
from mmflex.evaluation import vocabulary as ids
from mmflex.evaluation.pixels import TILE
from mmflex.evaluation.vocabulary import SIZE

CUTS = 16
"""Cuts that a run draws for each task and length; their tables stay on the device."""


def _gaps(batch: int, segments: int, widest: int, generator: torch.Generator) -> Tensor:
    """Random jumps of up to ``widest`` positions in front of each segment, int64 ``[batch, segments]``.

    So the model cannot count on distances between segments and works at lengths that it was not trained on. A fifth of
    the prompts have none, as in evaluation. The questions, the last segment, also move back.
    """
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    wide, small = uniform(segments) * widest, torch.exp(uniform(segments) * math.log(max(widest / 4, 1.0))) - 1
    gaps = torch.where(uniform(segments) < 0.5, wide, small)
    gaps[:, -1] = (2 * uniform() - 1) * widest
    gaps = torch.where(uniform(segments) < 0.3, 0, gaps)
    return torch.where(uniform(1) < 0.2, 0, gaps).long()


class Vision:
    """V-NIAH and MM-NIAH in turn, for Qwen2.5-VL.

    Losses (weights): the answers (1); the next frame's pixels in the same cell, which makes heads look along cells
    (0.3); which glyph a tile shows, from its vision embedding (0.3); after layer 2, at a needle's value which key it
    belongs to, and at a question which key is asked for (0.3); the next token of running text (0.1). The read-outs use
    the token embeddings, so that a glyph comes to mean its token. Without the read-out at the questions what they ask
    for is lost: token embeddings are small beside what layer 1 adds, and nothing is ever retrieved.
    """

    kind = "vision"
    tasks = samples.VISION
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    far = (4, 8, 16, 32, 32, 32)
    widest = (512, 1024, 2048, 2048, 2048, 2048)
    questions = ((6,), (6, 8), (8, 12), (8, 12), (8, 12), (8, 12, 16))
    patience = 0.2
    weights = {"answer": 1.0, "pixels": 0.3, "glyph": 0.3, "key": 0.3, "text": 0.1}  # noqa: RUF012

    def __init__(self, model: Any, generator: torch.Generator, seed: int, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.generator, self.dtype = model, generator, dtype
        self.choose, self.gap = random.Random(seed), self.widest[0]
        self.decoder = Decoder(model.model.language_model, dtype, compiled)
        self.pixels = nn.Linear(model.config.text_config.hidden_size, TILE).to(generator.device)
        self.extra = list(self.pixels.parameters())
        self.cuts = [
            [
                videos.cut(task, length, self.choose.choice(self.questions[level]), self.choose)
                for task in self.tasks
                for _ in range(CUTS)
            ]
            for level, length in enumerate(self.lengths)
        ]

    def draw(self, level: int, batch: int, reached: int) -> videos.Sample:
        """A batch of prompts as long as those of a level, with the needles and gaps of the level that is reached."""
        self.gap = self.widest[reached]
        return videos.draw(self.choose.choice(self.cuts[level]), batch, self.generator, far=self.far[reached])

    def kinds_of(self, sample: videos.Sample) -> tuple[str, ...]:
        """The kinds of the questions, the same for all prompts of a batch."""
        return sample.cut.kinds

    def embed(self, sample: videos.Sample) -> tuple[Tensor, Tensor]:
        """Input embeddings ``[B, N, hidden]`` and those of the tiles among them ``[B, V, hidden]``, float32.

        The vision tower of depth 0 without its bookkeeping: patch projection, norm, merging MLP.
        """
        visual, index, dtype = self.model.model.visual, sample.index, self.dtype
        batch, tiles = sample.tiles.shape[:2]
        weight = visual.patch_embed.proj.weight.flatten(1)
        patches = F.linear(sample.tiles.view(batch, tiles, 4, -1).to(dtype), weight.to(dtype))
        merger = visual.merger
        x = (rms(patches) * merger.ln_q.weight).flatten(2).to(dtype)
        up, down = merger.mlp[0], merger.mlp[2]
        x = F.gelu(F.linear(x, up.weight.to(dtype), up.bias.to(dtype)))
        shown = F.linear(x, down.weight.to(dtype), down.bias.to(dtype)).float()
        table = self.model.model.language_model.embed_tokens.weight
        embedded = F.embedding(sample.tokens, table)
        return embedded.index_copy(1, index.vision, shown), shown

    def losses(self, sample: videos.Sample, gaps: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, and which answers are right, bool ``[B, Q]``."""
        index, batch = sample.index, len(sample.tokens)
        embedded, shown = self.embed(sample)
        positions = index.positions[:, None].expand(-1, batch, -1)
        if gaps:
            shift = _gaps(batch, 2 * len(sample.cut.runs) + 1, self.gap, self.generator).cumsum(1)
            positions = positions + shift[:, index.segment]
        stages = self.decoder(embedded, positions)
        table = self.model.model.language_model.embed_tokens.weight.to(self.dtype)

        def read(h: Tensor, names: Tensor = table) -> Tensor:
            return F.linear(h.to(self.dtype), names).float()

        def entropy(logits: Tensor, right: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1), right.flatten())

        def at(h: Tensor, places: Tensor) -> Tensor:
            return h.gather(1, places[..., None].expand(-1, -1, h.shape[-1]))

        last, middle = stages[-1], stages[min(1, len(stages) - 2)]
        answers = read(last.index_select(1, index.rows))
        ahead = F.linear(
            last.index_select(1, index.vision[index.before]).to(self.dtype),
            self.pixels.weight.to(self.dtype),
            self.pixels.bias.to(self.dtype),
        )
        glyph = read(rms(at(shown, sample.glyph_places)), table[ids.KEYS : ids.KEYS + 2 * SIZE])
        asked = index.rows.expand(batch, -1)
        keyed = torch.cat([index.vision[sample.value_places], sample.fact_places, asked], 1)
        keys = torch.cat([sample.value_keys, sample.fact_keys, sample.tokens.gather(1, asked) - ids.KEYS], 1)
        key = read(rms(at(middle, keyed)), table[ids.KEYS : ids.KEYS + SIZE])
        losses = {
            "answer": entropy(answers, sample.answers),
            "pixels": F.mse_loss(ahead.float(), sample.tiles[:, index.after]),
            "glyph": entropy(glyph, sample.glyph_names),
            "key": entropy(key, keys),
        }
        if sample.cut.kinds.count("text"):
            following = sample.tokens[:, index.predicted + 1]
            losses["text"] = entropy(read(last.index_select(1, index.predicted)), following)
        return losses, answers.argmax(-1) == sample.answers


RECIPES: dict[str, Any] = {recipe.kind: recipe for recipe in (Vision, Text)}


@torch.no_grad()
def _initialise(model: Any) -> None:
    """Larger token embeddings and smaller layer outputs than transformers' own: what a token is stays visible beside
    what the layers add, and retrieval appears in half the time."""
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.normal_(std=0.05)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(0.35)


def start(kind: str, device: str, seed: int, *, tiny: bool, compiled: bool, weights: str | None = None) -> Any:
    """A recipe with a model in training mode on a device.

    Args:
        kind: "vision" or "text".
        device: "cuda" or "cpu".
        seed: of the weights and of the training prompts.
        tiny: a model of hidden size 64, for tests.
        compiled: compile the layers.
        weights: a folder to go on from.
    """
    torch.manual_seed(seed)
    if weights is not None:
        model = models.restore(kind, weights, device=device)
    else:
        model = models.build(kind, **({"hidden": 64, "layers": 2} if tiny else {}))
        _initialise(model)
    model = model.to(device).train()
    dtype = torch.bfloat16
    return RECIPES[kind](model, samples.training_generator(seed, device), seed, dtype, compiled)
