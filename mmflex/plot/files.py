"""Saved plans: one compressed file with what pictures need, `save_plan` and `load_plan`.

The file is an ``.npz``: ``meta`` is JSON (what `Snapshot` has but arrays), the rest are numpy arrays without pickles.
Block lists and token orders are kept as differences from entry to entry, which compress well.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.layout import TokenLayout
from ..ir.queries import QueryTokens
from .masks import TOKEN_LEVEL
from .snapshot import LaunchInfo, Lists, SlotTokens, Snapshot, snapshot

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


def _sums(values: np.ndarray) -> np.ndarray:
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
    try:
        with path.open("rb") as opened:
            if opened.read(4) != b"PK\x03\x04":
                raise ValueError(foreign)
        with np.load(path, allow_pickle=False) as file:
            if "meta" not in file.files:
                raise ValueError(foreign)
            meta = _meta(path, file["meta"])
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:  # numpy's, without the path
        raise ValueError(str(error) if str(path) in str(error) else f"{path} is not a saved plan: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a saved plan, or it is cut short: {error}") from None
    try:
        return _snapshot(meta, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is broken ({type(error).__name__}: {error}): save the plan again") from None


def _meta(path: Path, stored: np.ndarray) -> dict[str, Any]:
    try:
        meta = json.loads(str(stored))
    except ValueError:
        meta = None
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or schema != SCHEMA:
        raise ValueError(f'{path} is not a saved plan: its schema is {schema!r}, "{SCHEMA}" is needed')
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {meta.get('version')!r}; this mmflex reads version {VERSION}: save it again"
        )
    return meta


def _snapshot(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Snapshot:
    layout = _sums(arrays["layout"])
    fields = dict(zip(_LAYOUT, layout, strict=True))
    ids = fields.pop("modality")
    launches = tuple(
        LaunchInfo(**data | {"heads": tuple(data["heads"]), "section_slot": dict(data["section_slot"])})
        for data in meta["launches"]
    )
    q, k = tuple(meta["q"]), tuple(meta["k"])
    batch, heads, m, n = q[0], q[1], q[2], k[2]
    allowed = None
    if "allowed" in arrays:
        allowed = np.unpackbits(arrays["allowed"], axis=-1, count=n).astype(bool)
        _same("token masks", allowed.shape, (batch, heads, m, n))
    _same("density", arrays["density"].shape, (batch, heads))
    _same("layout", ids.shape[1:], (n,))
    for name in ("patterns", "families"):
        _same(name, len(meta[name]), heads)
    stored = [
        None if launch.kind == "dense" else _Launch.of(arrays, number, launch, batch, int(meta["tile"]))
        for number, launch in enumerate(launches)
    ]
    listed = meta.get("query_runs", [[n - m, n]] if m else [])
    runs = QueryTokens(tuple((int(first), int(end)) for first, end in listed))
    if any(a >= b for a, b in runs.runs) or any(b >= a for (_, b), (a, _) in itertools.pairwise(runs.runs)):
        raise ValueError(f"query runs {list(runs.runs)[:4]} are not ascending runs of tokens")
    return Snapshot(
        q,
        k,
        int(meta["tile"]),
        meta["backend"],
        meta["note"],
        TokenLayout.from_modality_ids(ids, valid=arrays["valid"], **fields),
        QueryTokens.of(runs, m, n),
        tuple(meta["patterns"]),
        tuple(meta["families"]),
        arrays["density"],
        launches,
        _Stored(stored, allowed),
    )


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what}: {found} where {expected} is expected")


@dataclass(frozen=True)
class _Launch:
    """Arrays of a launch: ``count [B x H, row blocks]``, ``index`` and where each row of it begins; per side a table of
    token rows and which one each head has, ``[B x H]``."""

    places: int
    lists: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    tokens: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], number: int, launch: LaunchInfo, batch: int, tile: int) -> _Launch:
        """Checked, so that what is drawn later is what was saved."""
        places = len(launch.heads)
        lists = []
        for name in ("partial", "full"):
            count = arrays[f"{number}.{name}.count"].reshape(batch * places, launch.row_slots // tile)
            index = _sums(arrays[f"{number}.{name}.index"])
            _same(f"launch {number}, {name} blocks", int(count.sum()), len(index))
            if len(index) and not 0 <= index.min() <= index.max() < launch.key_slots // tile:
                raise ValueError(f"launch {number}: a block outside of the {launch.key_slots // tile} key blocks")
            lists.append((count, index, np.concatenate([[0], count.sum(1).cumsum()])))
        tokens = {}
        for name in ("rows", "keys", "own"):
            table, which = _sums(arrays[f"{number}.{name}.table"]), arrays[f"{number}.{name}.which"]
            _same(f"launch {number}, {name}", which.shape, (batch * places,))
            if which.size and not which.max() < len(table):
                raise ValueError(f"launch {number}, {name}: row {which.max()} of {len(table)}")
            tokens[name] = (table, which)
        return cls(places, tuple(lists), tokens)


@dataclass(frozen=True)
class _Stored:
    """Reads from the arrays of a file."""

    launches: list[_Launch | None]
    masks: np.ndarray | None

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
        return None if self.masks is None else self.masks[batch, head]
