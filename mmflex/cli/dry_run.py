"""Lines that dry runs of several commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .estimate import BASIS, Forwards
from .options import counted, in_short

if TYPE_CHECKING:
    from ..evaluation.outlook import Work


def model_line(name: str, forwards: Forwards) -> str:
    """About the model."""
    text = forwards.config.get_text_config(decoder=True)
    return (
        f"model: {name}, {in_short(forwards.weights.every)} parameters, {counted(text.num_hidden_layers, 'layer')} x "
        f"{counted(text.num_attention_heads, 'head')}; on {forwards.device}, weights are not loaded in a dry run"
    )


def entries_of(given: dict[str, Any], config: Any, methods: list[str]) -> tuple[list[str], list[str]]:
    """(names of the specs that run as they are, labels of the methods that are brought to size)."""
    from ..evaluation.methods import SEARCHED, chosen

    labels = [method.label for method in chosen(methods) if method.name != "dense"] if methods else []
    return [SEARCHED] * (config is not None) + list(given), labels


def method_lines(given: list[str], methods: list[str], shares: Sequence[float], where: str) -> list[str]:
    """The lines of a dry run about what is compared. ``where``: what the shares are of, and at which lengths."""
    to_share = f"{', '.join(f'{share:g}' for share in sorted(shares))} of dense attention, {where}"
    return [
        f"as given: {', '.join(given) or 'none'}",
        f"brought to {to_share}: {', '.join(methods)}" if methods else "methods brought to size: none",
    ]


def written_line(files: Sequence[Path | None]) -> str:
    """The line of a dry run about files."""
    return f"would write: {', '.join(str(file) for file in files if file is not None) or 'no files'}"


def work_lines(works: Sequence[Work], forwards: Sequence[Forwards]) -> list[str]:
    """The lines of a dry run about an evaluation: what it runs, by length, and about how long that takes.

    Args:
        forwards: of the model that each work is for.
    """
    lines, total = [], 0.0
    for work, model in zip(works, forwards, strict=True):
        seconds = (work.dense + work.sparse) * model.seconds(work.tokens) + work.logits * model.head_s(work.tokens)
        total += seconds
        task = f"{work.where}, " if work.where else ""
        logits = f", the logits of all rows of {counted(work.logits, 'window')}" if work.logits else ""
        lines.append(
            f"would run, {task}{counted(work.tokens, 'token')}: {work.dense:,} dense and at most {work.sparse:,} "
            f"sparse passes of one prompt{logits}; about {duration(seconds)}"
        )
    sized = sum(work.sized for work in works)
    top = f"looking for {counted(sized, 'setting')} on plans, and compilation" if sized else "compilation"
    lines.append(
        f"would take: about {duration(total)} in all, sparse passes taken for dense ({BASIS}); not counted: {top} "
        "(5 to 60 s for every setting that runs as a kernel)"
    )
    return lines


def duration(seconds: float) -> str:
    """Seconds in the unit that fits, two digits: "0.4 s", "25 s", "4 minutes", "1.5 hours"."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.2g} hours"
