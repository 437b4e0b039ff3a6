"""Tables of ``benchmarks/results/*.json`` in Markdown: what a file lacks is "-", what it has besides is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

DENSE = {
    "fa2": "FlashAttention-2",
    "cudnn": "cuDNN",
    "fa4": "flash-attn-4",
    "fa4 as given": "flash-attn-4",
    "sdpa": "SDPA",
}
"""Dense kernels, as people call them."""


_NUMBER = re.compile(r"[+-]?\d|-$")


def load(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name, contents) of the result files of a name."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        data = json.loads(path.read_text("utf-8"))
        found.append((path.name, data if isinstance(data, dict) else {"rows": data}))
    return found


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]], right: bool = True) -> str:
    """A table; columns of numbers are aligned right, if asked, but for the first."""
    head, body = list(columns), [list(row) for row in rows]
    numbers = [right and all(_NUMBER.match(cell) for cell in cells) for cells in zip(*body, strict=True)]
    sides = ["---:" if number else ":---" for number in numbers or [False] * len(head)]
    lines = [head, [":---", *sides[1:]], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def where(data: dict[str, Any]) -> str:
    """Device and versions, wherever a file keeps them."""
    run = (data.get("runs") or [{}])[-1]
    versions = run.get("versions") if isinstance(run, dict) else None
    machine = data.get("machine")
    machine = {"device": machine} if isinstance(machine, str) else machine
    facts = data | {k: v for d in (machine, versions) if isinstance(d, dict) for k, v in d.items()}
    names = ("device", "torch", "flash-attn-4", "triton", "transformers", "mmflex")
    return ", ".join(str(facts[n]) if n == "device" else f"{n} {facts[n]}" for n in names if facts.get(n))


def tokens(n: Any) -> str:
    """131072 -> 128k."""
    if not isinstance(n, int):
        return "-"
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return f"{n:,}"


def seconds(value: Any) -> str:
    """Three figures, in the unit that fits."""
    if not isinstance(value, (int, float)):
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{_figures(value / unit)} {name}"
    return f"{_figures(value / 1e-6)} us"


def _figures(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _times(value: Any) -> str:
    return f"{_figures(value)}x" if isinstance(value, (int, float)) else "-"


def _milli(value: Any) -> str:
    return seconds(value / 1e3) if isinstance(value, (int, float)) else "-"


# ---- the tables ------------------------------------------------------------------------------------------------------


def attention() -> str:
    """One layer's attention on a GPU: a table for each file, the longest prompts and the greatest gains first."""

    def gain(row: dict[str, Any]) -> float:
        return row["S"] if isinstance(row.get("S"), (int, float)) else 0.0

    columns = ("tokens", "pattern", "kernels", "best dense", "mmflex", "faster", "density", "planning", "rate", "error")
    parts = []
    files = sorted(load("attention*.json"), key=lambda file: -max(map(gain, file[1].get("rows", [])), default=0.0))
    for name, data in files:
        rows = []
        for row in sorted(data.get("rows", []), key=lambda r: (r.get("backend", ""), -r.get("tokens", 0), -gain(r))):
            dense = {k: v for k, v in row.get("dense_ms", {}).items() if isinstance(v, (int, float))}
            best = min(dense, key=dense.__getitem__) if dense else ""
            ran = "dense" if row.get("runs") == "dense" else "sparse"
            kernels = f"auto,\N{NO-BREAK SPACE}{ran}" if row.get("backend") == "auto" else row.get("backend", "-")
            rows.append(
                (
                    tokens(row.get("tokens")),
                    f"`{row.get('spec', row.get('pattern', '-'))}`",
                    kernels,
                    f"{_milli(dense[best])} ({DENSE.get(best, best)})" if best else "-",
                    _milli(row.get("total_ms")),
                    _times(row.get("S")),
                    _number(row.get("density"), ".1%"),
                    _milli(row.get("plan_ms")) if ran != "dense" else "-",
                    _number(row.get("rate"), ".2f"),
                    _number(row.get("error"), ".1e"),
                )
            )
        parts.append(f"`{name}`: {where(data)}.\n\n{markdown(columns, rows)}")
    return "\n\n".join(parts)


