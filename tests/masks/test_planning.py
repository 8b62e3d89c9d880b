"""What the plan of every mask of the catalogue costs: no synchronisation, and memory in proportion to the tokens."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fa4_prefixlm as fp
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.ranges import Spans
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.masks.models.catalogue import CATALOGUE
from fa4_prefixlm.testing.batches import Batch
from fa4_prefixlm.testing.stages import prepare

SPANS = 3


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def plan_on_a_device(mask: fp.Mask, tokens: int) -> tuple[intervals.Bounds, int]:
    """(the bounds, elements of the largest tensor) where all values are on a device: one that is looked at raises."""
    with FakeTensorMode(), Largest() as largest:
        cuda = torch.device("cuda:0")
        sizes = lengths.packed(
            *(torch.empty(3, dtype=torch.int32, device=cuda) for _ in range(2)),
            total_q=tokens,
            total_k=tokens,
            max_seqlen_q=None,
            max_seqlen_k=None,
            device=cuda,
        )
        spans = {
            name: Spans(torch.empty(2, SPANS, 2, dtype=torch.int32, device=cuda), None, tokens) for name in mask.names
        }
        found = intervals.row_bounds(mask, spans, sizes, intervals.tokens(sizes))
    return found, largest.elements


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_plan_is_linear_in_the_tokens_and_looks_at_no_value(name: str) -> None:
    mask = CATALOGUE[name].mask
    (few, small), (many, large) = (plan_on_a_device(mask, tokens) for tokens in (1024, 4096))
    assert (len(few.lo), len(many.lo)) == (1024, 4096)
    assert large <= 4 * small
    assert small <= 64 * 1024


def test_a_mask_that_looks_at_values_is_found_out() -> None:
    class Looks(fp.PrefixLM):
        def intervals(self, rows):
            assert rows.position.max().item() >= 0
            return super().intervals(rows)

    with pytest.raises(DataDependentOutputException):
        plan_on_a_device(Looks(), 64)


def test_largest_sees_what_grows_with_the_square() -> None:
    with Largest() as largest:
        prepare(Batch(((64, 64),), ((),)), fp.masks.from_flex(lambda b, h, q, kv: q >= kv), {})
    assert largest.elements >= 64 * 64
