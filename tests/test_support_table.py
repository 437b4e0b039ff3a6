"""docs/families.md says what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")


def test_the_support_table_is_up_to_date() -> None:
    from support_table import table

    page = Path(__file__).parents[1] / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == table(), "run: python -m tests.support_table > docs/families.md"
