"""V-NIAH and MM-NIAH: needles in video, and in the text between its runs of frames.

A vision needle is a key glyph in one tile of a frame and its value glyph in the same tile of a later frame: the next
one (a *near* needle) or up to 32 frames on (a *far* one). A text needle is ``FACT key value``. The prompt ends with
questions, ``QUESTION key``; the answer is the needle's value. Distractors: glyphs that belong to no needle, half of the
lone keys being keys of needles, in tiles where no needle is; needles that nobody asks for; in text, keys of needles
without a value. The tile of a needle has no other needle, so every question has one answer.

A batch shares its *cut*: the shape of a frame, the runs of frames, the text between them. So nothing here loops over
tokens, frames or prompts, and training can draw 32 thousand tokens a step on the device.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mmflex.evaluation import vocabulary as ids
from mmflex.evaluation.pixels import NOISE, glyphs, videos
from mmflex.evaluation.vocabulary import SIZE

SHAPES = ((4, 4), (4, 5), (5, 4), (5, 5), (4, 6), (6, 4), (5, 6), (6, 6), (6, 8), (8, 6), (7, 7), (8, 8))
"""Tiles of a frame: rows and columns."""
FAR = 32
"""Most frames between the key and the value of a far needle."""
_KINDS = {"v-niah": ("near", "far"), "mm-niah": ("near", "far", "text")}
_SLOT = 4  # tokens that a fact in text may take


@dataclass(frozen=True)
class Cut:
    """What the prompts of a batch have in common.

    Attributes:
        rows, columns: tiles of a frame.
        runs: frames of each video.
        texts: tokens of text in front of each video, with the special ones (``BOS``, start and end of video).
        kinds: per question: "near", "far" or "text".
    """

    rows: int
    columns: int
    runs: tuple[int, ...]
    texts: tuple[int, ...]
    kinds: tuple[str, ...]

    @property
    def cells(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns

    @property
    def frames(self) -> int:
        """Frames of all videos together."""
        return sum(self.runs)

    @property
    def tokens(self) -> int:
        """Length of a prompt. The part after the last video has its end and the questions."""
        return sum(self.texts) + self.frames * self.cells + 1 + 2 * len(self.kinds)


@dataclass(frozen=True)
class Index:
    """The tables of a cut, int64, on one device: where things are in a prompt (0 to N - 1) or among its V tiles.

    Attributes:
        template: token ids ``[N]`` with zeros where the text goes.
        vision: places of the tiles ``[V]``.
        text: places of the running text ``[L]``; `begins`: whether a piece of text begins there, bool ``[L]``.
        predicted: places of text whose next token is text of the same piece ``[P]``.
        slots: places where a fact can begin ``[S]``.
        rows: places of the questions' keys ``[Q]``.
        positions: what the model's own ``get_rope_index`` gives ``[3, N]``.
        segment: number of the piece of text or video ``[N]``; the last is the questions'.
        low, high: per frame, the first frame of its video and the one after its last ``[T]``.
        before, after: pairs of tiles, the same cell in successive frames of a video ``[F]``.
    """

    template: Tensor
    vision: Tensor
    text: Tensor
    begins: Tensor
    predicted: Tensor
    slots: Tensor
    rows: Tensor
    positions: Tensor
    segment: Tensor
    low: Tensor
    high: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Sample:
    """A batch of B prompts, and what training may know about it.

    Attributes:
        cut, index: what the prompts share.
        tokens: ids ``[B, N]``.
        tiles: pixels ``[B, V, 192]``.
        answers: token ids ``[B, Q]``; `depths` of the needles, 0 to 1 ``[B, Q]``.
        glyph_places, glyph_names: all glyphs: place among the tiles, number (64 keys, then 64 values) ``[B, G]``.
        value_places, value_keys: values of vision needles: place among the tiles, number of the key ``[B, P]``.
        fact_places, fact_keys: values of text needles: place in the prompt, number of the key ``[B, F]``.
    """

    cut: Cut
    index: Index
    tokens: Tensor
    tiles: Tensor
    answers: Tensor
    depths: Tensor
    glyph_places: Tensor
    glyph_names: Tensor
    value_places: Tensor
    value_keys: Tensor
    fact_places: Tensor
    fact_keys: Tensor


def _parts(total: int, number: int, least: int, choose: random.Random) -> tuple[int, ...]:
    """``total`` as a sum of ``number`` random parts of at least ``least``."""
    spare = total - number * least
    cuts = sorted(choose.randint(0, spare) for _ in range(number - 1))
    return tuple(least + b - a for a, b in zip([0, *cuts], [*cuts, spare], strict=True))


def cut(
    task: str, tokens: int, questions: int, choose: random.Random, shapes: Sequence[tuple[int, int]] = SHAPES
) -> Cut:
    """Draw a cut of exactly ``tokens`` tokens.

    Args:
        task: "v-niah" (one video, less than a frame of text before it) or "mm-niah" (a quarter of the tokens is text,
            in front of and between 1 to 8 videos).
        tokens: length of a prompt.
        questions: how many are asked; kinds take turns.
        choose: where randomness comes from.
        shapes: frame shapes to choose from; those that leave too few frames or cells are passed over.

    Raises:
        ValueError: no shape leaves 8 frames and two cells for every vision needle that is asked for.
    """
    kinds = tuple(_KINDS[task][j % len(_KINDS[task])] for j in range(questions))
    needles = len(kinds) - kinds.count("text")
    tail, text = 1 + 2 * questions, tokens // 4 if task == "mm-niah" else 2
    fits = [(h, w) for h, w in shapes if h * w * 8 <= tokens - tail - text and 2 * needles <= h * w]
    if not fits:
        smallest = min(h * w for h, w in SHAPES)
        raise ValueError(
            f"{tokens} tokens and {questions} questions do not fit {task}: 8 frames of at least "
            f"{max(smallest, 2 * needles)} cells, {tail} tokens of questions and {text} of text; "
            f"ask at most {max(h * w for h, w in SHAPES) // 2} vision questions, or use longer prompts"
        )
    rows, columns = choose.choice(fits)
    frames = (tokens - tail - text) // (rows * columns)
    spare = tokens - tail - frames * rows * columns
    if task == "v-niah":
        return Cut(rows, columns, (frames,), (spare,), kinds)
    number = choose.randint(1, max(1, min(8, frames // 6, tokens // 256)))
    runs = _parts(frames, number, max(3, frames // (2 * number)), choose)
    return Cut(rows, columns, runs, _parts(spare, number, max(8, spare // (2 * number)), choose), kinds)


@lru_cache(maxsize=1024)
def tables(cut: Cut, device: torch.device | str = "cpu") -> Index:
    """The tables of a cut. Loops over videos, not over frames or tokens."""
    template, vision, text, begins, predicted, slots, positions, segment = ([] for _ in range(8))
    low, high, before, after = ([] for _ in range(4))
    place = at = tile = frame = number = 0

    def special(*tokens: int) -> None:
        nonlocal place, at
        template.append(torch.tensor(tokens))
        positions.append((at + torch.arange(len(tokens))).expand(3, -1))
        segment.append(torch.full((len(tokens),), number))
        place, at = place + len(tokens), at + len(tokens)

    for count, tokens in zip(cut.runs, cut.texts, strict=True):
        special(ids.VISION_END if frame else ids.BOS)
        length = tokens - 2
        text.append(place + torch.arange(length))
        begins.append(torch.arange(length) == 0)
        predicted.append(place + torch.arange(max(length - 1, 0)))
        slots.append(place + _SLOT * torch.arange(length // _SLOT))
        special(*[0] * length)
        special(ids.VISION_START)
        number += 1
        size = count * cut.cells
        vision.append(place + torch.arange(size))
        template.append(torch.full((size,), ids.VIDEO))
        grid = torch.meshgrid(torch.arange(count), torch.arange(cut.rows), torch.arange(cut.columns), indexing="ij")
        positions.append(at + torch.stack(grid).flatten(1))
        segment.append(torch.full((size,), number))
        before.append(tile + torch.arange(size - cut.cells))
        after.append(tile + torch.arange(cut.cells, size))
        low.append(torch.full((count,), frame))
        high.append(torch.full((count,), frame + count))
        number, place, tile, frame = number + 1, place + size, tile + size, frame + count
        at += max(cut.rows, cut.columns)
    special(ids.VISION_END)
    rows = place + 1 + 2 * torch.arange(len(cut.kinds))
    special(*[ids.QUESTION, 0] * len(cut.kinds))
    joined = (template, vision, text, begins, predicted, slots, [rows], positions, segment, low, high, before, after)
    return Index(*(torch.cat(parts, dim=-1).to(device) for parts in joined))


def draw(
    cut: Cut,
    batch: int,
    generator: torch.Generator,
    *,
    far: int = FAR,
    depth: float | None = None,
) -> Sample:
    """Draw a batch of prompts on the generator's device.

    Args:
        cut: what they share.
        batch: B.
        generator: where the contents come from.
        far: most frames between key and value of a far needle; at most half of all frames.
        depth: where the needles that are asked for shall be, 0 (start) to 1 (end); None: anywhere.
    """
    device, index = generator.device, tables(cut, str(generator.device))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    def below(limit: int | Tensor, *shape: int) -> Tensor:
        return (uniform(*shape) * limit).long()

    def shuffled(number: int) -> Tensor:
        return uniform(number).argsort(-1)

    seen = [kind for kind in cut.kinds if kind != "text"]
    told = len(cut.kinds) - len(seen)
    needles = max(len(seen), min(24, 3 * cut.cells // 8))
    facts = told + min(2, len(index.slots) - told) if told else 0
    mentions = min(8, (len(index.slots) - facts) // 2) if told else 0
    if told > len(index.slots):
        raise ValueError(f"{told} text needles in room for {len(index.slots)}: ask fewer, or use longer prompts")
    keys, values, cells = shuffled(SIZE), shuffled(SIZE), shuffled(cut.cells)

    # Vision needles, those that are asked for first. A needle lies within one video.
    far = min(far, max(2, cut.frames // 2))
    is_far = torch.arange(needles, device=device) % 2 == 1
    apart = torch.where(is_far, 2 + below(far - 1, needles), 1)
    frame = below(cut.frames, needles)
    if depth is not None:
        frame[:, : len(seen)] = round(depth * (cut.frames - 1))
    low, high = index.low[frame], index.high[frame]
    apart = torch.minimum(apart, high - low - 1)
    last = torch.maximum(frame, low + apart)
    home = cells[:, :needles]
    key_places = (last - apart) * cut.cells + home
    value_places = last * cut.cells + home

    # Lone glyphs, at most one each of keys and values in a frame, in cells where no needle is.
    lone = min(24, cut.frames // 2)
    own = (cut.cells - needles) // 2
    width = cut.frames // lone
    strata = width * torch.arange(lone, device=device) + below(cut.frames - width * lone + 1, 1)
    stray = strata + below(width, lone)
    stray_keys = stray * cut.cells + cells.gather(1, needles + below(own, lone))
    stray = strata + below(width, lone)
    stray_values = stray * cut.cells + cells.gather(1, needles + own + below(cut.cells - needles - own, lone))
    used = needles + facts
    which = torch.where(uniform(lone) < 0.5, below(used, lone), used + below(SIZE - used, lone))
    glyph_places = torch.cat([key_places, value_places, stray_keys, stray_values], 1)
    glyph_names = torch.cat(
        [keys[:, :needles], SIZE + values[:, :needles], keys.gather(1, which), SIZE + below(SIZE, lone)], 1
    )
    tiles = videos(batch, cut.frames, cut.rows, cut.columns, generator).flatten(1, 2)
    painted = glyphs(str(device))[glyph_names]
    tiles.scatter_(1, glyph_places[..., None].expand_as(painted), painted)
    tiles += NOISE * torch.randn(tiles.shape, generator=generator, device=device)

    # Text: runs of counters, facts and mentions in it, questions at the end.
    tokens = index.template.expand(batch, -1).clone()
    length = len(index.text)
    starts = (uniform(length) < 1 / 16) | index.begins
    start = torch.where(starts, torch.arange(length, device=device), 0).cummax(1).values
    count = below(SIZE, length).gather(1, start) + torch.arange(length, device=device) - start
    tokens[:, index.text] = ids.COUNTERS + count % SIZE
    asked_keys, asked_values = iter(keys[:, :needles].T), iter(values[:, :needles].T)
    depths = iter(index.vision[value_places[:, : len(seen)]].T)
    fact_places = fact_keys = keys[:, :0]
    if told:
        score = uniform(len(index.slots))
        order = score.argsort(-1)
        if depth is not None:
            near = (index.slots - depth * cut.tokens).abs() + (told + 2) * _SLOT * score
            asked = near.argsort(-1)[:, :told]
            order = score.scatter(1, asked, score.gather(1, asked) - 2).argsort(-1)
        slot = index.slots[order[:, : facts + mentions]]
        fact_keys, fact_values = keys[:, needles:used], values[:, needles:used]
        tokens.scatter_(1, slot[:, :facts], torch.full_like(slot[:, :facts], ids.FACT))
        tokens.scatter_(1, slot[:, :facts] + 1, ids.KEYS + fact_keys)
        tokens.scatter_(1, slot[:, :facts] + 2, ids.VALUES + fact_values)
        tokens.scatter_(1, slot[:, facts:] + 1, ids.KEYS + keys.gather(1, below(used, mentions)))
        told_keys, told_values = iter(fact_keys.T), iter(fact_values.T)
        fact_places = slot[:, :facts] + 2
        told_depths = iter(fact_places[:, :told].T)
    key, value, where = [], [], []
    for kind in cut.kinds:
        key.append(next(told_keys if kind == "text" else asked_keys))
        value.append(next(told_values if kind == "text" else asked_values))
        where.append(next(told_depths if kind == "text" else depths))
    tokens[:, index.rows] = ids.KEYS + torch.stack(key, 1)
    return Sample(
        cut=cut,
        index=index,
        tokens=tokens,
        tiles=tiles,
        answers=ids.VALUES + torch.stack(value, 1),
        depths=torch.stack(where, 1).float() / (cut.tokens - 1),
        glyph_places=glyph_places,
        glyph_names=glyph_names,
        value_places=value_places,
        value_keys=keys[:, :needles],
        fact_places=fact_places,
        fact_keys=fact_keys,
    )


def processed(sample: Sample) -> dict[str, Tensor]:
    """A sample as transformers' Qwen2.5-VL processor would return it."""
    cut, batch = sample.cut, len(sample.tokens)
    grid = torch.tensor([[count, 2 * cut.rows, 2 * cut.columns] for count in cut.runs] * batch)
    return {
        "input_ids": sample.tokens,
        "attention_mask": torch.ones_like(sample.tokens),
        "mm_token_type_ids": torch.where(sample.tokens == ids.VIDEO, 2, 0),
        "pixel_values_videos": sample.tiles.reshape(-1, sample.tiles.shape[-1] // 4),
        "video_grid_thw": grid.to(sample.tokens.device),
    }
