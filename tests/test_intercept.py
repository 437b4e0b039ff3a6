"""`mmflex.intercept`: which calls of plain attention run through mmflex, which are left alone, and leaving no trace."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from plain_models import WIDTH, Decoder, LlavaVideo, config_of
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import mmflex
import mmflex.runtime.attention as runtime
from mask_builders import AShape, Dense, Grid, VerticalSlash
from mmflex import DenseFallback, TokenLayout, intercept

LINES = VerticalSlash(30, 128)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Calls(list):
    """(q, k, v, spec, layout, scale) of every call of `mmflex.attention`."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen, real = Calls(), runtime.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, spec: Any, **options: Any) -> Any:
        seen.append((q, k, v, spec, options["layout"], options["scale"]))
        return real(q, k, v, spec, **options)

    monkeypatch.setattr(runtime, "attention", attention)
    return seen


def decoder(seed: int = 0, **config: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(config_of(**config)).eval()


def embeddings(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def padding(tokens: int, side: str) -> Tensor:
    """int [2, tokens]: the first prompt is 37 tokens shorter."""
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, slice(0, 37) if side == "left" else slice(tokens - 37, tokens)] = 0
    return mask


def agree(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert difference <= tolerance, difference


# ---- what runs through mmflex ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdpa", "grouped"])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (4, 4)])
def test_dense_is_the_model_itself_and_every_kv_head_is_taken_once(
    calls: Calls, heads: tuple[int, int], kind: str
) -> None:
    model = decoder(heads=heads[0], kv_heads=heads[1])
    for layer in model.layers:
        layer.self_attn.kind = kind
    x = embeddings(1, 333)
    with intercept(model, Dense()) as seen:
        inside = model(x)
    agree(inside, model(x))
    assert seen.taken == {0: 1, 1: 1}
    assert not seen.reasons
    assert [(q.shape[1], k.shape[1], v.shape[1]) for q, k, v, *_ in calls] == [(*heads, heads[1])] * 2


def test_a_sparse_spec_is_softmax_under_the_plans_own_mask(calls: Calls) -> None:
    """Layer 0's attention is computed again in float64 under the mask that the same q and k select."""
    model = decoder()
    x = embeddings(1, 391)
    outputs = []
    model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with intercept(model, {0: LINES}, backend="reference"):
        model(x)
    q, k, v, spec, layout, scale = calls[0]
    plan = mmflex.plan(q, k, spec, layout=layout, scale=scale, backend="reference")
    mask = plan.dense_mask()
    assert 0.05 < mask.double().mean() < 0.45
    found = outputs[0].view(1, 391, 4, 16).transpose(1, 2)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3)) * scale
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double().repeat_interleave(2, 1)
    agree(found, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_type", ["additive", "bool"])
@pytest.mark.parametrize("unmasked", [False, True])
def test_padding_is_read_from_the_mask(calls: Calls, side: str, mask_type: str, unmasked: bool) -> None:
    model = decoder()
    model.mask_type, model.unmasked = mask_type, unmasked
    x, mask = embeddings(2, 301), padding(301, side)
    if mask_type == "bool" and side == "left" and not unmasked:
        mask[0, 0] = 1  # a query that sees no key at all has no softmax
    wanted = model(x, mask)[mask.bool()]
    with intercept(model, Dense(), backend="reference") as seen:
        agree(model(x, mask)[mask.bool()], wanted)
    assert seen.taken == {0: 1, 1: 1}
    assert np.array_equal(calls[0][4].valid, mask.bool().numpy())
    assert calls[0][4] is calls[1][4]


def test_a_mask_is_read_once_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmflex.integrations.intercept import masks

    reads, real = [], masks._read
    monkeypatch.setattr(masks, "_read", lambda *args: reads.append(args[1:]) or real(*args))
    model = decoder(layers=5)
    with intercept(model, AShape(16, 64), backend="reference"):
        for _ in range(3):
            model(embeddings(2, 200), padding(200, "left"))
    assert reads == [(200, 200)] * 3


def test_a_mask_that_was_changed_in_place_is_read_again() -> None:
    """The next prompt's mask in the tensor of the last one's, also where torch counts no versions."""
    model = decoder()
    allowed = torch.ones(200, 200, dtype=torch.bool).tril()[None, None].repeat(1, 1, 1, 1)
    model.mask = lambda x, mask, past: allowed  # type: ignore[method-assign]
    x = embeddings(1, 200)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), intercept(model, Dense(), backend="reference") as seen:
            if mode is torch.inference_mode:
                allowed = torch.ones(200, 200, dtype=torch.bool).tril()[None, None]
            model(x)
            allowed[..., :9] = False
            allowed[..., range(9), range(9)] = True  # the first nine see themselves: padding that sees something
            with pytest.warns(DenseFallback, match="not causal plus padding"):
                model(x)
            assert seen.reasons == {"a mask that is not causal plus padding": 2}
            allowed[...] = torch.ones(200, 200, dtype=torch.bool).tril()
            model(x)
            assert seen.taken == {0: 2, 1: 2}


