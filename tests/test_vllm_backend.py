"""The mixin of the vLLM plugin over a standard backend made up for it: no vLLM needed.

The made-up backend keeps keys and values in pages, in the layouts of FlashAttention in vLLM 0.24 and 0.32 and, like
vLLM's CPU kernels, in an order of its own. It attends densely, so that whatever mmflex gets wrong shows.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib
import itertools
import json
import logging
import sys
import tomllib
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import mmflex
from mask_builders import AShape, BlockTopK, Dense, Grid, ProxyAttn, QBoundary, VerticalSlash
from mmflex.integrations.vllm import batch, options, plugin
from mmflex.integrations.vllm import engine as engines
from mmflex.integrations.vllm.backend import RUNS, Platform, accelerated_backend
from mmflex.integrations.vllm.carry import Carried
from mmflex.integrations.vllm.pages import ProbedPages, StridedPages, split_pages
from mmflex.integrations.vllm.requests import Prompt, Requests, Step, _current, follow_runner
from mmflex.integrations.vllm.settings import read_settings
from mmflex.integrations.vllm.warmup import lengths
from mmflex.tuning.default import default_spec

torch.set_num_threads(1)
HEADS, KV_HEADS, DIM, PAGE, LAYERS = 4, 2, 16, 32, 2
SCALE = 0.3


# ---- what vLLM has, in small -----------------------------------------------------------------------------------------


@dataclass
class Common:
    """`CommonAttentionMetadata`."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    seq_lens_cpu_upper_bound: Tensor | None = None
    is_prefilling: Tensor | None = None
    encoder_seq_lens: Tensor | None = None
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None
    _num_computed_tokens_cache: Tensor | None = None


@dataclass
class Metadata:
    starts: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor
    cascade: int
    schedule: Tensor | None


class FullAttentionSpec:
    attention_chunk_size = None


