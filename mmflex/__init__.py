"""mmflex: a block-mask compiler for attention on PyTorch FlexAttention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compiler.lower import Lowering
from .integrations.registration import register_when_imported
from .ir.layout import Segment, TokenLayout
from .ir.pattern import Pattern, Tokens, View
from .ir.queries import QueryTokens
from .runtime.attention import attention, plan
from .runtime.backends import why_not
from .runtime.caches import clear_caches
from .runtime.merge import merge_attention
from .runtime.plan import Plan
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .integrations.intercept import intercept
    from .integrations.layouts import layout_for
    from .integrations.long_prefill import last_token_logits
    from .integrations.registration import configure
    from .integrations.search import search
    from .integrations.transformers import DenseFallback, patch, patched, token_layout, unpatch
    from .selfcheck import check
    from .tuning.config import Config, load_config, load_minference_config, save_config
    from .tuning.default import default_spec

__all__ = [
    "Config",
    "DenseFallback",
    "Lowering",
    "Pattern",
    "Plan",
    "QueryTokens",
    "Segment",
    "TokenLayout",
    "Tokens",
    "View",
    "attention",
    "check",
    "clear_caches",
    "configure",
    "default_spec",
    "intercept",
    "last_token_logits",
    "layout_for",
    "load_config",
    "load_minference_config",
    "merge_attention",
    "patch",
    "patched",
    "plan",
    "save_config",
    "search",
    "token_layout",
    "unpatch",
    "warmup",
    "why_not",
]

# Loaded when first asked for, so that `import mmflex` stays light.
_LAZY = {
    "Config": "tuning.config",
    "DenseFallback": "integrations.transformers",
    "check": "selfcheck",
    "configure": "integrations.registration",
    "default_spec": "tuning.default",
    "intercept": "integrations.intercept",
    "last_token_logits": "integrations.long_prefill",
    "layout_for": "integrations.layouts",
    "load_config": "tuning.config",
    "load_minference_config": "tuning.config",
    "patch": "integrations.transformers",
    "patched": "integrations.transformers",
    "save_config": "tuning.config",
    "search": "integrations.search",
    "token_layout": "integrations.transformers",
    "unpatch": "integrations.transformers",
    "warmup": "integrations.warmup",
}


def _show_in_notebooks() -> None:
    """Has notebooks draw plans and layouts: pictures know the runtime, which knows nothing of them."""

    def plan_html(self: Plan) -> str:
        return import_module(".plot", __name__).plan_html(self)

    def layout_html(self: TokenLayout) -> str:
        return import_module(".plot", __name__).layout_html(self)

    Plan._repr_html_ = plan_html  # type: ignore[attr-defined]
    TokenLayout._repr_html_ = layout_html  # type: ignore[attr-defined]


_show_in_notebooks()


def __getattr__(name: str) -> Any:
    if name in ("distributed", "plot"):
        return import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register_when_imported()
