"""`mmflex demo`: a small Qwen2.5-VL reads a video, once with dense attention and once patched, side by side.

The model is the real transformers class with random weights (nothing is downloaded), the video is drawn here and goes
through transformers' own processor. What is measured is the whole prefill, planning counted.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

VOCABULARY = 2048
IMAGE, VIDEO, VISION_START, VISION_END = range(VOCABULARY - 4, VOCABULARY)
CUES = {"prompt": 24, "question": 40}
"""Text tokens before and after the video."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo: ``frames`` of ``size`` x ``size`` pixels; ``layers`` of the language model; timed ``runs``."""

    frames: int = 512
    size: int = 224
    layers: int = 2
    heads: int = 8
    kv_heads: int = 2
    runs: int = 2
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0

    def on(self) -> torch.device:
        """The device to run on."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- the input ------------------------------------------------------------------------------------------------------


def moving_shapes(frames: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 ``[frames, size, size, 3]``: a disc, a square and a triangle bouncing over a slowly turning ground,
    and a watermark in the corner."""
    from PIL import Image, ImageDraw

    generator = np.random.default_rng(seed)
    place, speed = generator.uniform(0.2, 0.8, (3, 2)), generator.uniform(0.004, 0.016, (3, 2))
    colours = [(230, 70, 60), (60, 160, 230), (240, 200, 60)]
    ramp = np.linspace(0, 1, size)
    out = np.empty((frames, size, size, 3), np.uint8)
    for t in range(frames):
        angle = 2 * np.pi * t / max(frames, 1)
        shade = 90 + 50 * (np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None])
        picture = Image.fromarray(np.repeat(shade[..., None], 3, 2).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        centre = size * (0.15 + 0.7 * np.abs((place + speed * t) % 2 - 1))
        radius = size * 0.12
        for number, ((x, y), colour) in enumerate(zip(centre, colours, strict=True)):
            corners = [(x - radius, y - radius), (x + radius, y + radius)]
            if number == 0:
                draw.ellipse(corners, fill=colour)
            elif number == 1:
                draw.rectangle(corners, fill=colour)
            else:
                draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
        corner = size // 8
        draw.rectangle([0, 0, corner, corner], fill=(250, 250, 250))
        draw.ellipse([corner // 4, corner // 4, corner - corner // 4, corner - corner // 4], fill=(20, 20, 20))
        out[t] = np.asarray(picture)
    return out


def process(video: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(pixel values, video_grid_thw, how) of a video, as Qwen2.5-VL's processor gives them.

    With torchvision by its video processor; without, frame by frame through its Pillow image processor, pairs of frames
    then joined in the patches' time dimension, which is all that the video processor does differently.
    """
    limits = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}
    try:
        import torchvision  # noqa: F401
        from transformers import Qwen2VLVideoProcessor
    except ImportError:
        pass
    else:
        frames = torch.from_numpy(video).permute(0, 3, 1, 2)
        found = Qwen2VLVideoProcessor(size=limits, cap_pixels_per_frame=False)(videos=[frames], return_tensors="pt")
        return found["pixel_values_videos"], found["video_grid_thw"], "Qwen2VLVideoProcessor"
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size=limits, temporal_patch_size=1)
    if len(video) % 2:
        video = np.concatenate([video, video[-1:]])
    pairs = []
    for first in range(0, len(video), 32):
        found = processor(images=list(video[first : first + 32]), return_tensors="np")
        _, height, width = found["image_grid_thw"][0]
        patches = found["pixel_values"].reshape(
            -1, 2, height * width, 3, 1, 14 * 14
        )  # [pairs, 2, patches, RGB, 1, pixels]
        pairs.append(np.concatenate([patches[:, 0], patches[:, 1]], 3).reshape(-1, 3 * 2 * 14 * 14))
    grid = torch.tensor([[len(video) // 2, int(height), int(width)]])
    return torch.from_numpy(np.concatenate(pairs)), grid, "Qwen2VLImageProcessorPil"


def prompt(pixels: torch.Tensor, grid: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """What the processor hands to the model: text, the video's placeholders, a question."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(VOCABULARY - 8, (n,), generator=generator) for n in CUES.values())
    tokens = int(grid.prod()) // 4
    marks = [torch.tensor([mark]) for mark in (VISION_START, VISION_END)]
    ids = torch.cat([before, marks[0], torch.full((tokens,), VIDEO), marks[1], after])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == VIDEO).long(),
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }


# ---- the model ------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> Any:
    """A Qwen2.5-VL of a few layers, random weights from a fixed seed, bfloat16."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(settings.seed)
    width = 64 * settings.heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.kv_heads,
            "max_position_embeddings": 1 << 20,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval().to(settings.on(), torch.bfloat16)


def shape_heads(model: Any, spec: Sequence[Any], inputs: dict[str, torch.Tensor], corner: torch.Tensor) -> None:
    """Sets query and key biases so that random heads look at what trained ones do, each as its pattern has it.

    Rotary features turn with the distance, the fast ones of time quickly and the slow ones of width hardly at all. A
    bias on both sides of the first makes a window (`AShape`). One on the queries along the second makes all of them
    seek the same keys: those of the watermark (`Grid`) or a few hundred others (`VerticalSlash`). Keys are looked up
    in one forward of ``inputs``, whose tokens at the watermark are ``corner``, bool [N].
    """
    fast, slow = [*range(8), *range(32, 40)], [*range(24, 32), *range(56, 64)]
    layers = model.model.language_model.layers
    found: list[torch.Tensor] = []
    hooks = [layer.self_attn.k_proj.register_forward_hook(lambda *call: found.append(call[2][0])) for layer in layers]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(1)
    for layer, projected in zip(layers, found, strict=True):
        query = layer.self_attn.q_proj.bias.data.view(len(spec), -1)
        key = layer.self_attn.k_proj.bias.data.view(-1, query.shape[1])
        keys = projected.float().unflatten(-1, key.shape)[..., slow]  # [N, KV heads, features]
        for head, pattern in enumerate(spec):
            kv = head * len(key) // len(spec)
            if type(pattern).__name__ == "AShape":
                query[head, fast] = key[kv, fast] = 3.0
            elif type(pattern).__name__ == "Grid":
                contrast = keys[corner, kv].mean(0) - keys[~corner, kv].mean(0)
                query[head, slow] = (contrast * 14 * 8 / contrast.square().sum()).to(query)  # they score 14 more
            else:
                sought = torch.randn(len(slow), generator=generator).to(keys)
                query[head, slow] = (sought * 4 * 8 / (keys[:, kv] @ sought).std()).to(query)  # scores deviate by 4


def spec_for(heads: int) -> list[Any]:
    """Three families over the heads: grid (columns and rows from frame to frame), vertical-slash, sink and window."""
    from mask_builders import AShape, Grid, VerticalSlash

    kinds = [Grid(columns=True, rows=True, local=512), VerticalSlash(500, 768), AShape(128, 1024)]
    return sorted((kinds[h % 3] for h in range(heads)), key=kinds.index)


# ---- the comparison -------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What the demo found; seconds are medians over the runs, ``first_s`` the first run, which compiles.

    ``dense_s`` and ``mmflex_s`` are (whole prefill, language model in it)."""

    tokens: int
    dense_s: tuple[float, float]
    mmflex_s: tuple[float, float]
    plan_s: float
    first_s: float
    dense_spec_difference: float
    sparse_difference: float
    mean_difference: float
    largest_logit: float
    same_next_token: bool
    plan: Any
    kept: np.ndarray
    picture: Path | None


@contextmanager
def recorded() -> Iterator[list[tuple[Any, Any, Any, dict[str, Any]]]]:
    """(q, k, spec, options) of every call of `mmflex.attention` in a ``with`` block."""
    import mmflex.runtime.attention as runtime

    seen: list[tuple[Any, Any, Any, dict[str, Any]]] = []
    real = runtime.attention

    def attention(q: Any, k: Any, v: Any, spec: Any, **options: Any) -> Any:
        seen.append((q, k, spec, options))
        return real(q, k, v, spec, **options)

    runtime.attention = attention  # type: ignore[assignment]
    try:
        yield seen
    finally:
        runtime.attention = real


def run(settings: Settings, console: Console, picture: Path | None = None) -> Result:
    """The demo; prints as it goes."""
    device = settings.on()
    console.print(f"[bold]mmflex demo[/] on {_name(device)}, torch {torch.__version__}")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return _run(settings, console, picture, device)


def _run(settings: Settings, console: Console, picture: Path | None, device: torch.device) -> Result:
    from mask_builders import Dense
    from mmflex.integrations.layouts import layout_for
    from mmflex.integrations.transformers import patched
    from mmflex.plot import attention_recall
    from mmflex.runtime.attention import plan as make_plan

    def step(label: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with console.status(label):
            found = work()
        console.print(f"  [green]✓[/] {label} [dim]{time.perf_counter() - start:.1f} s[/]")
        return found

    model = step("building a small Qwen2.5-VL (real class, random weights)", lambda: build(settings))
    label = f"drawing {settings.frames} frames of {settings.size} x {settings.size} and processing them"
    pixels, grid, how = step(label, lambda: process(moving_shapes(settings.frames, settings.size, settings.seed)))
    inputs = {name: t.to(device) for name, t in prompt(pixels.to(torch.bfloat16), grid, settings.seed).items()}
    layout = layout_for(model.config, inputs)
    tokens, spec = layout.length, spec_for(settings.heads)
    model.set_attn_implementation("sdpa")
    clip = _clip(inputs, grid, settings.seed)
    corner = torch.from_numpy(layout_for(model.config, clip).cell[0] == 0).to(device)
    step("giving its heads something to look for", lambda: shape_heads(model, spec, clip, corner))
    console.print(f"    {tokens:,} tokens ({layout.summary()}), video_grid_thw {grid.tolist()[0]}, by {how}")

    language = _Clock(model.model.language_model, device)

    def prefill() -> tuple[tuple[float, float], torch.Tensor]:
        _wait(device)
        start = time.perf_counter()
        logits = model(**inputs, use_cache=False).logits
        _wait(device)
        return (time.perf_counter() - start, language.seconds), logits

    def repeat(runs: int) -> tuple[tuple[float, float], torch.Tensor]:
        found = [prefill() for _ in range(runs)]
        whole, inner = zip(*(seconds for seconds, _ in found), strict=True)
        return (statistics.median(whole), statistics.median(inner)), found[-1][1]

    if device.type == "cuda":
        step("warming up", prefill)
    dense_s, expected = step(f"prefill with SDPA, {settings.runs} times", lambda: repeat(settings.runs))
    with patched(model, Dense(), backend=settings.backend):
        _, dense_logits = step("prefill with mmflex, Dense() everywhere", prefill)
    with patched(model, spec, backend=settings.backend):
        with recorded() as calls:
            (first_s, _), _ = step("prefill with mmflex, sparse, for the first time (compiles)", prefill)
        mmflex_s, logits = step(f"prefill with mmflex, sparse, {settings.runs} times", lambda: repeat(settings.runs))
    q, k, patterns, options = calls[len(calls) // 2]
    start = time.perf_counter()
    plan = make_plan(q, k, patterns, **options)
    _wait(device)
    plan_s = (time.perf_counter() - start) * len(calls)
    kept = step("measuring how much attention the masks keep", lambda: attention_recall(q, k, plan, rows=128))
    result = Result(
        tokens,
        dense_s,
        mmflex_s,
        plan_s,
        first_s,
        _difference(dense_logits, expected),
        _difference(logits, expected),
        float((logits.float() - expected.float()).abs().mean()),
        float(expected.abs().max()),
        bool((logits[0, -1].argmax() == expected[0, -1].argmax()).item()),
        plan,
        kept,
        picture,
    )
    if picture is not None:
        result.picture = step(f"drawing masks to {picture}", lambda: draw(plan, picture))
    report(result, len(calls) // 2, console)
    console.print(needles(device))
    return result


def needles(device: torch.device, tokens: int = 1024) -> Table:
    """What masks cost in answers: the small trained model that comes with mmflex looks for glyphs hidden in a video,
    under three masks, by the eager reference (short prompts save nothing)."""
    from mask_builders import AShape, Dense, VerticalSlash

    from .evaluation import models, samples
    from .evaluation.trace import logits_at
    from .integrations.transformers import patched

    model = models.load("v-niah", device=device)
    asked = samples.prompts("v-niah", tokens, batch=2, questions=6, seed=1, device=device)
    table = Table(title=f"a trained model: {asked.answers.numel()} questions about videos of {tokens:,} tokens")
    table.add_column("mask")
    table.add_column("right answers", justify="right")
    for spec in (Dense(), VerticalSlash(256, 384), AShape(128, 256)):
        with patched(model, spec, backend="reference"):
            found = logits_at(model, asked.inputs, asked.rows).argmax(-1)
        table.add_row(str(spec), str(int((found == asked.answers).sum())))
    return table


def draw(plan: Any, path: Path) -> Path | None:
    """A picture of one head of each pattern; None (with a warning) without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        warnings.warn("no picture: matplotlib is missing; pip install 'mmflex[plot]'", stacklevel=2)
        return None
    matplotlib.use("Agg")
    from . import plot

    heads = [group.heads[0] for group in plan.program.groups][:4]
    plot.plot_masks(plan, heads).savefig(path, bbox_inches="tight")
    return path


def report(result: Result, layer: int, console: Console) -> None:
    """The tables."""
    plan = result.plan
    console.print()
    console.print(f"[bold]plan of layer {layer}[/]")
    console.print(plan.explain(), highlight=False, markup=False, soft_wrap=True)
    console.print()
    table = Table(title=f"prefill of {result.tokens:,} tokens")
    table.add_column("")
    table.add_column("SDPA", justify="right")
    table.add_column("mmflex", justify="right")
    for label, dense, sparse in zip(
        ("whole prefill", "  language model"), result.dense_s, result.mmflex_s, strict=True
    ):
        table.add_row(label, f"{dense:.2f} s", f"{sparse:.2f} s ({dense / sparse:.1f}x)")
    table.add_row("  planning (counted above)", "", f"{result.plan_s:.2f} s")
    table.add_row("first time (compiles kernels)", "", f"{result.first_s:.1f} s")
    table.add_row("max logit difference, Dense()", "", f"{result.dense_spec_difference:.2g}")
    table.add_row("max logit difference, sparse", "", f"{result.sparse_difference:.2g}")
    table.add_row("  mean", "", f"{result.mean_difference:.2g}")
    table.add_row("  largest logit", f"{result.largest_logit:.2g}", "")
    table.add_row("next token", "", "the same" if result.same_next_token else "another")
    console.print(table)
    densities = Table(title=f"layer {layer}: {plan.density.total:.1%} of the causal pairs computed")
    densities.add_column("heads")
    densities.add_column("pattern")
    densities.add_column("density", justify="right")
    densities.add_column("attention kept", justify="right")
    for group in plan.program.groups:
        share = plan.density.heads[:, list(group.heads)].mean()
        kept = result.kept[:, list(group.heads)].mean()
        densities.add_row(_ranges(group.heads), str(group.pattern), f"{share:.1%}", f"{kept:.1%}")
    console.print(densities)
    console.print(
        "[dim]Weights are random; biases give each head a window, a watermark or some hundred keys to look for, "
        "as trained heads have.[/]"
    )
    if result.picture:
        console.print(f"masks of a head of each pattern: [bold]{result.picture}[/]")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _ranges(heads: Sequence[int]) -> str:
    if list(heads) == list(range(heads[0], heads[-1] + 1)) and len(heads) > 1:
        return f"{heads[0]}-{heads[-1]}"
    return ", ".join(map(str, heads))


def _clip(inputs: dict[str, torch.Tensor], grid: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """The inputs with the first 32 frames only."""
    short = grid.clone()
    short[0, 0] = min(16, int(grid[0, 0]))
    found = prompt(inputs["pixel_values_videos"][: int(short.prod())], short, seed)
    return {name: t.to(inputs["input_ids"].device) for name, t in found.items()}


class _Clock:
    """Times the last forward of a module."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.seconds, self.device = 0.0, device
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def start(self, module: torch.nn.Module, args: Any) -> None:
        _wait(self.device)
        self.began = time.perf_counter()

    def stop(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        _wait(self.device)
        self.seconds = time.perf_counter() - self.began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
