"""Evaluations side by side on one device, each in a process of its own with a limit, until a time is over.

    python -m benchmarks.stages v-niah --out build/out --seconds 150
    python -m benchmarks.stages mm-niah --out build/out --seconds 150
    python -m benchmarks.stages real --files build/real --out build/out --seconds 400

Evaluations of small models wait for the host (planning, compiling kernels) more than for the GPU, so some run at once.
*real*: what SmolLM2-135M loses on texts and needles (`benchmarks.real`), first the searches, then a process for each
text and length. *v-niah*, *mm-niah*: the methods of ``mmflex eval`` on 32k tokens, a process for each. Stages
start in the order of the lists below, which is that of their worth; what runs when the time is over is ended. Reports
are written a cell at a time and put together in OUT/NAME.json as they come; the end of every stage's output is in
OUT/NAME.log. A stage of *real* that is cut off leaves what it has measured in FILES/progress.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmflex.evaluation import Report as NeedleReport
from mmflex.evaluation.real import Report as RealReport

RESULTS = Path(__file__).parent / "results"


@dataclass
class Stage:
    """A command that writes a report.

    Attributes:
        name: of the stage. command: arguments of Python. limit: seconds that it may take.
        first: nothing else runs beside it, and nothing after it unless it is done.
    """

    name: str
    command: list[str]
    limit: float
    first: bool = False
    process: Any = None
    started: float = 0.0
    state: str = "not begun"
    seconds: float = field(default=0.0)


# ---- what is run -----------------------------------------------------------------------------------------------------

SEARCHES = ("outputs=0.3", "answers=0.36", "outputs=0.5")
TEXTS = ("prose", "code", "docs")


def real_stages(a: argparse.Namespace, part: Path) -> list[Stage]:
    """The searches; needles at 4k; 4k at the default's density and at 0.5; needles at 6k and 2k; 4k and 8k at 0.3."""
    of_all = ["--files", str(a.files), "--sample", str(a.sample), *(["--gguf", str(a.gguf)] if a.gguf else [])]
    common = ["-m", "benchmarks.real", "run", *of_all, "--backend", a.backend]
    tasks, prompts = "passkey,multikey", str(a.prompts)
    asked = ["--windows", "1", "--tasks", tasks, "--prompts", prompts, "--given", "default", *a.given]
    asked += ["--search", "answers=0.36", "--methods", "block-peaks,xattention", "--densities", "0.36"]

    def stage(name: str, limit: float, kinds: str, tokens: int, *more: str) -> Stage:
        where = ["--kinds", kinds, "--lengths", str(tokens), "--json", str(part / f"{name}.json")]
        return Stage(name, [*common, *where, *more], limit)

    short, middle, longer, longest = a.lengths
    searches = ["-m", "benchmarks.real", "search", *of_all, "--search", *SEARCHES]
    found = [Stage("search", searches, 150, first=True)]
    at_default = ["--given", "default", "--methods", "block-peaks,xattention,prism,minference", "--densities", "0.4"]
    at_half = ["--search", "outputs=0.5", "--methods", "block-peaks,xattention,prism", "--densities", "0.5"]
    for tokens, limit in ((middle, 400), (longer, 400), (short, 200)):
        found += [stage(f"needles-{kind}-{tokens}", limit, kind, tokens, *asked) for kind in TEXTS]
        if tokens == middle:
            found += [
                stage(f"default-{kind}-{tokens}", 150, kind, tokens, "--windows", "3", *at_default) for kind in TEXTS
            ]
            found += [stage(f"half-{kind}-{tokens}", 150, kind, tokens, "--windows", "3", *at_half) for kind in TEXTS]
    at_third = ["--given", "default", "--search", "outputs=0.3", "--densities", "0.3"]
    at_third += ["--methods", "block-peaks,xattention,prism,flexprefill,minference"]
    text = [(kind, tokens) for tokens in (middle, longest) for kind in TEXTS]
    for kind, tokens in text:
        windows = ["--windows", "3" if tokens == middle else "2"]
        found.append(stage(f"third-{kind}-{tokens}", 200, kind, tokens, *windows, *at_third))
    tracking = ["--tasks", "tracking", "--prompts", prompts]  # by the dense model, and a method that costs little
    tracking += ["--windows", "1", "--methods", "a-shape", "--densities", "0.3"]
    found.append(stage("tracking", 60, "prose", short, *tracking))
    return found


METHODS = (
    "minference", "block-peaks", "xattention", "flexprefill", "tri-shape", "a-shape", "mminference-intra", "prism",
    "proxyattn", "flashprefill", "stem", "block-topk", "sf-fixed", "sf-strided",
)  # fmt: skip


def niah_stages(a: argparse.Namespace, part: Path) -> list[Stage]:
    """The searched config at the least share and the methods at all of them; the config at the others last."""
    common = ["-m", "mmflex", "eval", "--task", a.what, "--lengths", str(a.tokens), "--questions", "16"]
    common += ["--prompts", str(a.prompts), "--seeds", str(a.seeds)]
    common += ["--backend", a.niah_backend] if a.niah_backend else []

    def stage(name: str, methods: str, flops: tuple[float, ...]) -> Stage:
        config = ["--config", str(RESULTS / "config-niah-15.json")]  # which also runs as it is
        searched = config if methods.startswith("mminference") else []
        shares = ",".join(map(str, flops))
        more = ["--methods", methods, "--flops", shares, "--json", str(part / f"{name}.json"), *searched]
        return Stage(name, [*common, *more], a.seconds)

    shares = tuple(float(share) for share in a.flops.split(","))
    found = [stage(f"searched-{shares[0]}", "mminference", shares[:1])]
    found += [stage(name, name, shares) for name in METHODS]
    return found + [stage(f"searched-{share}", "mminference", (share,)) for share in shares[1:]]


