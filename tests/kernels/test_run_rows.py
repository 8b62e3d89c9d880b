"""The launch that makes masks of transformers, in Triton's interpreter, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is. tests/integrations/test_transformers_masks.py runs on it too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("transformers.masking_utils")

from transformers import masking_utils

from fa4_prefixlm.integrations.transformers import masks
from fa4_prefixlm.integrations.transformers.mask_functions import read
from fa4_prefixlm.integrations.transformers.row_bounds import NotIntervals, bounds_of
from fa4_prefixlm.integrations.transformers.row_runs import bounds_of_runs
from fa4_prefixlm.integrations.transformers.row_terms import terms_of
from fa4_prefixlm.kernels import run_rows as kernel
from tests.kernels.counted import Counted
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

CAUSAL = masking_utils.causal_mask_function
EVERYTHING = masking_utils.bidirectional_mask_function
# Of the usual masks of models, by a window and ids.
USUAL: dict[str, Callable[[int, torch.Tensor], Any]] = {
    "causal": lambda window, ids: CAUSAL,
    "sliding": lambda window, ids: masking_utils.sliding_window_causal_mask_function(window),
    "global": lambda window, ids: masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(ids)),
    "Gemma 3's local": lambda window, ids: masking_utils.and_masks(
        masking_utils.sliding_window_overlay(window), USUAL["global"](window, ids)
    ),
    "PaliGemma 2's local": lambda window, ids: masking_utils.or_masks(
        USUAL["sliding"](window, ids), masking_utils.blockwise_overlay(ids)
    ),
    "bidirectional": lambda window, ids: masking_utils.sliding_window_bidirectional_mask_function(window),
}


def sizes_of(function: Any, batch: int, rows: int, keys: tuple[int, int], first: Any, real: Any) -> dict[str, Any]:
    sizes = {"batch_size": batch, "q_length": rows, "kv_length": keys[1] - keys[0], "kv_offset": keys[0]}
    sizes |= {"q_offset": first, "mask_function": function, "attention_mask": real, "use_vmap": False}
    return sizes | {"device": "cpu", "allow_is_causal_skip": False}


def check(sizes: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the launch, and whether torch, found more than a run."""
    expression = read(sizes["mask_function"])
    made, reading = masks._in_one_launch(expression, sizes)
    bounds, several = bounds_of_runs(*masks._unpadded(expression, sizes))
    numbers = reading.numbers()
    assert made.dtype == bounds.dtype == torch.int32
    if numbers[kernel.SEVERAL]:
        assert (made == masks.NO_GOOD).all()
    elif several:  # the launch looks at what is left within the keys
        general, overflow = bounds_of(*masks._unpadded(expression, sizes))
        assert not overflow
        shown, expected = (masks.visible(own, sizes["kv_length"]) for own in (made, general.unsqueeze(1)))
        assert (shown == expected).all()
    else:
        assert torch.equal(made.squeeze(1), bounds)
        assert numbers == masks._to_read(bounds).numbers()
    return bool(numbers[kernel.SEVERAL]), bool(several)


def random_ids(rng: random.Random, batch: int, width: int) -> torch.Tensor:
    """Runs of ids: mostly each its own, negative ones between; or few of them, negative or wider than the row."""
    rows, own = [], rng.random() < 0.8
    for _ in range(rng.choice((1, batch))):
        row: list[int] = []
        while len(row) < width:
            number = len(row) if own else rng.choice((-7, 0, 1, width + 3))
            row += [rng.choice((-1, number, number))] * rng.choice((1, 2, rng.randint(1, width)))
        rows.append(row[:width])
    return torch.tensor(rows, dtype=rng.choice((torch.int32, torch.int64)))


def random_real(rng: random.Random, batch: int, width: int) -> torch.Tensor | None:
    """A run of real keys in each row, at times none, and at times with holes."""
    kind = rng.choice(("none", "runs", "runs", "holes"))
    if kind == "none":
        return None
    real = torch.zeros(batch, width, dtype=torch.bool)
    for row in real:
        edges = sorted((rng.choice((0, rng.randint(0, width))), rng.choice((width, rng.randint(0, width)))))
        row[slice(*edges)] = True
        if kind == "holes":
            row[rng.randrange(width)] = False
    return real


def random_function(rng: random.Random, batch: int, width: int) -> Any:
    """A mask function of two terms, over one kind of ids."""
    ids = random_ids(rng, batch, width)
    overlay = rng.choice((masking_utils.blockwise_overlay, masking_utils.packed_sequence_mask_function))(ids)

    def term() -> Any:
        size = rng.choice((1, 3, rng.randint(1, width), 2**40))
        leaves = (
            CAUSAL,
            EVERYTHING,
            masking_utils.sliding_window_overlay(size),
            masking_utils.sliding_window_bidirectional_overlay(size),
            overlay,
        )
        return masking_utils.and_masks(*rng.choices(leaves, k=rng.randint(1, 3)))

    function = rng.choice((masking_utils.and_masks, masking_utils.or_masks))(term(), term())
    return rng.choice((function, masking_utils.and_masks(function, term())))


