"""What things cost on a device, in milliseconds: shipped with mmflex, or measured by ``mmflex calibrate``.

`constants_for` finds the record of a backend that fits best: of the device, the element size and the head dimension,
measured rather than shipped, then of the torch version and the dtype. A backend without any record gets `GENERIC`.
Records are read once, when first asked for.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

VERSION = 1
"""Version of the JSON form."""


PRICED_TILE = 128
"""Tokens on a side of the blocks, and in the tiles, that prices are for."""


def _ms(what: str) -> Any:
    return field(default=0.0, metadata={"what": what})


@dataclass(frozen=True)
class Constants:
    """Costs on one device with one backend, in milliseconds; blocks are `PRICED_TILE` x `PRICED_TILE`.

    Times of blocks, tiles and rows are amortised: what one more of them adds to a launch that fills the device.

    Attributes:
        device: name, as `device_name` gives it. torch: version. backend: "flash", "triton", "cpu" or "reference".
        dtype, head_dim: of the tensors that were measured.
        lanes: query tiles that run at once (multiprocessors, threads): one tile alone takes ``lanes`` times its share.
        full ... moved: attending. plan ... entry: planning, on the device (or all of it, where the host is the device).
        host ... host_launch: what the host needs for a call; it overlaps with the device, so only the longer counts.
        dense, dense_call: PyTorch's dense attention (the kernel that mmflex would take), causal blocks only.
        error: largest relative error on the cases that were held out of the fit; 0 if unknown.
        measured: date. source: "measured", "shipped" or "generic"; not written to files.
    """

    device: str
    torch: str
    backend: str
    dtype: str
    head_dim: int
    lanes: int
    full: float = _ms("full block")
    partial: float = _ms("partial block, one comparison")
    looked_full: float = _ms("full block beside a looked-up mask")
    lookup: float = _ms("partial block, looked up")
    tile: float = _ms("query tile")
    launch: float = _ms("launch")
    copy: float = _ms("launch that copies rows")
    moved: float = _ms("tile of rows copied")
    plan: float = _ms("planning")
    estimate: float = _ms("estimate")
    token: float = _ms("key token and head of an estimate")
    product: float = _ms("query-key product of an estimate")
    planned: float = _ms("planned launch")
    slot: float = _ms("key slot and head of a planned launch")
    entry: float = _ms("entry of a block table")
    host: float = _ms("call, on the host")
    host_estimate: float = _ms("estimate, on the host")
    host_launch: float = _ms("launch, on the host")
    dense: float = _ms("dense block pair")
    dense_call: float = _ms("dense call")
    error: float = 0.0
    measured: str = ""
    source: str = "measured"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kind: Any = {"str": str, "int": int, "float": (int, float)}[str(f.type)]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{f.name} is {value!r}: constants hold {f.type} there")
            if f.type != "str" and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{f.name} is {value}: constants are finite and not negative")
        for name in ("full", "dense", "head_dim", "lanes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be more than 0; calibrate again")

    @property
    def any_length(self) -> bool:
        """Whether tokens need not fill whole tiles (of launches whose masks are comparisons)."""
        return self.backend == "flash"

    @property
    def streams(self) -> bool:
        """Whether the device overlaps launches on several streams."""
        return self.backend in ("flash", "triton")

    @property
    def key(self) -> tuple[str, ...]:
        """What a record is filed under."""
        return (self.device, self.torch, self.backend, self.dtype, str(self.head_dim))

    def for_head_dim(self, dim: int) -> Constants:
        """The same device at another head dimension, roughly: products grow with it, exponentials do not."""
        if dim == self.head_dim:
            return self
        work, rows = (32 + dim) / (32 + self.head_dim), dim / self.head_dim
        scale = {"full": work, "partial": work, "looked_full": work, "lookup": work, "dense": work}
        scale |= {"tile": rows, "moved": rows, "token": rows, "product": work}
        return replace(self, head_dim=dim, **{name: getattr(self, name) * by for name, by in scale.items()})

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "source"}

    @classmethod
    def from_json(cls, data: Any, source: str = "measured") -> Constants:
        """ValueError for what is not a record of this version."""
        names = {f.name for f in fields(cls)} - {"source"}
        if isinstance(data, Mapping):
            data = {"product": 0.0, **data}  # older files count it in the price of a token
        if not isinstance(data, Mapping) or set(data) != names:
            odd = sorted(names ^ set(data)) if isinstance(data, Mapping) else [repr(data)]
            raise ValueError(f"not a record of constants: fields missing or unknown: {', '.join(odd)[:200]}")
        return cls(**data, source=source)


COSTS: dict[str, str] = {f.name: f.metadata["what"] for f in fields(Constants) if "what" in f.metadata}
"""Field -> what one of it is, for people."""

GENERIC = Constants(
    "any device", "any", "any", "any", 128, 1, full=1e-3, partial=1.2e-3, looked_full=1e-3, lookup=4e-3, launch=64e-3,
    moved=2e-5, dense=1e-3, source="generic",
)  # fmt: skip
"""Ratios that hold roughly everywhere; the milliseconds mean nothing. For backends without any record."""


# ---- files -----------------------------------------------------------------------------------------------------------


def cache_path() -> Path:
    """Where ``mmflex calibrate`` keeps what it measured: $MMFLEX_CACHE, $XDG_CACHE_HOME/mmflex or ~/.cache/mmflex."""
    folder = os.environ.get("MMFLEX_CACHE")
    if folder:
        return Path(folder).expanduser() / "constants.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmflex" / "constants.json"


def read_constants(text: str, source: str = "measured") -> list[Constants]:
    """The records of a file's text; ValueError says what is wrong with it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("constants"), list):
        raise ValueError('not written by mmflex: it has no list "constants"')
    if data.get("version") != VERSION:
        raise ValueError(f"version {data.get('version')!r}; this mmflex reads version {VERSION}")
    return [Constants.from_json(entry, source) for entry in data["constants"]]


