"""The sums of dQ in a fixed order: what the storing warp of the deterministic native backward does.

Key tiles add to a query tile in turns, which a counter in global memory says. One step of FA4's own storing warp is a
chain: the tile is added, the add has ended, the counter is raised, and only then may the product warps write the next
tile, and are the next turn and its counter looked at. At 64 query rows a tile that chain is longer than the products it
should hide behind. Here the product warps go on once the tile has left shared memory, the next turn is read a tile
ahead, and its counter is looked at while the add ends.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

WARP = 32


@functools.cache
def storing_warp(module: str) -> type:
    """The class for the build imported as `module`."""
    barrier = importlib.import_module(f"{module}.barrier")
    barriers = importlib.import_module(f"{module}.named_barrier").NamedBarrierBwd
    copy_utils = importlib.import_module("quack.copy_utils")

    class StoringWarp:
        """kernel: what it belongs to. order: of writes, see `key_intervals`. given: as FA4 calls `dQaccum_store`."""

        def __init__(self, kernel: Any, order: Any, given: dict[str, Any]) -> None:
            self.kernel, self.order, self.given = kernel, order, given
            self.parts = const_expr(kernel.num_wg_dQ)
            self.lane = cute.arch.thread_idx()[0] % WARP

        @cute.jit
        def run(self) -> None:
            """Store the sums of all key tiles of this CTA."""
            scheduler = self.given["TileSchedulerCls"]()
            work = scheduler.initial_work_tile_info()
            while work.is_valid_tile:
                n_block, head, batch, _ = work.tile_idx
                seqlen = self.given["SeqlenInfoCls"](batch)
                first, end = self.given["block_info"].get_m_block_min_max(seqlen, n_block)
                if first < end:
                    self._store(seqlen, n_block, head, batch, first, end)
                scheduler.advance_to_next_work()
                work = scheduler.get_current_work()

        @cute.jit
        def _store(self, seqlen: Any, n_block: Any, head: Any, batch: Any, first: Any, end: Any) -> None:
            size = self.kernel.tile_m * self.kernel.tile_hdim
            sums = self.given["mdQaccum"][None, head]
            sums = cute.domain_offset((seqlen.padded_offset_q * self.kernel.tile_hdim,), sums)
            counters = self.given["mdQ_semaphore"][None, 0, head, batch]
            for part in cutlass.range_constexpr(self.parts):
                self._give_room(part)
            turn, seen = self._turn(seqlen, n_block, first), Int32(-1)
            for m_block in cutlass.range(first, end, unroll=1):
                self._wait(self._counter(counters, m_block), turn, seen)
                following = cutlass.min(m_block + 1, end - 1)
                turn = self._turn(seqlen, n_block, following)
                for part in cutlass.range_constexpr(self.parts):
                    self._meet(part, barriers.dQFullWG0, cute.arch.barrier)
                    own = size // self.parts
                    with cute.arch.elect_one():
                        copy_utils.cpasync_reduce_bulk_add_f32(
                            self.given["sdQaccum"][None, part].iterator,
                            sums.iterator + (m_block * size + part * own),
                            self.kernel.tma_copy_bytes["dQ"],
                        )
                    cute.arch.cp_async_bulk_commit_group()
                if m_block + 1 < end:
                    for part in cutlass.range_constexpr(self.parts):
                        cute.arch.cp_async_bulk_wait_group(self.parts - 1 - part, read=True)
                        self._give_room(part)
                    # Most often it is this tile's turn there already: looking takes as long as the add does to end.
                    if self.lane == 0:
                        seen = barrier.ld_acquire(self._counter(counters, following))
                cute.arch.cp_async_bulk_wait_group(0, read=False)
                barrier.arrive_inc(self._counter(counters, m_block), self.lane, 0, 1)

        def _counter(self, counters: Any, m_block: Any) -> Any:
            return counters.iterator + cute.crd2idx((m_block,), counters.layout)

        @cute.jit
        def _wait(self, counter: Any, turn: Any, seen: Any) -> None:
            """seen: what the counter was at an earlier look."""
            if self.lane == 0:
                now = seen
                while now != turn:
                    now = barrier.ld_acquire(counter)

        def _turn(self, seqlen: Any, n_block: Any, m_block: Any) -> Any:
            """How many key tiles add to the query tile before this one."""
            if const_expr(cute.rank(self.order) == 1):
                return self.order[seqlen.padded_offset_q // self.kernel.tile_m + m_block] - 1 - n_block
            return self.order[seqlen.padded_offset_k // self.kernel.tile_n + n_block, m_block]

        def _give_room(self, part: int) -> None:
            """Warp group `part` of the products may write its part of a tile."""
            self._meet(part, barriers.dQEmptyWG0, cute.arch.barrier_arrive)

        def _meet(self, part: int, name: Any, how: Any) -> None:
            threads = self.kernel.num_threads_per_warp_group + WARP
            how(barrier_id=int(name) + part, number_of_threads=threads)

    return StoringWarp
