"""Models on `scaled_dot_product_attention` alone, which build prompts as the paper's video models do.

A decoder as Qwen2's of 2024 (KV heads repeated before the call, mask tensors), and around it
three ways to join text and features: LLaVA-Video's, VideoChat-Flash's and VILA's, each with a vision tower whose layers
attend as well. No transformers.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY = 64, 100


def rotated(x: Tensor, first: int) -> Tensor:
    """Rotary positions ``first, first + 1, ...`` of x ``[B, H, M, D]``."""
    half = x.shape[-1] // 2
    turns = torch.arange(first, first + x.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = turns.cos().to(x.device), turns.sin().to(x.device)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Self-attention of one layer; ``kind`` says by what code: "sdpa", "grouped" (``enable_gqa``) or "eager"."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.kind = config, layer_idx, "sdpa"
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.kv_heads
        self.width = config.head_dim
        self.q_proj = nn.Linear(WIDTH, self.heads * self.width)
        self.k_proj = nn.Linear(WIDTH, self.kv_heads * self.width)
        self.v_proj = nn.Linear(WIDTH, self.kv_heads * self.width)
        self.o_proj = nn.Linear(self.heads * self.width, WIDTH, bias=False)
        self.dropout = 0.0

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cache: list[Any] | None = None
    ) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        q, k, v = (
            proj(hidden_states).view(batch, tokens, -1, self.width).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        past = cache[self.layer_idx][0].shape[2] if cache is not None and cache[self.layer_idx] is not None else 0
        q, k = rotated(q, past), rotated(k, past)
        if cache is not None:
            if past:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache[self.layer_idx], (k, v), strict=True))
            cache[self.layer_idx] = (k, v)
        out = self.attend(q, k, v, attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and q.shape[2] > 1 and self.is_causal
        dropout = self.dropout if self.training else 0.0
        if self.kind == "grouped":
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        k, v = k.repeat_interleave(self.num_key_value_groups, 1), v.repeat_interleave(self.num_key_value_groups, 1)
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.width)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v


class Layer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor, mask: Tensor | None, cache: list[Any] | None) -> Tensor:
        x = x + self.self_attn(self.norms[0](x), attention_mask=mask, cache=cache)
        return x + self.mlp(self.norms[1](x))


def config_of(heads: int = 4, kv_heads: int = 2, layers: int = 2, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers, head_dim=16, **more
    )


class Decoder(nn.Module):
    """A language model. ``mask_type``: how it hands on padding, as the least number ("additive") or "bool"; without
    padding it hands on no mask at all, unless a chunk on a cache needs one. ``dropping``: {layer: tokens to keep}."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(config, number) for number in range(config.num_hidden_layers)])
        self.mask_type, self.unmasked = "additive", False
        self.dropping: dict[int, Tensor] = {}

    def mask(self, x: Tensor, padding: Tensor | None, past: int) -> Tensor | None:
        tokens = x.shape[1]
        if (padding is None or bool(padding.all())) and (past == 0 or tokens == 1):
            return None
        allowed = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)[None, None].expand(len(x), 1, -1, -1)
        if padding is not None:
            allowed = allowed & padding[:, None, None].bool()
        if self.unmasked:  # what transformers does on CUDA for rows that would see nothing
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        if self.mask_type == "bool":
            return allowed
        return torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, cache: list[Any] | None = None
    ) -> Tensor:
        """Hidden states ``[B, M, width]``; ``attention_mask [B, N]``, 0 for padding."""
        past = cache[0][0].shape[2] if cache is not None and cache[0] is not None else 0
        x, mask = inputs_embeds, self.mask(inputs_embeds, attention_mask, past)
        for number, layer in enumerate(self.layers):
            if number in self.dropping and x.shape[1] > 1:
                x = x[:, self.dropping[number]]
            x = layer(x, mask, cache)
        return x

    def generate(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, new: int = 3) -> Tensor:
        """The ids of the next tokens ``[B, new]``, greedily; padding on the left alone."""
        cache: list[Any] = [None] * len(self.layers)
        found, x = [], inputs_embeds
        for _ in range(new):
            h = self(x, attention_mask, cache)[:, -1]
            found.append((h @ self.embed_tokens.weight.T).argmax(-1))
            x = self.embed_tokens(found[-1])[:, None]
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return torch.stack(found, dim=1)


