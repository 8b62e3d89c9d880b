"""Copy the keys and values of a batch from pages to packed tensors, in one launch that does not synchronise."""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import os

import torch

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.geometry.tiles import ceil_div, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:  # gather_pages_torch works without it
    triton = None

# Elements of a key tensor that a program copies at once.
ELEMENTS = 8192


def gather_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    first_key: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    """Copy the keys `[first_key[b], first_key[b] + n_b)` of each sequence to the outputs, from row `cu_seqlens[b]` on.

    `n_b` is `cu_seqlens[b + 1] - cu_seqlens[b]`. Rows past `cu_seqlens[-1]` stay as they are, so the outputs may be
    longer than the batch. On CPU tensors it is `gather_pages_torch`, or Triton's interpreter where that is on.

    Args:
        k_cache: `(num_pages, page_size, kv_heads, head_dim)`, with any strides.
        v_cache: `(num_pages, page_size, kv_heads, head_dim_v)`, with any strides.
        page_table: `(batch, max_pages)` int32 on the device: key `i` of sequence `b` is in page
            `page_table[b, i // page_size]`. Entries of pages that hold no copied key are not read.
        first_key: `(batch,)` int32 on the device.
        cu_seqlens: `(batch + 1,)` int32 on the device, ascending from 0.
        k_out, v_out: `(total, kv_heads, head_dim)` and `(total, kv_heads, head_dim_v)`, contiguous, `total` at least
            `cu_seqlens[-1]`.
    """
    _check(k_cache, v_cache, page_table, first_key, cu_seqlens, k_out, v_out)
    if k_out.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return gather_pages_torch(k_cache, v_cache, page_table, first_key, cu_seqlens, k_out, v_out)
    total, batch = k_out.shape[0], first_key.shape[0]
    if total == 0 or batch == 0:
        return None
    sizes = constants(k_cache, v_cache)
    with torch.cuda.device_of(k_out):
        gather_pages_kernel[(ceil_div(total, sizes["ROWS"]),)](
            k_cache,
            v_cache,
            page_table,
            first_key,
            cu_seqlens,
            k_out,
            v_out,
            k_cache.stride(0),
            v_cache.stride(0),
            *page_table.stride(),
            first_key.stride(0),
            cu_seqlens.stride(0),
            total,
            batch,
            batch.bit_length(),
            **sizes,
        )
    return None