class Kind(enum.StrEnum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class Impl:
    """A standard implementation: dense, one request after another."""

    calls: list[tuple[int, int]] = []  # noqa: RUF012  tokens of each call

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: Any = Kind.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Any = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads

    def write(self, cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        keys, values = split_pages(cache, self.num_kv_heads, self.head_size)
        keys[slots // PAGE, slots % PAGE] = key
        values[slots // PAGE, slots % PAGE] = value

    def read(self, cache: Tensor, table: Tensor, n: int) -> tuple[Tensor, Tensor]:
        parts = split_pages(cache, self.num_kv_heads, self.head_size)
        k, v = (part[table].flatten(0, 1)[:n].transpose(0, 1)[None] for part in parts)
        return k, v

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        self.write(cache, slots, key, value)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        if attn_metadata.schedule is not None:  # a schedule is for exactly these rows
            assert torch.equal(attn_metadata.schedule, attn_metadata.lengths)
        starts = attn_metadata.starts.tolist()
        Impl.calls.append((starts[0], starts[-1]))
        for row, (a, b) in enumerate(itertools.pairwise(starts)):
            n = int(attn_metadata.lengths[row])
            if b > a:
                k, v = self.read(kv_cache, attn_metadata.table[row].long(), n)
                q = query[a:b].transpose(0, 1)[None]
                output[a:b] = mmflex.attention(q, k, v, Dense(), scale=self.scale, backend="dense")[0].transpose(0, 1)
        return output


class PackedImpl(Impl):
    """Keys transposed in pairs of tokens, values in reverse, as a processor might like them."""

    def pages(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        blocks = cache.shape[0]
        flat = cache.view(blocks, KV_HEADS, 2, PAGE * DIM)
        keys = flat[:, :, 0].view(blocks, KV_HEADS, DIM // 2, PAGE, 2).permute(0, 3, 1, 2, 4)
        return keys, flat[:, :, 1].view(blocks, KV_HEADS, DIM, PAGE).permute(0, 3, 1, 2)

    def write(self, cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        keys, values = self.pages(cache)
        keys[slots // PAGE, slots % PAGE] = key.unflatten(-1, (DIM // 2, 2))
        values[slots // PAGE, slots % PAGE] = value.flip(-1)

    def read(self, cache: Tensor, table: Tensor, n: int) -> tuple[Tensor, Tensor]:
        keys, values = self.pages(cache)
        k = keys[table].flatten(0, 1)[:n].flatten(-2)
        return k.transpose(0, 1)[None], values[table].flatten(0, 1)[:n].flip(-1).transpose(0, 1)[None]


class Builder:
    """A standard builder. Like FlashAttention's it has memory that every metadata not built fast shares."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        self.schedule = torch.zeros(64, dtype=torch.int64)

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Metadata:
        schedule = None
        if not fast_build:
            schedule = self.schedule[: common.num_reqs]
            schedule.copy_(common.seq_lens)
        assert int(common.query_start_loc_cpu[-1]) == common.num_actual_tokens
        return Metadata(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, common.slot_mapping,
            common_prefix_len, schedule,
        )  # fmt: skip

    def update_block_table(self, metadata: Metadata, blk_table: Tensor, slot_mapping: Tensor) -> Metadata:
        updated = copy.copy(metadata)
        updated.table, updated.slots = blk_table, slot_mapping
        return updated


def backend_class(impl: type = Impl) -> type:
    return type("Standard", (), {"get_impl_cls": lambda: impl, "get_builder_cls": lambda: Builder})


class CompilationConfig(types.SimpleNamespace):
    pass


def config(additional: dict[str, Any], **changed: Any) -> Any:
    """A `VllmConfig`."""
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    text = types.SimpleNamespace(num_hidden_layers=LAYERS, model_type="qwen2", **heads)
    model = {"hf_text_config": text, "hf_config": text, "max_model_len": 4096, "dtype": torch.float32}
    parallel = {"tensor_parallel_size": 1, "decode_context_parallel_size": 1}
    return types.SimpleNamespace(
        additional_config=additional,
        model_config=types.SimpleNamespace(**{**model, **changed.get("model", {})}),
        parallel_config=types.SimpleNamespace(**{**parallel, **changed.get("parallel", {})}),
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=changed.get("budget", 2048)),
        compilation_config=CompilationConfig(
            static_forward_context={}, max_cudagraph_capture_size=changed.get("captured")
        ),
    )


CACHES = {
    "0.24": ((2, PAGE, KV_HEADS, DIM), (0, 1, 2, 3, 4)),
    "0.24 heads first": ((2, PAGE, KV_HEADS, DIM), (0, 1, 3, 2, 4)),
    "0.32": ((KV_HEADS, PAGE, 2 * DIM), (0, 1, 2, 3)),
    "packed": ((KV_HEADS, PAGE, 2 * DIM), (0, 1, 2, 3)),
}


class Server:
    """A model of some attention layers behind vLLM's interface: requests in, outputs of every layer out."""

    def __init__(self, spec: Any, threshold: int = 100, cache: str = "0.24", rank: int = 0, **changed: Any) -> None:
        impl = PackedImpl if cache == "packed" else Impl
        additional = options(spec, threshold=threshold, backend=changed.pop("backend", "reference"))
        self.config = config(additional, **changed)
        pages = ProbedPages if cache == "packed" else StridedPages
        self.heads = HEADS // changed.get("parallel", {}).get("tensor_parallel_size", 1)
        self.platform = Platform(lambda: rank, lambda: self.config, pages, lambda: None, warms=True)
        backend = accelerated_backend(backend_class(impl), self.platform)
        shape, order = CACHES[cache]
        size = (200, *shape)
        inverse = [order.index(i) for i in range(len(order))]
        self.layers = {}
        generator = torch.Generator().manual_seed(0)
        for number in range(LAYERS):
            name = f"model.layers.{number}.self_attn.attn"
            memory = torch.empty([size[i] for i in order]).normal_(generator=generator)
            made = backend.get_impl_cls()(self.heads, DIM, SCALE, KV_HEADS)
            layer = types.SimpleNamespace(layer_name=name, impl=made, cache=memory.permute(inverse))
            self.layers[name] = self.config.compilation_config.static_forward_context[name] = layer
        self.builder = backend.get_builder_cls()(FullAttentionSpec(), list(self.layers), self.config, "cpu")
        self.tables: dict[str, list[int]] = {}
        self.free = torch.randperm(200, generator=generator).tolist()

    @property
    def engine(self) -> Any:
        return self.platform.engine(self.config)[0]

    def step(self, rows: list[tuple[str, int, int]], sides: dict[str, list[tuple[Tensor, ...]]], **changed: Any) -> Any:
        """Tokens ``start .. end`` of requests by name -> per layer, outputs of all of them [T, H, D]."""
        for name, _, end in rows:
            table = self.tables.setdefault(name, [])
            while len(table) * PAGE < end:
                table.append(self.free.pop())
        starts = torch.tensor([0, *np.cumsum([end - start for _, start, end in rows])])
        ends = torch.tensor([end for _, _, end in rows])
        width = max(len(self.tables[name]) for name, _, _ in rows)
        tables = torch.zeros((len(rows), width), dtype=torch.int32)
        for row, (name, _, _) in enumerate(rows):
            tables[row, : len(self.tables[name])] = torch.tensor(self.tables[name])
        slots = torch.cat(
            [torch.tensor([self.tables[n][t // PAGE] * PAGE + t % PAGE for t in range(a, b)]) for n, a, b in rows]
        )
        common = Common(
            starts, starts, ends, len(rows), int(starts[-1]), int(starts.diff().max()), int(ends.max()), tables, slots,
            seq_lens_cpu_upper_bound=ends, is_prefilling=starts.diff() > 1,
        )  # fmt: skip
        prefix = changed.pop("common_prefix_len", 0)
        metadata = self.builder.build(prefix, dataclasses.replace(common, **changed))
        self.metadata = metadata
        out = []
        for number, layer in enumerate(self.layers.values()):
            parts = [torch.cat([sides[n][number][i][a:b] for n, a, b in rows]) for i in range(3)]
            layer.impl.do_kv_cache_update(layer, parts[1], parts[2], layer.cache, slots)
            output = torch.full_like(parts[0], torch.nan)
            layer.impl.forward(layer, *parts, layer.cache, metadata, output)
            out.append(output)
        return out


def prompt(n: int, seed: int, heads: int = HEADS) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v [N, H, D] of every layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, KV_HEADS, KV_HEADS)
    return [tuple(2 * torch.randn(n, h, DIM, generator=generator) for h in sizes) for _ in range(LAYERS)]  # type: ignore[misc]


def wanted(sides: tuple[Tensor, ...], spec: Any, start: int, end: int, layout: Any = None, **given: Any) -> np.ndarray:
    """[M, H, D]: softmax attention under the plan's own mask, in float64."""
    q, k, v = (t[:end].transpose(0, 1)[None] for t in sides)
    q = q[:, :, start:]
    mask = mmflex.plan(q, k, spec, layout=layout, scale=SCALE, backend="reference", **given).dense_mask().numpy()
    return oracle.softmax(q, k, v, mask, SCALE)[0][0].swapaxes(0, 1)


def same(found: Tensor, want: np.ndarray) -> None:
    assert oracle.error(found, want) <= 2e-6


# ---- attention -------------------------------------------------------------------------------------------------------

SPEC = [VerticalSlash(12, 128, 16), AShape(8, 128), BlockTopK(2), AShape(40, 256)]


@pytest.mark.parametrize("cache", list(CACHES))
def test_long_prefills_and_everything_beside_them(cache: str) -> None:
    """One step of chunks with and without context, decode steps and short prompts, in every memory layout."""
    server = Server(SPEC, cache=cache)
    sides = {name: prompt(n, seed) for seed, (name, n) in enumerate([("a", 700), ("b", 350), ("c", 40), ("d", 230)])}
    server.step([("a", 0, 301), ("c", 0, 39)], sides)
    rows = [("c", 39, 40), ("a", 301, 650), ("d", 0, 7), ("b", 0, 350)]
    Impl.calls.clear()
    out = server.step(rows, sides)
    assert Impl.calls == [(0, 1), (0, 7)] * LAYERS  # decode and short prompt, each side of the chunk
    for number in range(LAYERS):
        first = 0
        for name, start, end in rows:
            spec = SPEC if end - start >= 100 else Dense()
            same(out[number][first : first + end - start], wanted(sides[name][number], spec, start, end))
            first += end - start
    out = server.step([("a", 650, 700), ("b", 349, 350)], sides)  # nothing long: the standard metadata as it was
    assert not getattr(server.metadata, RUNS)
    same(out[1][:50], wanted(sides["a"][1], Dense(), 650, 700))


def test_another_group_of_layers_with_the_same_rows() -> None:
    """Hybrid caches: the metadata of one group is used again with other pages."""
    server = Server(SPEC)
    sides = {"a": prompt(400, 0), "b": prompt(40, 1)}
    server.step([("b", 0, 40), ("a", 0, 250)], sides)
    server.step([("b", 39, 40), ("a", 250, 400)], sides)
    layer, metadata = next(iter(server.layers.values())), server.metadata
    moved = torch.randperm(200)
    caches = torch.empty_like(layer.cache)
    caches[moved] = layer.cache
    tables = moved[metadata.table.long()].int()
    updated = server.builder.update_block_table(metadata, tables, metadata.slots)
    q, k, v = (torch.cat([sides["b"][0][i][39:40], sides["a"][0][i][250:]]) for i in range(3))
    output = torch.empty_like(q)
    layer.impl.forward(layer, q, k, v, caches, updated, output)
    same(output[1:], wanted(sides["a"][0], SPEC, 250, 400))
    same(output[:1], wanted(sides["b"][0], Dense(), 39, 40))


def test_a_cascade_goes_without_where_a_prefill_is_long() -> None:
    server = Server(SPEC)
    sides = {"a": prompt(300, 0), "b": prompt(64, 1), "c": prompt(64, 2)}
    server.step([("b", 0, 63), ("c", 0, 63)], sides)
    out = server.step([("b", 63, 64), ("c", 63, 64), ("a", 0, 300)], sides, common_prefix_len=32)
    assert [run.metadata.cascade for run in getattr(server.metadata, RUNS)] == [0, 0]
    same(out[0][2:], wanted(sides["a"][0], SPEC, 0, 300))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_run_the_patterns_of_their_heads(rank: int) -> None:
    server = Server({1: SPEC}, rank=rank, parallel={"tensor_parallel_size": 2})
    sides = {"a": prompt(300, 0, heads=2)}
    out = server.step([("a", 0, 300)], sides)
    same(out[0], wanted(sides["a"][0], Dense(), 0, 300))
    same(out[1], wanted(sides["a"][1], SPEC[2 * rank : 2 * rank + 2], 0, 300))


def test_heads_estimated_together_are_not_torn_apart() -> None:
    """A proxy for the heads of two KV heads would be another one on a rank that has one of them."""
    with pytest.raises(ValueError, match=r"heads of 2 KV heads together, but 2 ranks share the 4 query heads"):
        Server(ProxyAttn(0.9, 8, 128, kv_heads=2), parallel={"tensor_parallel_size": 2})
    Server(ProxyAttn(0.9, 8, 128, kv_heads=1), parallel={"tensor_parallel_size": 2})


def test_shared_caches_are_read_rather_than_the_layers_own_keys() -> None:
    server = Server(SPEC)
    sides = {"a": prompt(300, 0)}
    server.step([("a", 0, 300)], sides)
    for layer in server.layers.values():
        layer.impl.mmflex.arguments["kv_sharing_target_layer_name"] = "another"
    layer = next(iter(server.layers.values()))
    q, k, v = sides["a"][0]
    output = torch.empty_like(q)
    layer.impl.forward(layer, q, torch.zeros_like(k), torch.zeros_like(v), layer.cache, server.metadata, output)
    same(output, wanted((q, k, v), SPEC, 0, 300))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"causal": torch.ones(1, dtype=torch.bool)}, "not causal"),
        ({"seq_lens_cpu_upper_bound": None}, "no sequence lengths on the host"),
        ({"encoder_seq_lens": torch.ones(1)}, "encoder_seq_lens is set"),
        ({"mm_req_doc_ranges": {0: [(3, 9)]}}, "mm_req_doc_ranges is set"),
    ],
)
def test_steps_that_must_not_be_cut(changed: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    server, sides = Server(SPEC), {"a": prompt(300, 0)}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = server.step([("a", 0, 300)], sides, **changed)
    same(out[0], wanted(sides["a"][0], Dense(), 0, 300))
    assert sum(reason in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sliding_window": 128}, "sliding window"),
        ({"logits_soft_cap": 30.0}, "soft-capped"),
        ({"sinks": torch.ones(HEADS)}, "sinks"),
        ({"alibi_slopes": [1.0] * HEADS}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "KV cache of fp8_e4m3"),
        ({"attn_type": Kind.ENCODER_ONLY}, "type encoder_only"),
    ],
)
def test_layers_that_stay_standard(arguments: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(SPEC)
    impl = accelerated_backend(backend_class(), server.platform).get_impl_cls()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        assert impl(HEADS, DIM, SCALE, KV_HEADS, **arguments).mmflex is None
    assert sum(reason in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": {"runner_type": "draft"}}, "draft"),
        ({"model": {"use_mla": True}}, "MLA"),
        ({"model": {"is_mm_prefix_lm": True}}, "see both ways"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode context parallelism"),
        ({"parallel": {"use_ubatching": True}}, "dual batch overlap"),
    ],
)
def test_engines_that_stay_standard(changed: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        server = Server(SPEC, **changed)
    assert all(layer.impl.mmflex is None for layer in server.layers.values())
    assert server.builder.mmflex is None
    assert sum(reason in message for message in caplog.messages) == 1


def test_layers_of_another_kind_of_cache_stay_standard() -> None:
    server = Server(SPEC)
    builder = accelerated_backend(backend_class(), server.platform).get_builder_cls()  # type: ignore[attr-defined]
    window = type("SlidingWindowSpec", (), {})()
    chunked = FullAttentionSpec()
    chunked.attention_chunk_size = 8192
    assert builder(FullAttentionSpec(), list(server.layers), server.config, "cpu").mmflex is not None
    for spec in (window, chunked):
        assert builder(spec, list(server.layers), server.config, "cpu").mmflex is None


def test_without_the_option_layers_are_standard() -> None:
    for additional in ({}, {"mmflex": "off"}, None):
        server = Server(SPEC)
        server.config = config(additional)  # type: ignore[arg-type]
        impl = accelerated_backend(backend_class(), server.platform).get_impl_cls()  # type: ignore[attr-defined]
        assert impl(HEADS, DIM, SCALE, KV_HEADS).mmflex is None


def test_a_spec_without_a_meaning_for_a_prompt_runs_standard(caplog: pytest.LogCaptureFixture) -> None:
    """Frames, but no video: a server goes on."""
    server, sides = Server({0: Grid("frame"), 1: AShape(8, 128)}), {"a": prompt(300, 0)}
    with caplog.at_level(logging.WARNING):
        out = server.step([("a", 0, 300)], sides)
    same(out[0], wanted(sides["a"][0], Dense(), 0, 300))
    same(out[1], wanted(sides["a"][1], AShape(8, 128), 0, 300))
    assert any("frame" in message for message in caplog.messages)
    assert (server.engine.counters.standard, server.engine.counters.layers) == (1, 1)


def test_auto_leaves_to_the_standard_backend_what_dense_does_faster() -> None:
    """And on a device whose kernels are compiled for one length each, everything."""
    server = Server(AShape(8, 128), backend="auto")
    assert server.builder.mmflex is None
    server.builder.mmflex = _group(server, 100)
    sides = {"a": prompt(300, 0)}
    Impl.calls.clear()
    server.step([("a", 0, 300)], sides)
    assert Impl.calls == [(0, 300)] * LAYERS
    assert server.engine.counters.standard == LAYERS


def _group(server: Server, threshold: int) -> Any:
    from mmflex.integrations.vllm.backend import LayerGroup

    return LayerGroup(server.engine, threshold)


def test_a_line_for_every_prefill(caplog: pytest.LogCaptureFixture) -> None:
    server, sides = Server(AShape(8, 128)), {"a": prompt(700, 0)}
    with caplog.at_level(logging.DEBUG, "vllm.mmflex"):
        server.step([("a", 0, 300)], sides)
        server.step([("a", 300, 700)], sides)
    lines = [m for m in caplog.messages if "new tokens of" in m]
    assert [line.split(":")[1].strip() for line in lines] == [
        "300 new tokens of 300 in 2 layers", "400 new tokens of 700 in 2 layers"
    ]  # fmt: skip
    density = [float(line.split("density ")[1].split("%")[0]) / 100 for line in lines]
    q, k = (torch.zeros(1, h, 700, DIM) for h in (HEADS, KV_HEADS))
    plan = mmflex.plan(q[:, :, 300:], k, AShape(8, 128), backend="reference")
    assert density[1] == pytest.approx(plan.density.total, abs=1e-3)
    assert server.engine.counters.tokens == 700


# ---- which token is what ---------------------------------------------------------------------------------------------

VL = types.SimpleNamespace(
    model_type="qwen2_5_vl", image_token_id=100, video_token_id=101,
    vision_config=types.SimpleNamespace(spatial_merge_size=2),
)  # fmt: skip


def feature(kind: str, offset: int, grid: tuple[int, int, int] | None, name: str) -> Any:
    """A `MultiModalFeatureSpec`; without its data where vLLM has it cached."""
    data = None
    if grid is not None:
        pixels = types.SimpleNamespace(data=torch.zeros(4, 8))
        data = {f"{kind}_grid_thw": types.SimpleNamespace(data=torch.tensor(grid)), "pixel_values": pixels}
    return types.SimpleNamespace(
        data=data, modality=kind, identifier=name, mm_hash=name, mm_position=types.SimpleNamespace(offset=offset)
    )


def scheduled(new: list[Any] = (), counts: dict[str, int] | None = None, finished: tuple[str, ...] = ()) -> Any:  # type: ignore[assignment]
    """A `SchedulerOutput`."""
    return types.SimpleNamespace(
        scheduled_new_reqs=list(new), num_scheduled_tokens=counts or {}, finished_req_ids=set(finished)
    )


def request(name: str, ids: list[int], features: list[Any]) -> Any:
    """A `NewRequestData`."""
    return types.SimpleNamespace(req_id=name, prompt_token_ids=ids, mm_features=features)


FRAMES, SIDE = 9, 6
IDS = [7] * 20 + [101] * (FRAMES * SIDE * SIDE) + [8] * 11 + [100] * 24 + [9] * 50
FEATURES = [("image", 20 + FRAMES * SIDE * SIDE + 11, (1, 8, 12), "i"), ("video", 20, (FRAMES, 12, 12), "v")]
LAYOUT = mmflex.TokenLayout.from_segments(
    [("text", 20), ("video", (FRAMES, SIDE, SIDE)), ("text", 11), ("image", (4, 6)), ("text", 50)]
)


class Runner:
    """A model runner that keeps its batch, as vLLM's first one does."""

    def __init__(self, server: Server, sides: Any) -> None:
        self.server, self.sides = server, sides
        self.input_batch = types.SimpleNamespace(req_ids=[])

    def execute_model(self, scheduler_output: Any, rows: list[tuple[str, int, int]]) -> Any:
        self.input_batch.req_ids = [name for name, _, _ in rows]
        return self.server.step(rows, self.sides)


class SecondRunner:
    """One whose batch is an argument, as in vLLM's second one."""

    def __init__(self, server: Server, sides: Any) -> None:
        self.server, self.sides = server, sides

    def prepare_attn(self, input_batch: Any) -> None:
        pass

    def execute_model(self, scheduler_output: Any, rows: list[tuple[str, int, int]]) -> Any:
        self.prepare_attn(types.SimpleNamespace(req_ids=[name for name, _, _ in rows]))
        return self.server.step(rows, self.sides)


def run(runner: Any, rows: list[tuple[str, int, int]], new: list[Any] = (), finished: tuple[str, ...] = ()) -> Any:  # type: ignore[assignment]
    return runner.execute_model(scheduled(new, {n: b - a for n, a, b in rows}, finished), rows)


BY_FRAME = [Grid("frame", local=16, last_q=16), QBoundary({"video": Grid("frame", local=16), "text": AShape(8, 64),
            "image": AShape(8, 64)}), AShape(8, 128), Grid("frame", rows=True, local=16, last_q=16)]  # fmt: skip


@pytest.mark.parametrize("runner_class", [Runner, SecondRunner])
def test_videos_have_frames(runner_class: type) -> None:
    """Rows find their requests, and patterns the frames, in every chunk; text beside them is text; later requests with
    images that vLLM has cached have them too."""
    followed = type("Runner", (runner_class,), dict(vars(runner_class)))
    follow_runner(followed)
    follow_runner(followed)
    n = len(IDS)
    server = Server(BY_FRAME, model={"hf_config": VL})
    sides = {"film": prompt(n, 0), "text": prompt(300, 1), "again": prompt(n + 200, 2)}
    runner = followed(server, sides)
    new = [request("text", [5] * 300, []), request("film", IDS, [feature(*f) for f in FEATURES])]
    out = run(runner, [("film", 0, 260), ("text", 0, 300)], new)
    same(out[0][:260], wanted(sides["film"][0], BY_FRAME, 0, 260, LAYOUT[:260]))
    same(out[0][260:], wanted(sides["text"][0], Dense(), 0, 300))  # no frames: standard
    out = run(runner, [("text", 299, 300), ("film", 260, n)])
    same(out[1][1:], wanted(sides["film"][1], BY_FRAME, 260, n, LAYOUT))
    cached = [feature(kind, offset, None, name) for kind, offset, _, name in FEATURES]
    longer = mmflex.TokenLayout.from_modality_ids(
        np.pad(LAYOUT.modality, ((0, 0), (0, 200))), frame=np.pad(LAYOUT.frame, ((0, 0), (0, 200)), constant_values=-1),
        cell=np.pad(LAYOUT.cell, ((0, 0), (0, 200)), constant_values=-1),
        segment=np.pad(LAYOUT.segment, ((0, 0), (0, 200)), constant_values=9),
    )  # fmt: skip
    out = run(runner, [("again", 0, n + 200)], [request("again", IDS, cached)], finished=("text", "film"))
    same(
        out[0], wanted(sides["again"][0], BY_FRAME, 0, n + 200, longer)
    )  # computed again with 200 tokens of its answer
    assert _current.get() is None


def test_prompts_that_say_nothing_are_text(caplog: pytest.LogCaptureFixture) -> None:
    """An image whose size nobody told, a family that is not known, embeddings: text, and a notice each."""
    server = Server(AShape(8, 128), model={"hf_config": VL})
    follow = type("Runner", (Runner,), dict(vars(Runner)))
    follow_runner(follow)
    sides = {name: prompt(len(IDS), i) for i, name in enumerate("abc")}
    runner, n = follow(server, sides), len(IDS)
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            lost = [feature(kind, offset, None, f"{name}{kind}") for kind, offset, _, _ in FEATURES]
            out = run(runner, [(name, 0, n)], [request(name, IDS, lost)])
            same(out[0], wanted(sides[name][0], AShape(8, 128), 0, n))
        run(runner, [("c", 0, n)], [request("c", None, [])])
    assert sum("taken as text" in message for message in caplog.messages) == 1


def test_rows_that_contradict_the_scheduler_are_nobodys() -> None:
    requests = Requests()
    step = Step(
        requests, {"a": 5, "b": 1}, types.SimpleNamespace(input_batch=types.SimpleNamespace(req_ids=["b", "a"]))
    )
    assert step.names([1, 5, 0]) == ["b", "a", None]
    assert step.names([1, 3]) == ["b", None]
    step.order = ["a"]
    assert step.names([5, 1]) == ["a", None]


# ---- from chunk to chunk ---------------------------------------------------------------------------------------------


def test_chunks_estimate_as_a_prompt_that_ends_there() -> None:
    """Few of a modality's queries may be in a chunk: those of earlier chunks count. The last chunk selects what the
    whole prompt does."""
    spec = QBoundary({"text": VerticalSlash(60, 40), "video": VerticalSlash(60, 64), "image": Dense()})
    server = Server(spec, model={"hf_config": VL})
    follow = type("Runner", (Runner,), dict(vars(Runner)))
    follow_runner(follow)
    n, sides = len(IDS), {"film": prompt(len(IDS), 0)}
    runner = follow(server, sides)
    new = [request("film", IDS, [feature(*f) for f in FEATURES])]
    differs = []
    for start, end in ((0, 110), (110, 310), (310, n)):
        out = run(runner, [("film", start, end)], new if not start else [])
        for number in range(LAYERS):
            q = sides["film"][number][0][:end].transpose(0, 1)[None]
            want = wanted(sides["film"][number], spec, start, end, LAYOUT[:end], estimate_from=(q, np.arange(end)))
            same(out[number], want)
            own = wanted(sides["film"][number], spec, start, end, LAYOUT[:end])
            differs.append(oracle.error(out[number], own) > 1e-3)
    assert differs == [False, False, False, False, True, True]  # its 61 text queries and 34 of video are too few
    assert not server.engine.counters.standard


def test_chunks_computed_again_begin_anew() -> None:
    prompt_ = Prompt([1] * 500, [{}])
    prompt_.carried[0] = Carried(torch.zeros(1, 1, 1, DIM), np.array([3]), 128)
    run_ = batch.Run(slice(0, 1), slice(0, 200), start=0, end=200, prompt=prompt_)
    run_.layout = mmflex.TokenLayout.text(200)
    from mmflex.integrations.vllm.carry import estimate_from

    q = torch.randn(1, 1, 200, DIM)
    program = mmflex.plan(q, q, VerticalSlash(4, 16, 8), layout=run_.layout, backend="reference").program
    assert estimate_from(run_, 0, q, program) is None
    assert prompt_.carried[0].numbers.tolist() == list(range(192, 200))
    assert torch.equal(prompt_.carried[0].queries, q[:, :, 192:])


# ---- settings, warm-up, threshold ------------------------------------------------------------------------------------


def test_settings_say_what_is_wrong(tmp_path: Any) -> None:
    file = tmp_path / "config.json"
    mmflex.save_config(mmflex.Config.of({1: AShape(8, 64)}, LAYERS, HEADS), file)
    assert read_settings({"mmflex": str(file)}).for_model(LAYERS, HEADS) == {1: (AShape(8, 64),) * HEADS}  # type: ignore[union-attr]
    high = {"mmflex": {"config": "default:high"}}
    assert read_settings(high).for_model(1, 2) == {0: (default_spec("high"),) * 2}  # type: ignore[union-attr]
    assert read_settings({"mmflex": "default"}).for_model(1, 1) == {0: (default_spec(),)}  # type: ignore[union-attr]
    short = {
        "mmflex": {"spec": {"0": [{"pattern": "AShape", "sink": 4, "local": 64}]}, "threshold": 9, "backend": "flash"}
    }
    found = read_settings(short)
    assert found is not None
    assert (found.for_model(1, 1), found.threshold, found.backend) == ({0: (AShape(4, 64),)}, 9, "flash")
    for given, text in (
        (5, 'give "off", "default"'),
        ({"specs": 1}, "unknown fields 'specs'"),
        ({}, "neither"),
        ({"config": "default", "spec": {}}, "needs one of spec and config"),
        ({"config": 3}, "config is 3"),
        ("default:best", "quality is 'best': use 'high', 'balanced', 'fast'"),
        ({"config": "default", "threshold": 0}, "threshold is 0"),
        ({"config": "default", "backend": "quick"}, "unknown backend 'quick'"),
        ({"spec": {"first": {}}}, "by layer number"),
        ({"spec": {"0": {"pattern": "AShape", "sinks": 3}}}, r"spec\['0'\]: AShape has no field sinks"),
        ({"spec": [{"pattern": "AShape"}, 3]}, r"spec\[1\]"),
        ({"spec": "default"}, "spec: a pattern is an object .* got 'default'"),
        ({"spec": {"1": {"pattern": "Dense"}, "01": {"pattern": "AShape"}}}, "spec: layer 1 has two entries"),
        ({"config": "default", "backend": ["flash"]}, r"unknown backend \['flash'\]"),
        ({"config": "default", 1: 2, "specs": 3}, "unknown fields 1, 'specs'"),
    ):
        with pytest.raises(ValueError, match=text):
            read_settings({"mmflex": given})


def test_specs_survive_the_way_through_vllms_options() -> None:
    for spec in (SPEC, {0: SPEC, 1: AShape(3, 64)}, BY_FRAME, mmflex.Config.of({1: SPEC}, LAYERS, HEADS)):
        given = json.loads(json.dumps(options(spec, threshold=7), sort_keys=True))  # as vLLM hashes them
        found = read_settings(given)
        assert found is not None
        whole = spec.patterns if isinstance(spec, mmflex.Config) else spec
        assert found.for_model(LAYERS, HEADS) == engines.Settings(whole).for_model(LAYERS, HEADS)


def test_options_take_the_text_that_the_command_line_takes(tmp_path: Any) -> None:
    file = tmp_path / "config.json"
    mmflex.save_config(mmflex.Config.of({1: AShape(8, 64)}, LAYERS, HEADS), file)
    for text in ("default", "default:high", str(file)):
        given = json.loads(json.dumps(options(text, threshold=7, backend="flash")))
        found, by_text = read_settings(given), read_settings({"mmflex": text})
        assert found is not None
        assert by_text is not None
        assert found.for_model(LAYERS, HEADS) == by_text.for_model(LAYERS, HEADS)
        assert (found.threshold, found.backend) == (7, "flash")
    assert options(file) == options(str(file))
    assert read_settings(options("off")) is None


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (5, "the spec is 5"),
        (None, "the spec is None"),
        (b"default", "the spec is b'default'"),
        ({"pattern": "AShape"}, "the key 'pattern'"),
        ({"spec": {"0": AShape(8, 64)}}, "the key 'spec'"),
        ({0: "default"}, "layer 0 is 'default'"),
        ({0: {0: AShape(8, 64)}}, "layer 0 is {0: AShape"),
        ([AShape(8, 64), "default"], "head 1 is 'default'"),
        (mmflex.default_spec, "the spec is <function default_spec"),
    ],
)
def test_options_name_what_they_cannot_take(spec: Any, named: str) -> None:
    with pytest.raises(TypeError, match=r'give patterns, a Config, "default", "off" or the path of a config') as error:
        options(spec)
    assert named in str(error.value)


def test_options_refuse_what_the_engine_would_refuse(tmp_path: Any) -> None:
    """Where they are written, not in a process of the engine."""
    for call, text in (
        (lambda: options("default:best"), "quality is 'best'"),
        (lambda: options(SPEC, threshold=0), "threshold is 0"),
        (lambda: options("default", backend="quick"), "unknown backend 'quick'"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        options(tmp_path / "none.json")


def test_the_threshold_is_beyond_captured_graphs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Server(SPEC, threshold=100, captured=512).builder.mmflex.threshold == 513
    assert "512 tokens vLLM replays CUDA graphs" in caplog.text
    assert Server(SPEC, threshold=600, captured=512).builder.mmflex.threshold == 600
    assert Server(SPEC, threshold=None).builder.mmflex.threshold == 1024  # type: ignore[arg-type]
    assert Server(Dense(), threshold=None).builder.mmflex.threshold == 4096  # type: ignore[arg-type]


def test_the_profiling_run_takes_the_memory_and_leaves_zeros() -> None:
    server = Server(SPEC, budget=512)
    for number, layer in enumerate(server.layers.values()):
        for tokens in (8, 512, 512):
            q, k, v = (torch.randn(tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
            out = layer.impl.forward(layer, q, k, v, torch.empty(0), None, torch.full_like(q, 3.0))
            assert not out.any()
            taken = server.engine.buffer.memory
            assert (taken is None) == (number == 0 and tokens == 8)
    assert taken is not None
    assert taken.numel() == 2 * KV_HEADS * 4096 * DIM
    assert len(server.engine.warmed) == 1  # both layers have one spec
    sides = {"a": prompt(700, 0)}
    server.step([("a", 0, 400)], sides)
    server.step([("a", 400, 700)], sides)
    assert server.engine.buffer.memory is taken


def test_the_warm_up_meets_every_way_to_read_queries_twice() -> None:
    """Whole prompts and chunks, of whole tiles and not; long ones in strips of 16 tiles (131072 queries or more)."""
    for budget, longest in ((131136, 131136), (8192, 131072), (4096, 4096), (2048, 1024), (300, 300), (1, 1)):
        budget = min(budget, longest)
        pairs = lengths(budget, longest)
        assert pairs[0] == (budget, budget)
        assert all(1 <= queries <= keys <= longest for queries, keys in pairs)
        if budget >= 1024:
            for whole in (True, False):
                met = [queries for queries, keys in pairs if (queries == keys) == whole]
                assert len({n for n in met if n % 128 == 0 and n < 131072}) >= 2
                assert len({n for n in met if n % 128}) >= 2
        assert any(n % 2048 == 0 and n >= 131072 for n, _ in pairs) == (budget >= 131072)


def test_the_entry_point_does_nothing_without_vllm() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["mmflex"].split(":")
    register = getattr(importlib.import_module(module), name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "version", lambda package: metadata.version(f"{package}-is-not-there"))
        before = set(sys.modules)
        register()
        assert not [name for name in set(sys.modules) - before if name.partition(".")[0] == "vllm"]


def test_the_page_names_the_versions_that_were_tried() -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto" / "vllm.md").read_text("utf-8")
    versions = page[page.index("## Versions") : page.index("## SGLang")]
    assert all(f"| {version} |" in versions for tried in plugin.TESTED.values() for version in tried)
