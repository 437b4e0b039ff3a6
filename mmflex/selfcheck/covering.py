"""Which combinations of settings to run: few, such that everything that is asked for occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product

Settings = dict[str, str]
"""Dimension -> its setting."""

Combination = tuple[tuple[str, str], ...]
"""(dimension, setting) of two or three dimensions, in the order of the dimensions."""


def required(
    dimensions: Mapping[str, Sequence[str]], names: Iterable[Sequence[str]], possible: Callable[[Settings], bool]
) -> list[Combination]:
    """Every possible combination of the settings of some dimensions, for each group of dimension names."""
    order = list(dimensions)
    out = []
    for group in names:
        group = sorted(group, key=order.index)
        for settings in product(*(dimensions[name] for name in group)):
            combination = tuple(zip(group, settings, strict=True))
            if possible(dict(combination)):
                out.append(combination)
    return out


def covering(
    dimensions: Mapping[str, Sequence[str]], wanted: Iterable[Combination], possible: Callable[[Settings], bool]
) -> list[Settings]:
    """Settings of all dimensions in which every wanted combination occurs.

    Each is built around a combination that is still missing. Its other dimensions get the setting that completes most
    missing ones, the first of equals: what comes first in a dimension is the usual setting. The same result every time.

    Args:
        possible: whether settings of some dimensions can be completed to something that can run.
    """
    order = list(dimensions)
    missing = dict.fromkeys(wanted)
    sizes = {len(combination) for combination in missing}

    def inside(settings: Settings) -> list[Combination]:
        """The missing combinations that occur in settings of some dimensions."""
        pairs = sorted(settings.items(), key=lambda pair: order.index(pair[0]))
        return [c for size in sizes for c in combinations(pairs, size) if c in missing]

    out = []
    while missing:
        settings = dict(next(iter(missing)))
        for name in order:
            if name not in settings:
                choices = [{**settings, name: setting} for setting in dimensions[name]]
                settings = max(filter(possible, choices), key=lambda choice: len(inside(choice)))
        out.append({name: settings[name] for name in order})
        for combination in inside(settings):
            del missing[combination]
    return out
