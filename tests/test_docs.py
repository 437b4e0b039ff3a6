"""The documentation: its Python runs and prints what it says, and what is made from the code is up to date.

The blocks of the README and of docs/ run page by page (docs/tools/blocks.py). docs/design.md is run by test_readme.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import mask_builders
import mmflex

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from docs.tools import blocks, browser, commands, markers, plots, results

ROOT = Path(__file__).parents[1]
ALL = [ROOT / "README.md", *markers.pages()]
PAGES = [page for page in ALL if page.name != "design.md" and blocks.BLOCK.search(page.read_text("utf-8"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # blocks may write files
    for ran in blocks.run(page):
        if ran.says is not None:
            assert ran.printed.strip() == ran.says.strip(), f"{page}, line {ran.line}: python -m docs.tools --prints"


def test_blocks_that_are_not_run_are_python_and_say_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python needs-gpu\nraise RuntimeError\n```\n")
    assert list(blocks.run(page)) == []
    for text, error in (("needs-gpu\nx =\n", SyntaxError), ("no-run\nx = 1\n", ValueError)):
        page.write_text(f"```python {text}```\n")
        with pytest.raises(error):
            list(blocks.run(page))


def test_prints_are_renewed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\nprint(x)\n```\n\n```text\n1\n```\n\nand\n\n```python\nprint(x)\n```\n")
    assert [(ran.line, ran.printed, ran.says) for ran in blocks.run(page)] == [(1, "2\n", "1\n"), (12, "2\n", None)]
    assert blocks.with_prints(page) == page.read_text().replace("```text\n1\n", "```text\n2\n")


# ---- what is made from the code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in ALL if markers.EXAMPLE.search(p.read_text("utf-8"))], ids=name_of)
def test_formulas_and_pictures_are_those_of_the_code(page: Path) -> None:
    text = page.read_text("utf-8")
    assert markers.with_examples(text, page) == text, "run: python -m docs.tools"
    for example in markers.found_examples(page):
        for view in example.views:
            assert example.drawn(view) == example.fingerprint(), f"{example.picture(view)}: run python -m docs.tools"


def test_every_pattern_has_a_page_with_its_mask() -> None:
    shown = set()
    for page in (ROOT / "docs" / "patterns").glob("*.md"):
        text = page.read_text("utf-8")
        described = re.findall(r"autoclass:: mask_builders\.(\w+)", text)
        drawn = {name for example in markers.found_examples(page) for name in re.findall(r"\w+", example.source)}
        assert set(described) <= drawn, f"{page.name} describes {described} and draws {sorted(drawn)}"
        shown |= set(described)
    assert shown == {name for name in mask_builders.__all__ if isinstance(getattr(mask_builders, name), type)}


def test_everything_public_is_in_the_reference() -> None:
    text = "".join(page.read_text("utf-8") for page in markers.pages())
    missing = [name for name in mmflex.__all__ if not re.search(rf":: mmflex\.{name}\b", text)]
    assert not missing, f"the pages leave out {missing}"
    from mmflex import plot

    drawing = [name for name in plot.__all__ if name.startswith("plot_")]
    assert not [name for name in drawing if f":: mmflex.plot.{name}\n" not in text]


def test_every_page_is_in_the_contents() -> None:
    listed = set()
    for page in markers.pages():
        for contents in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text("utf-8"), re.S):
            for entry in re.findall(r"^(?!:)(\S+)$", contents, re.M):
                listed.add((page.parent / f"{entry}.md").resolve())
    assert listed == {page.resolve() for page in markers.pages()} - {ROOT / "docs" / "index.md"}


def test_commands_are_all_described() -> None:
    import typer.main

    from mmflex.cli import app

    text = commands.commands()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## mmflex {name}\n" in text
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in text


# ---- tables of results ----------------------------------------------------------------------------------------------


def rows(table: str) -> list[str]:
    """The lines of Markdown tables, without their heads."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    heads = {i + d for i, line in enumerate(lines) if set(line) <= set("|:- ") for d in (-1, 0)}
    return [line for i, line in enumerate(lines) if i not in heads]


def test_tables_hold_every_row_of_the_results() -> None:
    for name in ("attention", "prefill", "cpu"):
        given = [row for _, data in results.load(f"{name}*.json") for row in data.get("rows", [])]
        assert len(rows(results.TABLES[name]())) == len(given) > 0
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert {"attention", "prefill", "vision", "cpu", "check", "files"} <= set(markers.TABLE.findall(text))
    for page in markers.pages():
        assert set(markers.TABLE.findall(page.read_text("utf-8"))) <= set(markers.TABLES), page


