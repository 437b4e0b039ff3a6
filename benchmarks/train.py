"""Train the evaluation's models from scratch, within a time limit, and measure how well they do.

    python -m benchmarks.train --task vision --out mmflex/evaluation/weights/vision \\
        --json benchmarks/results/train-vision.json
    python -m benchmarks.train --task vision --tiny --minutes 0.5 --out /tmp/tiny --device cpu     # to try it out

Prompts are drawn on the device. Training goes through the recipe's lengths, each until 90% of the answers are right,
for at most a share of the time (the recipe's ``patience``); a fifth of the steps repeat shorter prompts. The clock
includes compilation. At the limit (or at Ctrl-C) the weights are written in bfloat16, read back, and evaluated by
length and depth on prompts that training cannot have seen, for at most ``--evaluate`` minutes more. If half-way nothing
is learnt, training stops. ``--steps 0 --start FOLDER`` only evaluates.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes import RECIPES, start
from mmflex.evaluation import models, samples

STEP_TOKENS = 32_768
RATE, BETAS, DECAY, CLIP, WARM_UP = 6e-4, (0.9, 0.98), 0.05, 1.0, 200
CONSTANT, LAST_RATE = 0.6, 0.02
"""The learning rate is constant up to this share of the time, then falls linearly to this share of itself."""
GATE, REPLAY = 0.9, 0.2
"""Accuracy that opens the next length; share of shorter prompts."""
HOPELESS = 0.3
READ = 25
"""Steps between two looks at the numbers, which wait for the device."""
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Meter:
    """Sums on the device since the last look."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] += 1

    def read(self) -> dict[str, float]:
        """The means; one transfer. Empties the meter."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values())).tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        self.sums.clear()
        self.counts.clear()
        return means


def rate(share: float, step: int) -> float:
    """The learning rate at a share of the time."""
    fall = 1.0 if share < CONSTANT else 1 - (1 - LAST_RATE) * min(1.0, (share - CONSTANT) / (1 - CONSTANT))
    return RATE * fall * min(1.0, (step + 1) / WARM_UP)


def train(recipe: Any, args: argparse.Namespace, began: float, log: dict[str, Any]) -> None:
    """Train until the time is up; fills ``log["log"]`` and ``log["levels"]``."""
    model, device = recipe.model, torch.device(args.device)
    parameters = [p for p in (*model.parameters(), *recipe.extra) if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=device.type == "cuda")
    choose, meter, period = random.Random(args.seed), Meter(), Meter()
    budget = 60 * args.minutes
    stop = False

    def interrupted(*_: Any) -> None:
        nonlocal stop
        stop = True

    handlers = {name: signal.signal(name, interrupted) for name in (signal.SIGINT, signal.SIGTERM)}
    level, entered, last_line, last_save, seen, last_seen, step = args.level, time.monotonic(), 0.0, began, 0, 0, 0
    log["levels"].append({"tokens": recipe.lengths[level], "seconds": round(time.monotonic() - began, 1), "step": 0})
    while not stop and step < args.steps and (now := time.monotonic()) - began < budget:
        share = max((now - began) / budget, step / args.steps)
        chosen = choose.randrange(level) if level and choose.random() < REPLAY else level
        batch = max(1, args.step_tokens // recipe.lengths[chosen])
        sample = recipe.draw(chosen, batch, level)
        losses, right = recipe.losses(sample)
        total = sum(recipe.weights[name] * loss for name, loss in losses.items())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(share, step)
        optimizer.step()
        step, seen = step + 1, seen + batch * recipe.lengths[chosen]

        for name, loss in losses.items():
            period.add(name, loss)
        period.add("gradient", norm)
        if chosen == level:
            meter.add("right", right.float().mean())
            for kind in dict.fromkeys(recipe.kinds_of(sample)):
                at = [j for j, other in enumerate(recipe.kinds_of(sample)) if other == kind]
                period.add(f"right {kind}", sum(right[:, j].float().mean() for j in at) / len(at))
        if step % READ and step != 1:
            continue
        now, right_now = time.monotonic(), meter.read().get("right", 0.0)
        if step == 1:  # the layers are compiled now
            entered = now
        if step % READ == 0 and share > 0.5 and right_now < HOPELESS and not args.tiny:
            print(f"step {step}: {right_now:.3f} right half-way, which is not worth the other half", flush=True)
            stop = True
        if now - last_line >= args.every or step == 1:
            numbers = {name: round(value, 4) for name, value in period.read().items()}
            if not all(math.isfinite(value) for value in numbers.values()):
                raise SystemExit(f"step {step}: a loss is not finite: {numbers}")
            line = {
                "step": step,
                "seconds": round(now - began, 1),
                "level": recipe.lengths[level],
                "tokens": seen,
                "tokens_per_second": round((seen - last_seen) / (now - last_line)) if last_line else 0,
                "rate": round(rate(share, step) / RATE, 3),
                "right": round(right_now, 4),
                **numbers,
            }
            log["log"].append(line)
            last_line, last_seen = now, seen
            told = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            print(
                f"step {step:5d} {now - began:6.1f} s {seen / 1e6:6.1f}M tokens, {recipe.lengths[level]:5d} long, "
                f"right {right_now:.3f} | {told}",
                flush=True,
            )
        if step % READ == 0 and level + 1 < len(recipe.lengths):
            late = now - entered > recipe.patience * budget
            if right_now >= args.gate or late:
                level, entered = level + 1, now
                log["levels"].append({"tokens": recipe.lengths[level], "seconds": round(now - began, 1), "step": step})
                print(f"  -> {recipe.lengths[level]} tokens{' (late)' if late else ''}", flush=True)
        if now - last_save > 60:
            models.save(model, recipe.kind, args.out)
            last_save = now
    for name, handler in handlers.items():
        signal.signal(name, handler)
    log.update(steps=step, tokens=seen, seconds=round(time.monotonic() - began, 1), interrupted=stop)


@torch.no_grad()
def right_answers(model: Any, prompts: samples.Prompts) -> torch.Tensor:
    """Which questions the model answers with the right token, bool ``[B, Q]``."""
    length = prompts.inputs["input_ids"].shape[1]
    keep = length - int(prompts.rows.min())
    logits = model(**prompts.inputs, logits_to_keep=keep).logits
    rows = prompts.rows - (length - keep)
    return logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1])).argmax(-1) == prompts.answers


def evaluate(model: Any, tasks: tuple[str, ...], lengths: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy by task, length, depth and kind of question; stops at ``--evaluate`` minutes."""
    device, began = torch.device(args.device), time.monotonic()
    found: list[dict[str, Any]] = []
    for tokens in lengths:
        for task in tasks:
            row: dict[str, list[bool]] = defaultdict(list)
            for depth in DEPTHS:
                if time.monotonic() - began > 60 * args.evaluate:
                    print(f"evaluation stopped after {args.evaluate} minutes, before {task} at {tokens} tokens")
                    return found
                cells: dict[str, list[bool]] = defaultdict(list)
                batch = max(1, min(4, args.prompts, 65536 // tokens))
                for part in range(math.ceil(args.prompts / batch)):
                    seed = 1_000_000 + 10_000 * args.seed + 1000 * int(4 * depth) + part
                    drawn = samples.prompts(
                        task, tokens, batch=batch, questions=6, seed=seed, depth=depth, device=device
                    )
                    right = right_answers(model, drawn).tolist()
                    for kinds, answers in zip(drawn.kinds, right, strict=True):
                        for kind, answer in zip(kinds, answers, strict=True):
                            cells[kind].append(answer)
                for kind, answers in cells.items():
                    row[kind] += answers
                    found.append(
                        {
                            "task": task,
                            "tokens": tokens,
                            "depth": depth,
                            "kind": kind,
                            "right": sum(answers),
                            "questions": len(answers),
                        }
                    )
            told = ", ".join(f"{kind} {sum(a) / len(a):.3f}" for kind, a in row.items())
            everything = [answer for answers in row.values() for answer in answers]
            print(
                f"{task:9s} {tokens:6d} tokens: {sum(everything) / len(everything):.4f} of {len(everything)} ({told})",
                flush=True,
            )
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy by task and length."""
    right: dict[tuple[str, int], int] = defaultdict(int)
    asked: dict[tuple[str, int], int] = defaultdict(int)
    for cell in found:
        key = (cell["task"], cell["tokens"])
        right[key] += cell["right"]
        asked[key] += cell["questions"]
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (task, tokens), number in asked.items():
        table[task][str(tokens)] = round(right[task, tokens] / number, 4)
    return dict(table)


def write(log: dict[str, Any], path: str | None) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(log, indent=1) + "\n")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(RECIPES), default="vision")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, with compilation")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after so many, if the time is not up before")
    parser.add_argument(
        "--evaluate", type=float, default=2.0, help="minutes of evaluation at most, behind the training"
    )
    parser.add_argument("--out", required=True, help="folder for the weights")
    parser.add_argument("--json", help="file for the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small model and short prompts, to try it out")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the layers (on CUDA)")
    parser.add_argument("--start", help="folder with weights to go on from")
    parser.add_argument("--level", type=int, default=0, help="length to begin at, 0 the shortest")
    parser.add_argument("--gate", type=float, default=GATE, help="accuracy that opens the next length")
    parser.add_argument("--step-tokens", type=int, help="tokens of a step")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a length and depth in the evaluation")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines")
    args = parser.parse_args(argv)
    args.step_tokens = args.step_tokens or (1024 if args.tiny else STEP_TOKENS)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, save, evaluate; returns the log."""
    args, began = options(argv), time.monotonic()
    recipe = start(args.task, args.device, args.seed, tiny=args.tiny, compiled=args.compile, weights=args.start)
    log: dict[str, Any] = {
        "task": args.task,
        "arguments": vars(args),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "parameters": sum(p.numel() for p in recipe.model.parameters()),
        "levels": [],
        "log": [],
    }
    try:
        train(recipe, args, began, log)
    finally:
        log["bytes"] = models.save(recipe.model, args.task, args.out)
        write(log, args.json)
    print(
        f"{log['steps']} steps, {log['tokens'] / 1e6:.1f}M tokens, {log['seconds']} s, {log['bytes']} bytes", flush=True
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = models.restore(args.task, args.out, device=args.device, dtype=dtype)
    log["evaluation"] = evaluate(model, recipe.tasks, [256, 512] if args.tiny else list(LENGTHS), args)
    log["summary"] = summary(log["evaluation"])
    write(log, args.json)
    return log


if __name__ == "__main__":
    main()