def test_a_chunk_on_a_cache(calls: Calls) -> None:
    model = decoder()
    x = embeddings(1, 500)
    wanted = model(x)
    layout = TokenLayout.from_segments([("text", 20), ("video", (10, 6, 7)), ("text", 60)])
    with intercept(model, Dense(), layout=layout, chunks=True) as seen:
        cache: list[Any] = [None, None]
        parts = [model(x[:, start:end], cache=cache) for start, end in ((0, 201), (201, 430), (430, 500))]
    agree(torch.cat(parts, dim=1), wanted)
    assert seen.taken == {0: 3, 1: 3}
    assert [call[4].length for call in calls[::2]] == [201, 430, 500]
    assert calls[2][4].fingerprint == layout[:430].fingerprint


def test_decoding_is_not_touched(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """No function mode is entered for it: every call of PyTorch would pay for that."""
    from mmflex.integrations.intercept import interception

    entered, real = [], interception._Redirect.__enter__
    monkeypatch.setattr(interception._Redirect, "__enter__", lambda self: entered.append(1) or real(self))
    model = decoder()
    x = embeddings(2, 150)
    mask = padding(150, "left")
    wanted = model.generate(x, mask)
    with intercept(model, Dense(), backend="reference") as seen:
        assert torch.equal(model.generate(x, mask), wanted)
    assert seen.taken == {0: 1, 1: 1}
    assert len(calls) == len(entered) == 2
    assert not seen.left


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_modes(calls: Calls, mode: str) -> None:
    model, x = decoder(), embeddings(1, 310)
    context = torch.inference_mode() if mode == "inference" else torch.autocast("cpu", torch.bfloat16)
    with context:
        wanted = model(x)
        with intercept(model, Dense(), backend="reference"):
            found = model(x)
        with intercept(model, LINES, backend="reference"):
            model(x)
    assert found.dtype == wanted.dtype
    agree(found, wanted, 2e-6 if mode == "inference" else 4e-3)
    assert {call[0].dtype for call in calls} == {torch.float32 if mode == "inference" else torch.bfloat16}
    with intercept(model, LINES, backend="reference"):  # plans of inference mode serve outside of it
        model(x)


def test_autocast_reaches_only_the_arguments(calls: Calls) -> None:
    """Queries that are float32 under autocast are cast as SDPA casts them, and what is estimated from them is not."""
    model, x = decoder(), embeddings(1, 300)
    rows: list[Tensor] = []
    model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16), intercept(model, {0: LINES}, backend="reference"):
        model(x)
    q, k, v, spec, layout, scale = calls[0]
    alone = runtime.attention(q, k, v, spec, layout=layout, scale=scale, backend="reference")
    assert torch.equal(rows[0], alone.transpose(1, 2).reshape(1, 300, 64))


