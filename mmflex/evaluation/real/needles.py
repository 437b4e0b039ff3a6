"""Needles in real text: passkeys, several keys and chains of variables, in a model's own tokens.

A prompt is a window of filler text into which short statements are put, and a question at its end. It is prefilled by
the method; the answer is then decoded from the cache by the model's own attention, as in use: the tokens of the right
answer are fed as one short chunk, and the answer counts as right if each of them is the model's first choice, which is
what greedy decoding would have given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .model import Reader, last_row
from .text import encode

TASKS = ("passkey", "multikey", "tracking")
KEYS = 8
"""Keys in a prompt of "multikey", of which one is asked for."""

HOPS = 2
"""Assignments after the first one in a chain of "tracking"."""

NAMES = (
    "amber", "basalt", "cedar", "delta", "ember", "falcon", "granite", "harbor", "indigo", "jasper", "kestrel",
    "lagoon", "maple", "nickel", "onyx", "pepper", "quartz", "raven", "saffron", "topaz", "umber", "velvet", "willow",
    "zephyr",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A prompt and its answer.

    Attributes:
        ids: int64 [N], the prompt. answer: int64 [A], the tokens that are right.
        depth: where the statement that is asked for stands, from 0 (beginning) to 1 (end of the filler).
    """

    ids: Tensor
    answer: Tensor
    depth: float


@dataclass(frozen=True)
class _Parts:
    """Statements with their depths, the question, how the reply begins, and the answer; text."""

    statements: tuple[tuple[float, str], ...]
    question: str
    reply: str
    answer: str
    depth: float


def _passkey(random_: random.Random, depth: float) -> _Parts:
    key = str(random_.randrange(10000, 100000))
    statement = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    return _Parts(((depth, statement),), "What is the pass key?", "The pass key is", f" {key}", depth)


def _multikey(random_: random.Random, depth: float) -> _Parts:
    names, others = random_.sample(NAMES, KEYS), [random_.random() for _ in range(KEYS - 1)]
    keys = [str(random_.randrange(10000, 100000)) for _ in names]
    depths = [depth, *others]
    statements = tuple(
        (where, f"\nThe pass key of {name} is {key}. Remember it.\n")
        for where, name, key in zip(depths, names, keys, strict=True)
    )
    return _Parts(
        statements, f"What is the pass key of {names[0]}?", f"The pass key of {names[0]} is", f" {keys[0]}", depth
    )


def _tracking(random_: random.Random, depth: float) -> _Parts:
    names, value = random_.sample(NAMES, HOPS + 1), str(random_.randrange(10000, 100000))
    lines = [f"\nVAR {names[0]} = {value}\n"] + [f"\nVAR {b} = VAR {a}\n" for a, b in pairwise(names)]
    depths = [depth + (1 - depth) * i / (HOPS + 1) for i in range(HOPS + 1)]
    question = f"Which number is the value of VAR {names[-1]}?"
    return _Parts(
        tuple(zip(depths, lines, strict=True)), question, f"The value of VAR {names[-1]} is", f" {value}", depth
    )


_MAKE: dict[str, Callable[[random.Random, float], _Parts]] = {
    "passkey": _passkey, "multikey": _multikey, "tracking": _tracking
}  # fmt: skip


def question(task: str, model: Reader, filler: Tensor, tokens: int, depth: float, seed: int) -> Question:
    """A prompt of exactly ``tokens`` tokens.

    Args:
        task: one of `TASKS`.
        filler: int64 tokens of text, at least as many as the prompt has.
        depth: where the statement that is asked for stands in the filler, from 0 to 1.

    Raises:
        ValueError: an unknown task, or a prompt too short for its statements and question.
    """
    if task not in _MAKE:
        raise ValueError(f"unknown task {task!r}: use some of {', '.join(TASKS)}")
    parts = _MAKE[task](random.Random(f"{task} {tokens} {depth:.4f} {seed}"), depth)
    tokenizer = model.tokenizer
    before, after = _frame(tokenizer, parts)
    head, tail = encode(tokenizer, before), encode(tokenizer, after)
    answer = encode(tokenizer, after + parts.answer)[len(tail) :]
    if encode(tokenizer, after + parts.answer)[: len(tail)] != tail or not answer:
        raise ValueError(f"the tokenizer of {model.name} joins the answer {parts.answer!r} with the text before it")
    statements = [(where, encode(tokenizer, text)) for where, text in sorted(parts.statements)]
    room = tokens - len(head) - len(tail) - sum(len(ids) for _, ids in statements)
    if room < 0 or room > len(filler):
        raise ValueError(
            f"a {task} prompt of {tokens} tokens takes {room} tokens of filler, and the text gives {len(filler)}: use "
            "other lengths or a longer text"
        )
    body: list[int] = []
    taken = 0
    for where, ids in statements:
        cut = max(taken, _boundary(tokenizer, filler[:room], round(where * room)))
        body += filler[taken:cut].tolist() + ids
        taken = cut
    body += filler[taken:room].tolist()
    return Question(torch.tensor(head + body + tail), torch.tensor(answer), parts.depth)


def _frame(tokenizer: Any, parts: _Parts) -> tuple[str, str]:
    """The text before and after the filler: the model's chat template where it has one."""
    ask = "There is important information inside a long text. Find it and remember it; a question follows the text.\n\n"
    if getattr(tokenizer, "chat_template", None):
        mark = "\x00"
        chat = [{"role": "user", "content": f"{ask}{mark}\n\n{parts.question}"}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if text.count(mark) == 1:
            before, _, after = text.partition(mark)
            return before, after + parts.reply
    return ask, f"\n\n{parts.question} {parts.reply}"


def _boundary(tokenizer: Any, filler: Tensor, start: int, reach: int = 64) -> int:
    """The end of a sentence or line at ``start`` or soon after it; ``start`` itself where there is none."""
    for cut in range(start, min(len(filler), start + reach)):
        if cut and tokenizer.decode(filler[cut - 1 : cut]).rstrip(" ").endswith((".", "\n")):
            return cut
    return min(start, len(filler))


@torch.no_grad()
def answered(model: Any, asked: Sequence[Question]) -> list[bool]:
    """Whether a model (patched or not) answers questions of equally long prompts, prefilled together: whether greedy
    decoding would give each answer's tokens."""
    device = next(model.parameters()).device
    prompts = torch.stack([one.ids for one in asked]).to(device)
    answers = pad_sequence([one.answer for one in asked], batch_first=True, padding_value=-1).to(device)
    out = model(input_ids=prompts, use_cache=True, return_dict=True, **last_row(model))
    said = out.logits[:, -1:].argmax(-1)
    if answers.shape[1] > 1:
        # what stands behind a shorter answer is after all of its tokens
        given = {"input_ids": answers[:, :-1].clamp(min=0), "past_key_values": out.past_key_values}
        said = torch.cat([said, model(**given, use_cache=True, return_dict=True).logits.argmax(-1)], dim=1)
    return ((said == answers) | (answers < 0)).all(-1).tolist()
