"""The native backend's kernel: FA4's own SM90 main loop over a row's interval, without block lists or a mask_mod.

A tile's visible keys are one range of key tiles, masked at its ends and not in the middle: the shape of FA4's loop for
a causal or local mask. So the kernel is a subclass of FA4's that keeps its loads, pipelines and softmax, and replaces
where the range begins and ends (`BlockInfo`) and what masks a tile (`AttentionMask`).

It depends on FA4's internals, and is offered only on builds whose internals are those it was run on
(`Build.native_refusal`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


def row_intervals(module: str, bounds: Any, tiles: Any) -> Any:
    """What the kernel reads of a plan, in the place where FA4 carries its block lists.

    Args:
        module: the build.
        bounds: `(rows, 2)` int32 on the device, `[lo, hi)` of each query row.
        tiles: `(slots, 4)` int32 on the device, first, full_first, full_end and end of a query tile in key tiles; see
            `geometry.tiles.tile_slots`.
    """
    lists = importlib.import_module(f"{module}.block_sparsity").BlockSparseTensors
    return lists(mask_block_cnt=bounds, mask_block_idx=tiles)


@functools.cache
def kernel_class(module: str) -> type:
    """The kernel for the build imported as `module`."""

    def part(name: str) -> Any:
        return importlib.import_module(f"{module}.{name}")

    upstream: Any = part("flash_fwd_sm90").FlashAttentionForwardSm90
    block_info: Any = part("block_info").BlockInfo
    masking = part("mask")
    layout_utils = importlib.import_module("quack.layout_utils")

    @dataclasses.dataclass(frozen=True)
    class TileRange(block_info):
        """The range of key tiles of a query tile, read instead of computed.

        The first masked loop of FA4 takes the key tiles `[full_end, end)`, the unmasked one `[full_first, full_end)`,
        the last masked one `[first, full_first)`.
        """

        tiles: Any = None
        rows: Any = None

        def get_n_block_min_max(self, seqlen_info: Any, m_block: Any, *_: Any) -> Any:
            if self.rows is not None:
                self.rows.read(seqlen_info, m_block)
            first = self.tiles[self._slot(seqlen_info, m_block), 0]
            end = self.tiles[self._slot(seqlen_info, m_block), 3]
            return first, cutlass.max(end, first + 1)

        def get_n_block_min_causal_local_mask(self, seqlen_info: Any, m_block: Any, n_block_min: Any) -> Any:
            return self.tiles[self._slot(seqlen_info, m_block), 2]

        def get_n_block_min_before_local_mask(self, seqlen_info: Any, m_block: Any, n_block_min: Any) -> Any:
            if const_expr(self.window_size_left is None):
                return n_block_min
            return self.tiles[self._slot(seqlen_info, m_block), 1]

        def _slot(self, seqlen_info: Any, m_block: Any) -> Any:
            # FA4's padded offset, counting in query tokens of a tile, is the rule of `geometry.tiles.tile_slots`.
            return seqlen_info.padded_offset_q // (self.tile_m // self.qhead_per_kvhead_packgqa) + m_block

    class RowBounds:
        """`lo` and `hi` of the rows a thread holds, in registers; read once for a query tile."""

        def __init__(self, bounds: Any, kernel: Any, thr_mma: Any, lower: bool) -> None:
            self.bounds, self.lower = bounds, lower
            self.tile_m = kernel.tile_m
            self.heads = kernel.qhead_per_kvhead if kernel.pack_gqa else 1
            corner = cute.make_identity_tensor((kernel.tile_m, kernel.tile_n))
            self.where = layout_utils.reshape_acc_to_mn(thr_mma.partition_C(corner))
            self.count = const_expr(cute.size(self.where.shape[0]))
            self.hi = cute.make_rmem_tensor((self.count,), Int32)
            self.lo: Any = cute.make_rmem_tensor((self.count,), Int32) if lower else None

        def read(self, seqlen_info: Any, m_block: Any) -> None:
            for r in range(self.count):
                row = seqlen_info.offset_q + (self.where[r, 0][0] + m_block * self.tile_m) // self.heads
                self.hi[r] = self.bounds[row, 1]
                if self.lower:
                    self.lo[r] = self.bounds[row, 0]

    @dataclasses.dataclass(frozen=True)
    class IntervalMask:
        """In place of `AttentionMask`: keeps the keys `[lo, hi)` of each row. `hi` is never past the last key."""

        rows: Any
        tile_n: int

        def apply_mask(self, acc_S: Any, n_block: Any, **_: Any) -> None:
            self._keep(acc_S, n_block)

        @cute.jit
        def _keep(self, acc_S: Any, n_block: Any) -> None:
            scores = layout_utils.reshape_acc_to_mn(acc_S)
            first_key = n_block * self.tile_n + self.rows.where[0][1]
            for r in cutlass.range_constexpr(self.rows.count):
                below = masking.sm90_col_to_r2p_idx(self.rows.hi[r] - first_key)
                above = None
                if const_expr(self.rows.lower):
                    above = masking.sm90_col_to_r2p_idx(cutlass.max(self.rows.lo[r] - first_key, 0))
                masking.mask_r2p_lambda(scores[r, None], functools.partial(keep, above, below), rank1=True)

    def keep(above: Any, below: Any, chunk: int) -> Any:
        """One bit for each of a row's 32 elements of the chunk, set in [above, below)."""
        bits = masking.r2p_bitmask_below(below, chunk)
        return bits if above is None else bits & masking.r2p_bitmask_above(above, chunk)

    class PrefixLMForwardSm90(upstream):
        """lower: some row's interval begins past key 0, so the left end of a tile's range is masked too."""

        # FA4 sets it where it finds block lists, and takes `row_intervals` for some.
        use_block_sparsity = property(lambda self: False, lambda self, value: None)

        def __init__(self, *arguments: Any, lower: bool, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.lower = lower

        def load(self, *arguments: Any, **named: Any) -> None:
            given = by_name(upstream.load, arguments, named)
            self._replace(given, None)
            upstream.load(self, **given)

        def mma(self, *arguments: Any, **named: Any) -> None:
            given = by_name(upstream.mma, arguments, named)
            thr_mma = given["tiled_mma_qk"].get_slice(given["tidx"])
            rows = RowBounds(given["blocksparse_tensors"].mask_block_cnt, self, thr_mma, self.lower)
            self._replace(given, rows)
            given["AttentionMaskCls"] = lambda seqlen_info, **_: IntervalMask(rows, self.tile_n)
            upstream.mma(self, **given)

        def _replace(self, given: dict[str, Any], rows: Any) -> None:
            tokens = self.tile_m // (self.qhead_per_kvhead if self.pack_gqa else 1)
            given["SeqlenInfoCls"] = functools.partial(given["SeqlenInfoCls"], tile_m=tokens, tile_n=self.tile_n)
            given["block_info"] = TileRange(
                self.tile_m,
                self.tile_n,
                is_causal=False,
                is_local=True,
                window_size_left=Int32(0) if self.lower else None,
                qhead_per_kvhead_packgqa=self.qhead_per_kvhead if self.pack_gqa else 1,
                tiles=given["blocksparse_tensors"].mask_block_idx,
                rows=rows,
            )
            given["blocksparse_tensors"] = None

    return PrefixLMForwardSm90


def by_name(method: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(method).parameters)[1:]
    return {**dict(zip(names, arguments, strict=False)), **named}
