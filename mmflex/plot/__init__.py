"""Pictures of masks, orders, estimates and heads (needs matplotlib: ``pip install 'mmflex[plot]'``).

Every ``plot_`` function returns the matplotlib Figure and takes ``ax=`` to draw into one of yours. Tones differ in
lightness as well as in colour, so they hold in grey and for colour-blind eyes; figures made here are light in any
notebook theme.

    from mmflex import plot

    plan = mmflex.plan(q, k, spec, layout=layout)
    plot.plot_mask(plan, head=3).savefig("mask.png")
    plot.save_plan(plan, "plan.mmflex.npz")  # then: mmflex show plan.mmflex.npz

One module per picture: `masks`, `orders`, `estimates`, `graph`, `heads`, `importance`, `recall`, `text`; `bands` and
`style` are theirs in common, `html` is what notebooks show of a plan, `files` holds `save_plan` and `load_plan`.
"""

from .estimates import plot_estimate
from .files import load_plan, save_plan
from .graph import plot_graph
from .heads import plot_config, plot_heads
from .html import layout_html, plan_html
from .importance import plot_importance
from .masks import plot_mask, plot_masks
from .orders import plot_orders
from .recall import attention_recall, plot_recall
from .recorded import recorded
from .snapshot import Snapshot, family
from .style import FAMILIES, look
from .text import mask_text

Snapshot._repr_html_ = lambda self: plan_html(self)  # type: ignore[attr-defined]

__all__ = [
    "FAMILIES",
    "attention_recall",
    "family",
    "layout_html",
    "load_plan",
    "look",
    "mask_text",
    "plan_html",
    "plot_config",
    "plot_estimate",
    "plot_graph",
    "plot_heads",
    "plot_importance",
    "plot_mask",
    "plot_masks",
    "plot_orders",
    "plot_recall",
    "recorded",
    "save_plan",
]
