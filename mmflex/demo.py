"""`mmflex demo`: a Qwen2.5-VL reads a video, once with dense attention and once patched, side by side.

The model is the real transformers class with random weights (nothing is downloaded), small on a CPU, some layers of the
7B shape with its vision tower on a GPU. The video is drawn here and goes through transformers' own processor. What is
measured is everything up to the first token, planning counted.
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

from .integrations.timeline import MODEL_STAGES, PROCESSOR, READING, Timeline

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
    head_dim: int = 64
    real_tower: bool = False
    runs: int = 2
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    more: str = ""  # what it would take to see more

    def on(self) -> torch.device:
        """The device to run on."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def suited(cls, device: str = "auto", **chosen: Any) -> Settings:
        """Sizes that are worth it on a device; what is ``chosen`` (not None) is kept."""
        on = cls(device=device).on()
        given = {name: value for name, value in chosen.items() if value is not None}
        sizes: dict[str, Any] = {"more": "on a GPU the model is of the 7B shape and the video is longer"}
        if on.type == "cuda":
            free = torch.cuda.mem_get_info(on)[0] / 1e9
            shape = {
                "size": 448,
                "layers": 4,
                "heads": 28,
                "kv_heads": 4,
                "head_dim": 128,
                "real_tower": True,
                "runs": 3,
            }
            whole = "4 of 28 layers ran: python -m benchmarks.prefill --vision takes all of them, up to 256k tokens"
            if free >= 40:
                sizes = {**shape, "frames": 512, "more": whole}
            elif free >= 16:
                sizes = {**shape, "frames": 128}
                sizes["more"] = f"{free:.0f} GB of GPU memory are free: with 40 the video has 512 frames. {whole}"
            else:
                sizes["more"] = f"{free:.0f} GB of GPU memory are free: with 16 the model is of the 7B shape"
        return cls(device=device, **{**sizes, **given})


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


def process(video: np.ndarray, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, str]:
    """(pixel values, video_grid_thw, how) of a video, as Qwen2.5-VL's processor gives them.

    With torchvision by its video processor, on ``device``; without, frame by frame through its Pillow image processor,
    pairs of frames then joined in the patches' time dimension, which is all that the video processor does differently.
    """
    limits = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}
    try:
        import torchvision  # noqa: F401
        from transformers import Qwen2VLVideoProcessor
    except ImportError:
        pass
    else:
        frames = torch.from_numpy(video).permute(0, 3, 1, 2)
        of_videos: Any = Qwen2VLVideoProcessor(size=limits, cap_pixels_per_frame=False)
        found = of_videos(videos=[frames], return_tensors="pt", device=str(device))
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
    width, eighth = settings.head_dim * settings.heads, settings.head_dim // 8
    small_tower = {
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 128,
        "fullatt_block_indexes": [0],
    }
    # of Qwen2.5-VL's checkpoints: the defaults of transformers are 3584 channels wide
    qwen_tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    rotary = [eighth, 3 * eighth // 2, 3 * eighth // 2]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 18944 if settings.real_tower else 2 * width,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.kv_heads,
            "max_position_embeddings": 1 << 20,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": rotary},
        },
        vision_config={**(qwen_tower if settings.real_tower else small_tower), "out_hidden_size": width},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    with settings.on():
        return Qwen2_5_VLForConditionalGeneration(config).eval().to(torch.bfloat16)


def shape_heads(model: Any, spec: Sequence[Any], inputs: dict[str, torch.Tensor], corner: torch.Tensor) -> None:
    """Sets query and key biases so that random heads look at what trained ones do, each as its pattern has it.

    Rotary features turn with the distance, the fast ones of time quickly and the slow ones of width hardly at all. A
    bias on both sides of the first makes a window (`AShape`). One on the queries along the second makes all of them
    seek the same keys: those of the watermark (`Grid`) or a few hundred others (`VerticalSlash`). Keys are looked up
    in one forward of ``inputs``, whose tokens at the watermark are ``corner``, bool [N].
    """
    layers = model.model.language_model.layers
    width = layers[0].self_attn.head_dim
    some, half = width // 8, width // 2
    fast, slow = ([*range(n, n + some), *range(half + n, half + n + some)] for n in (0, half - some))
    scale = width**0.5  # which scores are divided by
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
                query[head, fast] = key[kv, fast] = (18 * scale / len(fast)) ** 0.5  # the nearest score 18
            elif type(pattern).__name__ == "Grid":
                contrast = keys[corner, kv].mean(0) - keys[~corner, kv].mean(0)
                query[head, slow] = (contrast * 14 * scale / contrast.square().sum()).to(query)  # they score 14 more
            else:
                sought = torch.randn(len(slow), generator=generator).to(keys)
                query[head, slow] = (sought * 4 * scale / (keys[:, kv] @ sought).std()).to(query)  # deviating by 4


def spec_for(heads: int) -> list[Any]:
    """Three families over the heads: grid (columns and rows from frame to frame), vertical-slash, sink and window."""
    from mask_builders import AShape, Grid, VerticalSlash

    kinds = [Grid(columns=True, rows=True, local=512), VerticalSlash(500, 768), AShape(128, 1024)]
    return sorted((kinds[h % 3] for h in range(heads)), key=kinds.index)


