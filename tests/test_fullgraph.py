"""mmflex.attention inside torch.compile(fullgraph=True): same result, and no recompile when only values change."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mmflex
from mask_builders import AShape, VerticalSlash


def test_fullgraph_gives_the_same_and_compiles_once():
    layout = mmflex.TokenLayout.from_segments([("text", 100), ("video", (4, 8, 8)), ("text", 44)])
    spec = [VerticalSlash(40, 128)] * 2 + [AShape(16, 64)] * 2

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = mmflex.attention(q * 2, k, v, spec, layout=layout, backend="reference")
        return out.transpose(1, 2).flatten(2) + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, heads, 400, 32) for heads in (4, 2, 2))
        torch.testing.assert_close(compiled(q, k, v), block(q, k, v))
    assert counter.frame_count == 1


def test_lse_has_its_shape_in_a_graph():
    pattern = AShape(16, 64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mmflex.attention(q, k, v, pattern, backend="reference", return_lse=True)

    q, k, v = (torch.randn(1, heads, 200, 32) for heads in (4, 2, 2))
    out, lse = both(q, k, v)
    expected = mmflex.attention(q, k, v, pattern, backend="reference", return_lse=True)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize(
    "where",
    [
        {"query_start": 30},
        {"query_positions": [*range(9, 40), *range(100, 133)]},
        {"query_positions": [*range(0, 192, 3)]},
        {"query_positions": []},
        {"query_start": -5},
        {"query_start": 170},
        {"query_start": 3, "query_positions": range(64)},
        {"query_start": np.int64(30)},
        {"query_positions": torch.arange(20, 84)},
        {"query_positions": np.arange(64) * 3},
        {"query_positions": mmflex.QueryTokens(((9, 40), (100, 133)))},
    ],
)
def test_positions_mean_the_same_in_compiled_code(where: dict[str, Any]) -> None:
    """Of the queries, and of others that patterns estimate by; what is refused is refused."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 4, n, 32) for n in (64, 200, 200))
    estimate = torch.randn(1, 4, 20, 32), [*range(5, 15), *range(150, 160)]
    spec = VerticalSlash(20, 40)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return mmflex.attention(q, k, v, spec, backend="reference", estimate_from=estimate, **where)

    try:
        expected, refused = run(q, k, v), ""
    except ValueError as error:
        refused = str(error)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    if refused:
        with pytest.raises(Exception, match=re.escape(refused.partition(":")[0])):
            compiled(q, k, v)
    else:
        torch.testing.assert_close(compiled(q, k, v), expected)