def write_constants(path: Path, records: Iterable[Constants]) -> None:
    """Writes records, all or nothing: a file that is there stays as it was until the new one is complete."""
    data = {"version": VERSION, "constants": [record.to_json() for record in records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(data, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def keep(records: Iterable[Constants]) -> Path:
    """Adds records to the user's cache, in place of those of the same device, version and backend; where it is."""
    path = cache_path()
    try:
        old = read_constants(path.read_text())
    except FileNotFoundError:
        old = []
    except ValueError:  # not ours: kept beside
        path.replace(path.with_suffix(".unreadable.json"))
        old = []
    new = {record.key: record for record in (*old, *records)}
    write_constants(path, new.values())
    forget()
    return path


@lru_cache(maxsize=1)
def shipped() -> tuple[Constants, ...]:
    """Records that come with mmflex."""
    folder = files("mmflex.compiler") / "measured"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(record for f in found for record in read_constants(f.read_text(), "shipped"))


@lru_cache(maxsize=4)
def _cached(path: Path) -> tuple[Constants, ...]:
    try:
        return tuple(read_constants(path.read_text()))
    except FileNotFoundError:
        return ()
    except (ValueError, OSError) as error:
        warnings.warn(
            f"{path} cannot be used: {error}. mmflex goes by its shipped constants; run `mmflex calibrate` to measure "
            "this device, or delete the file",
            stacklevel=5,
        )
        return ()


# ---- which record ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine() or "CPU"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


@lru_cache(maxsize=64)
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(device: torch.device | str) -> str:
    """What constants are filed under: the GPU's name; of a CPU also how many threads PyTorch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def constants_for(device: torch.device | str, backend: str, dtype: torch.dtype, head_dim: int) -> Constants:
    """The constants that fit best, brought to the head dimension."""
    dtype_name = str(dtype).removeprefix("torch.")
    where = os.environ.get("MMFLEX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    found = _find(device_name(device), backend, dtype_name, head_dim, where)
    return GENERIC if found is None else found


@lru_cache(maxsize=256)
def _find(device: str, backend: str, dtype: str, head_dim: int, where: tuple[str | None, ...]) -> Constants | None:
    records = [(0, record) for record in _cached(cache_path())] + [(1, record) for record in shipped()]
    records = [(source, record) for source, record in records if record.backend == backend]

    def distance(found: tuple[int, Constants]) -> tuple[Any, ...]:
        """Device first, then element size, head dimension, whether it was measured here, torch version and dtype."""
        source, record = found
        size = (record.dtype == "float32") != (dtype == "float32")
        away = abs(math.log2(record.head_dim / head_dim))
        return (record.device != device, size, away, source, record.torch != torch.__version__, record.dtype != dtype)

    best = min(records, key=distance, default=None)
    return None if best is None else best[1].for_head_dim(head_dim)


generation = 0
"""How often `forget` was called: what was decided by earlier constants is to be decided again."""


def forget() -> None:
    """Reads the files again when constants are next asked for."""
    global generation
    _cached.cache_clear()
    _find.cache_clear()
    generation += 1  # last: what another thread decides meanwhile is not kept as of these
