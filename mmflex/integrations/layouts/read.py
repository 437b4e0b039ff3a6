"""The layout of a batch of prompts, from a model's config and what its processor returned.

By the time a language model runs, generate() may have repeated the prompts (beams, several answers); what it encoded
before was described once. That is recognised here, and the layout repeated likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmflex.ir.layout import TokenLayout

from .families import FAMILIES, by_id
from .inputs import WAY_OUT, holds_pixels, setting, tokens_of
from .placing import assemble, consume, join
from .units import Batch, Unit, Units, placeholders_in


def layout_for(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """The token layout of a batch of prompts, from a model's config and its processor's output.

    Args:
        config: the model's config (``model.config``), read by attribute.
        inputs: what the processor returned: ``input_ids [B, N]``, ``attention_mask [B, N]`` where there is padding
            (left or right), ``mm_token_type_ids [B, N]``, and what the family's row of `FAMILIES` reads:
            ``image_grid_thw [images, 3]``, ``video_grid_thw [videos, 3]``, ``image_sizes [images, 2]``,
            ``pixel_values_videos [videos, frames, ...]``, ... Pixels are only asked for their shape; the reduced
            form that `geometry` returns does as well.

    Returns:
        A layout ``[B, N]``. Text between the frames of a video belongs to the video's segment, as text; the text in
        front of the first frame to the text segment before it. A text-only model or prompt gives text.

    Raises:
        ValueError: an unknown family, or placeholders and described tokens that differ (both numbers are named);
            the message says how to go on.
    """
    inputs = dict(inputs)
    model_type = str(setting(config, "model_type", default=type(config).__name__))
    row = FAMILIES.get(model_type)
    ids, valid = tokens_of(inputs, embeds_do=row is None)
    find = row.placeholders if row is not None else by_id
    masks = {name: mask & valid for name, mask in find(config, inputs, ids).items() if (mask & valid).any()}
    if not masks and (row is not None or not holds_pixels(inputs)):
        return assemble((), valid)
    if row is None:
        what = ", ".join(f"{int(mask.sum())} {name}" for name, mask in masks.items()) or "pixels and no known"
        raise ValueError(
            f"no layout rule for model_type {model_type!r}, whose prompts hold {what} placeholder tokens: "
            f"known are {', '.join(sorted(FAMILIES))}; {WAY_OUT}"
        )
    units = row.rule(Batch(config, inputs, masks))
    times = _times_repeated(ids, valid, masks, units)
    if times > 1:
        # What generate() did not encode before it repeated the prompts, it has repeated along with them.
        ids, valid = ids[::times], valid[::times]
        masks = {name: mask[::times] for name, mask in masks.items()}
        units = {
            name: of if placeholders_in(of) == masks[name].sum() else of[::times]
            for name, of in units.items()
            if name in masks
        }
    missing = [name for name in row.reads if inputs.get(name) is None]
    placed = consume(model_type, masks, units, valid, missing)
    if row.tiling is not None:
        prompts = [[unit for unit in placed if unit.row == number] for number in range(len(ids))]
        placed = [joined for number, of in enumerate(prompts) for joined in join(ids[number], of, row.tiling)]
    layout = assemble(placed, valid)
    return layout if times == 1 else repeat_layout(layout, times)


def _times_repeated(ids: np.ndarray, valid: np.ndarray, masks: Mapping[str, np.ndarray], units: Units) -> int:
    """How often generate() has repeated the prompts: 1, or a number that fits the rows and what was described."""
    rows = _repeats(ids, valid)
    described = {name: placeholders_in(units.get(name, ())) for name in masks}
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if rows == 1 or any(total == 0 or counts[name] % total for name, total in described.items()):
        return 1
    ratios = {counts[name] // total for name, total in described.items()}
    times = max(ratios)
    if times > 1:
        return times if ratios <= {1, times} and rows % times == 0 else 1
    # Repeated along with the rows, but one by one: a a a b b b for the rows (a b) (a b) (a b).
    return rows if all(_in_groups(units[name], rows) for name in masks) else 1


def _in_groups(units: Sequence[Unit], size: int) -> bool:
    """Whether every ``size`` units in a row look the same."""
    return len(units) % size == 0 and all(
        np.array_equal(unit.cells, units[number - number % size].cells) for number, unit in enumerate(units)
    )


def _repeats(ids: np.ndarray, valid: np.ndarray) -> int:
    """How often every row stands in a row (beam search repeats prompts one by one)."""
    rows = np.concatenate([ids, valid], axis=1)
    change = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    return math.gcd(len(ids), *change.tolist())


def repeat_layout(layout: TokenLayout, times: int) -> TokenLayout:
    """Every prompt ``times`` times, one after the other (`repeat_interleave`): what beam search does to a batch.

    Returns a layout ``[B * times, N]``; ValueError unless ``times`` is 1 or more.
    """
    if times < 1:
        raise ValueError(f"a layout is repeated 1 or more times, got {times}")
    fields = {
        name: np.repeat(getattr(layout, name), times, axis=0)
        for name in ("modality", "segment", "frame", "cell", "valid")
    }
    return TokenLayout.from_modality_ids(fields.pop("modality"), **fields)