def test_specs_per_layer_and_head_and_configs(calls: Calls) -> None:
    model, x = decoder(layers=3), embeddings(1, 300)
    heads = [Dense(), AShape(16, 64), LINES, AShape(64, 64)]
    with intercept(model, {0: heads, 2: Dense()}, backend="reference") as seen:
        assert "forward" not in vars(model.layers[1].self_attn)
        model(x)
    assert seen.taken == {0: 1, 2: 1}
    assert [call[3] for call in calls] == [tuple(heads), (Dense(),) * 4]
    config = mmflex.Config.of({1: heads}, layers=3, heads=4)
    with intercept(model, config, backend="reference") as seen:
        model(x)
    assert seen.taken == {1: 1}
    with pytest.raises(ValueError, match="28 layers but the model has 3"):
        intercept(model, mmflex.Config.of(Dense(), layers=28, heads=4))
    with pytest.raises(ValueError, match="3 patterns for 4 query heads"):
        intercept(model, [Dense()] * 3)
    with pytest.raises(ValueError, match=r"layer 3 has no attention.*0 to 2"):
        intercept(model, {3: Dense()})


def test_heads_that_only_the_call_tells(calls: Calls) -> None:
    model, x = decoder(), embeddings(1, 200)
    for layer in model.layers:
        layer.self_attn.config = None
    model.config = None
    with intercept(model, [Dense(), LINES, LINES, Dense()], backend="reference"):
        model(x)
    with intercept(model, {1: LINES}, backend="reference"):
        model(x)
    assert calls[-1][3] == (LINES,) * 4
    with intercept(model, {1: [LINES] * 3}, backend="reference"), pytest.raises(ValueError, match="3 patterns for 4"):
        model(x)


def test_other_widths_of_values_and_scales(calls: Calls) -> None:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Identity()
            self.attn.forward = self.attend  # type: ignore[method-assign]

        def attend(self, x: Tensor) -> Tensor:
            q, v = x.view(1, -1, 4, 16).transpose(1, 2), x.view(1, -1, 4, 16)[..., :8].transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, v, None, 0.0, True, scale=0.3)

    model, x = Latent().eval(), embeddings(1, 150)
    with intercept(model, Dense(), layers=[model], backend="reference"):
        assert vars(model.attn)["forward"] != model.attend
        agree(model.attn(x), model.attend(x))
    assert vars(model.attn)["forward"] == model.attend
    assert calls[0][5] == 0.3


def test_two_models_at_once(calls: Calls) -> None:
    one, two = decoder(1), decoder(2, heads=6, kv_heads=3)
    x = embeddings(1, 200)
    wanted = one(x), two(x)
    with intercept(one, Dense()) as first, intercept(two, {1: Dense()}) as second:
        agree(one(x), wanted[0])
        agree(two(x), wanted[1])
        agree(one(x), wanted[0])
    assert first.taken == {0: 2, 1: 2}
    assert second.taken == {1: 1}
    assert len(calls) == 5


def test_causal_bias_objects_of_torch(calls: Calls) -> None:
    """What plain code uses for a chunk on a cache: aligned to the bottom right, and the trap to the top left."""
    model, x = decoder(), embeddings(1, 300)
    wanted = model(x)[:, 200:]
    for kind, taken in ((causal_lower_right, 2), (causal_upper_left, 1)):
        model.mask = lambda x, mask, past, of=kind: of(x.shape[1], past + x.shape[1])  # type: ignore[method-assign]
        cache: list[Any] = [None, None]
        with warnings.catch_warnings(record=True) as caught, intercept(model, Dense()) as seen:
            warnings.simplefilter("always")
            model(x[:, :200], cache=cache)
            last = model(x[:, 200:], cache=cache)
        assert seen.taken == {0: taken, 1: taken}
        if taken == 2:
            agree(last, wanted)
            assert not caught
        else:
            assert "top left" in str(caught[0].message)


# ---- KV heads --------------------------------------------------------------------------------------------------------


def groups_of(k: Tensor, v: Tensor, declared: int | None) -> int:
    from mmflex.integrations.intercept.heads import KVGroups

    module = nn.Module()
    if declared is not None:
        module.num_key_value_groups = declared  # type: ignore[assignment]
    groups = KVGroups(module, None)
    return groups.of(k, v)


def test_repeated_heads_are_recognised_by_the_config_or_by_comparing() -> None:
    k, v = torch.randn(2, 3, 300, 16), torch.randn(2, 3, 300, 8)
    kr, vr = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    assert groups_of(kr, vr, 4) == groups_of(kr, vr, None) == 4
    assert groups_of(kr, vr, 2) == 2  # less than there is, and right
    assert groups_of(kr, vr, 6) == 4  # more than there is: the comparison knows better
    assert groups_of(kr, v.repeat(1, 4, 1, 1), None) == 1  # keys and values are not repeated alike
    assert groups_of(k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1), 4) == 1  # repeated in turns
    assert groups_of(torch.randn(1, 12, 70, 16), torch.randn(1, 12, 70, 16), 4) == 1


