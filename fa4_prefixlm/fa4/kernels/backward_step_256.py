"""One query tile of the SM90 backward at head dim 256, in two warp groups: 80 keys a tile in the place of FA4's 48.

FA4 stages dQ in 64 KB of shared memory on its way out, so no larger key tile fits, and with 48 keys its products wait
for shared memory. Here dQ leaves from the accumulator registers by vector reductions, in the order that FA4's
postprocess reads, and half of its columns at a time: dK and dV of 80 keys take 160 registers of a thread, 32 are left
for dQ. A reduction adds in any order, so there is no deterministic mode.

FA4's loads, pipelines, tiled products and epilogue are kept. A warp group issues, for query tile i,

    dP(i) | wait S(i) | P(i) | dV | wait dP | dS(i) | dQ left, dK | wait dV, dQ left | reduce | dQ right, S(i + 1) | ...

so that the tensor cores have work while P, dS and the reductions are made.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cutlass_dsl import dsl_user_op

from fa4_prefixlm.fa4.kernels.folded_heads import query_tile

WARP_GROUP = 128
PARTS_OF_DQ = 2
LN_2 = 0.6931471805599453


@dsl_user_op
def reduce_to_global(pointer: Any, values: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Add four floats to 16 aligned bytes of global memory, in one instruction."""
    operands = [pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)]
    operands += [Float32(value).ir_value(loc=loc, ip=ip) for value in values]
    llvm.inline_asm(
        None,
        operands,
        "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};",
        "l,f,f,f,f",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


@functools.cache
def step_class(module: str) -> type:
    """FA4's kernel of the build imported as `module`, with the step in the place of its own."""
    upstream: Any = importlib.import_module(f"{module}.flash_bwd_sm90").FlashAttentionBackwardSm90
    barriers: Any = importlib.import_module(f"{module}.named_barrier").NamedBarrierBwd
    copies = importlib.import_module("quack.copy_utils")
    layouts = importlib.import_module("quack.layout_utils")
    products = importlib.import_module("quack.sm90_utils")

    class KeyMask:
        """Keeps the rows `[begin, end)` of each key, read from shared memory where a query tile is masked.

        Registers have no room for the bounds of ten keys, and few query tiles are masked.
        """

        def __init__(self, bounds: Any, tiles: Any, kernel: Any, thr_mma: Any, room: Any, tidx: Any) -> None:
            self.bounds, self.tiles, self.tidx = bounds, tiles, tidx
            self.tile_m, self.tile_n, self.intervals = kernel.tile_m, kernel.tile_n, kernel.intervals
            where = thr_mma.partition_C(cute.make_identity_tensor((kernel.tile_m, kernel.tile_n)))
            self.where = layouts.reshape_acc_to_mn(where)
            self.held = cute.make_tensor(
                cute.recast_ptr(room.iterator, dtype=Int32),
                cute.make_layout((2 * self.intervals, self.tile_n)),
            )
            self.full = cute.make_rmem_tensor((2,), Int32)

        @cute.jit
        def read(self, seqlen_info: Any, n_block: Any, slot: Any) -> None:
            held = self.held
            if self.tidx < self.tile_n:
                key = n_block * self.tile_n + self.tidx
                for side in cutlass.range_constexpr(2 * self.intervals):
                    bound = self.bounds[seqlen_info.offset_k + key, side]
                    # Past the last key stand the keys of the next sequence.
                    held[side, self.tidx] = bound if key < seqlen_info.seqlen_k else Int32(0)
            self.full[0] = self.tiles[slot, 1]
            self.full[1] = self.tiles[slot, 2]
            cute.arch.barrier(barrier_id=int(barriers.PdS), number_of_threads=2 * WARP_GROUP)

        @cute.jit
        def apply_mask(self, acc_S: Any, m_block: Any) -> None:
            if m_block < self.full[0] or m_block >= self.full[1]:
                scores = layouts.reshape_acc_to_mn(acc_S)
                first = m_block * self.tile_m + self.where[0, 0][0]
                for c in cutlass.range_constexpr(cute.size(scores.shape[1])):
                    sides = cute.make_rmem_tensor((2 * self.intervals,), Int32)
                    cute.autovec_copy(self.held[None, self.where[0, c][1]], sides)
                    for r in cutlass.range_constexpr(cute.size(scores.shape[0])):
                        row = first + (self.where[r, 0][0] - self.where[0, 0][0])
                        seen = Boolean(row >= sides[0]) & Boolean(row < sides[1])
                        for k in cutlass.range_constexpr(1, self.intervals):
                            seen = seen | (Boolean(row >= sides[2 * k]) & Boolean(row < sides[2 * k + 1]))
                        scores[r, c] = scores[r, c] if seen else -Float32.inf

    class Loop:
        """What a warp group of products does; `given`: the arguments of FA4's `mma` by name."""

        def __init__(self, kernel: Any, given: dict[str, Any]) -> None:
            self.kernel, self.given = kernel, given
            self.tidx = given["tidx"]
            self.pipeline_q, self.pipeline_do = given["pipeline_Q"], given["pipeline_dO"]
            self.group = cute.arch.make_warp_uniform(self.tidx // WARP_GROUP)
            q, k, v, do = (given[f"s{name}"] for name in ("Q", "K", "V", "dO"))
            p, ds = given["sP"], given["sdS"]
            turned = layouts.transpose_view
            self.scores = given["tiled_mma_SdP"]
            self.to_dv, self.to_dk = given["tiled_mma_dV"], given["tiled_mma_dK"]
            self.to_dq = kernel.product_of_dq()
            self.s_of = self._operands(self.scores, q, k)
            self.dp_of = self._operands(self.scores, do, v)
            self.dv_of = self._operands(self.to_dv, turned(do), turned(p))
            self.dk_of = self._operands(self.to_dk, turned(q), turned(ds))
            tile = (kernel.tile_m, kernel.tile_n)
            width = kernel.tile_hdim // PARTS_OF_DQ
            self.dq_of = [
                self._operands(self.to_dq, ds, cute.local_tile(turned(k), (width, kernel.tile_n), (part, 0)))
                for part in range(PARTS_OF_DQ)
            ]
            self.s, self.dp = self._sums(self.scores, tile), self._sums(self.scores, tile)
            self.dv = self._sums(self.to_dv, (kernel.tile_hdimv, kernel.tile_n))
            self.dk = self._sums(self.to_dk, (kernel.tile_hdim, kernel.tile_n))
            self.dq = self._sums(self.to_dq, (kernel.tile_m, width))
            options = {"position_independent": True, "major_mode_size": kernel.tile_n // 2}
            self.write_p, _, _ = copies.get_smem_store_C(self.scores, p, self.tidx, **options)
            self.write_ds, _, _ = copies.get_smem_store_C(self.scores, ds, self.tidx, **options)
            # A thread holds two rows of S, eight apart.
            self.row = (self.tidx % WARP_GROUP) // 32 * 16 + (self.tidx % 32) // 4

        def _operands(self, tiled: Any, a: Any, b: Any) -> tuple[Any, Any]:
            own = tiled.get_slice(cute.make_layout(2, stride=WARP_GROUP)(self.group))
            return own.make_fragment_A(own.partition_A(a)), own.make_fragment_B(own.partition_B(b))

        @staticmethod
        def _sums(tiled: Any, shape: tuple[int, int]) -> Any:
            return cute.make_rmem_tensor(tiled.partition_shape_C(shape), Float32)

        @cute.jit
        def run(self) -> None:
            kernel, given = self.kernel, self.given
            done = Int32(0)
            scheduler = given["TileSchedulerCls"]()
            work = scheduler.initial_work_tile_info()
            while work.is_valid_tile:
                n_block, head, batch, _ = work.tile_idx
                seqlen = given["SeqlenInfoCls"](batch)
                mask = given["AttentionMaskCls"](seqlen)
                first, end = given["block_info"].get_m_block_min_max(seqlen, n_block)
                self.dk.fill(0.0)
                self.dv.fill(0.0)
                if first < end:
                    cap = functools.partial(self._cap, head=head, batch=batch, n_block=n_block, seqlen=seqlen)
                    self._issue_s(done)
                    warpgroup.wait_group(0)
                    m_block, own = query_tile(first, kernel.folded), Int32(0)
                    for _ in cutlass.range(end - first - 1, unroll=1):
                        self._step(m_block, done, mask, cap, self._sums_of_dq(seqlen, head, own), last=False)
                        done += 1
                        own += 1
                        if own == kernel.folded:
                            m_block += 1
                            own = Int32(0)
                    self._step(m_block, done, mask, cap, self._sums_of_dq(seqlen, head, own), last=True)
                    done += 1
                    if const_expr(kernel.qhead_per_kvhead == 1):
                        self.dk.store(self.dk.load() * given["softmax_scale"])
                self.kernel.epilogue_dKV(
                    *(self.dv, given["mdV"], given["sV"], self.dk, given["mdK"], given["sK"], seqlen),
                    *(given["tma_atom_dK"], given["tma_atom_dV"], self.to_dk, self.to_dv, self.tidx),
                    *(n_block, head, batch, given["qhead_per_kvhead_divmod"]),
                    *(given["mdK_semaphore"], given["mdV_semaphore"]),
                )
                scheduler.advance_to_next_work()
                work = scheduler.get_current_work()
            if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

        def _sums_of_dq(self, seqlen: Any, head: Any, own: Any) -> Any:
            """Of one query head; `own` counts those of a key head, where a CTA takes them all."""
            sums, kernel = self.given["mdQaccum"], self.kernel
            sums = sums[None, head, own] if kernel.folded > 1 else sums[None, head]
            return cute.domain_offset((seqlen.padded_offset_q * kernel.tile_hdim,), sums)

        def _issue_s(self, done: Any) -> None:
            self.pipeline_q.consumer_wait_w_index_phase(done % 2, done // 2 % 2)
            a, b = self.s_of
            products.gemm(self.scores, self.s, a[None, None, None, done % 2], b, zero_init=True, wg_wait=-1)

        def _cap(self, scores: Any, m_block: Any, **where: Any) -> None:
            self.kernel.apply_score_mod(
                *(scores, self.scores.get_slice(self.tidx), where["batch"], where["head"], m_block, where["n_block"]),
                *(self.given["softmax_scale"], where["seqlen"], self.given["aux_data"], self.given["fastdiv_mods"]),
            )

        def _publish(self) -> None:
            """What this thread wrote to shared memory, the products of both warp groups may read."""
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=int(barriers.PdS), number_of_threads=2 * WARP_GROUP)

        @cute.jit
        def _step(self, m_block: Any, done: Any, mask: Any, cap: Any, sums: Any, last: cutlass.Constexpr[bool]) -> None:
            kernel, stage = self.kernel, done % 2
            lse, dpsum = self.given["sLSE"], self.given["sdPsum"]
            self.pipeline_do.consumer_wait_w_index_phase(Int32(0), stage)
            a, b = self.dp_of
            products.gemm(self.scores, self.dp, a[None, None, None, 0], b, zero_init=True, wg_wait=-1)
            of_row = [lse[self.row, stage], lse[self.row + 8, stage]]
            if const_expr(kernel.score_mod is not None):
                cap(self.s, m_block)
            mask.apply_mask(self.s, m_block=m_block)
            p = layouts.reshape_acc_to_mn(self.s)
            scale = self.given["softmax_scale_log2"]
            for r in cutlass.range_constexpr(2):
                for c in cutlass.range_constexpr(cute.size(p.shape[1])):
                    p[r, c] = cute.math.exp2(p[r, c] * scale - of_row[r], fastmath=True)
            self.write_p(self.s, dst_idx=stage)
            self._publish()
            a, b = self.dv_of
            products.gemm(
                self.to_dv, self.dv, a[None, None, None, 0], b[None, None, None, stage], zero_init=False, wg_wait=-1
            )
            psum_of_row = [dpsum[self.row, 0], dpsum[self.row + 8, 0]]

            warpgroup.wait_group(1)
            ds = layouts.reshape_acc_to_mn(self.dp)
            for r in cutlass.range_constexpr(2):
                for c in cutlass.range_constexpr(cute.size(ds.shape[1])):
                    ds[r, c] = p[r, c] * (ds[r, c] - psum_of_row[r])
                    if const_expr(kernel.score_mod is not None):
                        ds[r, c] = self._uncapped(ds[r, c], p[r, c], of_row[r])
            self.write_ds(self.dp, dst_idx=stage)
            self._publish()
            self._issue_dq(0, stage)
            a, b = self.dk_of
            products.gemm(
                self.to_dk, self.dk, a[None, None, None, stage], b[None, None, None, stage], zero_init=False, wg_wait=-1
            )

            warpgroup.wait_group(1)
            self.pipeline_do.consumer_release_w_index(Int32(0))
            self._reduce_dq(0, sums, m_block)
            self._issue_dq(1, stage)
            if const_expr(last):
                warpgroup.wait_group(0)
            else:
                self._issue_s(done + 1)
                warpgroup.wait_group(1)
            self.pipeline_q.consumer_release_w_index(stage)
            self._reduce_dq(1, sums, m_block)
            # Were S in flight from one turn of the loop to the next, ptxas would serialise all products.
            warpgroup.wait_group(0)

        @cute.jit
        def _uncapped(self, ds: Any, p: Any, lse: Any) -> Any:
            """Times the derivative of the cap, from the capped score, which P still tells: no registers hold it."""
            ratio = (cute.math.log2(p, fastmath=True) + lse) * (LN_2 / self.kernel.softcap)
            return ds * (1.0 - ratio * ratio) if p > 0.0 else Float32(0.0)

        def _issue_dq(self, part: int, stage: Any) -> None:
            a, b = self.dq_of[part]
            products.gemm(self.to_dq, self.dq, a[None, None, None, stage], b, zero_init=True, wg_wait=-1)

        def _reduce_dq(self, part: int, sums: Any, m_block: Any) -> None:
            """In FA4's order: by warp group of its tile, as many columns as a part here; by register; by thread."""
            kernel = self.kernel
            size = kernel.tile_m * kernel.tile_hdim
            tile = cute.local_tile(sums, (size,), (m_block,))
            vectors = cute.size(self.dq) // 4
            at = tile.iterator + self.group * (vectors * 4 * WARP_GROUP) + self.tidx % WARP_GROUP * 4
            for vector in range(vectors):
                values = [self.dq[4 * vector + element] for element in range(4)]
                reduce_to_global(at + (part * (size // PARTS_OF_DQ) + vector * 4 * WARP_GROUP), values)

    class BackwardStep256(upstream):
        key_mask = KeyMask

        def product_of_dq(self) -> Any:
            """Of half the columns: a quarter by each warp group."""
            helpers = importlib.import_module("cutlass.utils.hopper_helpers")
            return helpers.make_trivial_tiled_mma(
                *(self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.MN, Float32),
                atom_layout_mnk=(1, 2, 1),
                tiler_mn=(self.tile_m, self.tile_hdim // PARTS_OF_DQ // 2),
            )

        def _setup_attributes(self) -> None:
            super()._setup_attributes()
            # Nothing stages dQ: the room holds the bounds of the tile's keys, see `KeyMask`.
            self.sdQaccum_layout = cute.make_layout(2 * self.intervals * self.tile_n)

        def dQaccum_store(self, **_: Any) -> None:
            """No warp stores dQ."""

        def mma(self, **given: Any) -> None:
            Loop(self, given).run()

    return BackwardStep256