def prefill() -> str:
    """Time to the first token of a model."""
    parts = []
    for name, data in load("prefill*.json"):
        rows, settings = data.get("rows", []), data.get("settings", {})
        dense = [m for m in ("sdpa", "fa2", "cudnn", "fa4") if any(m in row.get("methods", {}) for row in rows)]
        names = [DENSE[m] for m in dense]
        if settings.get("whole"):
            columns = ["tokens", "frames", "SDPA", "its tower", "mmflex", "its tower", "vs SDPA", "peak memory"]
            table = markdown(columns, (_whole_prefill_row(row) for row in rows))
        else:
            columns = ["tokens", *names, "mmflex", *(f"vs {n}" for n in names), "peak memory"]
            table = markdown(columns, (_prefill_row(row, dense) for row in rows))
        about = [f"`{name}`: {where(data)}."]
        if "model" in settings:
            about.append(f"{settings['model']}, {settings.get('dtype', '-')}.")
        if "note" in data:
            about.append(str(data["note"]))
        stars = "\n\n\\* counted up to all layers from fewer." if "*" in table else ""
        parts.append(f"{' '.join(about)}\n\n{table}{stars}")
    return "\n\n".join(parts)


def _prefill_row(row: dict[str, Any], dense: list[str]) -> list[str]:
    found = {m: r for m, r in row.get("methods", {}).items() if isinstance(r.get("seconds"), (int, float))}
    own = found.get("mmflex", {})
    taken, faster = [], []
    for name in dense:
        other = found.get(name, {})
        taken.append(seconds(other.get("seconds")) + ("\\*" if other.get("extrapolated") else ""))
        faster.append(_times(other["seconds"] / own["seconds"] if own and other else None))
    peak = f"{own['peak_gb']:.0f} GB" if "peak_gb" in own else "-"
    return [tokens(row.get("tokens")), *taken, seconds(own.get("seconds")), *faster, peak]


def _whole_prefill_row(row: dict[str, Any]) -> list[str]:
    """A row with the vision tower in it."""
    found = {m: r for m, r in row.get("methods", {}).items() if isinstance(r.get("seconds"), (int, float))}
    cells = []
    for name in ("sdpa", "mmflex"):
        result = found.get(name, {})
        star = "\\*" if result.get("extrapolated") else ""
        cells += [seconds(result.get("seconds")) + star, seconds(result.get("vision_s"))]
    faster = (
        found["sdpa"]["seconds"] / found["mmflex"]["seconds"] if len(found.keys() & {"sdpa", "mmflex"}) == 2 else None
    )
    peak = f"{found['mmflex']['peak_gb']:.0f} GB" if "peak_gb" in found.get("mmflex", {}) else "-"
    return [tokens(row.get("tokens")), str(row.get("frames", "-")), *cells, _times(faster), peak]


def vision() -> str:
    """The vision tower alone."""
    parts = []
    for name, data in load("vision*.json"):
        rows = data.get("tower", [])
        if not rows:
            continue
        methods = list(dict.fromkeys(method for row in rows for method in row.get("methods", {})))
        methods = [method for method in methods if any("seconds" in row["methods"].get(method, {}) for row in rows)]
        lines = []
        for row in rows:
            cells = []
            for method in methods:
                result = row["methods"].get(method, {})
                peak = f" ({result['peak_gb']:.0f} GB)" if isinstance(result.get("peak_gb"), (int, float)) else ""
                cells.append(seconds(result.get("seconds")) + peak)
            lines.append([str(row.get("frames", "-")), f"{row.get('patches', 0):,}", *cells])
        parts.append(f"`{name}`: {where(data)}.\n\n{markdown(['frames', 'patches', *methods], lines)}")
    return "\n\n".join(parts)


def cpu() -> str:
    """One layer's attention on a CPU."""
    columns = ("input", "density", "SDPA", "mmflex", "faster", "at most", "planning", "first call", "error")
    parts = []
    for name, data in load("cpu*.json"):
        s = data.get("settings", {})
        shape = (
            f"{tokens(s.get('tokens'))} tokens, {s.get('heads', '-')} query / {s.get('kv_heads', '-')} KV heads of "
            f"{s.get('dim', '-')}, {s.get('dtype', '-')}, {s.get('threads', '-')} threads, "
            f"`VerticalSlash({s.get('vertical', '-')}, {s.get('slash', '-')})`"
        )
        rows = [
            (
                str(row.get("input", "-")),
                _number(row.get("density"), ".1%"),
                seconds(row.get("dense_s")),
                seconds(row.get("mmflex_s")),
                _times(row.get("speedup")),
                _times(row.get("ideal_speedup")),
                seconds(row.get("plan_s")),
                seconds(row.get("first_call_s")),
                _number(row.get("relative_error"), ".1e"),
            )
            for row in data.get("rows", [])
        ]
        parts.append(f"`{name}`: {where(data)}. {shape}.\n\n{markdown(columns, rows)}")
    return "\n\n".join(parts)