def test_heads_of_zeros_say_nothing(calls: Calls) -> None:
    """A first call on zeros must not settle that all heads are copies."""
    model = decoder(heads=4, kv_heads=4)
    for layer in model.layers:
        attention = layer.self_attn
        attention.config = None
        del attention.num_key_value_groups
        attention.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        for projection in (attention.k_proj, attention.v_proj):
            projection.bias.zero_()
        layer.norms[0].bias.zero_()
    model.config = None
    x = embeddings(1, 150)
    wanted = model(x)
    with intercept(model, Dense()):
        model(torch.zeros(1, 150, WIDTH))
        agree(model(x), wanted)


# ---- what is left as it was ------------------------------------------------------------------------------------------


def left(model: Decoder, *args: Any, **options: Any) -> tuple[dict[str, int], list[str]]:
    """Reasons and warnings of a call that must be the model's own."""
    wanted = model(*args)
    with warnings.catch_warnings(record=True) as caught, intercept(model, LINES, **options) as seen:
        warnings.simplefilter("always")
        assert torch.equal(model(*args), wanted)
        model(*args)
    assert not seen.taken
    assert str(seen).count("as they were") == len(seen.reasons)
    return seen.reasons, [str(w.message) for w in caught if issubclass(w.category, DenseFallback)]


def window(tokens: int, width: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - width)[None, None]


def packed(*lengths: int) -> Tensor:
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]


def distances(tokens: int, slope: float) -> Tensor:
    order = torch.arange(tokens)
    bias = -slope * (order[:, None] - order).float()
    return bias.masked_fill(order[:, None] < order, -torch.inf)[None, None]


MASKS = {
    "a window": (window(130, 90), "not causal plus padding"),
    "a narrow window": (window(130, 1), "not causal plus padding"),
    "packed prompts": (packed(60, 70), "not causal plus padding"),
    "a prefix": (torch.ones(130, 130, dtype=torch.bool).tril(4)[None, None], "not causal plus padding"),
    "both ways": (torch.ones(130, 130, dtype=torch.bool)[None, None], "not causal plus padding"),
    "one pair less": (torch.ones(130, 130, dtype=torch.bool).tril()[None, None].clone(), "not causal plus padding"),
    "distances": (distances(130, 0.5), "adds a bias"),
    "distances in every head": (distances(130, 0.01).expand(1, 4, 130, 130).contiguous(), "adds a bias"),
    "a small bias": (distances(130, 0.0).nan_to_num(0, 0, -1e4).index_fill(3, torch.tensor([3]), 0.5), "adds a bias"),
    "not a number": (distances(130, 0.0).index_fill(3, torch.tensor([3]), torch.nan), "adds a bias"),
    "padding of keys alone": (torch.ones(1, 1, 1, 130, dtype=torch.bool), "another shape"),
}
MASKS["one pair less"][0][0, 0, 77, 5] = False


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_left(name: str) -> None:
    mask, message = MASKS[name]
    model = decoder()
    model.mask = lambda x, padding, past: mask  # type: ignore[method-assign]
    if name == "not a number":
        with pytest.warns(DenseFallback, match=message), intercept(model, LINES):
            assert model(embeddings(1, 130)).isnan().any()
        return
    reasons, notices = left(model, embeddings(1, 130))
    assert len(notices) == 1
    assert message in notices[0]
    assert list(reasons.values()) == [4]


def test_heads_with_masks_of_their_own_are_left() -> None:
    mask = torch.ones(130, 130, dtype=torch.bool).tril().expand(1, 4, 130, 130).contiguous()
    model = decoder()
    model.mask = lambda x, padding, past: mask  # type: ignore[method-assign]
    with intercept(model, Dense()) as seen:
        model(embeddings(1, 130))
    assert seen.taken == {0: 1, 1: 1}  # four masks, all the same
    mask[:, 2, :, :9] = False
    mask[:, 2, range(9), range(9)] = True
    assert list(left(model, embeddings(1, 130))[0]) == ["a mask that is not causal plus padding"]


