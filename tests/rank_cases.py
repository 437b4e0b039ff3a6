"""What ranks run in `test_distributed`: functions of a mesh, importable by their processes."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from unittest import mock

import torch

import mmflex
from mmflex.distributed import Dealing, attention, shard, unshard
from mmflex.distributed.decode import attend_shares
from mmflex.distributed.ranks import Ranks


def mine(mesh: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [shard(t, mesh=mesh) for t in tensors]


def attend(mesh: Any, q: Any, k: Any, v: Any, spec: Any, layout: Any, options: dict[str, Any]) -> Any:
    """(tokens, output, masks, selections and kinds of launches of the plan) of this rank.

    ``options["lowering"]``: which of the exact ways to compute the spec is taken.
    """
    from mmflex.distributed import attention as module
    from mmflex.runtime.calls import Request, observed

    plans: list[Any] = []
    ranks = Ranks.of(mesh)
    options = dict(options)
    request = partial(Request, lowering=options.pop("lowering", mmflex.Lowering()))
    with observed(plans.append), mock.patch.object(sys.modules[module.__module__], "Request", request):
        out = attention(*mine(mesh, q, k, v), spec, mesh=mesh, layout=layout, **options)
    (plan,) = plans
    tokens = Dealing.head_tail(q.shape[2], ranks.size).queries(ranks.rank).numbers
    kinds = [launch.label for launch in plan.program.launches]
    return tokens, out, plan.dense_mask(), dict(plan.selections), kinds


def compiled(mesh: Any, q: Any, k: Any, v: Any, spec: Any, layout: Any, scheme: str) -> Any:
    """(tokens, output, log-sum-exp, output of all tokens) by a compiled function."""

    @torch.compile(fullgraph=True, backend="eager")
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        options = {"mesh": mesh, "layout": layout, "backend": "reference", "scheme": scheme}
        out, lse = attention(q, k, v, spec, return_lse=True, **options)
        return out + 0.0, lse

    out, lse = run(*mine(mesh, q, k, v))
    ranks = Ranks.of(mesh)
    tokens = Dealing.head_tail(q.shape[2], ranks.size).queries(ranks.rank).numbers
    return tokens, out, lse, unshard(out, q.shape[2], mesh=mesh)


def refused(mesh: Any, case: str) -> None:
    """A call that does not fit."""
    from torch.distributed.device_mesh import DeviceMesh

    from mask_builders import AShape, ProxyAttn

    rank, spec = Ranks.of(mesh).rank, AShape(64, 128)
    q, k, v = (torch.randn(1, heads, 512, 16) for heads in (6, 3, 3))
    options: dict[str, Any] = {"mesh": mesh, "backend": "reference"}
    if case == "no cp":
        options["mesh"] = DeviceMesh.from_group(mesh.get_group(), "cpu", mesh=[0, 1], mesh_dim_names=("dp",))
    elif case == "no mesh":
        options["mesh"] = 2
    elif case == "short":
        options["layout"] = mmflex.TokenLayout.text(384)
    elif case == "share":
        q, options["layout"] = q[:, :, :500], mmflex.TokenLayout.text(1024)
        k, v = k[:, :, :500], v[:, :, :500]
    elif case == "heads":
        options["scheme"] = "heads"
    elif case == "no lse":
        options |= {"backend": "cpu", "return_lse": True}
    elif case == "unlike":
        options["layout"] = mmflex.TokenLayout.from_segments([("text", 500 + rank), ("image", (1, 524 - rank))])
    elif case == "scheme":
        options["scheme"] = "ring"
    elif case == "proxies":
        q, k, v = (torch.randn(1, heads, 512, 16) for heads in (4, 2, 2))
        options["scheme"], spec = "heads", ProxyAttn(kv_heads=2) & AShape(64, 128)
    attention(q, k, v, spec, **options)


def one_ends(mesh: Any) -> None:
    """Rank 1 ends without a word while rank 0 waits for it."""
    import os

    q, k, v = (torch.randn(1, heads, 512, 16) for heads in (4, 2, 2))
    if Ranks.of(mesh).rank == 1:
        os._exit(1)
    from mask_builders import AShape

    attention(q, k, v, AShape(64, 128), mesh=mesh, backend="reference")


def decoded(mesh: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
    """`attend_shares` with a third of the keys on rank 0, the rest on rank 1 and none on rank 2."""
    ranks = Ranks.of(mesh)
    n = k.shape[2]
    first, end = [(0, n // 3), (n // 3, n), (n, n)][ranks.rank]
    return attend_shares(q, k[:, :, first:end], v[:, :, first:end], seen[..., first:end], 0.25, ranks)


# ---- models ----------------------------------------------------------------------------------------------------------


def qwen_vl(**text: Any) -> Any:
    """A tiny Qwen2.5-VL of two layers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    small = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=small | text, vision_config=vision, image_token_id=100, video_token_id=101)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def video_prompt(side: str | None = None, batch: int = 1) -> dict[str, Any]:
    """40 tokens of text, ten frames of 8 x 8 and more text; with a side, the first prompt is 30 tokens shorter."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(batch):
        text = torch.randint(5, 90, (72,), generator=generator)
        before = 40 + 3 * row
        rows.append(torch.cat([text[:before], torch.full((640,), 101), text[before:]]))
    ids = torch.stack(rows)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :30] = 0
    elif side == "right":
        mask[0, -20:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": 2 * (ids == 101).int(),
        "video_grid_thw": torch.tensor([[10, 16, 16]] * batch),
        "pixel_values_videos": torch.randn(batch * 10 * 16 * 16, 3 * 2 * 4 * 4, generator=generator),
    }


def generated(mesh: Any, spec: Any, inputs: dict[str, Any], options: dict[str, Any], how: dict[str, Any]) -> Any:
    """Of one process and of this rank: (generated tokens, logits after the prompt, (queries, keys) of the plans)."""
    from mmflex.runtime.calls import observed

    model = qwen_vl()
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    got = []
    for where in ({}, {"mesh": mesh, **options}):
        sizes: list[Any] = []
        # chunks of a video do not tell their frames
        layout = mmflex.layout_for(model.config, inputs)
        with (
            mmflex.token_layout(layout),
            mmflex.patched(model, spec, backend="reference", **where),
            observed(lambda plan, to=sizes: to.append((plan.shape[0][2], plan.shape[1][2]))),
        ):
            tokens = model.generate(**inputs, **how)
            got.append((tokens, mmflex.last_token_logits(model, inputs), sizes))
    return got


def long_prompt(mesh: Any, spec: Any, fuse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after a video prompt without a mask, its layout read off it and given, of one process and over the ranks,
    run as prompts of 100,000 tokens are: embeddings are let go, layers compiled where ``fuse`` says so. A dense
    fallback is an error."""
    import warnings

    from mmflex.integrations import context_parallel

    model, inputs = qwen_vl(), video_prompt()
    del inputs["attention_mask"]
    got = []
    for where in ({}, {"mesh": mesh}):
        with (
            warnings.catch_warnings(),
            mock.patch.object(context_parallel, "LET_GO", 0),
            mmflex.patched(model, spec, backend="reference", fuse=fuse, **where),
        ):
            warnings.simplefilter("error", mmflex.DenseFallback)
            own = [mmflex.last_token_logits(model, inputs)]
            with mmflex.token_layout(mmflex.layout_for(model.config, inputs)):
                own.append(mmflex.last_token_logits(model, inputs))
            got.append(torch.stack(own))
    return got[0], got[1]


