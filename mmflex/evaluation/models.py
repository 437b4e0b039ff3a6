"""The small models of the evaluation: building, saving and loading them.

Both are trained from scratch by ``python -m benchmarks.train`` on generated prompts (`mmflex.evaluation.samples`), and
their weights (17 MB) come with the repository, not with the wheel:

    vision   Qwen2_5_VLForConditionalGeneration, 5.7M parameters: V-NIAH and MM-NIAH
    text     Qwen2ForCausalLM, 2.7M parameters: retrieval and variable tracking
"""

from pathlib import Path
from typing import Any

import torch

from mmflex.evaluation import vocabulary as ids
from mmflex.evaluation.samples import TASKS, VISION

KINDS = ("vision", "text")
WEIGHTS = Path(__file__).parent / "weights"
_FILE = "model.safetensors"
_TIED = "lm_head.weight"
LARGEST = 12_000_000
"""Bytes that a checkpoint may have."""


def _config(kind: str, hidden: int | None = None, layers: int | None = None) -> Any:
    """The config of a model; ``hidden`` and ``layers`` make a smaller one for tests."""
    common: dict[str, Any] = {
        "vocab_size": ids.VOCABULARY,
        "max_position_embeddings": 1 << 17,
        "tie_word_embeddings": True,
        "bos_token_id": ids.BOS,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": False,
    }
    if kind == "text":
        from transformers import Qwen2Config

        hidden = hidden or 256
        return Qwen2Config(
            **common,
            hidden_size=hidden,
            intermediate_size=hidden * 5 // 4,
            num_hidden_layers=layers or 6,
            num_attention_heads=max(2, hidden // 64),
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    if kind != "vision":
        raise ValueError(f"unknown model {kind!r}: choose from {', '.join(KINDS)}")
    from transformers import Qwen2_5_VLConfig

    hidden = hidden or 512
    heads = max(2, hidden // 64)
    text = {
        **common,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 8,
        "num_hidden_layers": layers or 4,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        # Every frequency goes to one of time, height and width in turn, so that each has long and short ones.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1] * (hidden // heads // 2),
        },
    }
    vision = {
        "depth": 0,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 64,
        "in_channels": 3,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "tokens_per_second": 1,
        "window_size": 64,
        "fullatt_block_indexes": [],
        "out_hidden_size": hidden,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids.IMAGE,
        video_token_id=ids.VIDEO,
        vision_start_token_id=ids.VISION_START,
        vision_end_token_id=ids.VISION_END,
        tie_word_embeddings=True,
    )


def _class(kind: str) -> Any:
    import transformers

    return transformers.Qwen2ForCausalLM if kind == "text" else transformers.Qwen2_5_VLForConditionalGeneration


def build(kind: str, *, hidden: int | None = None, layers: int | None = None) -> Any:
    """An untrained model, float32, on the CPU.

    Args:
        kind: "vision" or "text".
        hidden, layers: another size than the shipped one's, for tests.
    """
    return _class(kind)(_config(kind, hidden, layers))


def save(model: Any, kind: str, path: Path | str) -> int:
    """Write ``config.json`` and ``model.safetensors`` (bfloat16, the tied embedding once) into the folder ``path``.

    Returns:
        The size of the weights in bytes.

    Raises:
        ValueError: more than 12 MB; nothing is written then.
    """
    from safetensors.torch import save as packed

    if kind not in KINDS:
        raise ValueError(f"unknown model {kind!r}: choose from {', '.join(KINDS)}")
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != _TIED
    }
    data = packed(state, metadata={"format": "pt", "kind": kind})
    if len(data) > LARGEST:
        raise ValueError(f"the {kind} model has {len(data)} bytes in bfloat16, more than {LARGEST}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    partial = folder / f"{_FILE}.part"
    partial.write_bytes(data)
    partial.replace(folder / _FILE)
    return len(data)


def restore(
    kind: str, path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The model that `save` wrote into the folder ``path``, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing; it is named.
        ValueError: the weights are not this model's.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    _check_files(kind, folder)
    of = _class(kind)
    model = of(of.config_class.from_pretrained(folder))
    missing, unexpected = model.load_state_dict(load_file(folder / _FILE), strict=False)
    missing = [name for name in missing if name != _TIED]
    if missing or unexpected:
        raise ValueError(f"{folder / _FILE} is not a {kind} model: missing {missing[:3]}, unknown {unexpected[:3]}")
    model.tie_weights()
    return model.to(device=device, dtype=dtype).eval()


def _check_files(kind: str, folder: Path) -> None:
    for name in (_FILE, "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: the weights of the {kind} model are in the repository, not in the wheel; "
                f"install from a checkout with 'pip install -e .', or train it with 'python -m benchmarks.train "
                f"--task {kind} --out {folder}'"
            )


def check_present(task: str) -> None:
    """FileNotFoundError where `load` would have no weights."""
    _check_files(_kind(task), WEIGHTS / _kind(task))


def present(task: str) -> bool:
    """Whether the weights of a task's model are installed: a checkout has them, a wheel does not."""
    return (WEIGHTS / _kind(task) / _FILE).is_file()


def _kind(task: str) -> str:
    return "vision" if task in VISION else "text"


def config_of(task: str) -> Any:
    """The config of the shipped model that does a task."""
    return _config(_kind(task), None, None)


def load(task: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The shipped model that does a task, in evaluation mode.

    Args:
        task: one of `mmflex.evaluation.samples.TASKS`.
        device: where it goes.
        dtype: of the weights; they are stored in bfloat16.

    Raises:
        FileNotFoundError: the weights are missing; the message names the file.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    kind = _kind(task)
    return restore(kind, WEIGHTS / kind, device=device, dtype=dtype)
