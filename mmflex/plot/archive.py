"""Arrays of an ``.npz`` file that may come from anybody: nothing is allocated that the file does not hold, nothing is
run, and every defect is a ValueError."""

from __future__ import annotations

import struct
import zipfile
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from ..ir.shown import shown

MOST_BYTES = 1 << 30
"""Of a file's arrays in all, uncompressed."""

_DIRECTORY = 1 << 20
"""Bytes of the list of arrays: some ten thousand of them."""

_END = struct.Struct("<4s4H2LH")
"""The last record of an archive without a comment: mark, numbers, size and place of the list, length of the comment."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Name -> array, read-only: integers, booleans, floats and texts.

    Raises:
        ValueError: another kind of file, or a broken or an oversized one. OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _read(file)
        except Exception as error:  # zipfile, zlib and numpy have many for files that are not what they say
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _read(file: IO[bytes]) -> dict[str, np.ndarray]:
    file.seek(0, 2)
    size = file.tell()
    file.seek(max(0, size - _END.size))
    tail = file.read()
    if len(tail) < _END.size or tail[:4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise ValueError("it does not end as an archive of arrays does")
    directory = _END.unpack(tail)[5]
    if directory > _DIRECTORY:
        raise ValueError(f"its list of arrays takes {directory} bytes, {_DIRECTORY} are the most")
    out: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > MOST_BYTES:
            raise ValueError(f"its arrays take {total} bytes, {MOST_BYTES} are the most")
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if name in out:
                raise ValueError(f"it holds {shown(name)} twice")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                raise ValueError(f"{shown(name)} is compressed in way {entry.compress_type}, or encrypted: use deflate")
            with archive.open(entry) as opened:
                out[name] = _array(opened, entry.file_size, name)
    return out


def _array(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """The array of a ``.npy`` file of ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{shown(name)} has version {version} of numpy's format: 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.kind not in "iubfU" or not dtype.itemsize:
        raise ValueError(f"{shown(name)} holds {shown(dtype)}: numbers, booleans and texts are read")
    rest = size - file.tell()
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"{shown(name)} says that it is {shown(shape)} of {dtype}, and {rest} bytes follow")
    values = np.frombuffer(file.read(rest), dtype, count=prod(shape))
    return values.reshape(shape, order="F" if by_columns else "C")
