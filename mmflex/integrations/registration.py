"""``attn_implementation="mmflex"``: `patch` by the name that transformers selects its attention with.

After ``import mmflex`` both of these give a patched model, whichever of mmflex and transformers was imported first::

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mmflex")   # patched at its first forward
    model.set_attn_implementation("mmflex")                                            # patched at once

An attention function alone is not enough for mmflex: it has to read which token is what from the inputs of the whole
model, and the vision tower has to keep its own attention. transformers tells no one when a model selects a name, so two
methods of ``PreTrainedModel`` are extended: ``post_init`` and ``set_attn_implementation``.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

MODELING = "transformers.modeling_utils"
_WAITING = "_mmflex_at_first_forward"


# ---- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What `patch` is called with for a model that selects "mmflex"."""

    spec: Any = None
    quality: Any = None
    backend: str = "auto"
    mlp_chunk: int | None = None
    vision: bool = True
    fuse: bool | None = None


_options = Options()


def configure(spec: Any = None, **options: Any) -> None:
    """What models that select ``attn_implementation="mmflex"`` are patched with from now on.

    Models that are patched already stay as they are. Every call sets all options; without arguments they are the
    defaults again::

        mmflex.configure(mmflex.load_config("config.json"), backend="triton")
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mmflex")

    Args:
        spec: a spec or a `Config`, as in `patch`; None for `mmflex.default_spec`.
        quality, backend, mlp_chunk, vision, fuse: as in `patch`.

    Raises:
        TypeError: another option; the message names those that exist. A spec that holds something else than patterns.
        ValueError: an unknown quality, or a quality and a spec.
    """
    global _options
    unknown = sorted(set(options) - set(Options.__dataclass_fields__))
    if unknown:
        names = ", ".join(Options.__dataclass_fields__)
        raise TypeError(f"mmflex.configure has no option {unknown[0]!r}: it takes {names}")
    from mmflex.tuning.config import Config, checked_spec
    from mmflex.tuning.default import chosen_spec

    chosen_spec(spec, options.get("quality"))
    if spec is not None and not isinstance(spec, Config):
        spec = checked_spec(spec)
    _options = replace(Options(spec=spec), **options)


# ---- models that select "mmflex" -----------------------------------------------------------------------------------


def register(modeling: ModuleType) -> None:
    """Makes "mmflex" a valid name for the models of a ``transformers.modeling_utils``; nothing for versions that
    `patch` does not support."""
    from .masks import supported

    if not supported():
        return
    model_class = modeling.PreTrainedModel
    if hasattr(model_class.set_attn_implementation, "_mmflex"):
        return
    from .transformers import register_functions

    register_functions()
    model_class.post_init = _extended_post_init(model_class.post_init)
    model_class.set_attn_implementation = _extended_selection(model_class.set_attn_implementation)


def _selected(config: Any) -> bool:
    """Whether a model's config, or that of its language model, selects mmflex."""
    from .masks import NAME

    return NAME in (config._attn_implementation, config.get_text_config(decoder=True)._attn_implementation)


def _extended_post_init(post_init: Any) -> Any:
    @functools.wraps(post_init)
    def extended(self: Any) -> None:
        post_init(self)
        if _selected(self.config):
            # Weights are not loaded yet, and an outer model may still be under construction.
            vars(self)[_WAITING] = self.register_forward_pre_hook(_at_first_forward, prepend=True, with_kwargs=True)

    return extended


def _extended_selection(select: Any) -> Any:
    from .masks import NAME

    @functools.wraps(select)
    def extended(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        from .transformers import patch, selecting, unpatch

        if selecting.get():  # `patch` itself is at work
            return select(self, attn_implementation, *args, **kwargs)
        patched = "_mmflex_patch" in vars(self)
        names = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        if NAME not in names.values():
            if patched:
                unpatch(self)
            _forget(self)
            return select(self, attn_implementation, *args, **kwargs)
        others = {part: name for part, name in names.items() if name != NAME}
        if others:
            select(self, others, *args, **kwargs)
        if not patched:
            _restore_defaults(self)
            patch(self, **_arguments())
        return None

    extended._mmflex = True  # type: ignore[attr-defined]
    return extended


def _arguments() -> dict[str, Any]:
    arguments = dict(vars(_options))
    return {"spec_or_config": arguments.pop("spec"), **arguments}


def _forget(model: nn.Module) -> bool:
    """Whether this model, or one inside it, waited for its first forward to be patched; it no longer does."""
    waiting = [handle for module in model.modules() if (handle := vars(module).pop(_WAITING, None)) is not None]
    for handle in waiting:
        handle.remove()
    return bool(waiting)


def _restore_defaults(model: nn.Module) -> None:
    """Gives every model inside that was built with "mmflex" the attention that transformers would have chosen."""
    from .masks import NAME, previous_implementation

    _forget(model)
    inner: Any
    for inner in model.modules():
        if getattr(getattr(inner, "config", None), "_attn_implementation", None) != NAME:
            continue
        if hasattr(inner, "get_correct_attn_implementation") and previous_implementation(inner.config) is None:
            default = inner.get_correct_attn_implementation(None, is_init_check=True)
            inner.config._attn_implementation_internal = default


@torch.compiler.disable
def _at_first_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward pre-hook of models that were built with "mmflex"."""
    from .transformers import patch

    if not _forget(module) or not _selected(module.config):
        return
    _restore_defaults(module)
    if any("_mmflex" in vars(inner) for inner in module.modules()):
        return
    patch(module, **_arguments())
    # hooks that were registered just now are not called in this forward
    made = vars(module)["_mmflex_patch"]
    made.prompt.enter_root(module, args, kwargs)
    if made.text_model is module:
        made.prompt.enter_text(module, args, kwargs)


# ---- transformers imported after mmflex ----------------------------------------------------------------------------


class _AfterImport(MetaPathFinder):
    """Registers as soon as ``transformers.modeling_utils`` has been imported, so that mmflex need not import it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers now if transformers' models are imported, and otherwise when they are."""
    modeling = sys.modules.get(MODELING)
    if hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        register(modeling)  # type: ignore[arg-type]
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