def tiny(name: str) -> tuple[Any, dict[str, Any], Any]:
    """(a model of two layers, inputs of 600 tokens or so, a spec)."""
    import transformers
    from families import FAMILIES, text_config

    from mask_builders import AShape, VerticalSlash

    spec: Any = [AShape(64, 128), VerticalSlash(40, 128), VerticalSlash(20, 200), AShape(128, 0)]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 90, (2, 620), generator=generator)
    mask = torch.ones_like(ids)
    torch.manual_seed(0)
    if name.startswith("llama"):
        if name.endswith("padded"):
            mask[1, :61] = 0
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config()))
    elif name == "mistral":
        mask[1, :61] = 0
        config = transformers.MistralConfig(**text_config(head_dim=16, sliding_window=150))
        model = transformers.MistralForCausalLM(config)
    elif name == "deepseek":
        config = transformers.DeepseekV3Config(
            **text_config(num_key_value_heads=4),
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=2,
        )
        model = transformers.DeepseekV3ForCausalLM(config)
    else:
        model = FAMILIES[name].model()
        inputs = dict(FAMILIES[name].batch(model.config).inputs)
        more = 620 - inputs["input_ids"].shape[1]
        for key, value in (("input_ids", ids[:1, :more]), ("attention_mask", mask[:1, :more])):
            inputs[key] = torch.cat([inputs[key], value], 1)
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.zeros_like(ids[:1, :more])], 1)
        return model.eval(), inputs, spec
    return model.eval(), {"input_ids": ids, "attention_mask": mask}, spec


def logits(mesh: Any, name: str, options: dict[str, Any]) -> Any:
    """Pairs of logits, of one process and over the ranks."""
    model, inputs, spec = tiny(name)
    valid = inputs["attention_mask"].bool()
    text = set(inputs) <= {"input_ids", "attention_mask"} and name != "deepseek"
    if name == "deepseek":
        inputs["use_cache"] = False
    got: list[list[Any]] = []
    for where in ({}, {"mesh": mesh, **options}):
        with mmflex.patched(model, spec, backend="reference", **where):
            own = [model(**inputs).logits[valid], model(**{**inputs, "use_cache": False}, logits_to_keep=3).logits]
            if name == "llama padded":
                rows = torch.tensor([[5, 600], [619, 100]])
                own += [model(**inputs, logits_to_keep=rows).logits]
            if text:
                some = {"logits_to_keep": torch.tensor([619, 3, 300]), "use_cache": False}
                own.append(model(**inputs, **some).logits * valid[:, [619, 3, 300], None])
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                more = torch.ones_like(mask)
                for later in (530, 100, 20):  # dealt out, whole, and as a decode step
                    both = {"attention_mask": torch.cat([mask, more[:, :later]], 1), "logits_to_keep": 2}
                    first = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
                    own.append(model(ids[:, :later], past_key_values=first.past_key_values, **both).logits)
            got.append(own)
    return list(zip(*got, strict=True))


