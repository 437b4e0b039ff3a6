"""What README, CONTRIBUTING and docs/design.md claim: commands, tables, links, the own pattern, printed output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import mask_builders
import mmflex
from mmflex.runtime.reference import softmax_attention

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def run(source: str, namespace: dict[str, Any]) -> None:
    """As if it were a file: annotations are not strings here."""
    exec(compile(source, "<page>", "exec", dont_inherit=True), namespace)


def own_pattern() -> type[mmflex.Pattern]:
    """The class of the README's section on patterns of one's own."""
    source = next(block for block in blocks(README, "python") if "mmflex.Pattern)" in block)
    namespace: dict[str, Any] = {"mmflex": mmflex, "__name__": __name__}
    run(source.split("\n\n\nplan = ")[0], namespace)
    return namespace["HeavyKeys"]


def test_own_pattern_is_exact_and_composes() -> None:
    """As it stands in the README: finds planted keys, keeps to its budget, is softmax attention under its mask."""
    heavy = own_pattern()
    torch.manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(32), dim=0) * 8
    q, k, v = torch.randn(1, 4, 600, 32) + wanted, torch.randn(1, 2, 600, 32), torch.randn(1, 2, 600, 32)
    k[:, :, [77, 301]] += wanted
    spec = [heavy(20, 64), heavy(20, 64) | mask_builders.AShape(16, 32), heavy(20, 64) - mask_builders.AShape(0, 16)]
    plan = mmflex.plan(q, k, [*spec, heavy(20, 64)], backend="reference", block_size=16)
    mask = plan.dense_mask()
    assert mask[0, 0, -1, [77, 301]].all(), "the planted keys were not selected"
    position = torch.arange(600)
    window = position[:, None] // 16 - position // 16 <= 4
    outside = (mask[0, 0] & ~window).any(0).sum()
    assert 0 < outside <= 20
    expected, _ = softmax_attention(q.double(), k.double(), v.double(), mask, 32**-0.5)
    out = plan.attend(q, k, v)
    assert (out - expected).norm() / expected.norm() <= 2e-6


def test_own_pattern_is_short_and_travels_as_json() -> None:
    heavy = own_pattern()
    source = next(block for block in blocks(README, "python") if "mmflex.Pattern)" in block)
    body = source[source.index("@dataclass") : source.index("\n\n\nplan = ")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    assert mmflex.Pattern.from_json(heavy(5).to_json()) == heavy(5)


def test_commands_are_those_of_the_checks() -> None:
    """.ci/run installs and tests as the README says; two commands set up, everything pinned that is asked for."""
    setup, demo, check, tests = blocks(README, "bash")
    install = setup.splitlines()
    assert len(install) == 2
    checks = (ROOT / ".ci" / "run").read_text()
    assert install[1].removeprefix("pip install ") in checks
    assert tests.strip() in checks
    assert tests.strip() in (ROOT / "CONTRIBUTING.md").read_text()
    assert demo.strip() == "mmflex demo"
    assert check.strip() == "mmflex check"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(r for e in ("transformers", "plot", "dev") for r in project["optional-dependencies"][e]),
    ]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {re.split(r"[\[><=;]", r)[0] for r in asked} - {"mmflex"} <= pinned


def test_every_pattern_and_public_name_is_listed() -> None:
    rows = re.findall(r"^\| `(\w+)\(", README, re.M)
    assert set(mask_builders.__all__) <= set(rows)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mmflex.patterns"]
    patterns = {name for name in mask_builders.__all__ if isinstance(getattr(mask_builders, name), type)}
    assert set(points) == patterns
    helpers = {"Config", "DenseFallback", "Segment", "Tokens", "View", "last_token_logits"}
    missing = [name for name in mmflex.__all__ if name not in README and name not in helpers]
    assert not missing, f"the README's API leaves out {missing}"


def test_signatures_in_the_pattern_table() -> None:
    """Parameters named in the table exist, in that order."""
    for name, arguments in re.findall(r"^\| `(\w+)\(([\w, ]*)\)` \|", README, re.M):
        cls = getattr(mask_builders, name, None)
        if isinstance(cls, type):
            fields = [f.name for f in dataclasses.fields(cls)]
            named = [a.strip() for a in arguments.split(",") if a.strip()]
            assert named == fields[: len(named)], name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_folders_of_the_map_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in re.findall(r"`((?:mmflex|mask_builders|tests|benchmarks)/[\w/]*)`", text):
        assert (ROOT / folder).is_dir(), folder


def test_design_prints_what_it_says() -> None:
    """Costs may be tuned without touching the page: lines and phrases that hold predicted costs are not compared."""

    def comparable(text: str) -> list[str]:
        text = re.sub(r"; predicted \d+ blocks", "", text)
        lines = [line.rstrip() for line in text.strip().splitlines()]
        return [line for line in lines if not re.match(r"  (chosen|instead of|dense) ", line)]

    text = (ROOT / "docs" / "design.md").read_text()
    namespace: dict[str, Any] = {"__name__": __name__}
    pairs = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", text, re.M | re.S)
    assert len(pairs) == len(blocks(text, "python"))
    for source, printed in pairs:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run(source, namespace)
        assert comparable(out.getvalue()) == comparable(printed)
