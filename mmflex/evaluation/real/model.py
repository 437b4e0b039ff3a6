"""A causal language model and its tokenizer from a folder, a hub name or a GGUF file, and its logits a few rows at a
time: those of a long text never lie in memory at once."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...integrations import predictions
from ...integrations.predictions import Hidden


class Reader(Protocol):
    """What prompts are made for: a model, or what `describe` knows of it before its weights are loaded."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> int | None: ...


def check_context(reader: Reader, tokens: int, extend: bool = False) -> None:
    """ValueError for prompts longer than a model was trained for, unless ``extend``."""
    if reader.context is not None and tokens > reader.context and not extend:
        raise ValueError(
            f"{tokens} tokens are more than the {reader.context} positions that {reader.name} was trained for "
            f"(max_position_embeddings): use lengths up to {reader.context}, or --extend (extend=True) if you know "
            "that its positions go further"
        )


@dataclass(frozen=True, eq=False)
class Description:
    """A model without its weights; ``config`` of transformers, the others as of `LanguageModel`."""

    config: Any
    tokenizer: Any
    name: str
    context: int | None


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model in eval mode with its tokenizer.

    Attributes:
        name: as it was asked for; of a file, its name.
        context: tokens that the model was trained for (``max_position_embeddings``); None where it does not say.
    """

    model: Any
    tokenizer: Any
    name: str
    context: int | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save(self, folder: str | Path) -> None:
        """Writes weights, config and tokenizer as a folder that transformers loads: of a GGUF file, say."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load(source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """A causal language model of transformers.

    Args:
        source: a folder, a name that transformers finds, or a ``.gguf`` file (dequantised; a folder that holds one such
            file and no ``config.json`` will do).
        device: where it goes.
        dtype: of the weights; float32 on a CPU and bfloat16 elsewhere if None.

    Raises:
        ValueError: no such file, or a model that has no tokenizer. ImportError: what reading GGUF needs is missing.
    """
    from transformers import AutoModelForCausalLM

    where = torch.device(device)
    place, _, options = _place(source)
    if options:
        from transformers import GgufConfig

        # Left quantised, linear layers would go through kernels of their own, in other precision.
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype or default_dtype(where), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is no model that transformers can load: {error}") from error
    model.eval().to(where)
    known = describe(source)
    return LanguageModel(model, known.tokenizer, known.name, known.context)


def default_dtype(device: torch.device) -> torch.dtype:
    """What `load` makes the weights where it is told nothing."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def describe(source: str | Path) -> Description:
    """The config and the tokenizer of a model; ``source`` and errors as of `load`."""
    from transformers import AutoConfig, AutoTokenizer

    place, name, options = _place(source)
    try:
        config = AutoConfig.from_pretrained(place, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is no model that transformers can load: {error}") from error
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Description(config, tokenizer, name, limit if isinstance(limit, int) else None)


def _place(source: str | Path) -> tuple[str, str, dict[str, Any]]:
    """(folder or hub name, name for people, options of ``from_pretrained``)."""
    file = _gguf_file(Path(source))
    if file is None:
        return str(source), str(source), {}
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"reading {file.name} needs {' and '.join(missing)}: pip install 'mmflex[gguf]'")
    return str(file.parent), file.stem, {"gguf_file": file.name}


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path stands for, if it does."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        if files:
            raise ValueError(f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files)}): name one")
    return None


# ---- hidden states and logits ----------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_states(model: Any, ids: Tensor) -> Hidden:
    """The last hidden states of one prompt, ids int64 [N]; the head sees the last token alone."""
    device = next(model.parameters()).device
    given = {"input_ids": ids[None].to(device), "use_cache": False, "return_dict": True, **last_row(model)}
    return predictions.hidden_states(model, given)


@torch.no_grad()
def logits(model: Any, hidden: Hidden, first: int, last: int) -> Tensor:
    """float32 [last - first, vocabulary]: the model's own head on some rows of its hidden states."""
    return predictions.logits(model, hidden.output, hidden.states[first:last])


def last_row(model: Any) -> dict[str, int]:
    """The option by which a model computes the logits of its last token alone, where it has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
