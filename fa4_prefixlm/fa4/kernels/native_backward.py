"""The native backward: FA4's own SM90 backward main loop over the query rows that see each key.

A CTA of that loop owns a key tile and visits query tiles one after the other, so it is asked the transposed question:
which rows see a key? A thread holds few keys (2 of a transposed tile, 6 or 12 of another), so their bounds fit in
registers, and the loop over query tiles reads nothing.

The kernel is a subclass of FA4's that keeps its loads, its pipelines, its products and its epilogue, and replaces what
says which query tiles are visited (`BlockInfo`) and what masks one (`AttentionMask`). It leans on FA4's internals:
`Build.backward_refusal` says whether a build's are those that it was run on.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_prefixlm.fa4.kernels.backward_step_256 import step_class
from fa4_prefixlm.fa4.kernels.folded_heads import fold_loads, fold_sums, query_tile
from fa4_prefixlm.fa4.kernels.native import by_name
from fa4_prefixlm.fa4.kernels.ordered_sums import storing_warp


def key_intervals(module: str, bounds: Any, tiles: Any, order: Any | None) -> Any:
    """What the kernel reads of a plan, in the place where FA4 carries its block lists.

    bounds: `(keys, 2 * K)` int32, K times `begin, end`: the rows that see each key.
    tiles: `(slots, 4)` int32, see `row_tiles`.
    order: of writes to dQ, for the deterministic kernel: `key_tile_ends` or `visitors_before`.
    """
    lists = importlib.import_module(f"{module}.block_sparsity").BlockSparseTensors
    return lists(mask_block_cnt=bounds, mask_block_idx=tiles, full_block_cnt=order)


def heads_side_by_side(make_scheduler: Any, head_dim: int, head_dim_v: int, folded: int) -> Any:
    """FA4's scheduler of varlen tiles, with the order that it has for the deterministic kernel, but longest first.

    make_scheduler: `functools.partial(create, parameters)`, as the kernel gets it.
    folded: query heads that are one to the scheduler.
    """
    (parameters,) = make_scheduler.args
    decoder = parameters.decoder
    # As it counts there what has to fit the L2 cache: Q and dO in 2 bytes, and the float32 sums of dQ.
    fitting = decoder.max_kvblock_in_l2 * (head_dim + head_dim_v) // ((3 * head_dim + head_dim_v) * folded)
    decoder = dataclasses.replace(decoder, head_swizzle=True, max_kvblock_in_l2=fitting)
    return functools.partial(make_scheduler.func, dataclasses.replace(parameters, decoder=decoder))


@functools.cache
def kernel_class(module: str, step: str) -> type:
    """The kernel for the build imported as `module`. step: what computes a query tile, "fa4" is the build's own."""

    def part(name: str) -> Any:
        return importlib.import_module(f"{module}.{name}")

    upstream: Any = part("flash_bwd_sm90").FlashAttentionBackwardSm90
    base: Any = upstream if step == "fa4" else step_class(module)
    block_info: Any = part("block_info").BlockInfo
    masking = part("mask")
    layout_utils = importlib.import_module("quack.layout_utils")

    @dataclasses.dataclass(frozen=True)
    class RowRange(block_info):
        """Which query tiles a key tile visits, read instead of computed.

        Each kind of warp asks for them once per key tile and before all else: the place to read its keys' bounds, too.
        """

        tiles: Any = None
        keys: Any = None
        folded: int = 1

        def get_m_block_min_max(self, seqlen_info: Any, n_block: Any) -> Any:
            # FA4's padded offset, in key tiles, is the rule of `row_tiles`.
            slot = seqlen_info.padded_offset_k // self.tile_n + n_block
            if self.keys is not None:
                self.keys.read(seqlen_info, n_block, slot)
            return self.tiles[slot, 0] * self.folded, self.tiles[slot, 3] * self.folded

    class OwnKeys:
        """The rows that see each key that a thread holds, in registers; read once per key tile."""

        def __init__(self, bounds: Any, tiles: Any, kernel: Any, thr_mma: Any) -> None:
            self.bounds, self.tiles = bounds, tiles
            self.tile_m, self.tile_n, self.swapped = kernel.tile_m, kernel.tile_n, kernel.SdP_swapAB
            self.intervals, self.skip_full = kernel.intervals, kernel.skip_full
            self.col = 0 if self.swapped else 1
            shape = (kernel.tile_n, kernel.tile_m) if self.swapped else (kernel.tile_m, kernel.tile_n)
            corner = cute.make_identity_tensor(shape)
            self.where = layout_utils.reshape_acc_to_mn(thr_mma.partition_C(corner), transpose=self.swapped)
            self.nrow = const_expr(cute.size(self.where.shape[0]))
            self.ncol = const_expr(cute.size(self.where.shape[1]))
            # Transposed tiles: in elements, see `_element`. Others: the first row, and how many.
            self.begin = cute.make_rmem_tensor((self.ncol * self.intervals,), Int32)
            self.end = cute.make_rmem_tensor((self.ncol * self.intervals,), Int32)
            self.full: Any = cute.make_rmem_tensor((2,), Int32) if self.skip_full else None

        @cute.jit
        def read(self, seqlen_info: Any, n_block: Any, slot: Any) -> None:
            for c in cutlass.range_constexpr(self.ncol):
                key = n_block * self.tile_n + self.where[0, c][self.col]
                for k in cutlass.range_constexpr(self.intervals):
                    begin = self.bounds[seqlen_info.offset_k + key, 2 * k]
                    end = self.bounds[seqlen_info.offset_k + key, 2 * k + 1]
                    # Past the last key stand the keys of the next sequence.
                    end = end if key < seqlen_info.seqlen_k else begin
                    at = c * self.intervals + k
                    if const_expr(self.swapped):
                        self.begin[at] = self._element(begin)
                        self.end[at] = self._element(end)
                    else:
                        self.begin[at] = begin
                        self.end[at] = end - begin
            if const_expr(self.skip_full):
                self.full[0] = self.tiles[slot, 1]
                self.full[1] = self.tiles[slot, 2]

        def _element(self, row: Any) -> Any:
            """Which of the thread's rows it is, were its query tile the first: it holds rows 0, 1, 8, 9, 16, ...

            The element in query tile `m` is then smaller by `m * tile_m / 4`, for a tile has whole groups of 8 rows.
            """
            return masking.sm90_col_to_r2p_idx(row - self.where[0, 0][1] + 8) - 2

    @dataclasses.dataclass(frozen=True)
    class IntervalMask:
        """Stands in for `AttentionMask`: keeps the rows `[begin, end)` of each key."""

        keys: Any
        folded: int = 1

        def apply_mask(self, acc_S: Any, m_block: Any, **_: Any) -> None:
            m_block = query_tile(m_block, self.folded)
            if self.keys.skip_full:
                self._keep_unless_full(acc_S, m_block)
            else:
                self._keep(acc_S, m_block)

        @cute.jit
        def _keep_unless_full(self, acc_S: Any, m_block: Any) -> None:
            if m_block < self.keys.full[0] or m_block >= self.keys.full[1]:
                self._keep(acc_S, m_block)

        @cute.jit
        def _keep(self, acc_S: Any, m_block: Any) -> None:
            keys = self.keys
            scores = layout_utils.reshape_acc_to_mn(acc_S, transpose=keys.swapped)
            if const_expr(keys.swapped):
                passed = m_block * (keys.tile_m // 4)
                for c in cutlass.range_constexpr(keys.ncol):
                    limits = []
                    for k in cutlass.range_constexpr(keys.intervals):
                        at = c * keys.intervals + k
                        limits.append((keys.begin[at] - passed, keys.end[at] - passed))
                    masking.mask_r2p_lambda(scores[None, c], functools.partial(kept, limits), rank1=True)
            else:
                for r in cutlass.range_constexpr(keys.nrow):
                    row = m_block * keys.tile_m + keys.where[r, 0][0]
                    for c in cutlass.range_constexpr(keys.ncol):
                        # Two signed compares: of scalars, the DSL compiled one unsigned compare as a signed one.
                        past = row - keys.begin[c * keys.intervals]
                        seen = Boolean(past >= 0) & Boolean(past < keys.end[c * keys.intervals])
                        for k in cutlass.range_constexpr(1, keys.intervals):
                            past = row - keys.begin[c * keys.intervals + k]
                            seen = seen | (Boolean(past >= 0) & Boolean(past < keys.end[c * keys.intervals + k]))
                        scores[r, c] = scores[r, c] if seen else -Float32.inf

    def kept(limits: Any, chunk: int) -> Any:
        """One bit for each of 32 rows of the chunk: set within one of the intervals."""
        bits = None
        for above, below in limits:
            own = masking.r2p_bitmask_below(below, chunk) & masking.r2p_bitmask_above(above, chunk)
            bits = own if bits is None else bits | own
        return bits

    class PrefixLMBackwardSm90(base):
        """intervals: of rows that see a key, K. skip_full, by_heads: see `BackwardTile`.

        folded: how many query heads a CTA takes; if more than one, FA4's loops count tiles as `folded_heads` does.
        """

        # FA4 sets it where it finds something in the place of its block lists; `key_intervals` are none.
        use_block_sparsity = property(lambda self: False, lambda self, value: None)

        def __init__(
            self,
            *arguments: Any,
            intervals: int,
            skip_full: bool,
            by_heads: bool,
            softcap: float,
            folded: int,
            **options: Any,
        ) -> None:
            super().__init__(*arguments, **options)
            self.intervals, self.skip_full, self.by_heads = intervals, skip_full, by_heads
            self.softcap, self.folded = softcap, folded
            # As the kernels before and after it round, whose sums it adds to (FA4's rounds to 16 where they do to 32).
            head_dim, head_dim_v = self.head_dims = arguments[1:3]
            multiple = 64 if self.dKV_swapAB else 32
            self.tile_hdim = -(-head_dim // multiple) * multiple
            self.tile_hdimv = -(-head_dim_v // multiple) * multiple
            self.check_hdim_oob = head_dim != self.tile_hdim
            self.check_hdim_v_oob = head_dim_v != self.tile_hdimv

        def load(self, *arguments: Any, **given: Any) -> None:
            given = by_name(upstream.load, arguments, given)
            self._replace(given, None)
            if const_expr(self.folded > 1):
                fold_loads(module, self, given)
            base.load(self, **given)

        def dQaccum_store(self, *arguments: Any, **given: Any) -> None:
            given = by_name(upstream.dQaccum_store, arguments, given)
            order = given["blocksparse_tensors"].full_block_cnt
            self._replace(given, None)
            if const_expr(self.folded > 1):
                fold_sums(module, self, given)
            if const_expr(self.deterministic):
                storing_warp(module)(self, order, given).run()
            else:
                base.dQaccum_store(self, **given)

        def mma(self, *arguments: Any, **given: Any) -> None:
            given = by_name(upstream.mma, arguments, given)
            lists = given["blocksparse_tensors"]
            thr_mma = given["tiled_mma_SdP"].get_slice(given["tidx"])
            tables = lists.mask_block_cnt, lists.mask_block_idx
            if step == "fa4":
                keys: Any = OwnKeys(*tables, self, thr_mma)
                mask: Any = IntervalMask(keys, self.folded)
            else:
                keys = mask = base.key_mask(*tables, self, thr_mma, given["sdQaccum"], given["tidx"])
            self._replace(given, keys)
            given["AttentionMaskCls"] = lambda seqlen_info: mask
            base.mma(self, **given)

        def _replace(self, given: dict[str, Any], keys: Any) -> None:
            lists = given["blocksparse_tensors"]
            given["block_info"] = RowRange(
                self.tile_m,
                self.tile_n,
                is_causal=False,
                is_local=True,
                tiles=lists.mask_block_idx,
                keys=keys,
                folded=self.folded,
            )
            given["blocksparse_tensors"] = None
            if self.by_heads:
                head_dim, head_dim_v = self.head_dims
                given["TileSchedulerCls"] = heads_side_by_side(
                    given["TileSchedulerCls"], head_dim, head_dim_v, self.folded
                )

    return PrefixLMBackwardSm90
