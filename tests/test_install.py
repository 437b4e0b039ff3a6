"""An editable install finds mmflex from wherever Python is started."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_an_editable_install_is_a_path(tmp_path: Path) -> None:
    """A finder, which setuptools takes otherwise, comes after the folders of sys.path: started beside a clone that is
    called mmflex, Python would take that folder for the package."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than pyproject.toml wants")
    clone = tmp_path / "mmflex"
    for name in ("mmflex", "mask_builders"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    code = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        paths = [name for name in opened.namelist() if name.endswith((".pth", ".py"))]
        assert [opened.read(name).decode().strip() for name in paths] == [str(clone)]
