"""``mmflex warmup``."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer
from rich.console import Console

from .app import app, fail
from .models import check_backend, config_of, device_of, dtype_of
from .options import counted, numbers_of


@app.command()
def warmup(
    model: Annotated[str, typer.Argument(help="A folder or hub name; only its config.json is read.")],
    config: Annotated[
        str,
        typer.Option(
            help="What the model will be patched with: a config (JSON), or 'default', 'default:high', 'default:fast'."
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts to come, separated by commas.")] = "32768,131072",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'auto': a GPU if there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights and activations: 'bfloat16', 'float16' or 'float32'.")
    ] = "bfloat16",
    backend: Annotated[str, typer.Option(help="As in mmflex.patch.")] = "auto",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that compile side by side; 1: none. Default: by the number of CPU cores."),
    ] = None,
) -> None:
    """Compile kernels ahead, so that the first long prompt after a start waits less.

    Builds the model's language layers with random weights, one for every different spec, and prefills prompts of text
    of these lengths. What PyTorch, Triton and flash-attn-4 keep on disk serves later processes; `mmflex.warmup` does
    the rest inside a process.
    """
    if importlib.util.find_spec("transformers") is None:
        raise fail("mmflex warmup needs transformers: pip install 'mmflex[transformers]'")
    import torch

    from ..integrations.warmup import processes, random_model
    from ..integrations.warmup import warmup as run
    from ..tuning.config import load_config
    from ..tuning.default import default_named

    console = Console()
    try:
        where, kind = device_of(device), dtype_of(dtype)
        numbers = numbers_of(lengths, int, "--lengths")
        check_backend(backend, where, kind)
        check_backend(backend, where, kind, config_of(model))
        default = default_named(config)
        spec = load_config(config) if default is None else default
        patched = random_model(model, spec, torch.device(where), getattr(torch, kind), backend)
        for number, seconds in zip(numbers, run(patched, numbers, jobs=jobs or processes()), strict=True):
            console.print(f"{counted(number, 'token')}: {seconds:.1f} s")
    except (OSError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise fail(str(error)) from error