class Tower(nn.Module):
    """A vision tower: frames ``[T, 3, side, side]`` of one value a patch -> ``[T, side side, width]``."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.num_patches_per_side = side
        self.embed = nn.Linear(3, WIDTH)
        config = config_of(4, 4, 1)
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention(config, 0)})])
        del self.layers[0]["self_attn"].layer_idx
        self.calls = 0

    def forward(self, frames: Tensor) -> Tensor:
        x = self.embed(frames.flatten(2).transpose(1, 2))
        attention = self.layers[0]["self_attn"]
        shape = (len(x), x.shape[1], 4, 16)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        self.calls += 1
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# ---- LLaVA-NeXT and VideoChat-Flash ----------------------------------------------------------------------------------


class LlavaVideo(Decoder):
    """The decoder with its tower inside, as LlavaQwen; prompts as LLaVA-NeXT joins them."""

    def __init__(self, config: Any, side: int = 5) -> None:
        super().__init__(config)
        self.vision_tower = Tower(side)
        self.mm_projector = nn.Linear(WIDTH, WIDTH)
        self.image_newline = nn.Parameter(torch.randn(WIDTH))

    def get_model(self) -> LlavaVideo:
        return self

    def get_vision_tower(self) -> Tower:
        return self.vision_tower

    def pooled(self, x: Tensor) -> Tensor:
        side, mode = self.vision_tower.num_patches_per_side, self.config.mm_spatial_pool_mode
        x = x.view(len(x), side, side, -1).permute(0, 3, 1, 2)
        if mode == "bilinear":
            x = F.interpolate(x, size=(math.ceil(side / 2),) * 2, mode="bilinear")
        else:
            x = F.avg_pool2d(x, 2) if mode == "average" else F.max_pool2d(x, 2)
        return x.flatten(2).transpose(1, 2)

    def video(self, frames: Tensor) -> Tensor:
        """Tokens ``[n, width]`` of a video."""
        x = self.pooled(self.mm_projector(self.vision_tower(frames)))
        merge, where = self.config.mm_patch_merge_type, self.config.mm_newline_position
        if where == "grid" and merge != "flat":
            side = math.isqrt(x.shape[1])
            x = torch.cat([x.view(len(x), side, side, -1), self.image_newline.expand(len(x), side, 1, -1)], dim=2)
        elif where == "frame" and merge != "flat":
            x = torch.cat([x, self.image_newline.expand(len(x), 1, -1)], dim=1)
        x = x.reshape(-1, WIDTH)
        if where == "one_token" and "unpad" in merge:
            x = torch.cat([x, self.image_newline[None]], dim=0)
        return x

    def image(self, pixels: Tensor) -> Tensor:
        """Tokens of an image: ``[1, 3, P, P]`` alone, or ``[1 + h w, 3, P, P]`` with its tiles in a square."""
        x = self.mm_projector(self.vision_tower(pixels))
        newline = "unpad" in self.config.mm_patch_merge_type
        base, tiles = x[0], x[1:]
        if not len(tiles):
            return torch.cat([base, self.image_newline[None]], dim=0) if newline else base
        across, side = math.isqrt(len(tiles)), self.vision_tower.num_patches_per_side
        grid = (
            tiles.view(across, across, side, side, WIDTH).transpose(1, 2).reshape(across * side, across * side, WIDTH)
        )
        if newline:
            grid = torch.cat([grid, self.image_newline.expand(len(grid), 1, -1)], dim=1)
        return torch.cat([base, grid.reshape(-1, WIDTH)], dim=0)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities=("image",)
    ):  # fmt: skip
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features = [
            self.video(x) if kind == "video" else self.image(x) for x, kind in zip(images, modalities, strict=True)
        ]
        number, rows = 0, []
        for ids, tokens in zip(input_ids, keep.bool(), strict=True):
            ids, parts, start = ids[tokens], [], 0
            for place in (ids == -200).nonzero().flatten().tolist():
                parts += [self.embed_tokens(ids[start:place]), features[number]]
                number, start = number + 1, place + 1
            number += not parts  # the image of a prompt without one
            rows.append(torch.cat([*parts, self.embed_tokens(ids[start:])], dim=0))
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        rows = [row[:limit] for row in rows]
        left = getattr(self.config, "tokenizer_padding_side", "right") == "left"
        longest = max(map(len, rows))
        sides = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
        embeds = torch.stack([F.pad(row, (0, 0, *side)) for row, side in zip(rows, sides, strict=True)])
        mask = torch.stack([F.pad(torch.ones(len(row)), side) for row, side in zip(rows, sides, strict=True)])
        return None, position_ids, mask.long(), past_key_values, embeds, labels

    def answer(self, ids: Tensor, images: Any, modalities: Any = ("image",), mask: Tensor | None = None) -> Tensor:
        """Hidden states of the prompt."""
        joined = self.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images, modalities)
        embeds = self.embed_tokens(ids) if joined[4] is None else joined[4]
        return self(embeds, joined[2])


class Merger(nn.Module):
    """Merges a clip's patches ``[clips, frames patches, width]`` to ``[clips, 64, width]``."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool1d(x.transpose(1, 2), self.tokens).transpose(1, 2))