def random_sizes(rng: random.Random, longest: int) -> dict[str, Any]:
    batch, end = rng.choice((1, 2, 3)), rng.randint(20, longest)
    begin = rng.choice((0, 0, rng.randint(0, end // 2)))
    rows = rng.randint(1, end)
    first: Any = rng.choice((0, max(0, end - rows), rng.randint(0, end)))
    first = first if rng.random() < 0.6 else torch.tensor(first, dtype=rng.choice((torch.int32, torch.int64)))
    function = random_function(rng, batch, end + rng.choice((0, 0, 9)))
    real = random_real(rng, batch, max(begin + 1, end - rng.choice((0, 0, 5))))
    return sizes_of(function, batch, rows, (begin, end), first, real)


if INTERPRETED:

    @pytest.mark.parametrize("seed", range(6))
    def test_random_masks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """In blocks that runs go beyond, looked for in steps that are shorter and longer than blocks."""
        rng = random.Random(seed)
        monkeypatch.setattr(kernel, "BLOCK", rng.choice((8, 16, 64)))
        monkeypatch.setattr(kernel, "TOGETHER", rng.choice((8, 32)))
        found = [check(random_sizes(rng, 90)) for _ in range(25)]
        assert sum(mine and not torchs for mine, torchs in found) <= 1, "no more than the general path is for"
        assert sum(not mine for mine, _ in found) >= 6

    @pytest.mark.parametrize("name", USUAL)
    @pytest.mark.parametrize("padded", [False, True])
    def test_usual_masks(name: str, padded: bool) -> None:
        """In the blocks of a GPU; an image that several of them are in."""
        ids = torch.full((2, 3000), -1)
        ids[0, 100:1900], ids[1, 250:300], ids[1, 300:520] = 0, 0, 1
        real = torch.ones(2, 3000, dtype=torch.bool)
        real[1, :40] = not padded
        for rows in (3000, 1300):
            sizes = sizes_of(USUAL[name](700, ids), 2, rows, (0, 3000), 3000 - rows, real)
            assert check(sizes) == (False, False)

    def test_two_runs_that_all_but_touch() -> None:
        """A window, and real keys that end before it: row 12 sees `[0, 13)`, and row 13 not key 10."""
        real = torch.zeros(1, 40, dtype=torch.bool)
        real[:, :10] = True
        near = masking_utils.and_masks(CAUSAL, masking_utils.sliding_window_overlay(3))
        function = masking_utils.or_masks(
            near, masking_utils.and_masks(CAUSAL, masking_utils.padding_mask_function(real))
        )
        for rows, several in ((13, False), (14, True)):
            assert check(sizes_of(function, 1, rows, (0, 40), 0, None)) == (several, several)

    def test_ids_that_change_in_place() -> None:
        ids = torch.full((1, 60), -1)
        for _ in range(2):
            ids[:, 20:30] += 1
            for name in ("global", "Gemma 3's local"):
                assert check(sizes_of(USUAL[name](9, ids), 1, 60, (0, 60), 0, None)) == (False, False)

    @pytest.mark.parametrize("name", USUAL)
    def test_the_last_positions_that_it_takes(name: str) -> None:
        ids, far = torch.zeros(1, 9, dtype=torch.long), 2**30
        for function in (USUAL[name](2**40, ids), EVERYTHING):
            assert check(sizes_of(function, 1, 40, (far - 100, far), far - 41, None)) == (False, False)
            with pytest.raises(NotIntervals):
                masks._in_one_launch(read(function), sizes_of(function, 1, 40, (far - 100, far), far - 40, None))

    def test_what_it_does_not_take() -> None:
        ids, real = torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.bool)
        blocks, packed = masking_utils.blockwise_overlay(ids), masking_utils.packed_sequence_mask_function(ids)
        chunked = masking_utils.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.long))
        three = masking_utils.or_masks(CAUSAL, blocks, masking_utils.sliding_window_overlay(3))
        for function, more in (
            (chunked, {}),
            (three, {}),
            (masking_utils.and_masks(blocks, packed), {}),
            (masking_utils.or_masks(CAUSAL, masking_utils.padding_mask_function(real.clone())), {}),
            (masking_utils.blockwise_overlay(ids.to(torch.int16)), {}),
            (masking_utils.blockwise_overlay(ids.t().contiguous().t()), {}),
            (masking_utils.blockwise_overlay(torch.zeros(3, 40, dtype=torch.long)), {}),
            (CAUSAL, {"q_offset": 2**30}),
            (CAUSAL, {"q_offset": torch.tensor([0, 1])}),
            (CAUSAL, {"kv_length": 2**31}),
        ):
            with pytest.raises(NotIntervals):
                masks._in_one_launch(read(function), sizes_of(function, 2, 40, (0, 40), 0, real) | more)

else:

    def test_a_mask_takes_seven_operations_and_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
        launched: list[object] = []
        monkeypatch.setattr(kernel, "launch_run_rows", lambda *arguments: launched.append(arguments))
        ids = torch.tensor([[-1, 0, 0, -1, 1, 1, -1, -1]])
        real = torch.ones(1, 8, dtype=torch.bool)
        for name, make in USUAL.items():
            sizes = sizes_of(make(4, ids), 1, 8, (0, 8), 0, real)
            launched.clear()
            with Counted() as counted:
                masks._in_one_launch(read(sizes["mask_function"]), sizes)
            assert len(launched) == 1, name
            assert len(counted.names) <= 7, (name, counted.names)

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("name", USUAL)
    def test_the_usual_masks_are_one_or_two_terms(name: str) -> None:
        assert 1 <= len(terms_of(read(USUAL[name](9, torch.zeros(1, 9, dtype=torch.long))))) <= 2

    @pytest.mark.parametrize("ids", ["*i32", "*i64"])
    def test_it_compiles_for_hopper(ids: str) -> None:
        pointers = {"bounds": "*i32", "counts": "*i32", "ids": ids, "real": "*i1", "first_there": "*i64"}
        constants: dict[str, object] = {"BLOCK": kernel.BLOCK, "TOGETHER": kernel.TOGETHER}
        constants |= {"EMPTY_LO": kernel.EMPTY_LO, "EMPTY_HI": kernel.EMPTY_HI, "NUMBERS": kernel.NUMBERS}
        assert ".target sm_90" in compile_for_hopper(kernel.run_rows_kernel, pointers, constants)
