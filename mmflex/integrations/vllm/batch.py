"""A step's rows as runs: every long prefill alone, the others together.

vLLM describes a step by one `CommonAttentionMetadata` over all its requests, in rows: request i has the queries
``query_start_loc[i] .. query_start_loc[i + 1]`` of the step's tokens. A run of rows has one of its own, cut out of
that. Only host data decides; nothing is read back from the device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mmflex.compiler.program import Program
from mmflex.ir.layout import TokenLayout

from .requests import Prompt

PER_ROW = frozenset(
    [
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "block_table_tensor",
        "is_prefilling",
        "req_idx",
        "_seq_lens_cpu",
        "_num_computed_tokens_cpu",
    ]
)
"""Fields of `CommonAttentionMetadata` (of all versions named in `plugin`) with one entry per request."""

PER_TOKEN = frozenset({"slot_mapping", "positions"})
"""Fields with one entry per token of the step."""

_COUNTED = frozenset(
    [
        "query_start_loc",
        "query_start_loc_cpu",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "causal",
        "max_logits_per_req",
    ]
)
"""Fields that are worked out for a run, or hold for every run."""

_WORKED_OUT = frozenset({"_num_computed_tokens_cache", "_token_to_req_indices_cache"})
"""Fields that vLLM fills when first asked for: a run does so anew."""


@dataclass
class Run:
    """Consecutive rows of a step that are attended to in one way.

    Attributes:
        rows, tokens: which rows and which of the step's tokens.
        metadata: the standard backend's, for these rows alone.
        long: whether it is one long prefill.
        table: int [pages], of a long prefill: its pages in the cache.
        start, end: of a long prefill: tokens that the cache holds from earlier steps, and all tokens up to this step's
            last.
        prompt: of a long prefill: the request's, or None where the rows of the step are not known by name.
        layout: of a long prefill: its ``end`` tokens.
        programs: of a long prefill: a spec (by identity) -> its program, None where the standard attention is faster.
        wanted: of a chunk: which earlier and which own queries estimates go by (`carry`).
        counted: whether the counters have it.
    """

    rows: slice
    tokens: slice
    metadata: Any = None
    long: bool = False
    table: Tensor | None = None
    start: int = 0
    end: int = 0
    prompt: Prompt | None = None
    layout: TokenLayout | None = None
    programs: dict[int, Program | None] = field(default_factory=dict)
    wanted: tuple[Any, np.ndarray, Tensor, Tensor] | None = None
    counted: bool = False
    noted: list[tuple[float, float, float]] = field(default_factory=list)

    def over(self, metadata: Any, block_table: Tensor) -> Run:
        """The same rows with the metadata and the cache of other layers."""
        return dataclasses.replace(self, metadata=metadata, table=block_table[self.rows.start], noted=[])

    def note(self, density: float, planning_ms: float, attention_ms: float) -> None:
        """One layer, for `summary`."""
        self.noted.append((density, planning_ms, attention_ms))

    def summary(self) -> str:
        """A line about a long prefill and the layers noted so far."""
        density, planning, attending = np.asarray(self.noted).T
        return (
            f"{self.end - self.start} new tokens of {self.end} in {len(self.noted)} layers: density "
            f"{density.mean():.1%}, planning {planning.sum():.1f} ms, attention {attending.sum():.1f} ms"
        )


def why_whole(common: Any) -> str | None:
    """Why a step must not be cut into runs: something in its metadata that is no plain causal attention, or that is not
    known here. None where it may."""
    if common.causal is not True:
        return "attention that is not causal"
    if common.seq_lens_cpu_upper_bound is None:
        return "vLLM gives no sequence lengths on the host"
    for one in dataclasses.fields(common):
        if one.name in PER_ROW or one.name in PER_TOKEN or one.name in _COUNTED or one.name in _WORKED_OUT:
            continue
        value = getattr(common, one.name)
        if value is not None and (not isinstance(value, dict) or any(value.values())):
            return f"CommonAttentionMetadata.{one.name} is set, which mmflex does not know how to cut"
    return None


def runs_of(common: Any, threshold: int) -> list[Run]:
    """The runs of a step in the order of its rows; an empty list where no request has ``threshold`` new tokens."""
    starts = np.asarray(common.query_start_loc_cpu)[: common.num_reqs + 1]
    lengths = np.diff(starts)
    if not len(lengths) or lengths.max() < threshold:
        return []
    ends = np.asarray(common.seq_lens_cpu_upper_bound)
    runs: list[Run] = []
    for row, length in enumerate(lengths.tolist()):
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        if length >= threshold:
            end = int(ends[row])
            runs.append(Run(slice(row, row + 1), tokens, long=True, start=end - length, end=end))
        elif runs and not runs[-1].long:
            last = runs[-1]
            last.rows, last.tokens = slice(last.rows.start, row + 1), slice(last.tokens.start, tokens.stop)
        else:
            runs.append(Run(slice(row, row + 1), tokens))
    return [run for run in runs if run.tokens.stop > run.tokens.start]  # rows of padding have no tokens


def cut(common: Any, run: Run) -> Any:
    """The `CommonAttentionMetadata` of a run. ``max_seq_len`` is its longest row."""
    rows, tokens = run.rows, run.tokens
    given = {one.name: getattr(common, one.name) for one in dataclasses.fields(common)}
    changed: dict[str, Any] = {name: given[name][rows] for name in PER_ROW & set(given) if given[name] is not None}
    changed |= {name: given[name][tokens] for name in PER_TOKEN & set(given) if given[name] is not None}
    changed |= dict.fromkeys(_WORKED_OUT & set(given))
    for name in ("query_start_loc", "query_start_loc_cpu"):
        changed[name] = given[name][rows.start : rows.stop + 1] - tokens.start
    lengths = changed["query_start_loc_cpu"].diff()
    changed |= {
        "num_reqs": rows.stop - rows.start,
        "num_actual_tokens": tokens.stop - tokens.start,
        "max_query_len": int(lengths.max()),
        "max_seq_len": int(changed["seq_lens_cpu_upper_bound"].max()),
    }
    return dataclasses.replace(common, **changed)
