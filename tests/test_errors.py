"""The errors themselves."""

from __future__ import annotations

import pickle

import fa4_prefixlm as fp


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(fp.UnsupportedError("q", "this", 3)))
    assert isinstance(error, fp.UnsupportedError)
    assert str(error) == "q: expected this, got 3"
