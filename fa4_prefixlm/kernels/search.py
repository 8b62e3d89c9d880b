"""A search that several kernels do: in which sequence, or piece, a token or a tile is."""

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