def test_additive_masks_of_older_code(calls: Calls) -> None:
    """-10000 forbids, as -inf does, in any number of dimensions."""
    model = decoder()
    for lowest in (-1e4, -1e9, -torch.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(130, 130).masked_fill(~torch.ones(130, 130, dtype=torch.bool).tril(), lowest)
        for viewed in (mask, mask[None], mask[None, None]):
            model.mask = lambda x, padding, past, viewed=viewed: viewed  # type: ignore[method-assign]
            wanted = model(embeddings(1, 130))
            with intercept(model, Dense()) as seen:
                agree(model(embeddings(1, 130)), wanted)
            assert not seen.reasons


def test_calls_that_are_left() -> None:
    x = embeddings(1, 150)
    model = decoder()
    for layer in model.layers:
        layer.self_attn.is_causal = False
    reasons, notices = left(model, x)
    assert reasons == {"neither a mask nor is_causal": 4}
    assert "every query sees every key" in notices[0]

    model = decoder()
    for layer in model.layers:
        layer.self_attn.kind = "eager"
    reasons, notices = left(model, x)
    assert reasons == {"no call of scaled_dot_product_attention": 4}
    assert len(notices) == 1
    assert 'attn_implementation="sdpa"' in notices[0]

    model = decoder().double()
    assert list(left(model, x.double())[0]) == ["tensors that are not float32, bfloat16 or float16"]

    model = decoder()
    cache: list[Any] = [None, None]
    model(x, None, cache)
    model.mask = lambda x, padding, past: None  # type: ignore[method-assign]
    with (
        pytest.warns(DenseFallback, match="is_causal with fewer queries than keys .150 queries, 300 keys"),
        intercept(model, LINES) as seen,
    ):
        model(x, None, cache)
    assert not seen.taken


def test_training_and_dropout_are_left() -> None:
    model, x = decoder(), embeddings(1, 150)
    assert list(left(model.train(), x)[0]) == ["training"]
    for layer in model.eval().layers:
        attention = layer.self_attn
        attention.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v[:, [0, 0, 1, 1]], None, 0.1, True
        )
        attention.num_key_value_groups = 1
        attention.k_proj = nn.Linear(WIDTH, 64)
    with pytest.warns(DenseFallback, match="dropout_p is 0.1"), intercept(model, LINES) as seen:
        model(x)
    assert list(seen.reasons) == ["dropout"]


def test_there_is_no_backward() -> None:
    model, x = decoder(), embeddings(1, 150)
    with torch.enable_grad(), intercept(model, Dense()):
        total = model(x).sum()
        with pytest.raises(RuntimeError, match="no backward"):
            total.backward()


def test_cross_attention_in_the_same_module_is_left(calls: Calls) -> None:
    model, x = decoder(layers=1), embeddings(1, 150)
    attention = model.layers[0].self_attn
    own = type(attention).attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        across = F.scaled_dot_product_attention(q, k[:, [0, 0, 1, 1], :77], v[:, [0, 0, 1, 1], :77])
        return own(attention, q, k, v, mask) + across

    attention.attend = attend
    wanted = model(x)
    with pytest.warns(DenseFallback, match="neither a mask nor is_causal"), intercept(model, Dense()) as seen:
        agree(model(x), wanted)
    assert seen.taken == {0: 1}
    assert seen.left == {(0, "neither a mask nor is_causal"): 1}


def test_tensors_of_a_type_of_their_own_are_left() -> None:
    class Wrapped(torch.Tensor):
        pass

    model, x = decoder(), embeddings(1, 150)
    for layer in model.layers:
        layer.norms[0].register_forward_hook(lambda module, args, out: out.as_subclass(Wrapped))
    assert "tensors of a type of their own" in left(model, x)[0]


# ---- layouts ---------------------------------------------------------------------------------------------------------

VIDEO = TokenLayout.from_segments([("text", 20), ("video", (7, 5, 5)), ("text", 30)])


