"""What planning takes on a GPU, counted on the CPU: launches, in Triton's interpreter, and torch operations.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fa4_prefixlm as fp
from fa4_prefixlm.backends import base
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.masks import causal, key_in, one_block, prefix, same_span, window
from tests.kernels.counted import Counted
from tests.kernels.triton_processes import INTERPRETED, run_interpreted
from tests.tools.rows_by_torch import rows_by_torch

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.kernels import composed_rows
from fa4_prefixlm.kernels.launch import Launcher

ROWS, RULE, TAGS, LISTS = "composed_rows_kernel", "rule_numbers_kernel", "tags_kernel", "tile_lists_kernel"
# These only make tensors, or look at them in another way.
NO_WORK = {"empty", "narrow", "view", "slice", "select", "unbind", "detach", "alias"}
MASKS = {
    causal & (prefix("image") | window(100)): (ROWS, LISTS),
    causal & same_span("image"): (ROWS, LISTS),
    causal | one_block("image"): (ROWS, TAGS, LISTS),
    causal & (window(100) | key_in("image")): (ROWS, LISTS, RULE),
}

if INTERPRETED:

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    def test_a_plan_of_flex(mask: fp.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
        launched: list[str] = []
        launch = Launcher.__call__

        def noted(self, *arguments) -> None:
            launched.append(self._kernel.fn.__name__)
            with _disable_current_modes():
                launch(self, *arguments)

        monkeypatch.setattr(Launcher, "__call__", noted)
        monkeypatch.setattr(MaskedBatch, "on_gpu", True)
        monkeypatch.setattr(composed_rows, "ROWS", 1024)
        q = torch.empty(1000, 1, 16)
        images = {"image": [[(at, at + 40) for at in range(0, 1000, 100)]]}
        for _ in range(2):  # the first notes things of the mask, and copies it to the device
            launched.clear()
            with Counted(besides=NO_WORK) as counted:
                plan = fp.plan(
                    images, like=(q, q, q), cu_seqlens_q=[0, 1000], cu_seqlens_k=[0, 1000], mask=mask, backend="flex"
                )
        assert tuple(launched) == MASKS[mask]
        assert len(counted.names) <= 2, counted.names
        assert plan.traits.tagged == (TAGS in MASKS[mask])
        assert (plan.prepared.rule is not None) == (RULE in MASKS[mask])

    @pytest.mark.parametrize("mask", [fp.PrefixLM(), fp.PrefixLM(100), *MASKS], ids=str)
    def test_what_tests_make_wrong_is_what_rows_are_made_by(mask: fp.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MaskedBatch, "on_gpu", True)
        rows_by_torch(monkeypatch)
        called: list[fp.Mask] = []
        right = base.row_bounds

        def noted(mask, *more, **named):
            called.append(mask)
            return right(mask, *more, **named)

        monkeypatch.setattr(base, "row_bounds", noted)
        q = torch.empty(300, 1, 16)
        images = {"image": [[(at, at + 40) for at in range(0, 300, 100)]]}
        fp.plan(images, like=(q, q, q), cu_seqlens_q=[0, 300], cu_seqlens_k=[0, 300], mask=mask, backend="flex")
        assert called

else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)
