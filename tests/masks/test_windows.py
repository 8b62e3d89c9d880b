"""Windows that look left, right or both ways, against the words of `window`, pair by pair."""

from __future__ import annotations

import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.traits import CausalWindow
from fa4_prefixlm.masks import causal, everything, gemma3, same_span, window
from fa4_prefixlm.masks.closed_form import closed_form
from fa4_prefixlm.testing.batches import Batch, random_batch
from fa4_prefixlm.testing.stages import dense, prepare

SIDES = [None, 1, 2, 5, 40, 2**31 - 1, 2**40]


def by_its_words(left: int | None, right: int | None, rows: int, keys: int) -> torch.Tensor:
    """`query - key < left` and `key - query <= right`."""
    result = torch.zeros(rows, keys, dtype=torch.bool)
    for row in range(rows):
        query = row + keys - rows
        for key in range(keys):
            not_far_left = left is None or query - key < left
            not_far_right = right is None or key - query <= right
            result[row, key] = not_far_left and not_far_right
    return result


@pytest.mark.parametrize("right", [0, *SIDES])
@pytest.mark.parametrize("left", SIDES)
def test_windows(left: int | None, right: int | None) -> None:
    mask, rng = window(left, right), random.Random(f"{left}{right}")
    assert closed_form(mask) is not None
    for _ in range(4):
        batch = random_batch(rng, longest=60)
        found = prepare(batch, mask, {})
        assert (found.traits.intervals, found.traits.banded) == (1, True)
        for index, (rows, keys) in enumerate(batch.seqlens):
            wanted = by_its_words(left, right, rows, keys)
            assert torch.equal(mask.dense(seqlen=keys, seqlen_q=rows), wanted)
            own = slice(batch.cu_q[index], batch.cu_q[index] + rows)
            assert torch.equal(dense(found.bounds, keys, own), wanted)


def test_what_a_window_was_it_still_is() -> None:
    """`window(w)` limits the left side alone; with `causal` it is the mask of FA4's windowed call."""
    assert repr(window(4)) == "window(4)"
    assert window(4) == window(4, None)
    for mask in (causal & window(9), window(9, 0)):
        assert prepare(Batch(((30, 30),), ((),)), mask, {}).traits.causal_only == CausalWindow(9)
    assert closed_form(causal & window(9)) == closed_form(window(9, 0))


def test_both_ways_is_a_distance() -> None:
    position = torch.arange(30)
    near = (position[:, None] - position).abs() <= 6
    assert torch.equal(window(7, 6).dense(seqlen=30), near)


@pytest.mark.parametrize("mask", [everything, everything & window(None), everything | everything], ids=repr)
def test_everything_takes_more_queries_than_keys(mask: fp.Mask) -> None:
    """Encoders and cross-attention: softmax over all keys."""
    q, k, v = torch.randn(2, 9, 2, 8), torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(own.transpose(1, 2) for own in (q, k, v)))
    torch.testing.assert_close(fp.attention(q, k, v, mask=mask), wanted.transpose(1, 2))
    with pytest.raises(fp.InputError, match="seqlen_q"):
        fp.attention(q, k, v, mask=window(3, 3))


def test_repr_and_numpy_integers() -> None:
    numpy = pytest.importorskip("numpy")
    assert window(numpy.int64(4), numpy.int32(2)) == window(4, 2)
    assert [repr(own) for own in (everything, window(None, 2), window(4, 0))] == [
        "everything",
        "window(None, 2)",
        "window(4, 0)",
    ]


@pytest.mark.parametrize("left", [0, -1, True, 2.0, "4"])
def test_a_left_side_is_a_positive_number(left: object) -> None:
    with pytest.raises(fp.InputError, match="window: expected a positive number of tokens"):
        window(left)  # type: ignore[arg-type]


@pytest.mark.parametrize("right", [-1, False, 2.0, "4"])
def test_a_right_side_is_a_number(right: object) -> None:
    with pytest.raises(fp.InputError, match="right: expected a number of tokens, at least 0"):
        window(4, right)  # type: ignore[arg-type]


def test_a_sliding_layer_has_a_window() -> None:
    with pytest.raises(fp.InputError, match="window: expected a positive number of tokens, got None"):
        gemma3.local_layers(None, like="vllm")  # type: ignore[arg-type]


def test_rows_that_look_ahead_are_not_prefilled_in_chunks() -> None:
    for mask in (everything, window(4, 3), window(4, 3) | same_span("image")):
        with pytest.raises(fp.InputError, match="of which no row sees to the end of the keys"):
            fp.safe_chunk_end(8, None, mask)
    assert fp.safe_chunk_end(8, None, window(4, 0)) == 8
    assert fp.safe_chunk_end(8, None, window(4, 3) & causal) == 8
