"""What the kernel of `flex` reads of each token, in one launch: numbers for a mask's own rule, or tags.

The same numbers as `backends.flex_rule_tables.rule_tables` and `geometry.intervals.tags_of` take some twenty launches
for. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import Spans, SpanSets
from fa4_prefixlm.geometry.intervals import Tags
from fa4_prefixlm.geometry.tiles import ceil_div
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.kernels.search import last_begin, latest_of, row_place
from fa4_prefixlm.kernels.span_sets import looked_at
from fa4_prefixlm.kernels.token_places import MOST_SPANS
from fa4_prefixlm.masks.plain_parts import MOST_SETS

BLOCK = 128
LEAST_INT32 = torch.iinfo(torch.int32).min


def takes(names: Sequence[str], spans: SpanSets, lengths: Lengths) -> bool:
    """The batch and the sets of spans are of the kind that these kernels look in."""
    if not lengths.is_aligned or lengths.batch == 0 or len(names) > MOST_SETS:
        return False
    return sum(spans[name].values.shape[1] for name in names) <= MOST_SPANS


def rule_numbers(
    spans: SpanSets,
    lengths: Lengths,
    row_owners: Sequence[str],
    latest_ends: Sequence[str],
    key_owners: Sequence[str],
    *,
    causal: bool,
    rows: int,
    keys: int,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `backends.flex_rule_tables.rule_tables` returns: `(3 + n, rows, block)`, `(m, keys, block)` int32.

    Args:
        spans, lengths: of a batch that `takes` is true of, on the device.
        row_owners, latest_ends, key_owners: names of span sets.
        causal: the keys of a row end with its own.
        rows, keys: in blocks.
        block: tokens of a block.
    """
    names = sorted({*row_owners, *latest_ends, *key_owners})
    device = lengths.device
    columns = 3 + len(row_owners) + len(latest_ends)
    of_rows = torch.empty(columns, rows, block, dtype=torch.int32, device=device)
    of_keys = torch.empty(len(key_owners), keys, block, dtype=torch.int32, device=device)
    ranges, numbers = looked_at([spans[name].values for name in names], of_rows)
    wanted = [sum(1 << names.index(name) for name in own) for own in (row_owners, latest_ends, key_owners)]
    padded_q, padded_k = rows * block, keys * block
    with torch.cuda.device_of(of_rows):
        launch_rule_numbers(
            ceil_div(max(padded_q, padded_k if key_owners else 0), BLOCK),
            (of_rows, of_keys if key_owners else of_rows, lengths.cu_seqlens_q, lengths.cu_seqlens_k, ranges),
            (
                *numbers,
                *wanted,
                len(row_owners),
                len(names),
                int(causal),
                lengths.total_q,
                lengths.total_k,
                padded_q,
                padded_k if key_owners else 0,
                lengths.batch,
                lengths.batch.bit_length(),
            ),
            {"NONE": LEAST_INT32, "BLOCK": BLOCK},
        )
    return of_rows, of_keys


_SPANS = ("stride_sequence", "stride_span", "stride_edge", "spans", "second", "third", "fourth")
_SIZES = ("total_q", "total_k", "padded_q", "padded_k", "batch", "levels")


