"""Several ranks, as processes on the CPU: the same masks as one process, the same outputs and the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import rank_cases
import torch
from rank_pool import RankError, RankPool

import mmflex
from mask_builders import (
    AShape,
    BlockPeaks,
    BlockTopK,
    Boundary2D,
    Dense,
    FlashPrefill,
    FlexPrefill,
    Grid,
    Prism,
    ProxyAttn,
    QBoundary,
    VerticalSlash,
    XAttention,
)
from mmflex.distributed import Dealing

torch.set_num_threads(1)
VIDEO = mmflex.TokenLayout.from_segments(
    [
        ("text", 70),
        ("video", (8, 6, 9), {"timestamps": 3}),
        ("text", 61),
        ("image", (9, 13)),
        ("video", (6, 7, 8)),
        ("text", 53),
    ]
)  # 1,093 tokens
N = VIDEO.length


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    ranks = RankPool(4)
    yield ranks
    ranks.close()


def draw(n: int, heads: int = 14, kv_heads: int = 2, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, n, 16, generator=generator) for h in (heads, kv_heads, kv_heads))
    k[:, :, ::23] *= 2
    return [q, k, v]


# ---- dealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1024, 1025, 1093, 5000, 130_001])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_is_dealt_out_once_and_the_work_is_even(tokens: int, ranks: int) -> None:
    dealing = Dealing.head_tail(tokens, ranks)
    numbers = np.concatenate([dealing.queries(rank).numbers for rank in range(ranks)])
    assert np.array_equal(np.sort(numbers), np.arange(tokens))
    assert max(dealing.counts) - min(dealing.counts) <= 2 * 128
    seen = [(dealing.queries(rank).numbers + 1.0).sum() for rank in range(ranks)]
    assert max(seen) / min(seen) < 1 + 3 * 128 * ranks / tokens * 2
    for runs in dealing.runs:
        assert all(first % 128 == 0 for first, _ in runs)
    whole = torch.arange(tokens)[None]
    shares = torch.stack([dealing.padded(dealing.take(whole, rank, 1), 1) for rank in range(ranks)])
    assert torch.equal(dealing.restore(shares, 1), whole)


def test_tokens_that_follow_are_held_behind_those_before() -> None:
    first, second = Dealing.head_tail(1000, 2), Dealing.head_tail(600, 2)
    both = first.followed_by(second).with_owner(300)
    assert both.total == 1900
    numbers = np.concatenate([both.queries(rank).numbers for rank in range(2)])
    assert np.array_equal(np.sort(numbers), np.arange(1900))
    assert abs(len(both.tokens_from(0, 1600)) - 150) <= 64
    assert both.runs[0][:2] == ((0, 256), (768, 1128))  # its last tokens, and the first that follow


def test_too_many_ranks_name_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"1000 tokens are 8 tiles of 128, but 5 ranks need 10.*use 4 ranks or fewer"):
        Dealing.head_tail(1000, 5)


# ---- attention -------------------------------------------------------------------------------------------------------


def same_as_one_process(
    pool: RankPool, ranks: int, spec: Any, layout: mmflex.TokenLayout, options: dict[str, Any], batch: int = 1
) -> set[str]:
    """Masks and selections are those of one process, outputs too, and right by the oracle. The kinds of launches."""
    q, k, v = draw(layout.length, batch=batch)
    spec = [spec] * 14 if isinstance(spec, mmflex.Pattern) else spec
    backend = options.get("backend", "reference")
    whole = mmflex.plan(q, k, spec, layout=layout, backend=backend, v=v)
    mask, wanted = whole.dense_mask(), whole.attend(q, k, v)
    truth, _ = oracle.softmax(q, k, v, mask.numpy())
    kinds: set[str] = set()
    for rank, answer in enumerate(pool.run(ranks, rank_cases.attend, q, k, v, spec, layout, options)):
        tokens, out, rank_mask, selections, labels = answer
        heads = slice(None)
        if options.get("scheme") == "heads":
            heads = slice(rank * 14 // ranks, (rank + 1) * 14 // ranks)
            assert torch.equal(rank_mask, mask[:, heads])
        else:
            assert torch.equal(rank_mask, mask[:, :, tokens])
            for name, chosen in selections.items():
                if chosen.dim() < 4:  # tables hold a rank's own rows: the mask shows them
                    assert torch.equal(chosen, whole.selections[name]), name
        assert oracle.error(out, wanted[:, :, tokens].double().numpy()) <= 2e-6
        assert oracle.error(out, truth[:, :, tokens]) <= 2e-6
        kinds |= set(labels)
    return kinds


EVERY_KIND = [
    *[Grid("frame", rows=True, slash=True, local=128)] * 4,
    *[VerticalSlash(60, 200)] * 3,
    *[Dense()] * 2,
    *[AShape(128, 256)] * 3,
    *[Grid("search", shortest=40, longest=90, local=128)] * 2,
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_kind_of_launch(pool: RankPool, ranks: int) -> None:
    lowering = mmflex.Lowering(gather_rows=True, residue_launches=True)
    kinds = same_as_one_process(pool, ranks, EVERY_KIND, VIDEO, {"backend": "reference", "lowering": lowering})
    assert {kind.split(" ")[0] for kind in kinds} >= {"blocks", "gathered", "residue-major", "dense"}, kinds


PADDED = {
    "left": mmflex.TokenLayout.batch([VIDEO, VIDEO[41:]], side="left"),
    "right": mmflex.TokenLayout.batch([VIDEO, VIDEO[:1050]], side="right"),
    "text": mmflex.TokenLayout.batch([mmflex.TokenLayout.text(1093), mmflex.TokenLayout.text(1000)], side="left"),
}
BY_MODALITY = QBoundary({"text": VerticalSlash(40, 128), "video": Grid("frame", local=128, rows=True)})
BY_PAIR = Boundary2D({("text", "video"): VerticalSlash(30, 128), ("video", "video"): VerticalSlash(50, 128)})


@pytest.mark.parametrize("side", list(PADDED))
def test_unlike_prompts_in_a_batch(pool: RankPool, side: str) -> None:
    pattern = VerticalSlash(60, 200)
    spec = [*[pattern if side == "text" else BY_MODALITY] * 7, *[pattern if side == "text" else BY_PAIR] * 7]
    same_as_one_process(pool, 4, spec, PADDED[side], {"backend": "reference"}, batch=2)


BY_BLOCK = [
    *[BlockTopK(3)] * 3,
    *[XAttention(8, 0.8, 4)] * 2,
    BlockPeaks(0.01, 8, 4),
    *[FlexPrefill(0.9, 0.0, 40, 64, 4, 16)] * 2,
    *[FlexPrefill(0.9, 1.0, 40, 64, 4, 16)] * 2,
    *[BlockTopK(3).on("video", "video") | AShape(64, 128)] * 2,
    XAttention(8, 0.8, 4).on("video") | AShape(64, 128),
    BlockPeaks(0.02, 8, 4).on("video") | AShape(64, 128),
]


@pytest.mark.parametrize("layout", ["plain", "left"])
def test_patterns_that_score_blocks_of_queries(pool: RankPool, layout: str) -> None:
    """Blocks that a border between chunks divides, and shares of the mass of all queries, are those of one process."""
    prompts = {"plain": VIDEO, "left": PADDED["left"]}[layout]
    same_as_one_process(pool, 2, BY_BLOCK, prompts, {"backend": "reference"}, batch=prompts.batch_size)


FROM_ALL_QUERIES = [
    *[FlashPrefill(0.2, 4, 0.5, 200, 100, 100, 192)] * 2,
    *[FlashPrefill(0.3, 3, near=150, sink=1).on("video", "video") | AShape(64, 128)] * 2,
    *[ProxyAttn(0.8, 2, 0, block_size=192, last_q=40, near=1)] * 2,
    *[ProxyAttn(0.7, 3, 0, kv_heads=2).on("video") | AShape(64, 128)] * 2,
    *[Prism(0.6, 2, 192)] * 2,
    *[Prism(0.5, 3).on("video", "video") | AShape(64, 128)],
    *[BlockTopK(2, 192, 200, decay=0.5, values=0.3)] * 2,
    *[BlockTopK(3, decay=0.4, values=0.2).on("video", "video") | AShape(64, 128)],
]


@pytest.mark.parametrize(("ranks", "layout"), [(2, "plain"), (4, "left"), (2, "right")])
def test_neighbours_samples_budgets_and_values_of_blocks(pool: RankPool, ranks: int, layout: str) -> None:
    """What is forced near every query of a block, which queries are sampled and how budgets fall is that of whole
    blocks and prompts, on every rank; of values, all ranks have all."""
    prompts = VIDEO if layout == "plain" else PADDED[layout]
    same_as_one_process(pool, ranks, FROM_ALL_QUERIES, prompts, {"backend": "reference"}, batch=prompts.batch_size)


def test_proxies_within_a_ranks_heads(pool: RankPool) -> None:
    spec = [*[ProxyAttn(0.8, 5, 0)] * 9, *[BlockTopK(5, values=0.3)] * 5]
    same_as_one_process(pool, 2, spec, VIDEO, {"backend": "reference", "scheme": "heads"})


def test_heads_exchanged_for_tokens(pool: RankPool) -> None:
    same_as_one_process(pool, 2, EVERY_KIND, VIDEO, {"backend": "reference", "scheme": "heads"})
    same_as_one_process(
        pool, 2, [BY_MODALITY] * 14, PADDED["right"], {"backend": "reference", "scheme": "heads"}, batch=2
    )


def test_compiled_kernels(pool: RankPool) -> None:
    """FlexAttention on the CPU; short prompts under "auto" are dense for all ranks, as for one process."""
    layout = mmflex.TokenLayout.text(1024)
    same_as_one_process(pool, 2, AShape(128, 256), layout, {"backend": "cpu"})
    kinds = same_as_one_process(pool, 2, AShape(128, 256), mmflex.TokenLayout.text(512), {"backend": "auto"})
    whole = mmflex.plan(*draw(512)[:2], AShape(128, 256), layout=mmflex.TokenLayout.text(512))
    assert kinds == {launch.label for launch in whole.program.launches}


def test_log_sum_exp_and_torch_compile(pool: RankPool) -> None:
    q, k, v = draw(N)
    whole = mmflex.plan(q, k, EVERY_KIND, layout=VIDEO, backend="reference")
    truth, sums = oracle.softmax(q, k, v, whole.dense_mask().numpy())
    for scheme in ("keys", "heads"):
        for tokens, out, lse, unsharded in pool.run(2, rank_cases.compiled, q, k, v, EVERY_KIND, VIDEO, scheme):
            assert oracle.error(out, truth[:, :, tokens]) <= 2e-6
            assert np.abs(lse.double().numpy() - sums[:, :, tokens]).max() <= 1e-4
            assert oracle.error(unsharded, truth) <= 2e-6


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("no cp", "ValueError", ["('dp',)", "'cp'", "mesh_dim_names"]),
        ("no mesh", "TypeError", ["int", "DeviceMesh"]),
        ("short", "ValueError", ["384 tokens are 3 tiles", "2 ranks need 4"]),
        ("share", "ValueError", ["q has 500 tokens", "holds 512 of 1024"]),
        ("heads", "ValueError", ["3 KV heads do not divide by 2 ranks", 'scheme="keys"']),
        ("proxies", "ValueError", ["ProxyAttn", "2 KV heads together", "2 ranks share the 4 query heads and 2 KV"]),
        ("no lse", "ValueError", ["return_lse", "'cpu'", "reference"]),
        ("unlike", "ValueError", ["rank 0", "rank 1", "fingerprint", "same prompt"]),
        ("scheme", "ValueError", ["'ring'", '"keys" or "heads"']),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(pool: RankPool, case: str, kind: str, words: list[str]) -> None:
    with pytest.raises(RankError) as raised:
        pool.run(2, rank_cases.refused, case)
    assert len(raised.value.errors) == 2
    for name, message, _ in raised.value.errors:
        assert name == kind, message
        for word in words:
            assert word in message


def test_a_rank_that_ends_is_an_error_of_the_others() -> None:
    """They do not wait for ever: the process group's timeout at most, and the message says so."""
    ranks = RankPool(2)
    try:
        with pytest.raises(RankError) as raised:
            ranks.run(2, rank_cases.one_ends)
        messages = [message for _, message, _ in raised.value.errors]
        assert any("on rank 0 of 2 did not get through" in message for message in messages)
        assert any("init_process_group(timeout=" in message for message in messages)
    finally:
        ranks.close()


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [600, 6601])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_on_keys_that_are_dealt_out(pool: RankPool, dtype: torch.dtype, tokens: int) -> None:
    """Some rank sees no key of some row, and a row sees none at all; keys for one stretch or for several."""
    q, k, v = (t.to(dtype) for t in draw(tokens, 14, 2, batch=2))
    q = q[:, :, :3]
    seen = torch.rand(2, 1, 3, tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[0, 0, 0] = False
    seen[1, 0, 1, : tokens // 2] = False
    truth, _ = oracle.softmax(q, k, v, seen.expand(2, 14, 3, tokens).numpy())
    for out in pool.run(3, rank_cases.decoded, q, k, v, seen):
        assert out.dtype == dtype
        assert (out[0, :, 0] == 0).all()
        assert oracle.error(out, truth) <= (2e-6 if dtype == torch.float32 else 4e-3)


# ---- models ----------------------------------------------------------------------------------------------------------

SPEC = [Grid("frame", local=128), Grid("frame", rows=True, local=128), VerticalSlash(40, 128), Dense()]


@pytest.mark.parametrize(
    ("side", "batch", "options", "how"),
    [
        (None, 1, {}, {}),
        ("left", 2, {"cache": "sharded"}, {}),
        ("right", 2, {"scheme": "heads"}, {}),
        ("left", 1, {"cache": "sharded", "scheme": "heads"}, {}),
        (None, 1, {}, {"cache_implementation": "static"}),
        (None, 1, {"cache": "sharded"}, {"num_beams": 2}),
        ("left", 2, {}, {"prefill_chunk_size": 600}),
        ("left", 2, {"cache": "sharded"}, {"prefill_chunk_size": 600}),
    ],
)
def test_generate_gives_one_processs_tokens(
    pool: RankPool, side: str | None, batch: int, options: dict[str, Any], how: dict[str, Any]
) -> None:
    """A video and text: vision tower, M-RoPE positions, padding, caches, beams, chunks."""
    inputs = rank_cases.video_prompt(side, batch)
    for (tokens, logits, _), (rank_tokens, rank_logits, sizes) in pool.run(
        2, rank_cases.generated, SPEC, inputs, options, how
    ):
        assert torch.equal(rank_tokens, tokens)
        torch.testing.assert_close(rank_logits, logits, atol=2e-5, rtol=1e-4)
        if options.get("scheme") != "heads":
            dealt = [queries for queries, keys in sizes if queries < keys]
            assert len(dealt) >= 4, "tokens were dealt out"
            assert max(dealt) < 0.6 * inputs["input_ids"].shape[1]


@pytest.mark.parametrize("fuse", [False, True])
def test_long_prompts_let_their_embeddings_go(pool: RankPool, fuse: bool) -> None:
    """What the model's code holds of them becomes a rank's share: nothing may count tokens by it."""
    for one, several in pool.run(2, rank_cases.long_prompt, SPEC, fuse):
        torch.testing.assert_close(several, one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama padded", {"cache": "sharded"}),
        ("qwen3_vl", {}),  # visual features are added in several layers
        ("mistral", {"cache": "sharded"}),  # sliding windows
        ("gemma3", {}),  # an image that sees both ways: the previous attention, on every rank
        ("deepseek", {"scheme": "heads"}),  # values narrower than keys
    ],
)
def test_logits_of_all_tokens_are_those_of_one_process(pool: RankPool, name: str, options: dict[str, Any]) -> None:
    """By default, for the last few, for some by number, and in a second turn on the cache."""
    for answers in pool.run(2, rank_cases.logits, name, options):
        for one, several in answers:
            assert one.shape == several.shape
            torch.testing.assert_close(several, one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("no cp", "ValueError", ["('dp',)", "'cp'"]),
        ("no mesh", "ValueError", ["'sharded'", "mesh is None"]),
        ("word", "ValueError", ["'split'", "replicated", "sharded"]),
        ("kv heads", "ValueError", ["1 KV heads do not divide by 2 ranks"]),
        ("proxies", "ValueError", ["ProxyAttn", "2 KV heads together", "2 ranks"]),
        ("unlike", "ValueError", ["checksum", "rank 1", "same prompt"]),
        ("hybrid", "NotImplementedError", ["something else than attention in 1 of 2 layers"]),
        ("rope", "NotImplementedError", ["'dynamic'", "length of the prompt"]),
        ("states", "NotImplementedError", ["output_hidden_states"]),
        ("4-D", "NotImplementedError", ["4-D mask", "attention_mask"]),
        ("packed", "NotImplementedError", ["packed"]),
        ("filled", "NotImplementedError", ["empty DynamicCache", "StaticLayer"]),
        ("latent", "NotImplementedError", ["latent", "use_cache=False"]),
        ("crop", "NotImplementedError", ["cannot be cropped", "replicated"]),
    ],
)
def test_models_and_calls_that_do_not_fit_are_refused(pool: RankPool, case: str, kind: str, words: list[str]) -> None:
    with pytest.raises(RankError) as raised:
        pool.run(2, rank_cases.refused_model, case)
    for name, message, _ in raised.value.errors:
        assert name == kind, message
        for word in words:
            assert word in message


