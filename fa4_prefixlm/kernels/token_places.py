"""Where tokens stand, and the span that each last passed: what `Mask.intervals` looks at, a launch each.

The same numbers as `geometry.intervals.tokens` and `latest_span` take some forty launches for. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import Spans
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.geometry.intervals import Tokens
from fa4_prefixlm.geometry.tiles import ceil_div
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.kernels.search import latest_of, row_place
from fa4_prefixlm.masks.interval_lists import EMPTY_LO, Intervals

BLOCK = 256
# A token looks at every span of its sequence; of more than these, torch's search is faster.
MOST_SPANS = 256


def token_places(lengths: Lengths) -> Tokens:
    """`geometry.intervals.tokens` of all query tokens of a batch."""
    if not lengths.is_aligned or lengths.batch == 0 or lengths.total_q == 0:
        return intervals.tokens(lengths)
    total_q, device = lengths.total_q, lengths.device
    sequence, key_offset, seqlen_k, position = (
        torch.empty(total_q, dtype=torch.int32, device=device) for _ in range(4)
    )
    with torch.cuda.device_of(sequence):
        launch_token_places(
            ceil_div(total_q, BLOCK),
            (lengths.cu_seqlens_q, lengths.cu_seqlens_k, sequence, key_offset, seqlen_k, position),
            (total_q, lengths.batch, lengths.batch.bit_length()),
            {"BLOCK": BLOCK},
        )
    return Tokens(sequence, key_offset, seqlen_k, position)


def latest_span(spans: Spans, sequence: torch.Tensor, position: torch.Tensor) -> Intervals:
    """`geometry.intervals.latest_span`."""
    batch, width, _ = spans.values.shape
    if batch == 0 or not 0 < width <= MOST_SPANS or len(position) == 0:
        return intervals.latest_span(spans, sequence, position)
    start, end = torch.empty_like(position), torch.empty_like(position)
    with torch.cuda.device_of(position):
        launch_latest_span(
            ceil_div(len(position), BLOCK),
            (spans.values, sequence, position, start, end),
            (*spans.values.stride(), width, len(position)),
            {"EMPTY": EMPTY_LO, "BLOCK": BLOCK},
        )
    return start, end


@triton.jit(do_not_specialize=("total_q", "batch", "levels"))
def token_places_kernel(
    cu_seqlens_q,
    cu_seqlens_k,
    sequences,
    key_offsets,
    seqlens_k,
    positions,
    total_q,
    batch,
    levels,
    BLOCK: tl.constexpr,
):
    """Program `b` writes the tokens of block `b`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total_q
    sequence, first_key, keys, position = row_place(cu_seqlens_q, cu_seqlens_k, row, batch, levels)
    tl.store(sequences + row, sequence, mask=inside)
    tl.store(key_offsets + row, first_key, mask=inside)
    tl.store(seqlens_k + row, keys, mask=inside)
    tl.store(positions + row, position, mask=inside)


@triton.jit(do_not_specialize=("stride_sequence", "stride_span", "stride_edge", "width", "total"))
def latest_span_kernel(
    spans,
    sequences,
    positions,
    starts,
    ends,
    stride_sequence,
    stride_span,
    stride_edge,
    width,
    total,
    EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program `b` writes the spans of block `b`: of those in use that start at or before a token, the last one."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < total
    sequence = tl.load(sequences + token, mask=inside, other=0)
    position = tl.load(positions + token, mask=inside, other=-1)
    own = spans + sequence.to(tl.int64) * stride_sequence
    start, end = latest_of(own, position, stride_span, stride_edge, 0, width)
    tl.store(starts + token, tl.where(end > 0, start, EMPTY), mask=inside)
    tl.store(ends + token, end, mask=inside)


launch_token_places = Launcher(token_places_kernel)
launch_latest_span = Launcher(latest_span_kernel)
