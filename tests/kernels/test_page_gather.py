"""The copy of keys out of pages: Triton's interpreter against plain torch, and plain torch against a loop.

`test_in_the_interpreter` runs this file again with the interpreter on, as in `test_row_update`.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")


from fa4_prefixlm import InputError
from fa4_prefixlm.kernels import page_gather
from fa4_prefixlm.kernels.page_gather import gather_pages, gather_pages_torch

UNTOUCHED = 77.0
GARBAGE = (-1, 2**31 - 1, -(2**31))


class Case:
    """Random pages. Those that hold no wanted key are NaN, and their entries in the table are garbage."""

    def __init__(self, seed: int, lengths: list[int], page_size: int, heads: int, dims: tuple[int, int]) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.first = [rng.choice([0, rng.randrange(40), page_size, 2 * page_size - 1]) for _ in lengths]
        self.lengths = lengths
        used = [
            range(first // page_size, -(-(first + n) // page_size)) if n else range(0)
            for first, n in zip(self.first, lengths, strict=True)
        ]
        width = max((own.stop for own in used), default=0) + 2
        pages = rng.sample(range(sum(map(len, used)) + 3), sum(map(len, used)))
        table = torch.tensor(rng.choices(GARBAGE, k=len(lengths) * width), dtype=torch.int32).view(-1, width)
        wanted = iter(pages)
        for sequence, own in enumerate(used):
            for page in own:
                table[sequence, page] = next(wanted)
        self.table, self.page_size = table, page_size
        dtype = rng.choice([torch.bfloat16, torch.float16])
        self.caches = []
        for dim in dims:
            cache = torch.full((len(pages) + 3, page_size, heads, dim), float("nan"), dtype=dtype)
            cache[pages] = torch.randn(len(pages), page_size, heads, dim, generator=generator).to(dtype)
            self.caches.append(rng.choice([strided_heads_first, strided_with_gap, torch.clone])(cache))
        self.total = sum(lengths) + rng.choice([0, 1, 30])
        self.cu = torch.tensor([0, *lengths]).cumsum(0).int()

    def run(self, gather) -> list[torch.Tensor]:
        outs = [
            torch.full((self.total, *cache.shape[2:]), UNTOUCHED, dtype=cache.dtype, device=cache.device)
            for cache in self.caches
        ]
        gather(*self.caches, self.table, torch.tensor(self.first, dtype=torch.int32), self.cu, *outs)
        return outs

    def by_loop(self) -> list[torch.Tensor]:
        outs = []
        for cache in self.caches:
            rows = []
            for sequence, (first, count) in enumerate(zip(self.first, self.lengths, strict=True)):
                for key in range(first, first + count):
                    rows.append(cache[int(self.table[sequence, key // self.page_size]), key % self.page_size])
            rest = torch.full((self.total - len(rows), *cache.shape[2:]), UNTOUCHED, dtype=cache.dtype)
            outs.append(torch.cat([torch.stack(rows), rest]) if rows else rest)
        return outs

    def check(self, gather) -> None:
        for found, wanted in zip(self.run(gather), self.by_loop(), strict=True):
            assert torch.equal(found, wanted)  # which no NaN is


def strided_heads_first(cache: torch.Tensor) -> torch.Tensor:
    """The layout (num_pages, kv_heads, page_size, head_dim) in memory."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def strided_with_gap(cache: torch.Tensor) -> torch.Tensor:
    """Every second page of a buffer that holds keys and values."""
    return torch.stack([torch.full_like(cache, float("nan")), cache], dim=1)[:, 1]


CASES = {
    "one sequence": ([37], 16, 2, (64, 64)),
    "empty ones around": ([0, 5, 0, 0, 21, 0], 8, 1, (32, 16)),
    "one key each": ([1] * 9, 4, 2, (8, 24)),
    "page size 1": ([6, 3], 1, 2, (40, 40)),
    "a page size that is no power of two": ([30, 50], 12, 3, (24, 72)),
    "wide rows": ([19, 20], 16, 5, (256, 192)),
    "no keys": ([0, 0], 16, 1, (16, 16)),
    "no sequences": ([], 16, 1, (16, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_a_loop(name: str) -> None:
    for seed in range(3):
        case = Case(seed, *CASES[name])
        case.check(gather_pages_torch)
        case.check(gather_pages)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("seed", range(10))
    def test_random_batches(self, seed: int) -> None:
        rng = random.Random(seed)
        lengths = [rng.choice([0, 1, rng.randrange(60)]) for _ in range(rng.randint(1, 7))]
        dims = (rng.choice([8, 64, 96, 128]), rng.choice([8, 64, 80]))
        Case(seed, lengths, rng.choice([1, 3, 16, 64]), rng.choice([1, 2, 3]), dims).check(gather_pages)


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.mark.slow
    def test_in_the_interpreter(self) -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize(("heads", "dims"), [(8, (128, 128)), (1, (64, 64)), (4, (192, 128)), (1, (72, 80))])
    def test_compiles_for_hopper_with_wide_accesses(self, heads: int, dims: tuple[int, int]) -> None:
        caches = [torch.empty(2, 16, heads, dim, dtype=torch.bfloat16, device="meta") for dim in dims]
        pointers = dict.fromkeys(("k_cache", "v_cache", "k_out", "v_out"), "*bf16")
        aligned = (*pointers, "k_stride_page", "v_stride_page")
        pointers |= dict.fromkeys(("page_table", "first_key", "cu_seqlens"), "*i32")
        ptx = compile_for_hopper(
            page_gather.gather_pages_kernel, pointers, page_gather.constants(*caches), aligned=aligned
        )
        assert ".target sm_90" in ptx
        narrow = [line for line in ptx.splitlines() if "b16" in line and ("ld.global" in line or "st.global" in line)]
        assert not narrow, "an access of single elements"
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx

    def test_arguments(self) -> None:
        k, v = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 16)
        table, first, cu = torch.zeros(1, 2).int(), torch.zeros(1).int(), torch.tensor([0, 3]).int()
        good = (k, v, table, first, cu, torch.zeros(5, 2, 8), torch.zeros(5, 2, 16))
        gather_pages(*good)
        for index, message, bad in (
            (1, "v_cache", torch.zeros(3, 5, 2, 16)),
            (2, "page_table: expected dtype", table.long()),
            (2, r"page_table: expected shape \(1, 2\)", torch.zeros(2, 2).int()),
            (3, r"page_table: expected shape", torch.zeros(2).int()),
            (4, r"cu_seqlens: expected shape \(2,\)", first),
            (5, "k_out: expected a contiguous tensor", torch.zeros(5, 8, 2).transpose(1, 2)),
            (6, r"v_out: expected a contiguous tensor of shape \(5, 2, 16\)", torch.zeros(4, 2, 16)),
            (6, "v_out: expected dtype", torch.zeros(5, 2, 16).half()),
        ):
            with pytest.raises(InputError, match=message):
                gather_pages(*(bad if position == index else given for position, given in enumerate(good)))
