"""Token layouts of transformers' models: which token of a processed prompt is which cell of which frame.

The one function most callers want is `layout_for(config, inputs)`. It needs no transformers import: configs are read
by attribute, inputs by key, tensors are copied to the host (`inputs`). Per family (``config.model_type``) one row of
`FAMILIES` (`families`) names a *rule* (`rules`), which lists the units of the prompt (`units`: an image, a video) in
order, each with a frame and a cell per placeholder token. One shared consumer (`placing`) then hands the placeholder
tokens of the prompt to the units, and raises unless all are used up.

To know the layout inside ``forward()`` and ``generate()``, hook the model as `hooks` describes, or, where only its
language model can be seen, read its `positions`. Models that are fed ``inputs_embeds`` by their own code have nothing
to read here: ``mmflex.token_layout(layout)``.
"""

from .families import FAMILIES, Family
from .hooks import call_arguments, geometry, geometry_of_tower_calls
from .inputs import PixelShapes
from .positions import layout_from_positions
from .read import layout_for, repeat_layout

__all__ = [
    "FAMILIES",
    "Family",
    "PixelShapes",
    "call_arguments",
    "geometry",
    "geometry_of_tower_calls",
    "layout_for",
    "layout_from_positions",
    "repeat_layout",
]