def test_short_prompts_and_unpatching(pool: RankPool) -> None:
    """Every rank runs a short prompt whole, and says so once; nothing is left behind; embeddings are let go."""
    for warned, same, clean, freed in pool.run(2, rank_cases.short_and_clean):
        assert warned == 1
        assert same
        assert clean
        assert freed


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "options"),
    [
        ((1, 2), 4, 2, None),  # without "cp"
        ((2, 2), 4, 2, {"fuse": True}),
        ((2, 2), 6, 2, {"cache": "sharded"}),
        ((1, 4), 8, 2, None),  # more ranks than KV heads
        ((2, 2), 4, 1, {"cache": "sharded"}),
    ],
)
def test_tensor_parallel(pool: RankPool, ranks: tuple[int, int], heads: int, kv_heads: int, options: Any) -> None:
    for tokens, logits, rank_tokens, rank_logits in pool.run(ranks, rank_cases.over_tensors, heads, kv_heads, options):
        assert torch.equal(rank_tokens, tokens)
        torch.testing.assert_close(rank_logits, logits, atol=2e-5, rtol=1e-4)


def test_proxies_over_tensor_parallel_ranks(pool: RankPool) -> None:
    """Of the heads of one KV head, which one rank has; of more, they would not be those of one process."""
    few, many = ProxyAttn(0.8, 5, 0), ProxyAttn(0.8, 5, 0, kv_heads=2)
    for tokens, logits, rank_tokens, rank_logits in pool.run((1, 2), rank_cases.over_tensors, 4, 2, None, few):
        assert torch.equal(rank_tokens, tokens)
        torch.testing.assert_close(rank_logits, logits, atol=2e-5, rtol=1e-4)
    with pytest.raises(RankError) as raised:
        pool.run((1, 2), rank_cases.over_tensors, 4, 2, None, many)
    for name, message, _ in raised.value.errors:
        assert name == "ValueError"
        assert "2 KV heads together, but 2 ranks share the 4 query heads and 2 KV heads" in message


def test_heads_that_tensor_parallel_ranks_do_not_divide(pool: RankPool) -> None:
    with pytest.raises(RankError) as raised:
        pool.run((1, 2), rank_cases.over_tensors, 7, 1, None)
    assert "7 query heads and 1 KV heads do not divide by 2 tensor-parallel ranks" in str(raised.value)
    with pytest.raises(RankError) as raised:
        pool.run((1, 4), rank_cases.over_tensors, 12, 3, None)
    assert "12 query heads and 3 KV heads do not divide by 4" in str(raised.value)
