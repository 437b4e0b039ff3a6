"""The methods that are compared, and how each is brought to a share of the dense attention FLOPs.

A method is one ladder of settings or several, each from small to large. `largest` takes, by bisection on the density of
actual plans on a model's queries and keys, the largest setting of a ladder that stays within a target; `choose` takes
the ladder that then has the least output error, so that a baseline is not held back by one choice of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..ir.pattern import Pattern, Restricted, _Pair, find
from ..runtime.calls import TILE
from ..tuning.config import Config, Spec
from .trace import Measured, Trace

SEARCHED = "MMInference as searched"
"""What a searched config is called where it runs as it is."""

TEXT_RUN = 128
"""What stands for a frame where a prompt has none, in tokens."""


@dataclass(frozen=True)
class Setting:
    """A spec and its text for tables."""

    text: str
    spec: Spec | Config


@dataclass(frozen=True)
class Ladder:
    """``length`` settings, from small to large; ``at(i)`` is the i-th."""

    length: int
    at: Callable[[int], Setting]


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        name: on the command line. label: in tables and pictures.
        what: one line for people.
        ladders: what a prompt's layers see, a config -> ladders. Raises `Unavailable` where the method cannot run.
        prepare: the same -> the config that `ladders` takes: what is decided once, before any question is asked.
    """

    name: str
    label: str
    what: str
    ladders: Callable[[Trace, Config | None], Sequence[Ladder]]
    prepare: Callable[[Trace, Config | None], Config | None] = lambda trace, config: config


class Unavailable(ValueError):
    """Why a method is left out; the message is shown."""


# ---- the baselines -------------------------------------------------------------------------------------------------


def _of(name: str, count: int, **fields: Callable[[int], object]) -> Ladder:
    """A ladder of one pattern class, whose fields follow from the number of the setting."""

    def at(i: int) -> Setting:
        pattern = find(name)(**{field: value(i) for field, value in fields.items()})
        return Setting(str(pattern), pattern)

    return Ladder(count, at)


def _local(i: int) -> int:
    """A window of whole tiles: in between, the same blocks are computed."""
    return max(1, TILE * i)