def gather_pages_torch(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    first_key: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    """The same in torch operations. Synchronises."""
    page_size = k_cache.shape[1]
    for sequence, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        key = torch.arange(end - begin, device=k_out.device) + first_key[sequence]
        page, row = page_table[sequence, key // page_size], key % page_size
        k_out[begin:end] = k_cache[page, row]
        v_out[begin:end] = v_cache[page, row]


def constants(k_cache: torch.Tensor, v_cache: torch.Tensor) -> dict[str, int]:
    """What the kernel is compiled for. Strides are, so that alignment is known."""
    _, page_size, heads, head_dim = k_cache.shape
    head_dim_v = v_cache.shape[3]
    columns = min(ELEMENTS // 8, power_of_two(heads * max(head_dim, head_dim_v)))
    return {
        "PAGE_SIZE": page_size,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "K_STRIDE_ROW": k_cache.stride(1),
        "K_STRIDE_HEAD": k_cache.stride(2),
        "K_STRIDE_DIM": k_cache.stride(3),
        "V_STRIDE_ROW": v_cache.stride(1),
        "V_STRIDE_HEAD": v_cache.stride(2),
        "V_STRIDE_DIM": v_cache.stride(3),
        "ROWS": min(64, ELEMENTS // columns),
        "COLUMNS": columns,
    }


def _check(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    first_key: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    batch = first_key.shape[0]
    for name, tensor, shape in (
        ("page_table", page_table, (batch, page_table.shape[-1])),
        ("first_key", first_key, (batch,)),
        ("cu_seqlens", cu_seqlens, (batch + 1,)),
    ):
        if tensor.dtype != torch.int32:
            raise InputError(name, "dtype torch.int32", tensor.dtype)
        if tensor.shape != shape:
            raise InputError(name, f"shape {shape}", tuple(tensor.shape))
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise InputError("v_cache", f"shape {(*k_cache.shape[:3], 'head_dim_v')}", tuple(v_cache.shape))
    for name, out, cache in (("k_out", k_out, k_cache), ("v_out", v_out, v_cache)):
        shape = (k_out.shape[0], *cache.shape[2:])
        if out.shape != shape or not out.is_contiguous():
            raise InputError(name, f"a contiguous tensor of shape {shape}", f"{tuple(out.shape)}, {out.stride()}")
        if out.dtype != cache.dtype:
            raise InputError(name, f"dtype {cache.dtype}, as the cache", out.dtype)


if triton is not None:

    @triton.jit(do_not_specialize=("page_table", "first_key", "cu_seqlens", "total", "batch", "levels"))
    def gather_pages_kernel(
        k_cache,
        v_cache,
        page_table,
        first_key,
        cu_seqlens,
        k_out,
        v_out,
        k_stride_page,
        v_stride_page,
        table_stride_sequence,
        table_stride_page,
        first_key_stride,
        cu_seqlens_stride,
        total,
        batch,
        levels,
        PAGE_SIZE: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        HEAD_DIM_V: tl.constexpr,
        K_STRIDE_ROW: tl.constexpr,
        K_STRIDE_HEAD: tl.constexpr,
        K_STRIDE_DIM: tl.constexpr,
        V_STRIDE_ROW: tl.constexpr,
        V_STRIDE_HEAD: tl.constexpr,
        V_STRIDE_DIM: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """A program copies `ROWS` rows of the outputs, of one or more sequences."""
        out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        # The row's sequence is the last one that begins at or before it.
        sequence = tl.zeros([ROWS], tl.int32)
        for level in range(levels):
            later = sequence + (1 << (levels - 1 - level))
            begin = tl.load(cu_seqlens + later * cu_seqlens_stride, mask=later < batch, other=total)
            sequence = tl.where((later < batch) & (begin <= out_row), later, sequence)
        begin = tl.load(cu_seqlens + sequence * cu_seqlens_stride)
        end = tl.load(cu_seqlens + (sequence + 1) * cu_seqlens_stride)
        inside = (begin <= out_row) & (out_row < tl.minimum(end, total))
        key = tl.load(first_key + sequence * first_key_stride, mask=inside, other=0) + out_row - begin
        entry = sequence.to(tl.int64) * table_stride_sequence + (key // PAGE_SIZE) * table_stride_page
        page = tl.load(page_table + entry, mask=inside, other=0).to(tl.int64)
        row = (key % PAGE_SIZE).to(tl.int64)
        k_row = k_cache + page * k_stride_page + row * K_STRIDE_ROW
        v_row = v_cache + page * v_stride_page + row * V_STRIDE_ROW
        out_row = out_row.to(tl.int64)
        _copy_rows(k_row, k_out, out_row, inside, K_STRIDE_HEAD, K_STRIDE_DIM, HEADS, HEAD_DIM, COLUMNS)
        _copy_rows(v_row, v_out, out_row, inside, V_STRIDE_HEAD, V_STRIDE_DIM, HEADS, HEAD_DIM_V, COLUMNS)

    @triton.jit
    def _copy_rows(
        source,
        out,
        out_row,
        inside,
        STRIDE_HEAD: tl.constexpr,
        STRIDE_DIM: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        for first in tl.static_range(0, HEADS * HEAD_DIM, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < HEADS * HEAD_DIM)[None, :]
            offset = (column // HEAD_DIM) * STRIDE_HEAD + (column % HEAD_DIM) * STRIDE_DIM
            values = tl.load(source[:, None] + offset[None, :], mask=mask)
            tl.store(out + out_row[:, None] * (HEADS * HEAD_DIM) + column[None, :], values, mask=mask)
