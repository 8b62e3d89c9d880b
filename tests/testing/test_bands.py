"""Errors of an output as a whole and row by row, made by hand, and the limits for them."""

from __future__ import annotations

import math

import pytest
import torch

from fa4_prefixlm.testing.bands import (
    SLACK,
    TYPICAL,
    WORST_CAUSAL,
    Errors,
    causal_limits,
    errors_of,
    largest_lse_error,
    limits,
    row_errors,
)


def test_a_single_row_shows() -> None:
    exact = torch.randn(1000, 4, 64, dtype=torch.float64)
    exact[7, 1] = 0
    out = exact.clone()
    assert row_errors(out, exact).max() == 0
    out[500, 2] *= 1.05
    assert row_errors(out, exact).flatten().argmax() == 500 * 4 + 2
    out[7, 1, 3] = 1e-6
    assert row_errors(out, exact)[7, 1] == math.inf
    out[9, 0, 0] = math.nan
    assert row_errors(out, exact)[9, 0] == math.inf


def test_the_error_of_an_lse() -> None:
    exact = torch.tensor([[1.0, -math.inf]], dtype=torch.float64)
    assert largest_lse_error(exact.float(), exact) == 0
    assert largest_lse_error(torch.tensor([[1.5, -math.inf]]), exact) == 0.5
    assert largest_lse_error(torch.tensor([[1.0, 0.0]]), exact) == math.inf
    assert largest_lse_error(torch.tensor([[math.nan, -math.inf]]), exact) == math.inf
    assert largest_lse_error(torch.empty(2, 0), torch.empty(2, 0)) == 0


def test_errors_of_an_output() -> None:
    exact, lse = torch.randn(10, 2, 8, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    out = exact.clone()
    out[3, 1] *= 1.1
    found = errors_of(out, lse + 0.25, exact, lse)
    assert found.row_error == pytest.approx(0.1)
    assert 0 < found.error < 0.1
    assert found.lse_error == pytest.approx(0.25)
    nothing = torch.empty(0, 2, 8)
    assert errors_of(nothing, torch.empty(2, 0), nothing, torch.empty(2, 0)) == Errors(0.0, 0.0, 0.0)


def test_limits_are_made_of_the_causal_call() -> None:
    typical = TYPICAL["bfloat16"]
    usual = Errors(*(getattr(typical, own) * getattr(SLACK, own) for own in ("error", "row_error", "lse_error")))
    assert limits("bfloat16", None) == usual
    assert limits("bfloat16", Errors(0.0, 0.0, 0.0)) == usual, "a batch of one token has no error"
    assert limits("bfloat16", Errors(math.nan, math.nan, math.nan)) == usual
    assert limits("bfloat16", typical * 2) == usual * 2
    assert limits("bfloat16", typical * 1000) == usual * WORST_CAUSAL, "a causal call that is wrong is no band"
    assert causal_limits("bfloat16") == typical * WORST_CAUSAL
    assert limits("float16", None).error == limits("bfloat16", None).error / 8
