"""The bounds of all rows from the few that tell, in Triton's interpreter, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.telling_rows import TellingRows
from fa4_prefixlm.masks import causal, key_in, window
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_spans
from fa4_prefixlm.testing.stages import prepare
from tests.geometry.test_measured import random_expression
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.kernels import pieces as kernel


def check(batch: Batch, mask: fp.Mask, spans: dict) -> bool:
    try:
        stage = prepare(batch, mask, spans)
    except fp.InputError:  # spans that the chunk would have to hold whole
        return False
    if stage.bounds.tags is not None:
        return False
    telling = TellingRows(mask, stage.spans, stage.sizes)
    assert telling.bounds.count >= stage.bounds.count  # evaluated, however many rows tell
    pieces = telling.pieces(stage.bounds.count)
    assert pieces is not None
    made = kernel.all_rows(pieces, stage.sizes.total_q, stage.sizes.device)
    assert made.lo.stride() == made.hi.stride()
    assert torch.equal(made.lo, stage.bounds.lo)
    assert torch.equal(made.hi, stage.bounds.hi)
    return True


if INTERPRETED:

    @pytest.mark.parametrize("seed", range(10))
    def test_random_masks(seed: int) -> None:
        rng, count = random.Random(seed), 0
        while count < 3:
            mask, batch = random_expression(rng), random_batch(rng, longest=500)
            spans = {name: tuple(random_spans(rng, keys) for _, keys in batch.seqlens) for name in mask.names}
            count += check(batch, mask, spans)

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(name: str) -> None:
        assert check(UGLY[name], causal & (window(9) | key_in("image")), {"image": UGLY[name].spans})

else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def test_it_compiles_for_hopper() -> None:
        names = ("begins", "piece_lo", "piece_hi", "lo", "hi")
        constants: dict[str, object] = {"BLOCK": kernel.BLOCK}
        assert ".target sm_90" in compile_for_hopper(kernel.all_rows_kernel, dict.fromkeys(names, "*i32"), constants)
