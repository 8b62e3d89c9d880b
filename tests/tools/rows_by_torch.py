"""What rows see by torch operations alone, so that a test can make it wrong in one place."""

from __future__ import annotations

import pytest

from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.geometry.telling_rows import TellingRows
from fa4_prefixlm.runtime import plans


def rows_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans call `backends.base.row_bounds` for their rows, on a GPU too, and none of the launches in its place."""
    monkeypatch.setattr(plans, "fills_in_one_launch", lambda *_: False)
    monkeypatch.setattr(MaskedBatch, "_composed", lambda _: None)
    monkeypatch.setattr(TellingRows, "pieces", lambda *_: None)
