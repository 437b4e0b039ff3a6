"""The decoder layers of Qwen2 and Qwen2.5-VL as training runs them: packed, compiled once, in mixed precision.

The same arithmetic as the model's own forward. Everything but attention works on all tokens of a step in one row, so it
has one shape at every prompt length and compiles once. Weights and the residual stream are float32, products are in
the compute type.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation without a weight, float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _project(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).view(len(x), heads, -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return (torch.cat([a, b], -1) * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]).to(x.dtype)


def before_attention(
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    wq: Tensor,
    bq: Tensor,
    wk: Tensor,
    bk: Tensor,
    wv: Tensor,
    bv: Tensor,
    heads: int,
    groups: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``h [M, hidden]`` to q, k and v ``[M, heads, head dimension]``, rotated, KV heads repeated."""
    x = (rms(h, eps) * norm).to(dtype)
    q = _turned(_project(x, wq, bq, heads), cos, sin)
    k = _turned(_project(x, wk, bk, heads // groups), cos, sin)
    v = _project(x, wv, bv, heads // groups)
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def after_attention(
    h: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The rest of a layer: output projection, residual, MLP, residual. ``attended [M, hidden]``."""
    dtype = attended.dtype
    h = h + F.linear(attended, wo.to(dtype)).float()
    x = (rms(h, eps) * norm).to(dtype)
    x = F.silu(F.linear(x, gate.to(dtype))) * F.linear(x, up.to(dtype))
    return h + F.linear(x, down.to(dtype)).float()


class Decoder:
    """Runs the layers of a model's ``language_model`` (or ``model``, for a text model)."""

    def __init__(self, text_model: Any, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.dtype = text_model, dtype
        wrap: Callable[[Any], Any] = torch.compile(dynamic=False) if compiled else lambda f: f
        self.before, self.after = wrap(before_attention), wrap(after_attention)

    def __call__(self, embedded: Tensor, positions: Tensor) -> list[Tensor]:
        """Run the layers.

        Args:
            embedded: float32 ``[B, N, hidden]``.
            positions: what the rotary embedding takes: ``[3, B, N]`` or ``[B, N]``.

        Returns:
            The residual stream after each layer, and last the final norm's output, each ``[B, N, hidden]`` float32.
        """
        batch, length, hidden = embedded.shape
        cos, sin = self.model.rotary_emb(embedded, positions)
        cos, sin = cos.float().flatten(0, 1), sin.float().flatten(0, 1)
        h, stages = embedded.flatten(0, 1), []
        for layer in self.model.layers:
            a, m = layer.self_attn, layer.mlp
            heads = a.q_proj.out_features // a.head_dim
            q, k, v = self.before(
                h,
                cos,
                sin,
                layer.input_layernorm.weight,
                a.q_proj.weight,
                a.q_proj.bias,
                a.k_proj.weight,
                a.k_proj.bias,
                a.v_proj.weight,
                a.v_proj.bias,
                heads,
                heads * a.head_dim // a.k_proj.out_features,
                layer.input_layernorm.variance_epsilon,
                self.dtype,
            )
            q, k, v = (x.view(batch, length, heads, -1).transpose(1, 2) for x in (q, k, v))
            if q.is_cuda and q.dtype != torch.float32:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = self.after(
                h,
                out.transpose(1, 2).reshape(batch * length, hidden),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
                layer.post_attention_layernorm.variance_epsilon,
            )
            stages.append(h)
        stages.append(rms(h, self.model.norm.variance_epsilon) * self.model.norm.weight)
        return [stage.view(batch, length, hidden) for stage in stages]
