"""Documents packed into a sequence."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks import causal, one_block
from fa4_prefixlm.masks.models import gemma3
from fa4_prefixlm.masks.packing import in_documents
from tests.masks.planned import visible_by_bounds


@pytest.mark.parametrize(
    "mask", [gemma3.global_layers(), gemma3.local_layers(5, like="vllm"), causal | one_block("image")], ids=repr
)
def test_documents(mask: fp.Mask) -> None:
    documents, images = [(0, 9), (9, 20), (24, 40)], [(2, 6), (6, 9), (13, 18), (24, 31), (35, 40)]
    wanted = torch.zeros(44, 44, dtype=torch.bool)
    for start, end in documents:
        own = [(first - start, last - start) for first, last in images if start <= first < end]
        wanted[start:end, start:end] = mask.dense(seqlen=end - start, ranges=own)
    packed = in_documents(mask)
    spans = {"image": images, "document": documents}
    assert torch.equal(packed.dense(seqlen=44, ranges=spans), wanted)
    assert torch.equal(visible_by_bounds(packed, spans, 44, 44), wanted)
    assert packed.names == {"image", "document"}


def test_documents_are_checked() -> None:
    with pytest.raises(InputError, match="name: expected a name that"):
        in_documents(causal | one_block("image"), name="image")
    with pytest.raises(InputError, match="mask: expected a mask, got str"):
        in_documents("causal")  # type: ignore[arg-type]
    assert in_documents(causal, name="page").names == {"page"}