def check() -> str:
    """What `mmflex check` found: how many checks of each kind passed, and the largest errors."""
    from mmflex.selfcheck.report import summary

    parts = []
    columns = ("checks", "backend", "right", "largest error", "of its bound", "largest log-sum-exp error")
    for name, data in load("check*.json"):
        rows = [
            (
                kind.what,
                kind.backend,
                f"{kind.ran - kind.wrong} of {kind.ran}",
                _number(kind.error, ".1e"),
                _number(kind.share, ".0%"),
                _number(kind.lse_error, ".1e"),
            )
            for kind in summary(data.get("rows", []))
        ]
        if rows:
            about = f"{where(data)}, sources {data['source'][:12]}, {seconds(data['seconds'])} on {data['cores']} cores"
            parts.append(f"`{name}`: {about}.\n\n{markdown(columns, rows)}")
    return "\n\n".join(parts)


def evaluation() -> str:
    """Answers of methods at matched FLOPs: a table for each file, a column for each length and target."""
    parts = []
    for name, data in load("eval-*.json"):
        rows = data.get("rows", [])
        shares = sorted({(row["tokens"], row["target"]) for row in rows if row["target"] is not None})
        columns = shares or [(n, None) for n in sorted({row["tokens"] for row in rows})]
        head = [tokens(n) if share is None else f"{tokens(n)}, {share:.0%}" for n, share in columns]
        found = {(row["label"], row["tokens"], row["target"]): row for row in rows}
        lines = []
        for label in dict.fromkeys(row["label"] for row in rows):
            cells = [found.get((label, n, share)) or found.get((label, n, None)) for n, share in columns]
            lines.append([label, *(_answers(cell) for cell in cells)])
        runs = data.get("runs") or [{}]
        asked = max((row["score"]["asked"] for row in rows), default=0)
        about = f"`{name}`: {where(runs[0].get('versions', {}))}; {asked} questions a cell."
        parts.append(f"{about}\n\n{markdown(['method', *head], lines)}")
    return "\n\n".join(parts)


def choice() -> str:
    """Right answers at 8k tokens, by method, at shares of the dense attention FLOPs; the best first."""
    tasks: dict[str, dict[tuple[str, Any], dict[str, Any]]] = {}
    for _, data in load("eval-*.json"):
        for row in data.get("rows", []):
            if row.get("tokens") == 8192 and not row.get("over"):
                cells = tasks.setdefault(row["task"], {})
                known = cells.get((row["label"], row["target"]))
                if known is None or known["score"]["asked"] < row["score"]["asked"]:
                    cells[row["label"], row["target"]] = row
    columns = [(task, share) for task in tasks for share in (0.25, 0.4)]
    labels = dict.fromkeys(label for cells in tasks.values() for label, _ in cells)
    lines = []
    for label in labels:
        found = [tasks[t].get((label, share)) or tasks[t].get((label, None)) for t, share in columns]
        best = sum(cell["score"]["accuracy"] for cell in found if cell)
        if any(found):  # others were brought to other shares
            lines.append((best, [label, *(_answers(cell) for cell in found)]))
    if not lines:
        return ""
    head = [f"{task.upper()}, {share:.0%}" for task, share in columns]
    return markdown(["method", *head], [line for _, line in sorted(lines, key=lambda line: -line[0])])


def real() -> str:
    """A model that was not trained here: predictions and answers, a table for each file, text and length."""
    columns = ("method", "setting", "ran", "estimates", "perplexity", "over dense", "KL, all rows", "KL, last rows",
               "rows 0-15 of a tile", "other rows", "first choice as dense")  # fmt: skip
    parts = []
    for name, data in load("real-*.json"):
        run = (data.get("runs") or [{}])[-1]
        parts.append(f"`{name}`: {run.get('model', '-')}, {where(run.get('versions', {}))}.")
        texts = data.get("texts", [])
        for text, length, windows in dict.fromkeys((row["text"], row["tokens"], row["windows"]) for row in texts):
            rows = [row for row in texts if (row["text"], row["tokens"], row["windows"]) == (text, length, windows)]
            dense = rows[0]["scores"]["dense"]
            lines = [["dense", "-", "100%", "-", f"{dense:.2f}", *["-"] * 6], *map(_predictions, rows)]
            about = f"*{text}*, {tokens(length)} tokens, {windows} window{'s' * (windows != 1)}:"
            parts.append(f"{about}\n\n{markdown(columns, lines)}")
        if data.get("needles"):
            head = ("task", "tokens", "method", "setting", "ran", "right", "dense", "of dense's right")
            parts.append(f"Needles:\n\n{markdown(head, map(_needles, data['needles']))}")
    return "\n\n".join(parts)


