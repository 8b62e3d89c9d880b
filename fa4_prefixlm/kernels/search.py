"""Searches that several kernels do: in which sequence, or piece, something is, and which span it last passed."""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_begin(begins, at, count, last, levels):
    """Index of the last of `begins[:count]`, which ascend, that is at most `at`; 0 if none is. int32, of `at`'s shape.

    last: index up to which `begins` may be read. levels: `count.bit_length()`.
    """
    found = tl.zeros_like(at)
    for level in range(levels):
        later = found + (1 << (levels - 1 - level))
        begin = tl.load(begins + tl.minimum(later, last))
        found = tl.where((later < count) & (begin <= at), later, found)
    return found


@triton.jit
def latest_of(own, position, stride_span, stride_edge, first, end):
    """`(start, end)` of the last span that begins at or before a position; `(-1, 0)` if none does.

    first, end: of the spans that are looked at. own: where the spans of each position's sequence are, of its shape.
    """
    start = tl.zeros_like(position) - 1
    stop = tl.zeros_like(position)
    for index in range(first, end):
        s = tl.load(own + index * stride_span)
        e = tl.load(own + index * stride_span + stride_edge)
        later = (e > 0) & (s <= position) & (s > start)
        start = tl.where(later, s, start)
        stop = tl.where(later, e, stop)
    return start, stop


@triton.jit
def row_place(cu_seqlens_q, cu_seqlens_k, row, batch, levels):
    """(sequence of each row, its first key among the packed keys, its keys, the row's position)."""
    sequence = last_begin(cu_seqlens_q, row, batch, batch, levels)
    offset = tl.load(cu_seqlens_k + sequence)
    keys = tl.load(cu_seqlens_k + sequence + 1) - offset
    return sequence, offset, keys, row - tl.load(cu_seqlens_q + sequence + 1) + keys