def test_a_layout_reaches_the_patterns(calls: Calls) -> None:
    model, x = decoder(), embeddings(1, VIDEO.length)
    grid = Grid("frame", slash=True, local=16, sink=16)
    with intercept(model, grid, layout=VIDEO, backend="reference"):
        found = model(x)
    assert calls[0][4].fingerprint == VIDEO.fingerprint
    assert calls[0][4] is calls[1][4]
    with intercept(model, grid, backend="reference"), pytest.raises(ValueError, match="frame"):
        model(x)  # as text there are no frames
    assert found.isfinite().all()


def test_a_given_layout_is_the_one_that_plans_are_kept_with(calls: Calls) -> None:
    """So that the next block with it plans no more."""
    model, x = decoder(), embeddings(1, VIDEO.length)
    for _ in range(2):
        with intercept(model, Dense(), layout=VIDEO):
            model(x)
    assert all(call[4] is VIDEO for call in calls)


def test_layouts_of_another_length_are_left_and_said(calls: Calls) -> None:
    model = decoder()
    for tokens in (VIDEO.length - 1, VIDEO.length + 1):
        reasons, notices = left(model, embeddings(1, tokens), layout=VIDEO)
        assert reasons == {"a layout of another length": 4}
        assert f"225 tokens, the call has {tokens} keys" in notices[0]
        assert ("chunks=True" in notices[0]) == (tokens < VIDEO.length)
    assert not calls
    with intercept(model, Dense(), layout=VIDEO) as seen:
        model(embeddings(1, VIDEO.length))
        seen.layout = TokenLayout.text(150)
        model(embeddings(1, 150))
    assert seen.taken == {0: 2, 1: 2}


def test_layers_behind_a_drop_of_tokens_run_dense(calls: Calls) -> None:
    model = decoder(layers=4)
    model.dropping = {2: torch.arange(0, VIDEO.length, 2)}
    x = embeddings(1, VIDEO.length)
    wanted = model(x)
    for chunks in (False, True):
        with (
            intercept(model, Dense(), layout=VIDEO, chunks=chunks) as seen,
            pytest.warns(DenseFallback, match="dropped between layers .225 in earlier layers, 113 here"),
        ):
            agree(model(x), wanted)
        assert seen.taken == {0: 1, 1: 1}
        assert seen.reasons == {"tokens that were dropped between layers": 2}
    with intercept(model, Dense()) as seen:
        agree(model(x), wanted)  # without a layout all is text, before and behind
    assert sum(seen.taken.values()) == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_layouts_of_batches(calls: Calls, side: str) -> None:
    model = decoder()
    layout = TokenLayout.batch([VIDEO[37:], VIDEO], side=side)
    x, mask = embeddings(2, VIDEO.length), padding(VIDEO.length, side)
    wanted = model(x, mask)[mask.bool()]
    with intercept(model, Dense(), layout=layout, backend="reference"):
        agree(model(x, mask)[mask.bool()], wanted)
    other = "left" if side == "right" else "right"
    with intercept(model, Dense(), layout=layout), pytest.raises(ValueError, match="the layout has 188"):
        model(x, padding(VIDEO.length, other))
    with intercept(model, Dense(), layout=VIDEO), pytest.raises(ValueError, match=r"225 tokens in prompt 0 .* 188"):
        model(x, mask)


def test_right_padding_that_no_mask_names(calls: Calls) -> None:
    """A causal mask hides what comes after the prompt, so models may leave it out."""
    model = decoder()
    layout = TokenLayout.batch([VIDEO[37:], VIDEO])
    x, mask = embeddings(2, VIDEO.length), padding(VIDEO.length, "right").bool()
    with intercept(model, Dense(), layout=layout, backend="reference"):
        agree(model(x)[mask], model(x, mask)[mask])


