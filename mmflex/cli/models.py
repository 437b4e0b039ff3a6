"""What is asked of a model and of where it runs before anything slow is done, and how a model is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.shown import shown

if TYPE_CHECKING:
    import torch

DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16"}
DTYPES |= {"float32": "float32", "fp32": "float32"}
"""Names of dtypes that options take, and PyTorch's for them."""


# ---- options ---------------------------------------------------------------------------------------------------------


def device_of(name: str) -> str:
    """The device of a ``--device``; ValueError for what is none, or is not here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not number.isdecimal()):
        raise ValueError(f"--device is {shown(name)}: give cpu, cuda (or cuda:1, ...) or auto{_near(name, ['cuda'])}")
    if kind == "cuda" and int(number or 0) >= count:
        here = f"{count} of them" if count else "none"
        raise ValueError(
            f"--device is {shown(name)}, and of CUDA devices PyTorch {torch.__version__} sees {here}: give "
            f"--device {f'cuda:{count - 1}' if count else 'cpu'}, or auto"
        )
    return name


def dtype_of(name: str, *, auto: bool = False) -> str:
    """PyTorch's name for a ``--dtype``, or "auto" where that is allowed; ValueError for any other."""
    if auto and name == "auto":
        return name
    if name not in DTYPES:
        more = " or auto (as stored)" if auto else ""
        raise ValueError(f"--dtype is {shown(name)}: give bfloat16 (bf16), float16 (fp16), float32 (fp32){more}")
    return DTYPES[name]


def weights_dtype(dtype: str, config: Any) -> torch.dtype:
    """What a model is loaded in: a name of `dtype_of`, or for "auto" what its config says; bfloat16 if nothing."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    text = None if config is None else config.get_text_config(decoder=True)
    stored = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def check_backend(
    name: str, device: str, dtype: str = "auto", config: Any = None, *, without: Sequence[str] = ()
) -> None:
    """ValueError for a ``--backend`` that there is not, or that cannot run here.

    Args:
        name: what was given.
        device, dtype: of `device_of` and `dtype_of`.
        config: of the model, for its head dimension and the dtype that it is stored in; where either is unknown, the
            one that every backend takes.
        without: backends that the command does not take.
    """
    from ..integrations.shape import head_dim_of
    from ..runtime.backends import BACKENDS, why_not

    known = [b for b in BACKENDS if b not in without]
    if name != "auto" and name not in known:
        raise ValueError(f"--backend is {shown(name)}: give auto, {_either(known)}{_near(name, known)}")
    if name == "auto":
        return
    kind = weights_dtype(dtype, config)
    dim = (None if config is None else head_dim_of(config.get_text_config(decoder=True))) or 128
    reason = why_not(name, device, dim, kind)
    if reason is not None:
        can = [b for b in known if why_not(b, device, dim, kind) is None]
        raise ValueError(
            f"--backend is {shown(name)}, which cannot run here: {reason}; give --backend {_either(can)}, or auto"
        )


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


# ---- models ----------------------------------------------------------------------------------------------------------


def check_place(model: str, *, gguf: bool = False) -> None:
    """ValueError for a path where there is no model. Any other name may be one on the Hub."""
    path = Path(model)
    if path.is_dir():
        files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if files and not gguf:
            raise ValueError(_ways_out(files[0]))
        if not files and not (path / "config.json").is_file():
            raise ValueError(f"the folder {model} holds no model of transformers: there is no config.json in it")
    elif path.exists():
        if path.suffix == ".gguf" and not gguf:
            raise ValueError(_ways_out(path))
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is a file: give the folder of a transformers model, or a name on the Hub")
    elif model.endswith(".gguf"):
        raise ValueError(f"there is no file {model}")
    elif _is_path(model):
        raise ValueError(f"there is no folder {model}: give one with a transformers model, or a name on the Hub")


def _ways_out(file: Path) -> str:
    """What to do with a GGUF file where a folder is needed."""
    code = f"from mmflex.evaluation import real; real.load({str(file)!r}).save({file.stem!r})"
    return (
        f"{file} is a GGUF file, which mmflex eval --model reads as it is; this command takes a folder: save the model "
        f'as one, python -c "{code}", and give {file.stem}'
    )


def _is_path(name: str) -> bool:
    """Whether it cannot be a name on the Hub, ``name`` or ``owner/name``."""
    return not name or name.startswith((".", "~", os.sep)) or "\\" in name or name.count("/") > 1 or name.endswith("/")


def config_of(model: str) -> Any:
    """The config of a folder or a name; ValueError, of one line, if there is none."""
    check_place(model)
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(model).is_dir():
            raise ValueError(f"transformers cannot read the config of {model}: {reason}") from error
        raise ValueError(
            f"{shown(model)} is no folder here, and transformers finds no model of that name: {reason}"
        ) from error


def multimodal(config: Any) -> bool:
    """Whether a model sees more than text."""
    return getattr(config, "vision_config", None) is not None


def check_media(model: str, config: Any, video: Path | None, images: Sequence[Path] = ()) -> None:
    """Before a file is decoded: ValueError for one that is not there, or that the model does not take; ImportError for
    packages that reading a video needs."""
    given = [("--video", "video", video)] if video is not None else []
    for option, kind, file in [*given, *(("--image", "image", image) for image in images)]:
        if not file.is_file():
            raise ValueError(f"{option} is {file}: there is no file {file}")
        _check_kind(model, config, option, kind)
    if video is not None:
        needed = {"torchvision": ("torchvision",), "PyAV or torchcodec": ("av", "torchcodec")}
        missing = [p for p, names in needed.items() if not any(map(importlib.util.find_spec, names))]
        if missing:
            raise ImportError(f"--video needs {' and '.join(missing)}, not installed here: pip install 'mmflex[video]'")


def _check_kind(model: str, config: Any, option: str, kind: str) -> None:
    from ..integrations.layouts import FAMILIES

    if not multimodal(config):
        raise ValueError(
            f"{option} is given, and {model} ({config.model_type}) is a model of text alone: leave {option} out, or "
            "name a vision-language model"
        )
    family = FAMILIES.get(config.model_type)
    if family is not None and kind not in family.holds:
        raise ValueError(
            f"{option} is given, and prompts of {model} ({config.model_type}) hold {_either(family.holds)}: leave "
            f"{option} out, or name another model"
        )


def kind_of(config: Any) -> Any:
    """The class of transformers that builds a config's model."""
    import transformers

    return transformers.AutoModelForImageTextToText if multimodal(config) else transformers.AutoModelForCausalLM


def load(model: str, device: str, dtype: str = "auto") -> Any:
    """The model, in evaluation mode."""
    import torch

    loaded = kind_of(config_of(model)).from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return loaded.eval().to(device)