def default() -> str:
    """What the default spec costs in predictions: a row for each quality, text and length."""
    columns = ("spec", "text", "tokens", "windows", "ran", "estimates", "perplexity, over dense", "KL, all rows",
               "KL, last rows", "first choice as dense")  # fmt: skip
    lines = []
    for _, data in load("real-*.json"):
        for row in data.get("texts", []):
            if row["method"]["label"].startswith("default"):
                _, _, ran, estimates, _, over, kl, kl_last, _, _, same = _predictions(row)
                name, length = f"`{row['method']['label']}`", tokens(row["tokens"])
                lines.append([name, row["text"], length, str(row["windows"]), ran, estimates, over, kl, kl_last, same])
    return markdown(columns, lines) if lines else ""


def _predictions(row: dict[str, Any]) -> list[str]:
    s, m = row["scores"], row["method"]
    low, high = (_number(s["excess"][end], "+.1%") for end in ("low", "high"))
    return [
        m["label"], f"`{m['setting']}`", _number(m["ran"], ".0%"), _number(m["estimates"], ".1%"),
        _number(s["perplexity"], ".2f"), f"{_number(s['excess']['value'], '+.1%')} ({low} to {high})",
        _number(s["kl"]["value"], ".3f"), _number(s["kl_last"]["value"], ".3f"), _number(s["kl_first"], ".3f"),
        _number(s["kl_rest"], ".3f"), _number(s["top1"], ".1%"),
    ]  # fmt: skip


def _needles(row: dict[str, Any]) -> list[str]:
    m = row["method"]
    shares = [_share(row[name]) for name in ("score", "dense", "kept")]
    return [row["task"], tokens(row["tokens"]), m["label"], f"`{m['setting']}`", _number(m["ran"], ".0%"), *shares]


def _share(score: dict[str, Any]) -> str:
    return f"{score['accuracy']:.1%} of {score['asked']}" if score["asked"] else "-"


def _answers(row: dict[str, Any] | None) -> str:
    """Accuracy, and what was computed of dense attention."""
    return "-" if row is None else f"{100 * row['score']['accuracy']:.1f} ({row['ran']:.0%})"


def chunks() -> str:
    """A prompt in chunks beside a whole one."""
    columns = (
        "prompts",
        "spec",
        "overlap, by own queries",
        "with those before",
        "mass, whole",
        "own",
        "with those before",
    )
    parts = []
    for name, data in load("chunks*.json"):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in data.get("rows", []):
            groups.setdefault((row["task"], row["spec"]), []).append(row)
        lines = []
        for (task, spec), rows in groups.items():

            def mean(way: str, field: str, rows: list[dict[str, Any]] = rows) -> str:
                values = [row[field] for row in rows if row["way"] == way]
                return f"{sum(values) / len(values):.1%}" if values else "-"

            cells = [mean("own", "overlap"), mean("carried", "overlap")]
            lines.append([task, f"`{spec}`", *cells, *(mean(way, "kept") for way in ("whole", "own", "carried"))])
        if lines:
            settings = data.get("settings", {})
            about = f"{tokens(settings.get('tokens'))} tokens in {settings.get('chunks', '-')} chunks, means over them"
            parts.append(f"`{name}`: {where(data)}; {about}.\n\n{markdown(columns, lines)}")
    return "\n\n".join(parts)


SERVED = {
    "whole": "{tokens} tokens in one step",
    "chunks": "{tokens} tokens in steps of {budget}",
    "double": "{tokens} tokens in steps of {budget}",
    "long": "{tokens} tokens in steps of {budget}",
    "first": "the first request after the start",
    "shorts": "{prompts} prompts of {tokens} tokens at once",
    "video": "Qwen2.5-VL, a video of 128 frames",
    "server": "{tokens} tokens, by the server, in steps of {budget}",
}
"""What is measured in `benchmarks.serving` -> how it is called."""


