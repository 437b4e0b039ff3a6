"""Tests go by the shipped constants, whatever was calibrated on this machine."""

import os
import tempfile
from pathlib import Path

os.environ["MMFLEX_CACHE"] = str(Path(tempfile.gettempdir()) / "mmflex-tests-have-no-cache")
