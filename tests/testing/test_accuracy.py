"""What says how exact an output is."""

from __future__ import annotations

import math

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.testing.accuracy import exact_attention, overlapping_two_pass, plain_causal, relative_error
from fa4_prefixlm.testing.batches import Batch


def run(batch: Batch, mask: fp.Mask, heads=(4, 2), dims=(16, 24), dtype=torch.float64, **options):
    q, k, v = batch.tensors(heads, dims, dtype, "cpu")
    out, lse = fp.attention(
        q, k, v, batch.spans, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask, return_lse=True, **options
    )
    return (q, k, v), out, lse


def test_the_wrong_answers_are_wrong_and_only_where_there_are_spans() -> None:
    batch = Batch(((120, 120), (60, 60)), (((10, 60), (70, 100)), ()))
    (q, k, v), out, _ = run(batch, fp.PrefixLM(), dims=(16, 16))
    naive = overlapping_two_pass(q, k, v, window=None, spans=batch.spans, seqlens=batch.as_seqlens)
    causal = plain_causal(q, k, v, window=None, seqlens=batch.as_seqlens)
    exact, _ = exact_attention(q, k, v, mask=fp.PrefixLM(), spans=batch.spans, seqlens=batch.as_seqlens)
    assert relative_error(out, exact) < 1e-12
    assert 0.05 < relative_error(naive[:120], exact[:120]) < relative_error(causal[:120], exact[:120])
    for wrong in (naive, causal):
        assert relative_error(wrong[120:], exact[120:]) < 1e-6
        assert relative_error(wrong[:10], exact[:10]) < 1e-6


@pytest.mark.parametrize("window", [None, 9])
def test_overlapping_two_passes_count_the_keys_up_to_a_row_twice(window: int | None) -> None:
    """Pair by pair; in chunks too: a span before it, one that it begins within, and one inside."""
    batch = Batch(((10, 40), (12, 12), (20, 33)), (((3, 11), (25, 38)), ((0, 5),), ((0, 14), (15, 20), (30, 33))))
    q, k, v = batch.tensors((4, 2), (16, 24), torch.float64, "cpu")
    wrong = overlapping_two_pass(q, k, v, window=window, spans=batch.spans, seqlens=batch.as_seqlens)
    row = first_key = 0
    for rows, keys, spans in zip(*batch.as_seqlens, batch.spans, strict=True):
        for position in range(keys - rows, keys):
            counts = torch.zeros(keys, dtype=torch.float64)
            counts[max(0, position + 1 - (window or keys)) : position + 1] = 1
            for start, end in spans:
                if start <= position < end:
                    counts[start:end] += 1
            for head in range(4):
                scores = k[first_key : first_key + keys, head // 2] @ q[row, head] / 4
                weights = scores.exp() * counts
                expected = weights @ v[first_key : first_key + keys, head // 2] / weights.sum()
                torch.testing.assert_close(wrong[row, head], expected, rtol=1e-5, atol=1e-6)
            row += 1
        first_key += keys


def test_relative_error_does_not_hide_nan() -> None:
    good = torch.ones(4)
    assert relative_error(good, good) == 0
    assert math.isnan(relative_error(torch.tensor([1.0, math.nan, 1, 1]), good))
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.zeros(1)))
    assert relative_error(good, torch.zeros(4)) == math.inf
