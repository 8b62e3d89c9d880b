"""Tables of text."""

from __future__ import annotations

from fa4_prefixlm.testing import tables


def test_columns() -> None:
    rows = [("a", "", "number"), ("long name", "", "7")]
    assert tables.columns(rows) == ["a          number", "long name  7"]
    assert tables.columns(rows, right=[2]) == ["a          number", "long name       7"]
    assert tables.columns([]) == []
    assert tables.titled("title", ["x", "y"]) == "title\n  x\n  y"
    assert tables.markdown(["", "b"], [["1", "2"]]) == ["|  | b |", "| --- | --- |", "| 1 | 2 |"]
