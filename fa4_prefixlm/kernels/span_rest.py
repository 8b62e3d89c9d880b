"""The second pass over spans: the keys that a causal pass leaves out, added to its result in place, in one launch.

Pass 1 is any causal kernel, with or without a sliding window. The row at position `p` saw the keys `[base, p + 1)`,
with `base = 0` or `max(0, p - window + 1)`. A row that is to see `[lo, hi)` misses `[lo, base)` and `[p + 1, hi)`.

Attention over those is a flash attention loop whose online softmax begins where pass 1 ended: maximum `lse`, sum 1,
accumulator `out`. So there is no second output and no merge, every key counts once, and an attention sink that
pass 1 added stays right. Nothing here synchronises: a tile of rows that miss no key ends before it loads any.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.geometry.tiles import power_of_two

# The maximum with which the online softmax begins for a row that saw nothing: below any score, finite to avoid NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


class LoopTile(NamedTuple):
    """The tile of a program, and how the kernel is compiled for it.

    Attributes:
        rows: query rows.
        keys: keys at a time.
        warps: Triton's num_warps.
        stages: Triton's num_stages.
    """

    rows: int
    keys: int
    warps: int
    stages: int


# By the padded head_dim, the larger of q's and v's. Spans are a few hundred tokens long, so more rows would mostly be
# masked ones. q with `stages` tiles of k and v fits Hopper's 227 KB, at 64 and 256 twice. The loop spills no register,
# except a few at 256 with pages; with 64 rows or 64 keys it would at 512 or 256.
TILES = {
    16: LoopTile(128, 64, 4, 3),
    32: LoopTile(128, 64, 4, 3),
    64: LoopTile(128, 64, 4, 3),
    128: LoopTile(64, 64, 4, 3),
    256: LoopTile(64, 32, 4, 2),
    512: LoopTile(32, 32, 8, 2),
}


def add_span_rest(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    bounds: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    window: int | None,
    options: Options,
) -> None:
    """Make `out` and `lse` of a causal pass those of the rows' whole `bounds`, in place.

    Keys are contiguous and come with `cu_seqlens_k`, or in pages and come with `seqused_k` and `page_table`. Rows that
    miss no key keep their bits, as do rows past `cu_seqlens_q[-1]`. Nothing is checked here: the plan was.

    Args:
        q: `(total_q, heads_q, head_dim)` bfloat16 or float16. All tensors may have any strides but for their last
            dimension, which is contiguous.
        k, v: `(total_k, heads_kv, head_dim)` and `(.., head_dim_v)`, or `(pages, page_size, heads_kv, ..)`.
        out: `(total_q, heads_q, head_dim_v)` in the dtype of q, written in place.
        lse: `(heads_q, total_q)` float32, written in place.
        bounds: `(>= total_q, 2)` int32 on the device, contiguous: `[lo, hi)`, the keys that the row sees in all, local
            to its sequence. They hold the keys of pass 1, or the row sees nothing (`lo >= hi`) and is left alone.
        cu_seqlens_q, cu_seqlens_k: `(batch + 1,)` int32 on the device, contiguous.
        seqused_k: `(batch,)` int32 on the device, contiguous, keys of each sequence.
        page_table: `(batch, max_pages)` int32 on the device. Entries of pages that hold no missing key are not read.
        window: of pass 1, in tokens, the row's own included. None: it had none.
        options: of pass 1. Its sink is in that pass's result already, and is not looked at.
    """
    total_q, heads_q, head_dim = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    if total_q == 0 or batch == 0:
        return
    page_size = 0 if page_table is None else k.shape[1]
    compiled_for = constants(head_dim, v.shape[-1], page_size, window is not None, options.softcap != 0)
    slots = total_q // compiled_for["ROWS"] + batch
    with torch.cuda.device_of(q):
        add_span_rest_kernel[(slots * heads_q,)](
            q,
            k,
            v,
            out,
            lse,
            bounds,
            cu_seqlens_q,
            cu_seqlens_k if page_table is None else seqused_k,
            cu_seqlens_q if page_table is None else page_table,
            *q.stride()[:2],
            *(k.stride()[:3] if page_size else (0, *k.stride()[:2])),
            *(v.stride()[:3] if page_size else (0, *v.stride()[:2])),
            *out.stride()[:2],
            *lse.stride(),
            0 if page_table is None else page_table.stride(0),
            heads_q,
            heads_q // k.shape[-2],
            batch,
            min(window or 0, NO_KEY.value),
            options.softmax_scale,
            options.softcap,
            **compiled_for,
        )


@functools.cache
def constants(head_dim: int, head_dim_v: int, page_size: int, windowed: bool, capped: bool) -> dict[str, int]:
    """What the kernel is compiled for. page_size: 0 for contiguous keys."""
    dim, dim_v = (max(16, power_of_two(size)) for size in (head_dim, head_dim_v))
    tile = TILES[max(dim, dim_v)]
    return {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "DIM": dim,
        "DIM_V": dim_v,
        "PAGE_SIZE": page_size,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "SEQUENCES": 128,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit(do_not_specialize=("heads_q", "heads_per_kv", "batch", "window"))
def add_span_rest_kernel(
    q,
    k,
    v,
    out,
    lse,
    bounds,
    cu_seqlens_q,
    seqlens_k,
    page_table,
    q_stride_row,
    q_stride_head,
    k_stride_page,
    k_stride_row,
    k_stride_head,
    v_stride_page,
    v_stride_row,
    v_stride_head,
    out_stride_row,
    out_stride_head,
    lse_stride_head,
    lse_stride_row,
    table_stride,
    heads_q,
    heads_per_kv,
    batch,
    window,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """A program works on `ROWS` rows of one sequence and one head; the heads of a tile are neighbours, for the L2.

    seqlens_k: cu_seqlens_k, or seqused_k of pages. A tile has its own slot whatever the lengths, as in `row_update`.
    """
    slot = tl.program_id(0) // heads_q
    head = (tl.program_id(0) % heads_q).to(tl.int64)
    kv_head = head // heads_per_kv

    # The slots where sequences begin ascend, and so do their rows: the tile's sequence is the last one that begins at
    # or before `slot`. Looked at all at once: idle tiles cost little more than the wait for loads that need each other.
    sequence, begin, end = -1, 0, 0
    for first in range(0, batch, SEQUENCES):
        index = first + tl.arange(0, SEQUENCES)
        first_row = tl.load(cu_seqlens_q + index, mask=index < batch, other=0)
        last_row = tl.load(cu_seqlens_q + index + 1, mask=index < batch, other=0)
        reached = (index < batch) & (first_row // ROWS + index <= slot)
        sequence += tl.sum(reached.to(tl.int32), axis=0)
        begin = tl.maximum(begin, tl.max(tl.where(reached, first_row, 0), axis=0))
        end = tl.maximum(end, tl.max(tl.where(reached, last_row, 0), axis=0))
    seqlen_q = end - begin
    token = (slot - (begin // ROWS + sequence)) * ROWS + tl.arange(0, ROWS)
    inside = token < seqlen_q
    if PAGE_SIZE > 0:
        seqlen_k = tl.load(seqlens_k + sequence)
        page_table += tl.cast(sequence, tl.int64) * table_stride
    else:
        first_key = tl.load(seqlens_k + sequence)
        seqlen_k = tl.load(seqlens_k + sequence + 1) - first_key
        k += first_key.to(tl.int64) * k_stride_row
        v += first_key.to(tl.int64) * v_stride_row
    k += kv_head * k_stride_head
    v += kv_head * v_stride_head

    row = (begin + token).to(tl.int64)
    position = token + seqlen_k - seqlen_q
    lo = tl.load(bounds + row * 2, mask=inside, other=0)
    hi = tl.load(bounds + row * 2 + 1, mask=inside, other=0)
    seeing = lo < hi
    hi = tl.minimum(hi, seqlen_k)
    misses_right = seeing & (position + 1 < hi)
    misses = misses_right
    if WINDOWED:
        base = tl.maximum(position - (window - 1), 0)
        lo = tl.maximum(lo, 0)
        misses_left = seeing & (lo < base)
        misses |= misses_left
    if tl.max(misses.to(tl.int32), axis=0) == 0:
        return

    dim, dim_v = tl.arange(0, DIM), tl.arange(0, DIM_V)
    q_rows = tl.load(
        q + head * q_stride_head + row[:, None] * q_stride_row + dim[None, :],
        mask=_within(misses[:, None], dim[None, :], HEAD_DIM, DIM),
        other=0.0,
    )
    out += head * out_stride_head + row[:, None] * out_stride_row + dim_v[None, :]
    stored = _within(misses[:, None], dim_v[None, :], HEAD_DIM_V, DIM_V)
    lse += head * lse_stride_head + row * lse_stride_row
    # Maximum and sum of the online softmax in powers of 2.
    before = tl.load(lse, mask=misses, other=0.0)
    saw = before > float("-inf")
    most = tl.where(saw, before * LOG2_E, LOWEST)
    total = tl.where(saw, 1.0, 0.0)
    acc = tl.where(saw[:, None], tl.load(out, mask=stored, other=0.0).to(tl.float32), 0.0)

    acc, most, total = _add_keys(
        acc,
        most,
        total,
        q_rows,
        tl.where(misses_right, position + 1, NO_KEY),
        tl.where(misses_right, hi, 0),
        k,
        v,
        page_table,
        k_stride_page,
        k_stride_row,
        v_stride_page,
        v_stride_row,
        softmax_scale,
        softcap,
        HEAD_DIM,
        HEAD_DIM_V,
        DIM,
        DIM_V,
        PAGE_SIZE,
        CAPPED,
        KEYS,
    )
    if WINDOWED:
        acc, most, total = _add_keys(
            acc,
            most,
            total,
            q_rows,
            tl.where(misses_left, lo, NO_KEY),
            tl.where(misses_left, base, 0),
            k,
            v,
            page_table,
            k_stride_page,
            k_stride_row,
            v_stride_page,
            v_stride_row,
            softmax_scale,
            softcap,
            HEAD_DIM,
            HEAD_DIM_V,
            DIM,
            DIM_V,
            PAGE_SIZE,
            CAPPED,
            KEYS,
        )
    tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)
    tl.store(lse, (most + tl.log2(total)) / LOG2_E, mask=misses)


@triton.jit
def _add_keys(
    acc,
    most,
    total,
    q_rows,
    begin,
    end,
    k,
    v,
    page_table,
    k_stride_page,
    k_stride_row,
    v_stride_page,
    v_stride_row,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The online softmax over the keys `[begin, end)` of each row; rows without any have `(NO_KEY, 0)`.

    No key at or past the last `end` is loaded; zeros stand for those, whatever the memory holds.
    """
    last = tl.max(end, axis=0)
    dim, dim_v = tl.arange(0, DIM), tl.arange(0, DIM_V)
    # No row misses a key on this side: begin at `last`, since a pipelined loop looks ahead, and NO_KEY would overflow.
    for first in range(tl.minimum(tl.min(begin, axis=0), last), last, KEYS):
        key = first + tl.arange(0, KEYS)
        there = key < last
        if PAGE_SIZE > 0:
            page = tl.load(page_table + key // PAGE_SIZE, mask=there, other=0).to(tl.int64)
            own_row = key % PAGE_SIZE
            k_row = page * k_stride_page + own_row.to(tl.int64) * k_stride_row
            v_row = page * v_stride_page + own_row.to(tl.int64) * v_stride_row
        else:
            k_row = key.to(tl.int64) * k_stride_row
            v_row = key.to(tl.int64) * v_stride_row
        k_rows = tl.load(
            k + k_row[None, :] + dim[:, None], mask=_within(there[None, :], dim[:, None], HEAD_DIM, DIM), other=0.0
        )
        scores = tl.dot(q_rows, k_rows)
        if CAPPED:
            # tanh(x) = 1 - 2 / (e^2x + 1)
            power = tl.exp2(scores * (softmax_scale / softcap * 2 * LOG2_E))
            scores = (1 - 2 / (power + 1)) * (softcap * LOG2_E)
        else:
            scores *= softmax_scale * LOG2_E
        seen = (begin[:, None] <= key[None, :]) & (key[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_most[:, None])
        kept = tl.exp2(most - new_most)
        total = total * kept + tl.sum(weights, axis=1)
        v_rows = tl.load(
            v + v_row[:, None] + dim_v[None, :],
            mask=_within(there[:, None], dim_v[None, :], HEAD_DIM_V, DIM_V),
            other=0.0,
        )
        acc = tl.dot(weights.to(v_rows.dtype), v_rows, acc * kept[:, None])
        most = new_most
    return acc, most, total


@triton.jit
def _within(rows, dim, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The mask of rows, and of the columns of a head where it is padded."""
    if HEAD_DIM < DIM:
        rows &= dim < HEAD_DIM
    return rows
