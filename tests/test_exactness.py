"""The judgement of GPU tests, on right outputs of the reference in which one row, or one LSE, is broken."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error
from fa4_prefixlm.testing.bands import Errors
from fa4_prefixlm.testing.batches import Batch, random_batch
from tests.exactness import WHOLE, allowed, assert_exact, assert_within, errors

BATCH = Batch(((1500, 1500), (600, 900)), (((100, 356), (700, 956)), ((400, 656),)))
MASK = fp.PrefixLM(300)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def answer(request: pytest.FixtureRequest) -> tuple[torch.Tensor, ...]:
    """(out, lse, exact, exact_lse), and the output of the same call without the spans."""
    q, k, v = BATCH.tensors((4, 2), (64, 64), request.param, "cpu", 0)
    where = {"cu_seqlens_q": BATCH.cu_q, "cu_seqlens_k": BATCH.cu_k, "mask": MASK, "return_lse": True}
    out, lse = fp.attention(q, k, v, BATCH.spans, **where)
    causal, _ = fp.attention(q, k, v, [(), ()], **where)
    exact, exact_lse = exact_attention(q, k, v, mask=MASK, spans=BATCH.spans, seqlens=BATCH.as_seqlens)
    return out, lse, exact, exact_lse, causal


def test_a_right_output_is_right(answer: tuple[torch.Tensor, ...]) -> None:
    out, lse, exact, exact_lse, _ = answer
    assert_exact(out, exact, lse, exact_lse)
    assert_exact(out, exact)


def test_a_right_output_of_random_batches_is_right() -> None:
    for seed in range(12):
        batch = random_batch(random.Random(seed), longest=400)
        q, k, v = batch.tensors((4, 2), (64, 64), torch.bfloat16, "cpu", seed)
        where = {"cu_seqlens_q": batch.cu_q, "cu_seqlens_k": batch.cu_k}
        out, lse = fp.attention(q, k, v, batch.spans, return_lse=True, **where)
        exact, exact_lse = exact_attention(q, k, v, mask=fp.PrefixLM(), spans=batch.spans, seqlens=batch.as_seqlens)
        assert_exact(out, exact, lse, exact_lse, context=str(batch))


def test_one_row_that_lacks_its_span_is_wrong(answer: tuple[torch.Tensor, ...]) -> None:
    """Of 2100 tokens and 4 heads. The error of the whole output, alone, does not see it."""
    out, lse, exact, exact_lse, causal = answer
    broken = out.clone()
    broken[800, 2] = causal[800, 2]
    if out.dtype == torch.bfloat16:
        assert relative_error(broken, exact) < 2.5 * WHOLE[out.dtype]
    with pytest.raises(AssertionError, match="error of a row .* row 800 is the worst"):
        assert_exact(broken, exact, lse, exact_lse)
    one_key = out.clone()  # as if one of its keys weighed 5 % more or less
    one_key[800, 2] *= 1.02
    assert relative_error(one_key, exact) < WHOLE[out.dtype], "the whole alone calls it right"
    with pytest.raises(AssertionError, match=r"^error of a row"):
        assert_exact(one_key, exact, lse, exact_lse)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0], ids=str)
def test_one_row_that_was_not_written_is_wrong(answer: tuple[torch.Tensor, ...], value: float) -> None:
    out, lse, exact, exact_lse, _ = answer
    broken = out.clone()
    broken[2099, 3] = value
    with pytest.raises(AssertionError, match="error of a row"):
        assert_exact(broken, exact, lse, exact_lse)


@pytest.mark.parametrize("by", [3e-4, -float("inf"), float("nan")], ids=str)
def test_one_lse_is_wrong(answer: tuple[torch.Tensor, ...], by: float) -> None:
    out, lse, exact, exact_lse, _ = answer
    broken = lse.clone()
    broken[1, 1700] += by
    with pytest.raises(AssertionError, match=r"^error of an LSE"):
        assert_exact(out, exact, broken, exact_lse)


def test_limits_by_a_causal_call(answer: tuple[torch.Tensor, ...]) -> None:
    out, lse, exact, exact_lse, _ = answer
    found = errors(out, exact, lse, exact_lse)
    band = Errors(found.error, found.row_error, found.lse_error)
    limit = allowed(out.dtype, band, error=1.25 * band.error)
    assert_within(found, limit)
    for name in ("error", "row_error", "lse_error"):
        for value in (getattr(limit, name) * 1.01, float("nan")):
            with pytest.raises(AssertionError):
                assert_within(dataclasses.replace(found, **{name: value}), limit)
