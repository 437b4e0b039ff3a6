"""The README's picture, ``docs/masks.png``: six heads of one interleaved input.

    python -m benchmarks.picture

Random queries and keys with what trained heads show planted into them: keys that everyone wants, diagonals, a grid from
frame to frame, text that looks elsewhere than video. So the patterns have something to find.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import mmflex
from mask_builders import AShape, Boundary2D, Grid, QBoundary, VerticalSlash

LAYOUT = mmflex.TokenLayout.from_segments(
    [
        ("text", 96),
        ("video", (24, 16, 16)),
        ("text", 256),
        ("image", (32, 32)),
        ("text", 160),
        ("video", (24, 16, 16)),
        ("text", 320),
    ]
)

HEADS = [
    ("A-shape: sinks and a window", AShape(128, 1024)),
    ("vertical-slash: keys and distances found in the input", VerticalSlash(96, 640)),
    ("grid: one place of every frame, seen and seeing", Grid(columns=True, rows=True, local=512)),
    ("grid slash: the same place in every earlier frame", Grid(columns=False, slash=True, local=512)),
    (
        "Q-boundary: text, image and video queries look elsewhere",
        QBoundary({"video": Grid(local=512), "text": VerticalSlash(64, 384), "image": VerticalSlash(96, 512)}),
    ),
    (
        "2D-boundary: a pattern per pair of modalities",
        Boundary2D(
            {
                ("video", "video"): VerticalSlash(48, 640),
                ("video", "image"): VerticalSlash(24, 128),
                ("video", "text"): AShape(128, 128),
                ("image", "video"): VerticalSlash(64, 384),
                ("image", "text"): AShape(128, 128),
                ("text", "video"): VerticalSlash(64, 256),
            }
        ),
    ),
]


def planted(heads: int, tokens: int, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k ``[1, heads, tokens, dim]``: 40 columns and two diagonals a head."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(2))
    sought = torch.nn.functional.normalize(torch.randn(heads, dim, generator=generator), dim=-1) * 6
    q += sought[None, :, None]
    for head in range(heads):
        k[0, head, torch.randperm(tokens, generator=generator)[:40]] += 2 * sought[head]
    speed = 0.4 * torch.arange(1, dim // 2 + 1) / dim
    place = torch.arange(tokens)[:, None]
    for distance, strength in ((1500, 1.6), (4300, 1.3)):
        turned, still = (place - distance) * speed, place * speed
        q += strength * torch.cat([turned.cos(), turned.sin()], -1)
        k += strength * torch.cat([still.cos(), still.sin()], -1)
    return q, k


def draw(path: Path) -> None:
    """Plans the heads and writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from mmflex import plot

    q, k = planted(len(HEADS), LAYOUT.length)
    plan = mmflex.plan(q, k, [pattern for _, pattern in HEADS], layout=LAYOUT, backend="reference")
    shares = plan.density.heads[0]
    titles = [f"{name}\n{share:.1%} of the causal pairs" for (name, _), share in zip(HEADS, shares, strict=True)]
    figure = plot.plot_masks(plan, range(len(HEADS)), titles=titles)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    if path.suffix == ".png":  # a tenth of the size: it has few tones
        from PIL import Image

        few = Image.open(path).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
    print(f"{path}: {LAYOUT.length} tokens, {len(HEADS)} heads, {plan.density.total:.1%} of the causal pairs in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "masks.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