def serving() -> str:
    """Time to the first token of plain vLLM and of mmflex in it."""
    parts = []
    for name, data in load("serving*.json"):
        found = {(r["stage"], r["side"]): r for r in data.get("results", [])}
        lines = []
        for stage in dict.fromkeys(stage for stage, _ in found):
            sides = [found.get((stage, side), {}) for side in ("plain", "mmflex")]
            for key, label in SERVED.items():
                given = [side[key] for side in sides if key in side]
                if not given:
                    continue
                counts = {"tokens": tokens(given[0].get("tokens")), "prompts": given[0].get("prompts")}
                label = label.format(**counts, budget=tokens(data.get("sizes", {}).get("budget")))
                plain, fast = (side.get(key, {}).get("seconds") for side in sides)
                ratio = f"{fast / plain:.2f}" if plain and fast else "-"
                lines.append([f"{label} (`{stage}`)", seconds(plain), seconds(fast), ratio])
        if lines:
            columns = ("time to the first token", "plain vLLM", "mmflex", "ratio")
            version = data["machine"].get("vllm", "-")
            parts.append(f"`{name}`: vLLM {version}, {where(data)}.\n\n{markdown(columns, lines)}")
    return "\n\n".join(parts)


def distributed() -> str:
    """One prompt on one GPU, on several, and with tensor parallelism over the same."""
    parts = []
    for name, data in load("distributed*.json"):
        steps, lines = data["steps"], []
        lengths = sorted({int(step.rpartition(", ")[2]) for step in steps if step.startswith("ranks, ")})
        for n in lengths:
            one, ranks, tensor = (steps.get(f"{step}, {n}") or {} for step in ("one GPU", "ranks", "tensor parallel"))
            waits = sum(ranks.get("waits_ms_per_layer", {}).values())
            cells = [tokens(n), seconds(one.get("seconds"))]
            for found in (ranks, tensor):
                share = f" ({found['seconds'] / one['seconds']:.2f})" if found and one else ""
                cells.append(seconds(found.get("seconds")) + share)
            peaks = [f"{found['peak_gb']:.0f}" if found else "-" for found in (one, ranks, tensor)]
            lines.append([*cells, " / ".join(peaks), f"{waits:.1f} ms"])
        count = data["settings"]["ranks"]
        columns = ("tokens", "one GPU", f"{count} ranks (share)", "tensor parallel (share)", "peak GB", "waits a layer")
        parts.append(f"`{name}`: {where(data)}, {count} GPUs.\n\n{markdown(columns, lines)}")
        steps = {step.removeprefix("decoding, "): one for step, one in steps.items() if step.startswith("decoding, ")}
        if steps:
            times = ", ".join(f"{step} {one['ms']:.1f} ms" for step, one in steps.items())
            parts.append(f"A token, decoded behind {tokens(next(iter(steps.values()))['tokens'])} tokens: {times}.")
    return "\n\n".join(parts)


def intercept() -> str:
    """`mmflex.intercept` beside `mmflex.patch` on the same weights."""
    parts = []
    for name, data in load("intercept*.json"):
        heads = {
            "plain": "model as it is",
            "patch": "`patch`",
            "unfused": "`patch`, `fuse=False`",
            "intercept": "`intercept`",
        }
        ran = [method for method in heads if any(f"{method}_s" in row for row in data["prefill"])]
        lines = []
        for row in data["prefill"]:
            lines.append([tokens(row["tokens"]), *(seconds(row.get(f"{method}_s")) for method in ran)])
        columns = ["tokens", *(heads[method] for method in ran)]
        parts.append(f"`{name}`: {where(data)}.\n\n{markdown(columns, lines)}")
        for step in data.get("decode", []):
            parts.append(
                f"A decode step on {step['tokens']:,} tokens: {step['plain_ms']:.2f} ms as it is, "
                f"{step['intercept_ms']:.2f} in the block."
            )
    return "\n\n".join(parts)


def files() -> str:
    """Every file of results."""
    rows = [
        (f"`{name}`", where(data) or "-", str(sum(len(v) for v in data.values() if isinstance(v, list)) or "-"))
        for name, data in load("*.json")
    ]
    return markdown(("file", "measured on", "rows"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "attention": attention,
    "prefill": prefill,
    "vision": vision,
    "cpu": cpu,
    "check": check,
    "evaluation": evaluation,
    "choice": choice,
    "real": real,
    "chunks": chunks,
    "serving": serving,
    "distributed": distributed,
    "intercept": intercept,
    "default": default,
    "files": files,
}