def _tiles(trace: Trace) -> int:
    return -(-trace.tokens // TILE)


def _dense(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_of("Dense", 1)]


def _a_shape(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_of("AShape", _tiles(trace), sink=lambda i: 128, local=_local)]


def _tri_shape(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_of("TriShape", _tiles(trace), sink=lambda i: 128, local=_local, last=lambda i: 128)]


def _run(trace: Trace) -> int | str:
    """The stride of a segment: one frame, or `TEXT_RUN` tokens of text."""
    return "frame" if trace.frame else TEXT_RUN


def _sf_fixed(trace: Trace, config: Config | None) -> list[Ladder]:
    run = _run(trace)
    return [_of("StridedFixed", trace.frame or TEXT_RUN, stride=lambda i: run, first=lambda i: i + 1)]


def _sf_strided(trace: Trace, config: Config | None) -> list[Ladder]:
    """The stride stays one frame, which is what makes its lines meaningful; what grows is the local window."""
    lines = find("Strided")(_run(trace))

    def at(i: int) -> Setting:
        spec = lines | find("AShape")(0, TILE * i) if i else lines
        return Setting(str(spec), spec)

    return [Ladder(_tiles(trace), at)]


def _minference(trace: Trace, config: Config | None) -> list[Ladder]:
    """Vertical-slash for every head, with a quarter, half or three quarters of the budget in columns."""

    def ladder(share: float) -> Ladder:
        def columns(i: int) -> int:
            return round(TILE * (i + 1) * share)

        return _of("VerticalSlash", 2 * _tiles(trace), vertical=columns, slash=lambda i: TILE * (i + 1) - columns(i))

    return [ladder(share) for share in (0.25, 0.5, 0.75)]


def _block_topk(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_of("BlockTopK", _tiles(trace), blocks=lambda i: i + 1)]


def _stem(trace: Trace, config: Config | None) -> list[Ladder]:
    """Block top-k whose budget falls along the prompt, scored without and with the values."""

    def ladder(values: float) -> Ladder:
        return _of("BlockTopK", _tiles(trace), blocks=lambda i: i + 1, decay=lambda i: 0.7, values=lambda i: values)

    return [ladder(0.0), ladder(0.2)]


def _triangle_mix(trace: Trace, config: Config | None) -> list[Ladder]:
    """How many lower layers stay dense; the upper ones have the paper's tri-shape."""
    lower, upper = find("Dense")(), find("TriShape")(8, 512, 128)

    def at(i: int) -> Setting:
        return Setting(f"{i} dense layers, then {upper}", {n: lower if n < i else upper for n in range(trace.depth)})

    return [Ladder(trace.depth + 1, at)]


SHARES = tuple(1 - 2 ** (-k / 8) for k in range(1, 81))
"""Shares of the attention mass to keep, denser towards 1: 0.083, 0.16, 0.23 ... 0.5 ... 0.9, 0.92 ... 0.999."""


def _flex_prefill(trace: Trace, config: Config | None) -> list[Ladder]:
    """gamma decides alone: the floor of 1024 tokens that the paper has would be a large share of these prompts, and the
    bounds are out of reach (columns: half of the prompt, more would not be gathered)."""
    bounds = {"vertical": trace.tokens // 2, "slash": trace.tokens, "blocks": _tiles(trace), "minimum": TILE}
    return [_by_share("FlexPrefill", "gamma", bounds)]


def _x_attention(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_by_share("XAttention", "threshold", {"stride": stride, "blocks": _tiles(trace)}) for stride in (8, 16)]


def _block_peaks(trace: Trace, config: Config | None) -> list[Ladder]:
    """A cut that falls, from 0.9 to 0.0001 of a run's attention."""

    def at(i: int) -> Setting:
        peak = round(0.9 * 2 ** (-i / 6), 4)
        return Setting(f"peak {peak:g}", find("BlockPeaks")(peak=peak, blocks=_tiles(trace)))

    return [Ladder(80, at)]


def _prism(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_by_share("Prism", "threshold", {"blocks": _tiles(trace)})]


def _proxy_attn(trace: Trace, config: Config | None) -> list[Ladder]:
    """gamma decides alone, without the paper's floor of 2048 tokens; a proxy for each KV head, or one for three."""
    fixed = {"blocks": _tiles(trace), "minimum": TILE}
    return [_by_share("ProxyAttn", "gamma", {**fixed, "kv_heads": shared}, "kv_heads") for shared in (1, 3)]


def _flash_prefill(trace: Trace, config: Config | None) -> list[Ladder]:
    """A cut that falls. What the paper forces is a third of a prompt of 4k tokens, so a second ladder forces little."""
    kind, blocks = find("FlashPrefill"), _tiles(trace)

    def ladder(**forced: int) -> Ladder:
        def at(i: int) -> Setting:
            pattern = kind(alpha=round(1 - SHARES[i], 4), blocks=blocks, **forced)
            return Setting(str(pattern), pattern)

        return Ladder(len(SHARES), at)

    return [ladder(), ladder(near=TILE, sink=TILE, last=0)]


def _by_share(name: str, field: str, fixed: dict[str, int], shown: str = "stride") -> Ladder:
    try:
        kind: Callable[..., Pattern] = find(name)
    except ValueError:
        raise Unavailable(f"there is no pattern {name} among the entry points of mmflex.patterns") from None

    def at(i: int) -> Setting:
        share = round(SHARES[i], 4)
        return Setting(
            f"{field} {share:g}" + (f", {shown} {fixed[shown]}" if shown in fixed else ""),
            kind(**{field: share}, **fixed),
        )

    return Ladder(len(SHARES), at)


# ---- searched configs ----------------------------------------------------------------------------------------------


FACTORS = tuple(2 ** (k / 8) for k in range(-32, 33))
"""A config's budgets are multiplied by these (`Pattern.scaled`); 1 is the config as it was searched."""


def _scaled(config: Config) -> Ladder:
    def at(i: int) -> Setting:
        if FACTORS[i] == 1:
            return Setting("as searched", config)
        patterns = {n: tuple(p.scaled(FACTORS[i]) for p in heads) for n, heads in config.patterns.items()}
        return Setting(f"budgets x {FACTORS[i]:.3g}", replace(config, patterns=patterns))

    return Ladder(len(FACTORS), at)


def _checked(config: Config | None, trace: Trace) -> Config:
    if config is None:
        raise Unavailable("it needs a searched config: --config FILE (mmflex search writes one)")
    try:
        config.for_model(trace.depth, trace.heads)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    return config


def intra(pattern: Pattern) -> tuple[Pattern, ...]:
    """The patterns of a modality or of a pair inside a pattern with boundaries; else the pattern alone."""
    kind = type(pattern).__name__
    if kind in ("QBoundary", "Boundary2D"):
        inner: Iterator[Pattern] = (part for _, part in pattern.parts)  # type: ignore[attr-defined]
    elif isinstance(pattern, Restricted):
        inner = iter((pattern.inner,))
    elif isinstance(pattern, _Pair) and any(intra(side) != (side,) for side in (pattern.left, pattern.right)):
        inner = iter((pattern.left, pattern.right))
    else:
        return (pattern,)
    return tuple(dict.fromkeys(leaf for part in inner for leaf in intra(part)))


def without_boundaries(config: Config, trace: Trace) -> Config:
    """Every head's best pattern of those inside its own, over the whole sequence: by output error on a trace."""
    patterns = {}
    for layer, heads in config.patterns.items():
        choices = [intra(p) for p in heads]
        rounds = max(map(len, choices))
        best: list[tuple[float, Pattern]] = [(float("inf"), found[0]) for found in choices]
        for i in range(rounds if rounds > 1 else 0):
            tried = tuple(found[min(i, len(found) - 1)] for found in choices)
            errors = trace.errors(layer, trace.plan(layer, tried)).tolist()
            found_now = zip(errors, tried, strict=True)
            best = [min(pair, key=lambda x: x[0]) for pair in zip(best, found_now, strict=True)]
        patterns[layer] = tuple(p for _, p in best)
    return replace(config, patterns=patterns)


def _intra_only(trace: Trace, config: Config | None) -> Config:
    return without_boundaries(_checked(config, trace), trace)


def _searched(trace: Trace, config: Config | None) -> list[Ladder]:
    return [_scaled(_checked(config, trace))]


METHODS = {
    m.name: m
    for m in (
        Method("dense", "dense", "the model's own attention", _dense),
        Method("a-shape", "A-shape", "sink 128 and a local window, which grows", _a_shape),
        Method("tri-shape", "Tri-shape", "A-shape, and dense rows for the last 128 queries", _tri_shape),
        Method("sf-fixed", "SF-fixed", "own frame and the first tokens of every frame, which grow", _sf_fixed),
        Method("sf-strided", "SF-strided", "every frame's same place and a local window, which grows", _sf_strided),
        Method("minference", "MInference", "vertical-slash on every head; of three ratios the best", _minference),
        Method("block-topk", "block top-k", "the best key blocks by mean-pooled scores, as many for each query block",
               _block_topk),
        Method("stem", "Stem", "block top-k with budgets that fall along the prompt; with and without values", _stem),
        Method("flexprefill", "FlexPrefill", "blocks or lines that hold gamma of the mass, tau 0.1", _flex_prefill),
        Method("xattention", "XAttention", "antidiagonal scores to a threshold; of two strides the best",
               _x_attention),
        Method("block-peaks", "block peaks", "blocks to which the longest query of a run, or a run, gives a share",
               _block_peaks),
        Method("prism", "Prism", "mean-pooled blocks by bands of rotary frequencies, to a threshold", _prism),
        Method("flashprefill", "FlashPrefill", "blocks above a share of the heaviest; forced as in the paper or little",
               _flash_prefill),
        Method("proxyattn", "ProxyAttn", "blocks ranked by proxies that heads share, budgets by gamma", _proxy_attn),
        Method("triangle-mix", "TriangleMix", "dense lower layers, as many as fit, and a tri-shape", _triangle_mix),
        Method(
            "mminference-intra", "MMInference w/o inter", "the config with each head's best part over all tokens",
            _searched, _intra_only,
        ),
        Method("mminference", "MMInference", "the searched config, its budgets resized together", _searched),
    )
}  # fmt: skip
"""What `mmflex eval --methods all` compares, by name."""


def chosen(names: str | Sequence[str]) -> list[Method]:
    """Methods of some names, in the order of the table; "all", or ValueError for one that is unknown."""
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = sorted(set(wanted) - {*METHODS, "all"})
    if unknown:
        raise ValueError(f"unknown method {', '.join(map(repr, unknown))}: use 'all' or some of {', '.join(METHODS)}")
    return [m for m in METHODS.values() if "all" in wanted or m.name in wanted]


# ---- sizing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A setting brought to a target on a prompt.

    Attributes:
        measured: density, allowed pairs and output error there.
        over: even the smallest setting computes more than the target.
    """

    setting: Setting
    measured: Measured
    over: bool


def fit(ladder: Ladder, target: float, trace: Trace) -> Fitted:
    """The largest setting of a ladder within ``target`` (pairs in computed blocks over causal pairs), else the
    smallest."""
    setting, fits = largest(ladder, target, trace)
    return Fitted(setting, trace.measure(setting.spec), not fits)


def choose(ladders: Sequence[Ladder], target: float, trace: Trace) -> int:
    """Which ladder has the least output error at a target; the least dense one where none is within."""
    if len(ladders) == 1:
        return 0
    found = [fit(ladder, target, trace) for ladder in ladders]
    order = [(f.over, f.measured.density if f.over else f.measured.error, i) for i, f in enumerate(found)]
    return min(order)[-1]


def largest(ladder: Ladder, target: float, trace: Trace) -> tuple[Setting, bool]:
    """The largest setting of a ladder within a target, by bisection (density grows along a ladder), and whether it is;
    else the smallest."""
    fits, fails = -1, ladder.length
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if trace.density(ladder.at(middle).spec) <= target:
            fits = middle
        else:
            fails = middle
    return ladder.at(max(fits, 0)), fits >= 0
