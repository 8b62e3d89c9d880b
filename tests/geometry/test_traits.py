"""What a mask asks of a kernel."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.traits import CausalWindow
from fa4_prefixlm.geometry.traits import traits as traits_of
from fa4_prefixlm.masks import causal, prefix, same_span, window
from fa4_prefixlm.testing.batches import Batch, random_batch, random_mask
from fa4_prefixlm.testing.stages import prepare


@pytest.mark.parametrize(
    ("mask", "spans", "found"),
    [
        (fp.PrefixLM(), (), CausalWindow(None)),
        (fp.PrefixLM(7), ((3, 60),), CausalWindow(7)),  # behind the queries, which begin at 60
        (fp.PrefixLM(7), ((3, 61),), None),
        (fp.PrefixLM(7, clamp=False), ((60, 61),), None),
        (causal, None, CausalWindow(None)),
        (causal & window(9), None, CausalWindow(9)),
        (causal & window(2**33), None, CausalWindow(2**30)),  # FA4 counts in int32
        ((causal & window(9)) | same_span("image"), ((0, 10),), CausalWindow(9)),
        (window(9), None, None),
        (causal & (prefix("image") | window(9)), ((0, 10),), None),
    ],
    ids=str,
)
def test_plain_batches(mask: fp.Mask, spans: tuple | None, found: CausalWindow | None) -> None:
    given: dict = {name: [spans, ((0, 50),)] for name in mask.names}
    stages = prepare(Batch(((40, 100), (0, 50)), ((), ())), mask, given)
    assert stages.traits.causal_only == found
    if spans and found:
        unknown = {name: dataclasses.replace(own, host=None) for name, own in stages.spans.items()}
        assert traits_of(mask, unknown, stages.sizes).causal_only is None


def test_plain_is_what_the_mask_is() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        batch, mask = random_batch(rng, longest=60), random_mask(rng)
        found = prepare(batch, mask).traits.causal_only
        for (rows, keys), own in zip(batch.seqlens, batch.spans, strict=True):
            seen = mask.dense(seqlen=keys, ranges=own, seqlen_q=rows)
            text = fp.PrefixLM(mask.window).dense(seqlen=keys, ranges=(), seqlen_q=rows)
            if found is not None:
                assert torch.equal(seen, text)
