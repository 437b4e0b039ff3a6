"""What an evaluation will run, counted from its settings before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .evaluate import Settings
from .real.evaluate import Settings as TextSettings


@dataclass(frozen=True)
class Work:
    """Forward passes of one prompt at one length.

    Attributes:
        where: the task, or "" where the texts and tasks of a length are counted together.
        dense, sparse: with the model's own attention, and under a spec. Methods that cannot run, or that two targets
            bring to one setting, run less.
        logits: windows of which the head reads all rows.
        sized: settings that are looked for, on plans and not by forwards.
    """

    where: str
    tokens: int
    dense: int
    sparse: int
    logits: int
    sized: int


def text_work(settings: TextSettings, texts: int, given: int, methods: int) -> list[Work]:
    """Of `mmflex.evaluation.real.evaluate`, by length.

    Args:
        texts, given, methods: how many texts, specs that run as they are (a config is one), and methods other than
            dense there are.
    """
    sized = methods * len(settings.densities)
    entries, windows = given + sized, texts * settings.windows
    asked = texts * len(settings.tasks) * settings.prompts
    measured = (texts + windows) * bool(entries)  # sizing reads each text's first window once more
    return [
        Work("", tokens, measured + asked, (windows + asked) * entries, 2 * windows * entries, texts * sized)
        for tokens in sorted(set(settings.lengths))
    ]


def task_work(settings: Settings, tasks: Sequence[str], given: int, methods: int) -> list[Work]:
    """Of `mmflex.evaluation.evaluate`, by task and length; arguments as of `text_work`."""
    prompts, work = settings.seeds * settings.prompts, []
    for task in tasks:
        for tokens in sorted(set(settings.lengths)):
            sized = methods * len(settings.targets(tokens))
            dense = 1 + settings.seeds + prompts  # the sample, each seed's first prompt, and the answers
            work.append(Work(task, tokens, dense, prompts * (given + sized), 0, settings.seeds * sized))
    return work