def refused_model(mesh: Any, case: str) -> None:
    """A model or a call that does not fit."""
    import transformers
    from families import text_config
    from torch.distributed.device_mesh import DeviceMesh

    from mask_builders import AShape, ProxyAttn

    rank, options, more = Ranks.of(mesh).rank, {"mesh": mesh, "backend": "reference"}, {}
    spec: Any = AShape(64, 128)
    ids = torch.randint(5, 90, (1, 600), generator=torch.Generator().manual_seed(rank if case == "unlike" else 0))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if case == "no cp":
        options["mesh"] = DeviceMesh.from_group(mesh.get_group(), "cpu", mesh=[0, 1], mesh_dim_names=("dp",))
    elif case == "no mesh":
        options |= {"mesh": None, "cache": "sharded"}
    elif case == "word":
        options["cache"] = "split"
    elif case == "kv heads":
        options["scheme"], more = "heads", {"num_key_value_heads": 1}
    elif case == "proxies":
        options["scheme"], more, spec = "heads", {"num_key_value_heads": 2}, ProxyAttn(kv_heads=2)
    elif case == "rope":
        more = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    elif case == "states":
        inputs["output_hidden_states"] = True
    elif case == "4-D":
        inputs["attention_mask"] = torch.ones(1, 1, 600, 600, dtype=torch.bool)
    elif case == "packed":
        inputs["position_ids"] = (torch.arange(600) % 300)[None]
    elif case in ("filled", "crop"):
        options["cache"] = "sharded"
    elif case == "latent":
        inputs["use_cache"] = True
    if case == "hybrid":
        kinds = ["linear_attention", "full_attention"]
        text = text_config(head_dim=16, layer_types=kinds, linear_num_value_heads=4, linear_num_key_heads=2)
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**text, num_experts=4))
    elif case == "latent":
        model = tiny("deepseek")[0]
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(**more)))
    if case == "filled":
        inputs["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=700)
    with mmflex.patched(model.eval(), spec, **options):
        if case == "crop":
            cache = model(ids, use_cache=True).past_key_values
            cache.crop(-1)
        else:
            model(**inputs)


def short_and_clean(mesh: Any) -> tuple[int, bool, bool, bool]:
    """(warnings of a short prompt, whether its logits are those of one process, whether unpatching leaves nothing,
    whether embeddings were let go)."""
    import warnings

    from mask_builders import AShape
    from mmflex.integrations import context_parallel

    model, inputs, _ = tiny("llama")
    short = {name: value[:, :300] for name, value in inputs.items()}
    model(**short)

    def trace() -> Any:
        return [
            (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]

    before = trace()
    with mmflex.patched(model, AShape(64, 128), backend="reference"):
        want = model(**short).logits, model(**inputs).logits
    freed: list[int] = []
    with (
        warnings.catch_warnings(record=True) as caught,
        mmflex.patched(model, AShape(64, 128), backend="reference", mesh=mesh),
        mock.patch.object(context_parallel, "LET_GO", 0),
    ):
        warnings.simplefilter("always")
        got = [model(**short).logits, model(**short).logits]
        table = model.model.embed_tokens
        made: list[torch.Tensor] = []
        handle = table.register_forward_hook(lambda module, args, output: made.append(output))
        got.append(model(**inputs).logits)
        freed = [t.numel() for t in made]
        handle.remove()
    same = torch.allclose(got[0], want[0], atol=1e-5) and torch.allclose(got[2], want[1], atol=1e-5)
    warned = sum("fewer than two chunks" in str(w.message) for w in caught)
    return warned, same, trace() == before, freed == [0]


def over_tensors(mesh: Any, heads: int, kv_heads: int, options: Any, pattern: Any = None) -> Any:
    """(tokens of one process, tokens over the ranks of "tp" and, with options, of "cp", logits of both)."""
    import transformers
    from families import text_config

    from mask_builders import AShape, Dense, VerticalSlash
    from mmflex.integrations.tensor_parallel import tensor_parallel

    some = [AShape(64, 128), VerticalSlash(40, 128), VerticalSlash(20, 200), Dense()]
    spec = (some * heads)[:heads] if pattern is None else [pattern] * heads
    config = transformers.Qwen2Config(
        **text_config(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads)
    )
    inputs = tiny("llama padded")[1]
    got = []
    for several in (False, True):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config).eval()
        model.generation_config.eos_token_id = None
        where = {"mesh": mesh, **options} if several and options is not None else {}
        if several:
            tensor_parallel(model, mesh)
        with mmflex.patched(model, spec, backend="reference", **where):
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            got += [tokens, mmflex.last_token_logits(model, inputs)]
    return got
