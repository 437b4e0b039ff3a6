"""What an installed wheel must do; to be run outside of the checkout, by a Python that has the wheel."""

from importlib.metadata import entry_points, files
from pathlib import Path

import torch

import mask_builders
import mmflex

checkout = Path(__file__).parents[1]
for package in (mmflex, mask_builders):
    folder = Path(package.__file__).parent
    assert not folder.is_relative_to(checkout), f"{folder} is the checkout, not the wheel"
    assert (folder / "py.typed").is_file(), f"{folder} has no py.typed"

packed = files("mmflex") or []
assert any(path.match("mmflex/compiler/measured/*.json") for path in packed), "the cost constants are missing"
size = sum(path.size or 0 for path in packed)
assert size < 4_000_000, f"the wheel unpacks to {size} bytes: are the evaluation's weights in it?"

patterns = [point.load() for point in entry_points(group="mmflex.patterns")]
assert set(mask_builders.__all__) >= {pattern.__name__ for pattern in patterns}

q, k, v = torch.randn(3, 1, 2, 300, 16).unbind(0)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
out = mmflex.attention(q, k, v, mask_builders.AShape(0, 300), backend="reference")
torch.testing.assert_close(out, dense)
print(f"{len(patterns)} patterns, {size / 1e6:.1f} MB unpacked")
