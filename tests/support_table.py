"""The support table, by running every family: ``python -m tests.support_table > docs/families.md``.

A row's status is what happened when a tiny random model of the family was patched with a sparse spec and run: how many
of its layers reached `mmflex.attention`, which notices it gave, or with which error `mmflex.patch` refused it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

import mmflex
import mmflex.runtime.attention as runtime
from mask_builders import AShape, Dense
from mmflex.integrations import layouts
from mmflex.integrations.transformers import DenseFallback
from mmflex.integrations.vision import TOWERS
from mmflex.integrations.vision import attention as vision_attention

if __package__:
    from .families import FAMILIES, Family, text_config
else:
    from families import FAMILIES, Family, text_config

TITLE = """# Model families

Every row is a tiny random model of the family that was patched and run; `python -m tests.support_table` writes this
page, and the tests check that it is up to date.

- **accelerated**: every layer's prefill runs through `mmflex.attention` with its spec.
- **window kept**: sliding-window layers keep exactly the model's own window, and the spec is not used there (above 4096
  keys mmflex computes it).
- **dense**: the model's previous attention runs, and a `DenseFallback` warning says why.
- **refused**: `mmflex.patch` raises an error that says why.

The last column is about the vision tower. **one call a layer**: its frames and windows are one packed sequence, and
mmflex attends within them in one call a layer, exactly. **as it is**: frames are a batch, which is one call a layer
already; mmflex does not touch it.

Any other causal language model of transformers that goes through its `AttentionInterface` works as well, its tokens
taken as text. For a vision-language model that is not listed, give the layout with `mmflex.token_layout`.
"""

COLUMNS = ("family", "transformers class", "where the layout comes from", "text mask", "status", "vision tower")

MASKS = {
    "causal": "causal",
    "sliding": "causal, sliding window",
    "bidirectional": "image blocks see both ways; sliding window",
    "prefix": "the prompt sees both ways (prefix)",
}


def _refused() -> dict[str, Callable[[], Any]]:
    """Models that `patch` does not take, built."""
    import transformers as t

    gpt_oss = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    return {
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**text_config(head_dim=16))),
        "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**text_config(**gpt_oss))),
    }


def row(family: Family) -> tuple[str, ...]:
    """A family's row."""
    model = family.model()
    spec = AShape(128, 1)
    prompt = family.batch(model.config, text=300).inputs
    status = _status(model, spec, prompt)
    if family.kind == "vlm" and status != "accelerated":
        words = {"input_ids": torch.arange(600)[None] % 80 + 5}
        if family.type_ids and "dense" in _status(model, spec, words):
            words[family.type_ids] = torch.zeros_like(words["input_ids"])
        status = f"with images {status}; text alone {_status(model, spec, words)}"
    name = family.name + (f" ({family.note})" if family.note and family.note != "image blocks see both ways" else "")
    mask = MASKS[family.attention]
    return name, f"`{type(model).__name__}`", source(model.config), mask, status, _tower(family, model)


def _tower(family: Family, model: Any) -> str:
    """What becomes of the vision tower, counted in a forward of two images or films."""
    if family.kind != "vlm":
        return "-"
    calls = []
    real = vision_attention.varlen_attention

    def counted(*args: Any) -> Any:
        calls.append(len(args[3]))
        return real(*args)

    vision_attention.varlen_attention = counted
    try:
        with warnings.catch_warnings(), torch.no_grad(), mmflex.patched(model, Dense()):
            warnings.simplefilter("ignore", DenseFallback)
            model(**family.batch(model.config, batch=2).inputs)
    finally:
        vision_attention.varlen_attention = real
    return "one call a layer" if calls and max(calls) > 1 else "as it is"


def source(config: Any) -> str:
    """What `mmflex.layout_for` reads for a model."""
    entry = layouts.FAMILIES.get(config.model_type)
    if entry is None:
        return "text only"
    by_id = layouts.Family.placeholders
    ids = "`input_ids`" if entry.placeholders is by_id else "`input_ids`, `mm_token_type_ids`"
    return ", ".join([ids, *(f"`{name}`" for name in entry.reads)])


def _status(model: Any, spec: Any, inputs: dict[str, torch.Tensor]) -> str:
    calls = []
    real = runtime.attention

    def counted(q: Any, k: Any, v: Any, used: Any, **options: Any) -> Any:
        calls.append(all(isinstance(pattern, AShape) for pattern in used) if isinstance(used, tuple) else False)
        return real(q, k, v, used, **options)

    runtime.attention = counted
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            with mmflex.patched(model, spec, backend="reference"):
                model(**inputs)
    finally:
        runtime.attention = real
    layers = model.config.get_text_config().num_hidden_layers
    notices = [str(w.message) for w in caught if issubclass(w.category, DenseFallback)]
    if notices:
        reasons = "; ".join(notice.split("): ", 1)[-1].split(" (")[0] for notice in notices)
        return f"dense{f' in {layers - sum(calls)} of {layers} layers' if any(calls) else ''} ({reasons})"
    own = layers - sum(calls)
    if own in (0, layers):
        return "window kept" if own else "accelerated"
    return f"accelerated, window kept in {own} of {layers} layers"


def table() -> str:
    """The whole page."""
    rows = [row(family) for family in FAMILIES.values()]
    for name, build in _refused().items():
        model = build().eval()
        try:
            mmflex.patch(model, AShape())
        except NotImplementedError as error:
            said = str(error).removeprefix(f"{type(model).__name__} ").split(" (")[0]
            kind = (name, f"`{type(model).__name__}`", "text only", "causal, sliding window")
            rows.append((*kind, f"refused: {said}", "-"))
        else:
            raise AssertionError(f"{name} was expected to be refused")
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    towers = ", ".join(f"`{name}`" for name in TOWERS)
    title = f"{TITLE}\nTowers that mmflex knows, by the `model_type` of their configs: {towers}.\n"
    return title + "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