# ---- running ---------------------------------------------------------------------------------------------------------


def run(stages: list[Stage], workers: int, end: float, part: Path, ended: Callable[[Stage], None]) -> None:
    """Stages in their order, so many at once, until the time ``end`` (monotonic seconds)."""
    waiting, running = list(stages), list[Stage]()
    try:
        while (waiting or running) and time.monotonic() < end:
            alone = any(stage.first for stage in running)
            while waiting and len(running) < workers and not alone:
                stage = waiting.pop(0)
                begin(stage, part)
                running.append(stage)
                alone = stage.first
            time.sleep(0.5)
            for stage in list(running):
                stage.seconds = time.monotonic() - stage.started
                code = stage.process.poll()
                if code is None and stage.seconds < stage.limit:
                    continue
                stage.state = "cut off" if code is None else "done" if code == 0 else f"failed ({code})"
                finish(stage)
                running.remove(stage)
                print(f"{stage.name}: {stage.state}, {stage.seconds:.0f} s", flush=True)
                ended(stage)
                if stage.first and stage.state != "done":
                    waiting.clear()  # they would each do its work
    finally:  # an error here or there leaves nothing running
        for stage in running:
            stage.state = "cut off"
            finish(stage)


def begin(stage: Stage, part: Path) -> None:
    """Starts a stage in a session of its own, so that what it starts can be ended with it."""
    log = (part / f"{stage.name}.log").open("w")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUNBUFFERED": "1"}
    stage.process = subprocess.Popen(
        [sys.executable, *stage.command], stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )
    stage.started, stage.state = time.monotonic(), "running"


def finish(stage: Stage) -> None:
    """Ends what a stage has left running."""
    if stage.process.poll() is None:
        os.killpg(stage.process.pid, signal.SIGKILL)
        stage.process.wait()


def gather(kind: Any, part: Path, stages: list[Stage], target: Path) -> Any:
    """One report of those that there are. What several processes have measured is there once: of the most windows."""
    report: Any = kind(()) if kind is NeedleReport else kind()
    for stage in stages:
        path = part / f"{stage.name}.json"
        if path.exists():
            report = report + kind.load(path)
    if kind is NeedleReport:
        rows = {(r.task, r.tokens, r.label, r.target, r.settings): r for r in reversed(report.rows)}
        report = NeedleReport(tuple(reversed(rows.values())), report.skipped, report.runs)
    else:
        most = sorted(report.texts, key=lambda r: r.windows)
        texts = {(r.text, r.tokens, r.method.label, r.method.target): r for r in most}
        report = RealReport(tuple(texts.values()), report.needles, report.skipped, report.runs)
    report.save(target)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "v-niah", "mm-niah"))
    parser.add_argument("--files", type=Path, default=Path("build/real"))
    parser.add_argument("--gguf", type=Path, help="as of benchmarks.real")
    parser.add_argument("--out", type=Path, required=True, help="where the report and the log go")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=16, help="of a task, text and length, or of a seed")
    parser.add_argument("--seeds", type=int, default=2, help="of prompts of the small models")
    parser.add_argument("--flops", default="0.12,0.16,0.24,0.33", help="of the small models, ascending")
    parser.add_argument("--tokens", type=int, default=32768, help="of a prompt of the small models")
    parser.add_argument("--lengths", default="2048,4096,6144,8192", help="of texts and needles, four")
    parser.add_argument("--sample", type=int, default=4096)
    parser.add_argument("--backend", default="masked")
    parser.add_argument("--niah-backend", default="", help="of the small models; default: theirs")
    parser.add_argument("--given", nargs="*", default=[], help="more specs for the needles")
    parser.add_argument("--only", default="", help="stages whose names begin so, separated by commas")
    a = parser.parse_args()
    end = time.monotonic() + a.seconds
    real = a.what == "real"
    a.lengths = [int(n) for n in a.lengths.split(",")]
    part = a.out / a.what
    part.mkdir(parents=True, exist_ok=True)
    stages = (real_stages if real else niah_stages)(a, part)
    stages = [stage for stage in stages if stage.name.startswith(tuple(a.only.split(",")))]
    kind, target = (RealReport if real else NeedleReport), a.out / f"{a.what}.json"

    run(stages, a.workers, end, part, lambda stage: gather(kind, part, stages, target))
    with (a.out / f"{a.what}.log").open("w") as log:
        for stage in stages:
            path = part / f"{stage.name}.log"
            text = path.read_text(errors="replace") if path.exists() else ""
            log.write(f"==== {stage.name}: {stage.state}, {stage.seconds:.0f} s\n{text[-3000:]}\n")
    print(gather(kind, part, stages, target))
    for stage in stages:
        print(f"{stage.name}: {stage.state}, {stage.seconds:.0f} s of {stage.limit:.0f}")


if __name__ == "__main__":
    main()
