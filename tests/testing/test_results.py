"""Files of results, as benchmarks write them."""

from __future__ import annotations

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_row_is_a_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from harness import write

    content = {
        "device": "a GPU",
        "sizes": [1, 2],
        "wrong": [],
        "results": [{"ms": 1.23456}, {"ms": None, "of": {"a": 2}}],
    }
    write(tmp_path / "new" / "own.json", content)
    text = (tmp_path / "new" / "own.json").read_text()
    assert json.loads(text) == {**content, "results": [{"ms": 1.235}, {"ms": None, "of": {"a": 2}}]}
    assert [line.strip(" ,") for line in text.splitlines()] == [
        "{",
        '"device": "a GPU"',
        '"sizes": [1, 2]',
        '"wrong": []',
        '"results": [',
        '{"ms": 1.235}',
        '{"ms": null, "of": {"a": 2}}',
        "]",
        "}",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["own.json"]
    write(tmp_path / "empty.json", {})
    assert json.loads((tmp_path / "empty.json").read_text()) == {}