class VideoChatFlash(LlavaVideo):
    """Prompts of clips; ``dropping`` keeps fewer tokens in later layers."""

    def __init__(self, config: Any, side: int = 5, tokens: int = 64) -> None:
        super().__init__(config, side)
        self.mm_projector = Merger(tokens)

    def video(self, frames: Tensor) -> Tensor:
        patches = self.vision_tower(frames)
        x = self.mm_projector(patches.reshape(len(frames) // self.config.mm_local_num_frames, -1, WIDTH))
        where = self.config.mm_newline_position if "pad" in self.config.mm_patch_merge_type else "nothing"
        if where == "frame":
            x = torch.cat([x, self.image_newline.expand(len(x), 1, -1)], dim=1)
        x = x.flatten(0, 1)
        return torch.cat([x, self.image_newline[None]], dim=0) if where == "one_token" else x

    def image(self, pixels: Tensor) -> Tensor:
        return self.mm_projector(self.vision_tower(pixels)).flatten(0, 1)


# ---- VILA ------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer: a token a character."""

    media_token_ids = {"image": 97, "video": 98}  # noqa: RUF012
    padding_side = "right"

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(c) % 90 for c in text])


class Encoder(nn.Module):
    """Frames to tokens with start and end tokens; with ``pool_sizes``, at several sizes."""

    def __init__(self, parent: Any, start: str | None = None, end: str | None = "\n") -> None:
        super().__init__()
        self.parent = [parent]  # not a submodule
        self.start_tokens, self.end_tokens = start, end

    def words(self, text: str | None) -> Tensor:
        ids = [] if text is None else self.parent[0].tokenizer(text).input_ids
        return self.parent[0].llm.embed_tokens(torch.tensor(ids, dtype=torch.long))

    def framed(self, x: Tensor) -> Tensor:
        ends = [self.words(text).expand(len(x), -1, -1) for text in (self.start_tokens, self.end_tokens)]
        return torch.cat([ends[0], x, ends[1]], dim=1).flatten(0, 1)

    def forward(self, media: list[Tensor], config: Any) -> list[Tensor]:
        return [self.framed(self.parent[0].encoded(x)) for x in media]


class PoolingEncoder(Encoder):
    def __init__(self, parent: Any, pool_sizes: list[list[int]], sep: str | None, **ends: Any) -> None:
        super().__init__(parent, **ends)
        self.pool_sizes, self.sep_tokens = pool_sizes, sep

    def framed(self, x: Tensor) -> Tensor:
        side, parts = math.isqrt(x.shape[1]), []
        for a, b, c in self.pool_sizes:
            pooled = F.avg_pool3d(x.view(len(x), side, side, WIDTH).permute(3, 0, 1, 2), (a, b, c)).permute(1, 2, 3, 0)
            parts += [super().framed(pooled.flatten(1, 2)), self.words(self.sep_tokens)]
        return torch.cat(parts, dim=0)


class Vila(nn.Module):
    """A tower, a projector that halves sides, a decoder ``llm``, and the joining of VILA."""

    def __init__(self, config: Any, side: int = 9) -> None:
        super().__init__()
        self.config = config
        self.llm, self.tower = Decoder(config), Tower(side)
        self.projector = nn.Linear(4 * WIDTH, WIDTH)
        self.tokenizer = Words()
        self.encoders: dict[str, Encoder] = {"image": Encoder(self), "video": Encoder(self)}

    def encoded(self, frames: Tensor) -> Tensor:
        x, side = self.tower(frames), self.tower.num_patches_per_side
        x = F.pad(x.view(len(x), side, side, WIDTH), (0, 0, 0, side % 2, 0, side % 2))
        half = x.shape[1] // 2
        x = x.view(len(x), half, 2, half, 2, WIDTH).transpose(2, 3).reshape(len(x), half * half, 4 * WIDTH)
        return self.projector(x)

    def _embed(self, input_ids, media, media_config, labels, attention_mask):
        embedded = {name: list(self.encoders[name](items, media_config)) for name, items in media.items()}
        names = {number: name for name, number in self.tokenizer.media_token_ids.items()}
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for ids, tokens in zip(input_ids, keep.bool(), strict=True):
            ids, parts, start = ids[tokens], [], 0
            for place, number in enumerate(ids.tolist()):
                if number in names:
                    if start < place:
                        parts.append(self.llm.embed_tokens(ids[start:place]))
                    parts.append(embedded[names[number]].pop(0))
                    start = place + 1
            if start < len(ids):
                parts.append(self.llm.embed_tokens(ids[start:]))
            rows.append(torch.cat(parts, dim=0))
        left, longest = self.tokenizer.padding_side == "left", max(map(len, rows))
        sides = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
        embeds = torch.stack([F.pad(row, (0, 0, *side)) for row, side in zip(rows, sides, strict=True)])
        mask = torch.stack([F.pad(torch.ones(len(row)), side) for row, side in zip(rows, sides, strict=True)])
        return embeds, None, mask.bool()

    def answer(self, ids: Tensor, media: dict[str, list[Tensor]], mask: Tensor | None = None) -> Tensor:
        embeds, _, mask = self._embed(ids, media, {}, None, mask)
        return self.llm(embeds, mask)