# ---- the comparison -------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What the demo found: ``dense`` and ``mmflex`` are the stages of every run, in seconds by name, those before the
    model too; ``first_s`` is the first run, which compiles."""

    tokens: int
    dense: list[dict[str, float]]
    mmflex: list[dict[str, float]]
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

    kind = "some layers of a Qwen2.5-VL-7B" if settings.real_tower else "a small Qwen2.5-VL"
    model = step(f"building {kind} (real class, random weights)", lambda: build(settings))
    timeline = Timeline(model)
    with timeline.stage(READING):
        video = step(
            f"drawing {settings.frames} frames of {settings.size} x {settings.size}",
            lambda: moving_shapes(settings.frames, settings.size, settings.seed),
        )
    with timeline.stage(PROCESSOR):
        pixels, grid, how = step("processing them", lambda: process(video, device))
    inputs = {name: t.to(device) for name, t in prompt(pixels.to(torch.bfloat16), grid.cpu(), settings.seed).items()}
    layout = layout_for(model.config, inputs)
    tokens, spec = layout.length, spec_for(settings.heads)
    model.set_attn_implementation("sdpa")
    clip = _clip(inputs, grid.cpu(), settings.seed)
    corner = torch.from_numpy(layout_for(model.config, clip).cell[0] == 0).to(device)
    step("giving its heads something to look for", lambda: shape_heads(model, spec, clip, corner))
    console.print(f"    {tokens:,} tokens ({layout.summary()}), video_grid_thw {grid.tolist()[0]}, by {how}")

    def prefill() -> tuple[dict[str, float], torch.Tensor]:
        with timeline.first_token():
            logits = model(**inputs, use_cache=False).logits
            int(logits[0, -1].argmax())
        return dict(timeline.seconds), logits

    def repeat(runs: int) -> tuple[list[dict[str, float]], torch.Tensor]:
        found, logits = [], None
        for _ in range(runs):
            del logits  # of all tokens: one set of them is enough
            stages, logits = prefill()
            found.append(stages)
        assert logits is not None
        return found, logits

    if device.type == "cuda":
        step("warming up", prefill)
    dense, expected = step(f"prefill with SDPA, {settings.runs} times", lambda: repeat(settings.runs))
    with patched(model, Dense(), backend=settings.backend):
        _, dense_logits = step("prefill with mmflex, Dense() everywhere", prefill)
    dense_difference = _difference(dense_logits, expected)
    del dense_logits
    with patched(model, spec, backend=settings.backend):
        with recorded() as calls:
            first, _ = step("prefill with mmflex, sparse, for the first time (compiles)", prefill)
        sparse, logits = step(f"prefill with mmflex, sparse, {settings.runs} times", lambda: repeat(settings.runs))
    q, k, patterns, options = calls[len(calls) // 2]
    start = time.perf_counter()
    plan = make_plan(q, k, patterns, **options)
    _wait(device)
    plan_s = (time.perf_counter() - start) * len(calls)
    kept = step("measuring how much attention the masks keep", lambda: attention_recall(q, k, plan, rows=128))
    result = Result(
        tokens,
        dense,
        sparse,
        plan_s,
        sum(first[stage] for stage in MODEL_STAGES if stage in first),
        dense_difference,
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
    if settings.more:
        console.print(f"[dim]To see more: {settings.more}.[/]")
    from .evaluation import models

    if models.present("v-niah"):
        console.print(needles(device))
    else:
        console.print("[dim]The table of answers needs weights that are in a checkout, and not in the wheel.[/]")
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
    table = Table(title=f"{result.tokens:,} tokens: time to the first token")
    table.add_column("")
    table.add_column("SDPA", justify="right")
    table.add_column("mmflex", justify="right")
    before = result.mmflex[0]
    table.add_row("reading (here: drawing) frames", "", f"{before[READING]:.2f} s")
    table.add_row("processor", "", f"{before[PROCESSOR]:.2f} s")
    whole = [[sum(run[s] for s in MODEL_STAGES if s in run) for run in runs] for runs in (result.dense, result.mmflex)]
    table.add_row("whole prefill", *compared(*whole))
    for stage, label in zip(
        MODEL_STAGES, ("  vision tower", "  language model", "  first token and the rest"), strict=True
    ):
        table.add_row(label, *compared(*([run[stage] for run in runs] for runs in (result.dense, result.mmflex))))
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


def compared(dense: Sequence[float], sparse: Sequence[float]) -> tuple[str, str]:
    """Cells of two medians in seconds; how many times faster only where they are farther apart than their runs."""
    usual, ours = statistics.median(dense), statistics.median(sparse)
    spread = max(dense) - min(dense) + max(sparse) - min(sparse)
    told = len(dense) > 1 and len(sparse) > 1 and abs(usual - ours) > spread
    return f"{usual:.2f} s", f"{ours:.2f} s ({usual / ours:.1f}x)" if told else f"{ours:.2f} s"


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