def test_tables_say_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times in their units, the best dense kernel, what is missing as "-", unknown fields and files left alone."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    times = {"dense_ms": {"fa2": 8.0, "cudnn": 4.0, "new": 5.0}, "total_ms": 0.5, "S": 8.0}
    row = {
        "tokens": 131072,
        "spec": "A | B",
        "backend": "flash",
        **times,
        "later": 1,
    }
    attention = {"device": "D", "rows": [row, {"tokens": 1000}], "more": {}}
    (tmp_path / "attention-x.json").write_text(json.dumps(attention))
    methods = {
        "mmflex": {"seconds": 2.0, "peak_gb": 70.7},
        "fa2": {"seconds": 300.0, "extrapolated": True},
        "cudnn": {},
    }
    prefill = {"machine": {"device": "E", "torch": "3"}, "rows": [{"tokens": 1 << 20, "methods": methods}]}
    (tmp_path / "prefill-x.json").write_text(json.dumps(prefill))
    (tmp_path / "other.json").write_text(json.dumps([1, 2]))
    (tmp_path / "plain.json").write_text(json.dumps({"machine": "x86_64", "torch": "2"}))
    first, second = sorted(rows(results.attention()), reverse=True)
    assert first == "| 128k | `A \\| B` | flash | 4.00 ms (cuDNN) | 500 us | 8.00x | - | - | - | - |"
    assert second == "| 1,000 | `-` | - | - | - | - | - | - | - | - |"
    assert rows(results.prefill()) == ["| 1M | 300 s\\* | - | 2.00 s | 150x | - | 71 GB |"]
    assert rows(results.files()) == [
        "| `attention-x.json` | D | 2 |",
        "| `other.json` | - | 2 |",
        "| `plain.json` | x86_64, torch 2 | - |",
        "| `prefill-x.json` | E, torch 3 | 1 |",
    ]
    for empty in ("cpu", "check", "evaluation", "vision", "real", "chunks", "serving"):
        assert results.TABLES[empty]() == ""
    whole = {
        "mmflex": {"seconds": 2.0, "vision_s": 0.5, "peak_gb": 60.0},
        "sdpa": {"seconds": 9.0, "extrapolated": True},
    }
    row = {"tokens": 65876, "frames": 512, "methods": whole}
    (tmp_path / "prefill-x.json").write_text(json.dumps({"settings": {"whole": True}, "rows": [row]}))
    assert rows(results.prefill()) == ["| 65,876 | 512 | 9.00 s\\* | - | 2.00 s | 500 ms | 4.50x | 60 GB |"]
    tower = {
        "frames": 128,
        "patches": 65536,
        "methods": {"A": {"seconds": 1.0, "peak_gb": 3.0}, "B": {"error": "none"}},
    }
    (tmp_path / "vision-x.json").write_text(json.dumps({"machine": {"device": "G"}, "tower": [tower]}))
    assert results.vision().startswith("`vision-x.json`: G.")
    assert rows(results.vision()) == ["| 128 | 65,536 | 1.00 s (3 GB) |"]
    score = {"score": {"accuracy": 0.975, "asked": 40}, "tokens": 8192, "ran": 0.384}
    given = [score | {"label": "dense", "target": None, "ran": 1.0}, score | {"label": "A", "target": 0.4}]
    (tmp_path / "eval-x.json").write_text(json.dumps({"rows": given, "runs": [{"versions": {"device": "F"}}]}))
    assert results.evaluation().startswith("`eval-x.json`: F; 40 questions a cell.")
    assert rows(results.evaluation()) == ["| dense | 97.5 (100%) |", "| A | 97.5 (38%) |"]


