"""flex: torch's FlexAttention over the batch as one sequence, with a block mask made from the rows' bounds.

For what FlashAttention-4 does not take: other GPUs, more than four intervals a row, float32, other head dims. The block
mask costs O(tokens) and the pairs of blocks, and nothing is compiled anew for new ranges or lengths (`flex_attend`).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch._functorch.config as functorch_config

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.flex_attend import BLOCK, LEAST_INT32, Form, Tables, compiled, free
from fa4_prefixlm.backends.flex_rule import MOST_AS_FAST, Rule, rule_for
from fa4_prefixlm.backends.flex_rule_tables import rule_tables, rule_tables_in_one_launch
from fa4_prefixlm.backends.rows import kernel_bounds
from fa4_prefixlm.batch.lengths import Lengths, as_one_sequence
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.device_checks import has_triton
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.intervals import Bounds, Tags
from fa4_prefixlm.geometry.packed_row_tiles import packed_map, tag_ranges, transposed
from fa4_prefixlm.geometry.tiles import TileCounts, TileMap, ceil_div, power_of_two
from fa4_prefixlm.geometry.traits import Traits, in_words
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO, END_OF_KEYS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Up to this many intervals of a row a kernel compares a key with each; beyond, it searches for it.
MOST_COMPARED = 16
OLDEST_ARCH = 80
LEAST_HEAD_DIM = 16
# torch takes a size of 1 for a constant.
LEAST_BLOCKS = 2


@dataclass
class FlexCall(Prepared):
    """FlexAttention over one padded sequence.

    Attributes:
        spec: of the tensors.
        lengths: those of the batch.
        rows, keys: blocks of queries and of keys, of the batch as one padded sequence.
        key_tiles: of each block of queries.
        intervals: of a row.
        rule: tells what rows see, in the place of their intervals; None: those do.
        tables: the mask as the forward reads it.
    """

    spec: CallSpec
    lengths: Lengths
    rows: int
    keys: int
    key_tiles: TileMap
    intervals: int
    rule: Rule | None
    tables: Tables

    @functools.cached_property
    def tables_of_backward(self) -> Tables:
        """With the blocks of queries of each block of keys; made when a gradient is first needed."""
        seen = transposed(self.key_tiles)
        return self.tables._replace(
            row_counts=_counts(seen.partial),
            row_indices=_indices(seen.partial_matrix(self.rows)),
            full_row_counts=_counts(seen.full),
            full_row_indices=_indices(seen.full_matrix(self.rows)),
        )

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with_grad = torch.is_grad_enabled() and any(
            own is not None and own.requires_grad for own in (q, k, v, options.learnable_sink)
        )
        tables = self.tables_of_backward if with_grad else self.tables
        form = self._form(options, with_grad)
        if not with_grad:  # torch refuses leaves that require a gradient on the CPU, also where there will be none
            q, k, v = q.detach(), k.detach(), v.detach()
        q_blocks = _in_blocks(q, self.rows)
        k_blocks, v_blocks = (_in_blocks(own, self.keys) for own in (k, v))
        # With a gradient, compiled autograd would reuse what it keeps for the backward, which so could run once (no
        # retain_graph). Without one, dynamo would compile a form for each grad mode.
        mode = functorch_config.patch(donated_buffer=False) if with_grad else torch.no_grad()
        with torch.autocast(q.device.type, enabled=False), mode:
            padded, lse = compiled(form)(q_blocks, k_blocks, v_blocks, options.learnable_sink, tables)
        result, rows = padded[: q.shape[0]], q.shape[0]
        lse = lse[:, :rows].to(torch.float32).contiguous()
        return (result, lse) if out is None else (out.copy_(result), lse)

    def describe(self) -> list[tuple[str, str]]:
        words = in_words(self.intervals, tagged=self.tables.row_tag is not None)
        told = "" if self.rule is None else ", told by the mask's own rule"
        how = "its dense form, every pair of tokens" if self.spec.device.type == "cpu" else f"blocks of {BLOCK}x{BLOCK}"
        return [
            ("kernel", f"torch {torch.__version__} on {self.spec.device}, {how}, {words}{told}"),
            ("memory", f"mask and blocks {self.tables.nbytes() / 2**20:.2f} MiB"),
        ]

    def tile_counts(self) -> TileCounts:
        full, partial = int(self.key_tiles.full.sum()), int(self.key_tiles.partial.sum())
        blocks = ceil_div(self.lengths.total_q, BLOCK) * ceil_div(self.lengths.total_k, BLOCK)
        return TileCounts(full, partial, max(0, blocks - full - partial))

    def _form(self, options: Options, with_grad: bool) -> Form:
        spec, ends, searched = self.spec, self.tables.ends, self.rule is None and is_searched(self.intervals)
        return Form(
            device=spec.device.type,
            arch=spec.arch,
            dtype=spec.dtype,
            heads=(spec.heads_q, spec.heads_kv),
            dims=(spec.head_dim, spec.head_dim_v),
            ends=ends.shape[2] if searched else ends.shape[0],
            searched=searched,
            tagged=self.tables.row_tag is not None,
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
            sink=options.learnable_sink is not None,
            with_grad=with_grad,
            rule=self.rule,
        )


def flex_call(batch: MaskedBatch) -> FlexCall:
    """The state of a batch: its rows and blocks, padded. Nothing synchronises."""
    lengths = batch.lengths
    rows, keys = (max(LEAST_BLOCKS, ceil_div(total, BLOCK)) for total in (lengths.total_q, lengths.total_k))
    few = batch.traits.tagged or batch.traits.intervals <= MOST_AS_FAST
    rule = None if few else rule_for(batch.mask, batch.bounds.count)
    make = tables_in_one_launch if batch.on_gpu else tables_by_torch
    intervals, tables, key_tiles = make(batch, rows, keys, rule)
    return FlexCall(batch.spec, lengths, rows, keys, key_tiles, intervals, rule, tables)


def tables_by_torch(batch: MaskedBatch, rows: int, keys: int, rule: Rule | None = None) -> tuple[int, Tables, TileMap]:
    """(intervals of a row, the tables, the blocks as a map).

    Args:
        batch: the batch.
        rows, keys: in blocks.
        rule: what tells which keys rows see; None: their intervals.
    """
    bounds = _padded(batch.packed_bounds, rows * BLOCK, keys * BLOCK)
    whole = as_one_sequence(dataclasses.replace(batch.lengths, total_q=rows * BLOCK, total_k=keys * BLOCK))
    key_tiles = packed_map(bounds, whole, batch.lengths.batch, BLOCK, BLOCK)
    ends, of_keys = (_ends(bounds), None) if rule is None else rule_tables(batch, rule, rows, keys)
    tables = Tables(
        ends=ends,
        row_tag=None if bounds.tags is None else _tags(bounds.tags.row_tag),
        key_tag=None if bounds.tags is None else _tags(bounds.tags.key_tag),
        counts=_counts(key_tiles.partial),
        indices=_indices(key_tiles.partial_matrix(keys)),
        full_counts=_counts(key_tiles.full),
        full_indices=_indices(key_tiles.full_matrix(keys)),
        of_keys=of_keys,
    )
    return bounds.count, tables, key_tiles


def tables_in_one_launch(
    batch: MaskedBatch, rows: int, keys: int, rule: Rule | None = None
) -> tuple[int, Tables, TileMap]:
    """The same by a kernel, from the rows of another one where the mask has a closed form."""
    from fa4_prefixlm.kernels.tile_lists import block_tables

    bounds = kernel_bounds(batch)
    tags, tagged = None, None
    if batch.block is not None:
        tags, tagged = _tag_tables(batch, batch.block, rows, keys)
    count = bounds.count
    compared = rule is None and not is_searched(count)
    made = block_tables(
        bounds.lo,
        bounds.hi,
        batch.lengths,
        rows=rows,
        keys=keys,
        block=BLOCK,
        intervals=rounded_up(count) if compared else 0,
        tagged=tagged,
    )
    of_keys = None
    if rule is not None:
        ends, of_keys = rule_tables_in_one_launch(batch, rule, rows, keys)
    elif compared:
        ends = free(made.ends, 1)
    else:
        ends = _ends(_padded(batch.packed_bounds, rows * BLOCK, keys * BLOCK))
    tables = Tables(
        ends=ends,
        row_tag=None if tags is None else _tags(tags.row_tag),
        key_tag=None if tags is None else _tags(tags.key_tag),
        counts=free(made.counts, 2),
        indices=free(made.indices, 2, 3),
        full_counts=free(made.full_counts, 2),
        full_indices=free(made.full_indices, 2, 3),
        of_keys=of_keys,
    )
    return count, tables, TileMap(made.is_full, made.is_partial)


def _tag_tables(batch: MaskedBatch, block: str, rows: int, keys: int) -> tuple[Tags, tuple[torch.Tensor, torch.Tensor]]:
    """(the padded tags, those of rows and of keys by block)."""
    from fa4_prefixlm.kernels import token_tables

    if token_tables.takes([block], batch.spans, batch.lengths):
        made = token_tables.tag_tables(batch.spans[block], batch.lengths, rows * BLOCK, keys * BLOCK, BLOCK)
        return made.tags, (made.rows, made.keys)
    assert batch.bounds.tags is not None
    tags = _padded_tags(batch.bounds.tags, rows * BLOCK, keys * BLOCK)
    of_rows, of_keys = (tag_ranges(own, BLOCK, batch.lengths.batch) for own in (tags.row_tag, tags.key_tag))
    return tags, (of_rows, of_keys)


def flex_refusal(spec: CallSpec) -> str | None:
    """Why torch's FlexAttention can't run the call, whatever the mask; None if it can."""
    if spec.dtype not in DTYPES:
        return f"FlexAttention takes bfloat16, float16 and float32, not {spec.dtype}"
    if spec.device.type == "cpu":
        return None
    if 0 < spec.arch < OLDEST_ARCH:
        return f"torch tests FlexAttention on sm_{OLDEST_ARCH} and later, not sm_{spec.arch}"
    if min(spec.head_dim, spec.head_dim_v) < LEAST_HEAD_DIM:
        return f"FlexAttention takes head dims of at least {LEAST_HEAD_DIM} on a GPU"
    if not has_triton():
        return "Triton is not installed, which torch compiles FlexAttention with"
    return None


class Flex(Backend):
    name = "flex"
    summary = "torch's FlexAttention over the batch as a single sequence, block-sparse"
    reads_kernel_rows = True

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        return flex_refusal(spec)

    def prepare(self, batch: MaskedBatch) -> FlexCall:
        return flex_call(batch)


def _in_blocks(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """`(total, heads, dim)` as `(blocks, BLOCK, heads, dim)`, with zeros where there are no tokens."""
    missing = blocks * BLOCK - tensor.shape[0]
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
    return free(padded.unflatten(0, (-1, BLOCK)), 0)


def _padded(bounds: Bounds, rows: int, keys: int) -> Bounds:
    """The bounds of `rows` rows, of which those past the batch see nothing, and nobody sees the keys past it."""
    tags = None if bounds.tags is None else _padded_tags(bounds.tags, rows, keys)
    return Bounds(_longer(bounds.lo, rows, EMPTY_LO), _longer(bounds.hi, rows, EMPTY_HI), tags)


def _padded_tags(tags: Tags, rows: int, keys: int) -> Tags:
    return Tags(_longer(tags.row_tag, rows, -1), _longer(tags.key_tag, keys, -2))


def _longer(values: torch.Tensor, count: int, value: int) -> torch.Tensor:
    widths = (0, 0) * (values.ndim - 1) + (0, count - values.shape[0])
    return torch.nn.functional.pad(values, widths, value=value)


def is_searched(intervals: int) -> bool:
    """A kernel searches the ends of a row that has so many intervals."""
    return intervals > MOST_COMPARED


def rounded_up(intervals: int) -> int:
    """The number of intervals that a form is compiled for: beyond four, an even one."""
    return intervals if intervals <= 4 else intervals + intervals % 2


def _ends(bounds: Bounds) -> torch.Tensor:
    """`Tables.ends`, for a number of intervals that is rounded up: few forms are compiled."""
    if not is_searched(bounds.count):
        missing = rounded_up(bounds.count) - bounds.count
        begin = bounds.lo ^ LEAST_INT32
        width = (bounds.hi - bounds.lo).masked_fill(bounds.lo >= bounds.hi, 0) ^ LEAST_INT32
        ends = torch.nn.functional.pad(
            torch.stack([begin, width], dim=2).flatten(1), (0, 2 * missing), value=LEAST_INT32
        )
        return free(ends.T.contiguous().unflatten(1, (-1, BLOCK)), 1)
    empty = (bounds.lo >= bounds.hi).repeat_interleave(2, dim=1)
    ends = torch.stack([bounds.lo, bounds.hi], dim=2).flatten(1)
    ends = ends.masked_fill(empty, END_OF_KEYS).sort(dim=1).values
    missing = power_of_two(ends.shape[1] + 1) - ends.shape[1]
    ends = torch.nn.functional.pad(ends, (0, missing), value=END_OF_KEYS)
    return free(ends.unflatten(0, (-1, BLOCK)), 0)


def _tags(tag: torch.Tensor) -> torch.Tensor:
    return free(tag.view(-1, BLOCK), 0)


def _counts(per_block: torch.Tensor) -> torch.Tensor:
    return free(per_block.contiguous().unsqueeze(0).unsqueeze(0), 2)


def _indices(matrix: torch.Tensor) -> torch.Tensor:
    return free(matrix.to(torch.int32).contiguous().unsqueeze(0).unsqueeze(0), 2, 3)
