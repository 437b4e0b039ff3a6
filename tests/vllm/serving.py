"""vLLM on the CPU with tiny models of random weights, in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch

from benchmarks import served

torch.set_num_threads(1)

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@lru_cache(maxsize=1)
def text_model() -> str:
    """A folder with a Qwen2 of two layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT, dtype="float32"))
    return _saved(model, "text")


def _saved(model: Any, name: str) -> str:
    with torch.no_grad():  # random weights attend evenly; larger ones choose
        for part, weight in model.named_parameters():
            if "q_proj" in part or "k_proj" in part:
                weight.mul_(12.0)
            elif weight.dim() == 2:
                weight.mul_(3.0)
    folder = Path(mkdtemp(prefix="mmflex-vllm-")) / name
    model.save_pretrained(folder)
    return str(folder)


@contextmanager
def engine(model: str, additional_config: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A vLLM engine for the length of a block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    llm = LLM(model, additional_config=additional_config or {}, **{**given, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # at the latest here, not when the next engine is being built
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: Any, prompts: Sequence[Any], tokens: int = 6) -> list[tuple[list[int], list[float]]]:
    """(tokens, their logprobs) of every prompt, which are ids or vLLM's own form."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=1, detokenize=False, ignore_eos=True)
    given = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
    found = []
    for output in llm.generate(given, sampling, use_tqdm=False):
        chosen = output.outputs[0]
        lines = [line[token].logprob for token, line in zip(chosen.token_ids, chosen.logprobs, strict=True)]
        found.append((list(chosen.token_ids), lines))
    return found


def ids(count: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(5, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def accelerated() -> Any:
    """The mmflex engine that this process built last (`mmflex.integrations.vllm.engine.Engine`)."""
    from mmflex.integrations.vllm.cpu import PLATFORM

    return list(PLATFORM.engines.values())[-1][1]


# ---- a vision-language model -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def vision_model() -> str:
    """A folder with a Qwen2.5-VL of two layers, its processor, and a tokenizer whose tokens are bytes."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 128, "num_heads": 2,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = served.vision_config({**TEXT, "vocab_size": 320}, vision, [4, 6, 6], dtype="float32")
    folder = _saved(Qwen2_5_VLForConditionalGeneration(config), "vision")
    served.save_processor(folder)
    return folder


def film(frames: int, height: int, width: int, seed: int = 0) -> Any:
    """A video of noise, uint8 [frames, height, width, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator).numpy()
