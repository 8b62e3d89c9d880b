"""Where tokens stand and the spans that they passed, in Triton's interpreter, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fa4_prefixlm.batch.ranges import Spans
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.masks import same_span
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch
from fa4_prefixlm.testing.stages import prepare
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.kernels import token_places
from fa4_prefixlm.masks.interval_lists import EMPTY_LO


def check(batch: Batch) -> None:
    stage = prepare(batch, same_span("image"), {"image": batch.spans})
    mine, wanted = token_places.token_places(stage.sizes), intervals.tokens(stage.sizes)
    for name in ("sequence", "key_offset", "seqlen_k", "position"):
        assert torch.equal(getattr(mine, name), getattr(wanted, name)), name
    spans = stage.spans["image"]
    shuffled = dataclasses.replace(spans, values=spans.values[:, torch.randperm(spans.values.shape[1])])
    for own in (spans, shuffled):
        found = token_places.latest_span(own, wanted.sequence, wanted.position)
        expected = intervals.latest_span(own, wanted.sequence, wanted.position)
        assert all(map(torch.equal, found, expected))


if INTERPRETED:

    @pytest.mark.parametrize("seed", range(20))
    def test_random_batches(seed: int) -> None:
        check(random_batch(random.Random(seed), longest=900))

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(name: str) -> None:
        check(UGLY[name])

    def test_more_spans_than_a_token_looks_at() -> None:
        count = token_places.MOST_SPANS
        for width in (count, count + 1):
            check(Batch(((3 * width, 3 * width),), (tuple((3 * n, 3 * n + 2) for n in range(width)),)))

    def test_strided_spans() -> None:
        values = torch.tensor([[[4, 9], [0, 0], [20, 22]]], dtype=torch.int32)
        sequence, position = torch.zeros(30, dtype=torch.int32), torch.arange(30, dtype=torch.int32)
        wide = torch.zeros(1, 6, 4, dtype=torch.int32)
        wide[:, ::2, ::2] = values
        found = token_places.latest_span(Spans(wide[:, ::2, ::2], None, 5), sequence, position)
        expected = intervals.latest_span(Spans(values, None, 5), sequence, position)
        assert all(map(torch.equal, found, expected))

else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def test_they_compile_for_hopper() -> None:
        names = ("cu_seqlens_q", "cu_seqlens_k", "sequences", "key_offsets", "seqlens_k", "positions")
        constants: dict[str, object] = {"BLOCK": token_places.BLOCK}
        kernel = token_places.token_places_kernel
        assert ".target sm_90" in compile_for_hopper(kernel, dict.fromkeys(names, "*i32"), constants)
        names = ("spans", "sequences", "positions", "starts", "ends")
        constants |= {"EMPTY": EMPTY_LO}
        kernel = token_places.latest_span_kernel
        assert ".target sm_90" in compile_for_hopper(kernel, dict.fromkeys(names, "*i32"), constants)