@triton.jit(do_not_specialize=(*_SPANS, "row_owners", "latest_ends", "key_owners", "owners", "sets", "causal", *_SIZES))
def rule_numbers_kernel(
    of_rows,
    of_keys,
    cu_seqlens_q,
    cu_seqlens_k,
    ranges,
    stride_sequence,
    stride_span,
    stride_edge,
    spans,
    second,
    third,
    fourth,
    row_owners,
    latest_ends,
    key_owners,
    owners,
    sets,
    causal,
    total_q,
    total_k,
    padded_q,
    padded_k,
    batch,
    levels,
    NONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program `b` writes the rows of block `b`, and its keys.

    row_owners, latest_ends, key_owners: sets, as bits. owners: how many `row_owners` there are.
    causal: 1, the keys of a row end with its own.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence, offset, keys, position = row_place(cu_seqlens_q, cu_seqlens_k, token, batch, levels)
    present, exists = token < total_q, token < padded_q
    tl.store(of_rows + token, tl.where(present, offset ^ NONE, NONE), mask=exists)
    count = tl.where(causal > 0, tl.minimum(keys, tl.maximum(position + 1, 0)), keys)
    tl.store(of_rows + tl.cast(padded_q, tl.int64) + token, tl.where(present, count ^ NONE, NONE), mask=exists)
    column = of_rows + 2 * tl.cast(padded_q, tl.int64) + token
    tl.store(column, tl.where(present, position + offset, NONE), mask=exists)
    latest = column + owners * tl.cast(padded_q, tl.int64)
    own = ranges + sequence.to(tl.int64) * stride_sequence
    for name in range(sets):
        if ((row_owners | latest_ends) >> name) & 1:
            first, last = _begins(name, spans, second, third, fourth)
            start, end = latest_of(own, position, stride_span, stride_edge, first, last)
            if (row_owners >> name) & 1:
                column += padded_q
                tl.store(column, tl.where(present & (position < end), start + offset, NONE), mask=exists)
            if (latest_ends >> name) & 1:
                latest += padded_q
                tl.store(latest, tl.where(present & (end > 0), tl.minimum(end, keys) + offset, NONE), mask=exists)

    key_sequence, key_offset, key_position = _key_place(cu_seqlens_k, token, batch, levels)
    key_present, key_exists = token < total_k, token < padded_k
    key_column = of_keys + token
    own = ranges + key_sequence.to(tl.int64) * stride_sequence
    for name in range(sets):
        if (key_owners >> name) & 1:
            first, last = _begins(name, spans, second, third, fourth)
            start, end = latest_of(own, key_position, stride_span, stride_edge, first, last)
            owner = tl.where(key_position < end, start + key_offset, NONE + 1)
            tl.store(key_column, tl.where(key_present, owner, NONE), mask=key_exists)
            key_column += padded_k


@triton.jit
def _key_place(cu_seqlens_k, key, batch, levels):
    """(sequence of each packed key, its first key, the key's position)."""
    sequence = last_begin(cu_seqlens_k, key, batch, batch, levels)
    offset = tl.load(cu_seqlens_k + sequence)
    return sequence, offset, key - offset


@triton.jit
def _begins(name, spans, second, third, fourth):
    """Where the spans of a set begin and end, of `span_sets.together`."""
    first = tl.where(name == 0, 0, tl.where(name == 1, second, tl.where(name == 2, third, fourth)))
    last = tl.where(name == 0, second, tl.where(name == 1, third, tl.where(name == 2, fourth, spans)))
    return first, last


class TagTables(NamedTuple):
    """The tags of a batch, and what each block of tokens has of them; int32.

    Attributes:
        tags: of rows and keys, those past the batch included, which have none.
        rows, keys: `(blocks, 3)`, see `geometry.packed_row_tiles.tag_ranges`.
    """

    tags: Tags
    rows: torch.Tensor
    keys: torch.Tensor


def tag_tables(spans: Spans, lengths: Lengths, rows: int, keys: int, block: int = BLOCK) -> TagTables:
    """The tables of a set of spans.

    Args:
        spans, lengths: of a batch that `takes` is true of, on the device.
        rows, keys: tokens, at least those of the batch.
        block: tokens of a block, a power of two.
    """
    blocks = [ceil_div(count, block) for count in (rows, keys)]
    shapes = ((rows,), (keys,), (blocks[0], 3), (blocks[1], 3))
    made = [torch.empty(shape, dtype=torch.int32, device=lengths.device) for shape in shapes]
    values = spans.values
    with torch.cuda.device_of(values):
        launch_tags(
            max(1, *blocks),
            (*made, lengths.cu_seqlens_q, lengths.cu_seqlens_k, values if values.numel() else made[0]),
            (
                *values.stride(),
                values.shape[1],
                lengths.total_q,
                lengths.total_k,
                rows,
                keys,
                lengths.batch,
                lengths.batch.bit_length(),
            ),
            {"BLOCK": block},
        )
    return TagTables(Tags(made[0], made[1]), made[2], made[3])


@triton.jit(do_not_specialize=("stride_sequence", "stride_span", "stride_edge", "width", *_SIZES))
def tags_kernel(
    row_tag,
    key_tag,
    row_blocks,
    key_blocks,
    cu_seqlens_q,
    cu_seqlens_k,
    ranges,
    stride_sequence,
    stride_span,
    stride_edge,
    width,
    total_q,
    total_k,
    padded_q,
    padded_k,
    batch,
    levels,
    BLOCK: tl.constexpr,
):
    """Program `b` writes the rows of block `b`, and its keys."""
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    sequence, _, _, position = row_place(cu_seqlens_q, cu_seqlens_k, token, batch, levels)
    own = ranges + sequence.to(tl.int64) * stride_sequence
    _, end = latest_of(own, position, stride_span, stride_edge, 0, width)
    tag = tl.where((token < total_q) & (position < end), sequence, -1)
    _store_tags(row_tag, row_blocks, tag, block, token, padded_q, batch)

    sequence, _, position = _key_place(cu_seqlens_k, token, batch, levels)
    own = ranges + sequence.to(tl.int64) * stride_sequence
    _, end = latest_of(own, position, stride_span, stride_edge, 0, width)
    tag = tl.where((token < total_k) & (position < end), sequence, -2)
    _store_tags(key_tag, key_blocks, tag, block, token, padded_k, batch)


@triton.jit
def _store_tags(tags, blocks, tag, block, token, padded, batch):
    exists = token < padded
    tl.store(tags + token, tag, mask=exists)
    present = tag >= 0
    first = tl.min(tl.where(present, tag, batch), axis=0)
    last = tl.max(tag, axis=0)
    whole = tl.min((present | (exists == 0)).to(tl.int32), axis=0)
    is_block = tl.max(exists.to(tl.int32), axis=0) > 0
    tl.store(blocks + block * 3, first, mask=is_block)
    tl.store(blocks + block * 3 + 1, last, mask=is_block)
    tl.store(blocks + block * 3 + 2, whole, mask=is_block)


launch_rule_numbers = Launcher(rule_numbers_kernel)
launch_tags = Launcher(tags_kernel)