def test_beams_repeat_the_layout(calls: Calls) -> None:
    model = decoder()
    layout = TokenLayout.batch([VIDEO[37:], VIDEO], side="left")
    x, mask = embeddings(2, VIDEO.length), padding(VIDEO.length, "left")
    with intercept(model, Dense(), layout=layout, backend="reference"):
        model(x.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
    assert calls[0][4].batch_size == 6


# ---- entering and leaving --------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model, x = decoder(), embeddings(1, 150)
    own = model.layers[1].self_attn.forward
    model.layers[1].self_attn.forward = own  # somebody else's, such as a wrapper that moves tensors between devices
    before = [dict(vars(module)) for module in model.modules()]
    with intercept(model, Dense()):
        model(x)
    assert [dict(vars(module)) for module in model.modules()] == before

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    model.layers[0].self_attn.attend = fails
    with pytest.raises(KeyboardInterrupt), intercept(model, Dense()):
        model(x)
    assert not torch.overrides._is_torch_function_mode_enabled()
    assert [set(vars(m.self_attn)) - {"attend"} for m in model.layers] == [
        set(before[i]) for i, m in enumerate(model.modules()) if type(m).__name__ == "Attention"
    ]


def test_a_short_prompt_is_told_once_however_many_blocks_there_are() -> None:
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in (decoder(), decoder()):
            for _ in range(3):
                with intercept(model, AShape(0, 64)):
                    model(embeddings(1, 150))
            messages.append(len([w for w in caught if "predicts to be faster" in str(w.message)]))
    assert messages == [1, 2]


def test_nested_use_is_refused() -> None:
    model = decoder()
    with intercept(model, {0: Dense()}), intercept(model, {1: LINES}):
        pass  # layers of their own
    with intercept(model, Dense()), pytest.raises(ValueError, match="layer 0 of Decoder is intercepted already"):
        intercept(model, LINES).__enter__()
    block = intercept(model, Dense())
    with block:
        model(embeddings(1, 150))
    with block:
        model(embeddings(1, 150))
    assert block.taken == {0: 2, 1: 2}


def test_towers_are_told_from_decoders() -> None:
    model = LlavaVideo(config_of(mm_spatial_pool_mode="max", mm_newline_position="grid", mm_patch_merge_type="flat"))
    assert [n for n, _ in intercept(model, Dense()).modules] == [0, 1]
    towers = nn.ModuleDict({"a": model.vision_tower, "b": LlavaVideo(config_of()).vision_tower})
    with pytest.raises(TypeError, match=r"2 stacks of layers .* .a.layers, b.layers.: .*layers="):
        intercept(towers, Dense())
    with pytest.raises(TypeError, match=r"holds 0 stacks"):
        intercept(nn.Linear(2, 2), Dense())
    given = intercept(towers, Dense(), layers=[towers["a"].layers[0]["self_attn"]])
    assert given.modules == [(0, towers["a"].layers[0]["self_attn"])]


def test_layouts_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"layout is list: give a mmflex.TokenLayout, or a reader"):
        intercept(decoder(), Dense(), layout=[("text", 5)])  # type: ignore[arg-type]


def test_unknown_backends() -> None:
    with pytest.raises(ValueError, match="unknown backend 'best': use 'auto'"):
        intercept(decoder(), Dense(), backend="best")


def test_compiled_models() -> None:
    """Attention runs outside of the graph: nothing is skipped, and the answer is that of the model."""
    model, x = decoder(), embeddings(1, 150)
    wanted = model(x)
    with intercept(model, Dense()) as seen:
        compiled = torch.compile(model, backend="eager")
        agree(compiled(x), wanted)
    assert seen.taken == {0: 1, 1: 1}
    with intercept(compiled, Dense()) as seen:
        agree(compiled(x), wanted)
    assert seen.taken == {0: 1, 1: 1}
    agree(compiled(x), wanted)
    assert seen.taken == {0: 1, 1: 1}


def test_transformers_need_not_be_there() -> None:
    program = """
import sys
sys.modules["transformers"] = None  # an import of it fails
sys.path[:0] = ["tests"]
import torch, mmflex
from mask_builders import VerticalSlash
from mmflex.integrations import video_models
from plain_models import Decoder, config_of
model = Decoder(config_of()).eval()
with torch.no_grad(), mmflex.intercept(model, VerticalSlash(20, 128), backend="reference") as seen:
    model(torch.randn(1, 200, 64))
assert seen.taken == {0: 1, 1: 1}, seen
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=str(oracle_root()))


def oracle_root() -> Any:
    from pathlib import Path

    return Path(oracle.__file__).resolve().parents[1]