def test_tables_of_serving_say_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    plain = {"stage": "brief", "side": "plain", "whole": {"tokens": 131072, "seconds": 8.0}, "first": {"seconds": 9.0}}
    fast = {"stage": "brief", "side": "mmflex", "whole": {"tokens": 131072, "seconds": 2.0}}
    other = {"stage": "chunks", "side": "mmflex", "chunks": {"tokens": 131072, "seconds": 3.0}, "error": "E"}
    data = {"machine": {"device": "D", "vllm": "0.24.0"}, "sizes": {"budget": 32768}, "results": [fast, plain, other]}
    (tmp_path / "serving-x.json").write_text(json.dumps(data))
    assert results.serving().startswith("`serving-x.json`: vLLM 0.24.0, D.")
    assert rows(results.serving()) == [
        "| 128k tokens in one step (`brief`) | 8.00 s | 2.00 s | 0.25 |",
        "| the first request after the start (`brief`) | 9.00 s | - | - |",
        "| 128k tokens in steps of 32k (`chunks`) | - | 3.00 s | - |",
    ]
    ways = [("whole", 1.0, 0.9), ("own", 0.5, 0.7), ("carried", 0.75, 0.8), ("carried", 0.25, 0.6)]
    given = [{"task": "T", "spec": "S", "way": way, "overlap": a, "kept": b} for way, a, b in ways]
    (tmp_path / "chunks-x.json").write_text(json.dumps({"settings": {"tokens": 4096, "chunks": 4}, "rows": given}))
    assert rows(results.chunks()) == ["| T | `S` | 50.0% | 50.0% | 90.0% | 70.0% | 70.0% |"]


def test_tables_of_real_weights_say_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmflex.evaluation.real.report import Method, NeedleRow, Report, TextRow
    from mmflex.evaluation.real.score import Interval, Scores
    from mmflex.evaluation.report import Score

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    kl = Interval(0.0314, 0.02, 0.04)
    scores = Scores(21.0, 20.0, Interval(0.05, 0.04, 0.06), kl, kl, 0.9, 0.8, 0.2, 0.02, 0.1, 0.01, (0.2,) * 8, 99, 9)
    method = Method("a-shape", "A-shape", "AShape(local=1)", 0.3, False, 0.29, 0.1, 0.294, 0.0156, "cpu")
    needle = NeedleRow("passkey", "prose", 4096, method, Score(3, 4), Score(4, 4), Score(3, 4), 0, (Score(3, 4),))
    runs = ({"model": "M", "versions": {"device": "F"}},)
    Report((TextRow("prose", 4096, 3, method, scores, (21.0,)),), (needle,), (), runs).save(tmp_path / "real-x.json")
    assert results.real().startswith("`real-x.json`: M, F.\n\n*prose*, 4k tokens, 3 windows:")
    assert rows(results.real()) == [
        "| dense | - | 100% | - | 20.00 | - | - | - | - | - | - |",
        "| A-shape | `AShape(local=1)` | 29% | 1.6% | 21.00 | +5.0% (+4.0% to +6.0%) "
        "| 0.031 | 0.031 | 0.200 | 0.020 | 90.0% |",
        "| passkey | 4k | A-shape | `AShape(local=1)` | 29% | 75.0% of 4 | 100.0% of 4 | 75.0% of 4 |",
    ]


def test_the_table_of_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmflex.evaluation.real.report import Method, Report, TextRow
    from mmflex.evaluation.real.score import Interval, Scores

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.default() == ""
    kl = Interval(0.0314, 0.02, 0.04)
    scores = Scores(21.0, 20.0, Interval(0.05, 0.04, 0.06), kl, kl, 0.9, 0.8, 0.2, 0.02, 0.1, 0.01, (0.2,) * 8, 99, 9)
    found = []
    for label in ("A-shape", "default:high"):
        method = Method("x", label, "as given", None, False, 0.29, 0.1, 0.294, 0.0156, "cpu")
        found.append(TextRow("prose", 4096, 1, method, scores, (21.0,)))
    Report(tuple(found), (), (), ()).save(tmp_path / "real-x.json")
    assert rows(results.default()) == [
        "| `default:high` | prose | 4k | 1 | 29% | 1.6% | +5.0% (+4.0% to +6.0%) | 0.031 | 0.031 | 90.0% |"
    ]


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no table 'nothing': use one of attention"):
        markers.with_tables("<!-- table: nothing -->")


# ---- formulas, plots and built pages ---------------------------------------------------------------------------------


