"""transformers' tensor parallelism for a model that is already loaded, on a mesh of its caller's."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shards the weights of a transformers model over the dimension "tp" of a mesh, by the model's own plan.

    ``from_pretrained(tp_plan="auto")`` does this while it loads, over all processes of a job. Here other dimensions may
    stand beside "tp", such as the "cp" of `mmflex.patch`, and weights may be random. Call it before `mmflex.patch`.

    Every rank has its share of the query heads and of the KV heads. Where there are more ranks than KV heads, all KV
    heads stay on every rank, and a patched model attends to the one that its query heads belong to.

    Args:
        model: with a head, its weights whole on every rank.

    Returns:
        The model itself.

    Raises:
        ValueError: a mesh without "tp", or heads that do not divide by its ranks; both numbers are named.
        TypeError: a model without a plan.
    """
    names = mesh.mesh_dim_names or ()
    if "tp" not in names:
        raise ValueError(f"the mesh has the dimensions {names or 'without names'} but none is named 'tp': give one")
    from transformers.distributed import tensor_parallel as transformers_tp

    root: Any = model
    if not getattr(root, "tp_plan", None):
        raise TypeError(f"{type(root).__name__} has no tp_plan: give a transformers model that has one")
    ranks, config = mesh["tp"].size(), root.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    check_tensor_ranks(heads, kv_heads, ranks)
    plan = dict(root.tp_plan)
    if kv_heads % ranks:
        plan = {name: style for name, style in plan.items() if not name.endswith(("k_proj", "v_proj"))}
        for module in root.modules():
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = heads // ranks
    apply: Any = transformers_tp.apply_tensor_parallelism
    if "tp_plan" in inspect.signature(apply).parameters:
        apply(root, mesh["tp"], root._expand_parallel_plan(plan))
    else:  # up to transformers 5.19 or so, the model's own attribute is read
        root._tp_plan = plan
        apply(root, mesh["tp"])
    root._device_mesh, root._tp_size = mesh["tp"], ranks
    return model


def check_tensor_ranks(heads: int, kv_heads: int, ranks: int) -> None:
    """ValueError unless so many ranks can share the heads of a layer."""
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{heads} query heads and {kv_heads} KV heads do not divide by {ranks} tensor-parallel ranks: use a number "
            "that divides both (or is a multiple of the KV heads), and a 'cp' dimension for the other GPUs"
        )
