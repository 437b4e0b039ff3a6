"""What an evaluation has measured so far, in a folder, so that one that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..report import replaced


class Progress:
    """Arrays by what they are of; in memory alone where ``folder`` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.arrays: dict[str, np.ndarray] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, *key: Any) -> np.ndarray | None:
        """What was put under a key (JSON data), or None."""
        name = _name(key)
        if name not in self.arrays and self.folder is not None and (self.folder / f"{name}.npy").is_file():
            self.arrays[name] = np.load(self.folder / f"{name}.npy", allow_pickle=False)
        return self.arrays.get(name)

    def put(self, array: np.ndarray, *key: Any) -> None:
        """Keeps an array under a key; in the folder it is complete or not there."""
        name = _name(key)
        self.arrays[name] = array
        if self.folder is not None:
            replaced(self.folder / f"{name}.npy", lambda part: np.save(part, array, allow_pickle=False))

    def get_text(self, *key: Any) -> str | None:
        """A text that was put under a key, or None."""
        array = self.get("text", *key)
        return None if array is None else str(array)

    def put_text(self, text: str, *key: Any) -> None:
        """Keeps a text under a key."""
        self.put(np.array(text), "text", *key)


def _name(key: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
