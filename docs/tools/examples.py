"""Examples of patterns on one input: formula, numbers and pictures, from the plan that would run."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mask_builders
import mmflex
from mmflex.ir.pattern import Pattern
from mmflex.runtime.explain import readable

from .formula import latex

PICTURES = Path(__file__).parents[1] / "pictures"

LAYOUT = mmflex.TokenLayout.from_segments(
    [
        ("text", 128),
        ("video", (16, 16, 16)),
        ("text", 128),
        ("image", (16, 16)),
        ("text", 128),
        ("video", (8, 16, 16)),
        ("text", 256),
    ]
)
"""The input of all examples: two videos with 256 tokens a frame and an image, between pieces of text."""


@cache
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """q and k ``[1, 1, N, 64]`` with what trained heads show: 24 keys that every query wants, three distances (relative
    position by 28 random frequencies), and cell 100 of every frame."""
    generator = torch.Generator().manual_seed(5)
    n, dim = LAYOUT.length, 64
    q, k = (0.7 * torch.randn(1, 1, n, dim, generator=generator) for _ in range(2))
    rate = torch.rand(28, generator=generator) * torch.pi

    def wave(place: torch.Tensor) -> torch.Tensor:
        return torch.cat([(place[:, None] * rate).cos(), (place[:, None] * rate).sin()], 1)

    place = torch.arange(n)
    q[..., :56], k[..., :56] = wave(place), 0
    for distance in (0, 1500, 4300):
        k[..., :56] += 2.5 * wave(place + distance)
    q[..., 56:58] = 2.0
    k[0, 0, torch.randperm(n, generator=generator)[:24], 56] = 24.0
    k[0, 0, torch.from_numpy(LAYOUT.cell[0] == 100), 57] = 21.0
    return q, k


@dataclass(frozen=True)
class Example:
    """A pattern of a page, as its marker names it: ``Grid(local=512); mask, orders``.

    Attributes:
        name: what its pictures are called.
        source: the pattern, as Python.
        views: pictures, of "mask", "orders", "estimate".
    """

    name: str
    source: str
    views: tuple[str, ...]

    @classmethod
    def parse(cls, name: str, marker: str) -> Example:
        source, _, views = marker.partition(";")
        chosen = tuple(view.strip() for view in (views or "mask").split(","))
        unknown = set(chosen) - {"mask", "orders", "estimate"}
        if unknown:
            raise ValueError(f"{name}: unknown pictures {sorted(unknown)}: use mask, orders, estimate")
        return cls(name, source.strip(), chosen)

    @property
    def pattern(self) -> Pattern:
        return eval(self.source, {name: getattr(mask_builders, name) for name in mask_builders.__all__})

    def plan(self) -> mmflex.Plan:
        """The plan of one head."""
        return _plan(self.source)

    def picture(self, view: str) -> Path:
        return PICTURES / f"{self.name}-{view}.png"

    def fingerprint(self) -> str:
        """What a picture is of: changes with the selection and the block lists."""
        (full, partial), plan = _counts(self.plan()), self.plan()
        launches = ", ".join(launch.label for launch in plan.program.launches)
        return f"{self.source} on {LAYOUT.fingerprint}: {launches}; {full} full, {partial} partial"

    def markdown(self, up: str) -> str:
        """Formula, text, pictures and numbers; ``up``: the way from the page to docs/."""
        plan = self.plan()
        group = plan.program.groups[0]
        text = "q >= k" if group.expr == True else f"q >= k and {readable(group.expr)}"  # noqa: E712
        parts = [f"$$\n{latex(group.expr)}\n$$", f"As text: `{text}`"]
        for view in self.views:
            parts.append(f"![{_TITLES[view]} of {self.source}]({up}pictures/{self.picture(view).name})")
        parts.append(
            f"*`{self.source}` on the [example input]({up}patterns/index.md#the-example-input): {_words(plan)}.*"
        )
        return "\n\n".join(parts) + "\n"

    def draw(self) -> None:
        """Writes the pictures that are not up to date."""
        for view in self.views:
            if self.drawn(view) != self.fingerprint():
                self._save(view)

    def drawn(self, view: str) -> str:
        """The fingerprint that a picture carries; "" where there is none."""
        from PIL import Image

        path = self.picture(view)
        if not path.exists():
            return ""
        with Image.open(path) as image:
            return str(image.info.get("mmflex", ""))

    def _save(self, view: str) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from PIL import Image, PngImagePlugin

        from mmflex import plot

        draw: Any = {"mask": plot.plot_mask, "orders": plot.plot_orders, "estimate": plot.plot_estimate}[view]
        with io.BytesIO() as file:
            draw(self.plan(), 0).savefig(file, format="png", dpi=85, bbox_inches="tight")
            small = Image.open(file).convert("RGB").quantize(160, Image.Quantize.MAXCOVERAGE)
        notes = PngImagePlugin.PngInfo()
        notes.add_text("mmflex", self.fingerprint())
        PICTURES.mkdir(exist_ok=True)
        small.save(self.picture(view), optimize=True, pnginfo=notes)


_TITLES = {"mask": "The mask", "orders": "The orders", "estimate": "The estimate and the selection"}


@cache
def _plan(source: str) -> mmflex.Plan:
    q, k = inputs()
    return mmflex.plan(q, k, Example("", source, ()).pattern, layout=LAYOUT, backend="reference")


def _counts(plan: mmflex.Plan) -> tuple[int, int]:
    """(full, partial) blocks in all launches of the one head."""
    full, partial = 0, 0
    for _, mask in plan.block_masks:
        assert mask.full_kv_num_blocks is not None
        full, partial = full + int(mask.full_kv_num_blocks.sum()), partial + int(mask.kv_num_blocks.sum())
    return full, partial


def _words(plan: mmflex.Plan) -> str:
    full, partial = _counts(plan)
    launches = [launch.label for launch in plan.program.launches]
    how = f"{len(launches)} launches ({', '.join(launches)})" if len(launches) > 1 else "one launch"
    if plan.program.launches[0].name == "dense":
        return f"{LAYOUT.length:,} tokens, PyTorch's own attention"
    return f"{full:,} full and {partial:,} partial blocks in {how}, {plan.density.total:.1%} of the causal pairs"
