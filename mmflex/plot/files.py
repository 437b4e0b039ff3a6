"""Saved plans: one compressed file with what pictures need, `save_plan` and `load_plan`.

The file is an ``.npz``: ``meta`` is JSON (what `Snapshot` has but arrays), the rest are numpy arrays without pickles.
Block lists and token orders are kept as differences from entry to entry, which compress well.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.layout import LONGEST_PROMPT, TokenLayout
from ..ir.queries import QueryTokens
from ..ir.shown import clipped, shown
from .archive import read_arrays
from .masks import TOKEN_LEVEL
from .snapshot import KINDS, LaunchInfo, Lists, SlotTokens, Snapshot, snapshot

if TYPE_CHECKING:
    from ..runtime.plan import Plan

SCHEMA = "mmflex.plan"
VERSION = 1

_LAYOUT = ("modality", "segment", "frame", "cell")


def save_plan(plan: Plan | Snapshot, path: str | os.PathLike[str]) -> None:
    """Write what pictures need of a plan: block lists, token orders, the layout, patterns and numbers; up to 1024 x
    1024 tokens also the token masks. ``mmflex show FILE`` draws it, `load_plan` reads it.

    The file is complete or untouched. It holds no queries, keys or estimates, so it can neither attend nor plan again.
    """
    snap = snapshot(plan)
    arrays: dict[str, np.ndarray] = {
        "layout": _differences(np.stack([getattr(snap.layout, name) for name in _LAYOUT])),
        "valid": snap.layout.valid,
        "density": snap.density,
    }
    for number, launch in enumerate(snap.launches):
        if launch.kind != "dense":
            arrays |= {f"{number}.{name}": array for name, array in _launch_arrays(snap, number, launch).items()}
    if 0 < snap.queries * snap.length <= TOKEN_LEVEL:
        masks = [[snap.reader.allowed(head, b) for head in range(snap.heads)] for b in range(snap.batch)]
        if all(mask is not None for row in masks for mask in row):
            arrays["allowed"] = np.packbits(np.array(masks, bool), axis=-1)
    meta = {
        "schema": SCHEMA,
        "version": VERSION,
        "q": list(snap.q),
        "k": list(snap.k),
        "tile": snap.tile,
        "backend": snap.backend,
        "note": snap.note,
        "query_runs": [list(run) for run in snap.query_tokens.runs],
        "patterns": list(snap.patterns),
        "families": list(snap.families),
        "launches": [_launch_meta(launch) for launch in snap.launches],
    }
    _write(Path(path), {"meta": np.array(json.dumps(meta)), **arrays})


def _launch_meta(launch: LaunchInfo) -> dict[str, Any]:
    data = {name: getattr(launch, name) for name in LaunchInfo.__dataclass_fields__}
    return data | {"heads": list(launch.heads), "section_slot": [list(pair) for pair in launch.section_slot.items()]}


def _launch_arrays(snap: Snapshot, number: int, launch: LaunchInfo) -> dict[str, np.ndarray]:
    """Lists of every head, and the tokens in its slots: equal rows once, and which head has which."""
    places = range(len(launch.heads))
    lists = [snap.reader.lists(number, place, b) for b in range(snap.batch) for place in places]
    out = {}
    for kind, name in enumerate(("partial", "full")):
        out[f"{name}.count"] = np.concatenate([found[kind][0] for found in lists]).astype(np.int32)
        out[f"{name}.index"] = _differences(np.concatenate([found[kind][1] for found in lists]))
    tokens = [snap.reader.tokens(number, place, b) for b in range(snap.batch) for place in places]
    for name in ("rows", "keys", "own"):
        table: dict[bytes, int] = {}
        which = []
        for found in tokens:
            row = getattr(found, name)
            which.append(-1 if row is None else table.setdefault(row.astype(np.int32).tobytes(), len(table)))
        rows = np.frombuffer(b"".join(table), np.int32).reshape(len(table), -1) if table else np.zeros((0, 0), np.int32)
        out |= {f"{name}.table": _differences(rows), f"{name}.which": np.array(which, np.int32)}
    return out


def _differences(values: np.ndarray) -> np.ndarray:
    """int32 differences along the last axis; `_sums` undoes it."""
    return np.diff(values.astype(np.int32), axis=-1, prepend=np.int32(0))


def _sums(values: np.ndarray, dimensions: int) -> np.ndarray:
    _same("differences", (values.dtype, values.ndim), (np.dtype(np.int32), dimensions))
    return np.cumsum(values, axis=-1, dtype=np.int32)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_plan(path: str | os.PathLike[str]) -> Snapshot:
    """Read what `save_plan` wrote, for every function of `mmflex.plot` but `plot_estimate` and `plot_recall`.

    Raises:
        ValueError: another file, another version, or a broken one; the message says which.
        FileNotFoundError: no file.
    """
    path = Path(path)
    foreign = f"{path} is not a saved plan: write one with mmflex.plot.save_plan(plan, path)"
    with path.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            raise ValueError(foreign)
    try:
        arrays = read_arrays(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a saved plan, or it is cut short: {clipped(error)}") from None
    if "meta" not in arrays:
        raise ValueError(foreign)
    meta = _meta(path, arrays["meta"])
    try:
        return _snapshot(meta, arrays)
    except Exception as error:  # it may be anybody's, and hold anything
        raise ValueError(f"{path} is broken ({type(error).__name__}: {clipped(error)}): save the plan again") from None


def _meta(path: Path, stored: np.ndarray) -> dict[str, Any]:
    try:
        meta = json.loads(str(stored))
    except (ValueError, RecursionError):
        meta = None
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or schema != SCHEMA:
        raise ValueError(f'{path} is not a saved plan: its schema is {shown(schema)}, "{SCHEMA}" is needed')
    version = meta.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path} has version {shown(version)}; this mmflex reads version {VERSION}: save it again")
    return meta


def _snapshot(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Snapshot:
    """Checked, so that what is drawn later is what was saved."""
    q, k = (_integers(meta[name], name, 0, LONGEST_PROMPT) for name in ("q", "k"))
    _same("numbers in q and k", (len(q), len(k)), (4, 4))
    batch, heads, m, n = q[0], q[1], q[2], k[2]
    _same("prompts and head dimension of k", (k[0], k[3]), (batch, q[3]))
    if not k[1] or heads % k[1] or m > n:
        raise ValueError(f"q {list(q)} does not go with k {list(k)}")
    (tile,) = _integers([meta["tile"]], "tile", 1, LONGEST_PROMPT)
    layout = _sums(arrays["layout"], 3)
    fields = dict(zip(_LAYOUT, layout, strict=True))
    ids = fields.pop("modality")
    _same("layout", ids.shape[1:], (n,))
    if ids.shape[0] not in (1, batch):
        raise ValueError(f"layout: {ids.shape[0]} prompts where 1 or {batch} are expected")
    density = arrays["density"]
    _same("density", density.shape, (batch, heads))
    if density.dtype.kind != "f" or not (density >= 0).all() or not np.isfinite(density).all():
        raise ValueError("density: a share of the causal pairs is 0 or more")
    for name in ("patterns", "families"):
        _same(name, len(_texts(meta[name], name)), heads)
    _texts([meta["backend"], meta["note"]], "backend and note")
    launches = tuple(_launch_info(data, number, heads, tile) for number, data in enumerate(meta["launches"]))
    allowed = arrays.get("allowed")
    if allowed is not None:
        _same("token masks", (allowed.dtype, allowed.shape), (np.dtype(np.uint8), (batch, heads, m, -(-n // 8))))
    stored = [
        None if launch.kind == "dense" else _Launch.of(arrays, number, launch, (batch, m, n), tile)
        for number, launch in enumerate(launches)
    ]
    listed = meta.get("query_runs", [[n - m, n]] if m else [])
    runs = QueryTokens(tuple(_integers(run, "query runs", 0, n) for run in listed))  # type: ignore[misc]
    return Snapshot(
        q,
        k,
        tile,
        meta["backend"],
        meta["note"],
        TokenLayout.from_modality_ids(ids, valid=arrays["valid"], **fields),
        QueryTokens.of(runs, m, n),
        tuple(meta["patterns"]),
        tuple(meta["families"]),
        density,
        launches,
        _Stored(stored, allowed, n),
    )


def _launch_info(data: dict[str, Any], number: int, heads: int, tile: int) -> LaunchInfo:
    own, slots = data["heads"], dict(data["section_slot"])
    info = LaunchInfo(**data | {"heads": _integers(own, "heads", -1, heads - 1), "section_slot": slots})
    real = [head for head in info.heads if head >= 0]
    _texts([info.kind, info.label, info.rows, info.keys], f"launch {number}")
    if info.kind not in KINDS.values() or type(info.natural) is not bool or len(set(real)) < len(real):
        raise ValueError(f"launch {number}: kind {shown(info.kind)}, natural {shown(info.natural)}, heads {shown(own)}")
    _integers(list(slots), "heads with a section", 0, heads - 1)
    _integers(list(slots.values()), "sections", 0, len(own) - 1)
    sizes = _integers([info.row_slots, info.main_slots, info.section], "slots", 0, LONGEST_PROMPT)
    if any(size % tile for size in sizes) or not set(slots) <= set(real):
        raise ValueError(f"launch {number}: {sizes} slots in blocks of {tile}, sections of heads {shown(list(slots))}")
    _integers([info.key_slots], "key slots", 0, LONGEST_PROMPT)
    return info


def _integers(values: Any, what: str, least: int, most: int) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or not least <= v <= most for v in values):
        raise ValueError(f"{what}: {shown(values)} where whole numbers from {least} to {most} are expected")
    return tuple(values)


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list) or any(not isinstance(v, str) for v in values):
        raise ValueError(f"{what}: {shown(values)} where texts are expected")
    return values


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what}: {shown(found)} where {shown(expected)} is expected")


@dataclass(frozen=True)
class _Launch:
    """Arrays of a launch: ``count [B x H, row blocks]``, ``index`` and where each row of it begins; per side a table of
    token rows and which one each head has, ``[B x H]``."""

    places: int
    lists: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    tokens: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(
        cls, arrays: dict[str, np.ndarray], number: int, launch: LaunchInfo, sizes: tuple[int, int, int], tile: int
    ) -> _Launch:
        """``sizes``: prompts, queries and keys."""
        (batch, m, n), places, blocks = sizes, len(launch.heads), launch.key_slots // tile
        lists = []
        for name in ("partial", "full"):
            count = arrays[f"{number}.{name}.count"].reshape(batch * places, launch.row_slots // tile)
            index = _sums(arrays[f"{number}.{name}.index"], 1)
            _within(f"launch {number}, {name} blocks of a row", count, 0, blocks)
            _same(f"launch {number}, {name} blocks", int(count.sum(dtype=np.int64)), len(index))
            if len(index) and not 0 <= index.min() <= index.max() < blocks:
                raise ValueError(f"launch {number}: a block outside of the {blocks} key blocks")
            lists.append((count, index, np.concatenate([[0], count.sum(1).cumsum()])))
        tokens = {}
        with_section = np.tile([head in launch.section_slot for head in launch.heads], batch)
        for name, slots, most in (
            ("rows", launch.row_slots, m),
            ("keys", launch.main_slots, n),
            ("own", launch.section, n),
        ):
            table, which = _sums(arrays[f"{number}.{name}.table"], 2), arrays[f"{number}.{name}.which"]
            _same(f"launch {number}, {name}", which.shape, (batch * places,))
            _within(f"launch {number}, {name}", which, -1, len(table) - 1)
            if len(table):
                _same(f"launch {number}, slots of {name}", table.shape[1:], (slots,))
            _within(f"launch {number}, tokens of {name}", table, -1, most - 1)
            _same(f"launch {number}, heads with {name}", (which >= 0).all(where=with_section | (name != "own")), True)
            _same(f"launch {number}, heads without", (which < 0).all(where=~with_section & (name == "own")), True)
            tokens[name] = (table, which)
        return cls(places, tuple(lists), tokens)


def _within(what: str, values: np.ndarray, least: int, most: int) -> None:
    if values.dtype.kind not in "iu" or (values.size and not least <= int(values.min()) <= int(values.max()) <= most):
        found = f"{values.min()} to {values.max()}" if values.size else values.dtype
        raise ValueError(f"{what}: {found} where whole numbers from {least} to {most} are expected")


@dataclass(frozen=True)
class _Stored:
    """Reads from the arrays of a file; ``masks`` uint8 ``[B, H, M, N / 8]``, 8 keys in each."""

    launches: list[_Launch | None]
    masks: np.ndarray | None
    length: int

    def _launch(self, number: int) -> _Launch:
        launch = self.launches[number]
        if launch is None:
            raise ValueError(f"launch {number} is dense: it has no block lists")
        return launch

    def lists(self, number: int, place: int, batch: int) -> tuple[Lists, Lists]:
        launch = self._launch(number)
        at = batch * launch.places + place
        (few, index, start), (whole, all_index, all_start) = launch.lists
        return (few[at], index[start[at] : start[at + 1]]), (
            whole[at],
            all_index[all_start[at] : all_start[at + 1]],
        )

    def tokens(self, number: int, place: int, batch: int) -> SlotTokens:
        launch = self._launch(number)
        found: list[np.ndarray | None] = []
        for name in ("rows", "keys", "own"):
            table, which = launch.tokens[name]
            row = which[batch * launch.places + place]
            found.append(None if row < 0 else table[row].astype(np.int64))
        rows, keys, own = found
        assert rows is not None
        assert keys is not None
        return SlotTokens(rows, keys, own)

    def allowed(self, head: int, batch: int) -> np.ndarray | None:
        if self.masks is None:
            return None
        return np.unpackbits(self.masks[batch, head], axis=-1, count=self.length).astype(bool)