def test_formulas_become_mathml() -> None:
    """All of the pages, without a rest of LaTeX; rows and columns of aligned ones."""
    mathml = pytest.importorskip("docs.tools.mathml", reason="needs latex2mathml")
    formulas = [
        f for page in markers.pages() for f in re.findall(r"^\$\$\n(.*?)^\$\$$", page.read_text("utf-8"), re.M | re.S)
    ]
    assert len(formulas) > 15
    for formula in formulas:
        made = mathml.mathml(formula, display=True)
        assert made.startswith("<math")
        assert not re.search(r"\\\\|\\[a-z]|&amp;", made)
        if "aligned" in formula:
            assert made.count("<mtr>") == formula.count("\\\\\n") + 1
            assert made.count("<mtd>") == formula.count("&") + made.count("<mtr>")
    assert "<mi>columns</mi>" in mathml.mathml(r"\mathrm{columns}")
    with pytest.raises(ValueError, match="not converted"):
        mathml.mathml(r"\begin{aligned}a & \unknowncommand b\end{aligned}")


def test_plots_are_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name in ("attention_times", "prefill_times", "prefill_memory"):
        made = plots.PLOTS[name]()
        assert made.startswith("```{raw} html\n<figure")
        assert "\n\n" not in made
        assert made == plots.PLOTS[name]()
    assert "VerticalSlash()" in plots.PLOTS["attention_times"]()
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert {make() for make in plots.PLOTS.values()} == {""}
    methods = {"sdpa": {"seconds": 9.0, "vision_s": 4.0}, "mmflex": {"seconds": 2.0, "vision_s": 0.5}, "fa2": {}}
    row = {"tokens": 65876, "methods": methods}
    (tmp_path / "prefill-x.json").write_text(json.dumps({"settings": {"whole": True}, "rows": [row]}))
    assert "vision tower" in plots.stages()
    assert "65,876" in plots.stages()
    text = {"scores": {"excess": {"value": 0.031}}, "method": {"label": "Some method", "ran": 0.3}}
    (tmp_path / "real-x.json").write_text(json.dumps({"texts": [text]}))
    assert "Some method" in plots.quality()


def test_a_page_that_needs_a_network_or_shows_latex_is_found() -> None:
    built = pytest.importorskip("docs.tools.built", reason="needs latex2mathml")
    good = (
        '<p>a <code>\\begin{x}</code> <svg><text>$$</text></svg> C:\\ no</p><a href="https://x.y">x</a>'
        '<link rel="canonical" href="https://x.y">'
        '<div class="table-wrapper docutils"><table class="docutils"></table></div>'
    )
    assert built.problems(good) == []
    bad = (
        r"<p>\[q \ge k\]</p><script src='https://cdn.x/mathjax.js'></script><p>$$ x $$</p>"
        "<img src='//x/y.png'><table class='docutils'></table>"
    )
    assert [wrong.split(":")[0] for wrong in built.problems(bad)] == [
        "raw LaTeX", "loads https", "raw LaTeX", "loads //x/y.png", "a table that cannot be scrolled"
    ]  # fmt: skip


@pytest.mark.skipif(browser.found() is None, reason="needs a Chromium")
def test_a_page_that_looks_wrong_is_found(tmp_path: Path) -> None:
    """On every screen on which it does; what can be scrolled may be wide."""
    wide = "<table><tr><td style='min-width: 700px'>wide</td></tr></table>"
    bad = f"<img src='no.png'><div style='overflow: hidden'>{wide}</div><script>throw new Error('no')</script>"
    for name, inside in (("good", f"<div style='overflow-x: auto'>{wide}</div>"), ("bad", bad)):
        (tmp_path / f"{name}.html").write_text(f"<!doctype html><article>{inside}</article>")
    with browser.Browser(browser.found()) as opened:
        assert browser.problems(opened, tmp_path / "good.html") == []
        found = browser.problems(opened, tmp_path / "bad.html", tmp_path)
    narrow = {line for line in found if line.startswith("400 pixels: clipped: t")}
    assert len(narrow) == 4  # table, tbody, tr and td
    for width in browser.WIDTHS:
        said = [line.removeprefix(f"{width} pixels: ") for line in found if line.startswith(str(width))]
        assert said[0].startswith("a picture that does not load: file://")
        assert {line.split("\n")[0] for line in said} >= {"console: Error: no"}
        assert (tmp_path / f"{tmp_path.name}-bad-{width}-dark.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_in_the_readme_is_of_the_results() -> None:
    shown = (ROOT / "docs" / "pictures" / "stages.svg").read_text("utf-8")
    for row in json.loads((ROOT / "benchmarks" / "results" / "prefill-vision-h200.json").read_text("utf-8"))["rows"]:
        assert f"{row['tokens']:,}" in shown, "renew it: python -m docs.tools.plots"
