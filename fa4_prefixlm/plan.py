"""A plan: bounds, block lists and the choice of backend for one batch and one mask, reused by every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import advice, backends, call, intervals, lengths, op, paging
from .backends import Choice, Prepared, Work
from .backends.reference import dense_mask
from .call import QKV, CallSpec
from .errors import InputError
from .fa4 import build as builds
from .fa4.build import Build
from .lengths import CuSeqlens, Lengths
from .mask import Mask
from .masks import PrefixLM
from .ranges import MaxRange, NamedRanges, SequenceSpans, SpanSets
from .ranges import parse as parse_ranges
from .tiling import TileCounts


@op.with_handle
class Plan:
    """Made by `plan`. `print(plan)` shows the backend and why, the tiles and the exact work (which synchronises).

    Attributes: `mask`; `choice`, the backend with its reason; `call`, what `q`, `k`, `v` must look like; `lengths`;
    `spans`; `demand`, what the mask asks of a kernel (intervals per row, a block of tags); `bounds`, the keys each row
    sees; `pages`, where the keys are, if they are in pages; `build`, the FA4 it runs on; `prepared`, the backend's own
    state.
    """

    def __init__(self, work: Work, choice: Choice) -> None:
        self.mask, self.call, self.lengths, self.choice = work.mask, work.call, work.lengths, choice
        self.demand = work.demand
        self.spans, self.bounds, self._where = work.spans, work.bounds, work.where
        self.build, self.pages = work.build, work.pages
        self.prepared: Prepared = choice.prepare(work)

    def check(self, spec: CallSpec) -> None:
        """Refuse tensors that the plan was not made for."""
        fields = ("shape_q", "shape_k", "heads_q", "heads_kv", "head_dim", "head_dim_v", "dtype", "device")
        check_same(spec, self.call, fields)

    def tiles(self) -> TileCounts | None:
        """Tiles of one head visited in full, in part, and skipped; None for the reference. Synchronises."""
        return self.prepared.tile_counts()

    def flops(self) -> int:
        """Exact floating point operations of the forward: `2 * heads * (head_dim + head_dim_v)` for every pair of a
        query and a key it sees. Synchronises.
        """
        return self._flops(int(self.bounds.visible_pairs(self._where)))

    def causal_flops(self) -> int:
        """The same for a plain causal mask without a window."""
        return self._flops(sum(_causal_pairs(rows, keys) for rows, keys in zip(*self.lengths.on_host(), strict=True)))

    def dense_flops(self) -> int:
        """The same if every query saw every key of its sequence."""
        return self._flops(sum(rows * keys for rows, keys in zip(*self.lengths.on_host(), strict=True)))

    def _flops(self, pairs: int) -> int:
        return 2 * self.call.heads_q * (self.call.head_dim + self.call.head_dim_v) * pairs

    def __str__(self) -> str:
        flops, causal, dense = self.flops(), self.causal_flops(), self.dense_flops()
        size = self.lengths
        lines = [
            ("batch", f"{size.batch} sequences, {size.total_q} queries, {size.total_k} keys"),
            ("mask", f"{self.mask}, {intervals.in_words(self.bounds.count, tagged=self.demand.tagged)}"),
            ("heads", f"{self.call.heads_q} query, {self.call.heads_kv} key, head dim {_dims(self.call)}"),
            ("backend", str(self.choice)),
            *[("not", f"{name}: {reason}") for name, reason in self.choice.passed_over],
            *self.prepared.describe(),
        ]
        tiles = self.tiles()
        if tiles is not None:
            lines.append(("tiles", f"{tiles.full} full, {tiles.partial} partial, {tiles.skipped} skipped (a head)"))
        share = f"{_share(flops, causal)} of plain causal, {_share(flops, dense)} of dense"
        lines.append(("work", f"{flops / 1e9:.3f} GFLOP exact, {share}"))
        return "\n".join(f"{label:8} {text}" for label, text in lines)

    def __repr__(self) -> str:
        return f"<Plan {self.choice.name}, {self.lengths.batch} sequences, {self.mask}>"


def plan(
    ranges: NamedRanges = None,
    *,
    like: QKV,
    cu_seqlens_q: CuSeqlens | None = None,
    cu_seqlens_k: CuSeqlens | None = None,
    seqused_k: CuSeqlens | None = None,
    page_table: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    max_range: MaxRange = None,
    mask: Mask = PrefixLM(),  # noqa: B008 (an immutable value)
    backend: str = "auto",
    build: str | None = None,
) -> Plan:
    """Prepare one batch under one mask. Builds on the device of `like`, without synchronising it.

    Args:
        ranges: bidirectional spans, half-open `[start, end)` in absolute key positions. One list of pairs per sequence,
            `[[(4, 260)], [(0, 256), (300, 556)]]`, or an int32 tensor `(batch, max_ranges, 2)` on the host or the
            device with unused rows `(0, 0)`. None: no spans. They must not overlap; adjacent spans stay two spans.
            A mask that reads several span sets takes a dictionary, `{"image": [[(8, 24)]], "prompt": [[(0, 8)]]}`.
        like: the `(q, k, v)` that the plan is for; only shapes, dtypes and devices matter. Packed
            `(total, heads, head_dim)` with both `cu_seqlens`, or `(batch, seqlen, heads, head_dim)` without. With a
            `page_table`: `q` packed, `k` and `v` the cache, `(pages, page_size, kv_heads, head_dim)`.
        cu_seqlens_q, cu_seqlens_k: `(batch + 1,)` int32 cumulative lengths, on the host (checked) or the device.
            Queries are the last `seqlen_q` of the `seqlen_k` positions of their sequence.
        seqused_k: `(batch,)` int32, the keys that each sequence has in its pages, those of this call included.
        page_table: `(batch, max_pages)` int32, on the host (checked) or the device: the pages of each sequence in
            order; entries past its last key are not read. Rows of the last page past the last key must be finite. Goes
            with `seqused_k`, instead of `cu_seqlens_k`. Spans may lie past the keys that are present, to be prefilled
            later; one that begins before their end and ends after it is an error (see `safe_chunk_end`).
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; they spare memory when `cu_seqlens` is on the device.
        max_range: upper bound of a span's length in tokens, or one per name; it spares memory when `ranges` is on the
            device.
        mask: what the spans mean: `PrefixLM`, one of `fa4_prefixlm.masks`, or your own.
        backend: "auto", "causal", "native", "varlen", "packed", "two_pass" or "reference".
        build: the FA4 to run on, the package it is imported as. Default: "flash_attn.cute", or vLLM's
            "vllm.vllm_flash_attn.cute" where that is the only one.

    Raises:
        InputError: an argument is wrong; nothing was launched. Values that are on the device are checked by a
            device-side assertion instead (or here, in debug mode).
        UnsupportedError: the named backend can't run this call exactly.
    """
    if seqused_k is not None and page_table is None:
        raise InputError("seqused_k", "a page_table beside it", "none")
    return plan_for(
        call.describe(*three(like), paged=page_table is not None),
        ranges,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        page_table=page_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        max_range=max_range,
        mask=mask,
        backend=backend,
        build=find_build(build),
    )


def plan_for(
    spec: CallSpec,
    ranges: NamedRanges,
    *,
    cu_seqlens_q: CuSeqlens | None,
    seqused_k: CuSeqlens | None,
    page_table: torch.Tensor | None,
    mask: Mask,
    build: Build | None,
    cu_seqlens_k: CuSeqlens | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    max_range: MaxRange = None,
    backend: str = "auto",
) -> Plan:
    """`plan`, for tensors that are already described."""
    where_keys = _Keys(cu_seqlens_k, seqused_k, page_table)
    sizes = _lengths(spec, cu_seqlens_q, where_keys, max_seqlen_q, max_seqlen_k)
    check_mask(mask)
    spans = parse_ranges(mask, ranges, sizes, max_range)
    _refuse_empty(mask, spans, sizes)
    demand = intervals.measured(mask, spans, sizes, intervals.demand(mask, spans, sizes))
    choice = backends.choose(backend, spec, demand, sizes, build)
    advice.tell(choice, spec, demand, sizes, build)
    where = intervals.tokens(sizes)
    bounds = intervals.row_bounds(mask, spans, sizes, where, demand.intervals if not demand.custom else None)
    pages = None
    if page_table is not None:
        assert spec.page_size is not None
        pages = paging.pages(page_table, sizes, spec.page_size, spec.shape_k[0])
    return Plan(Work(spec, mask, spans, sizes, demand, where, bounds, pages, build), choice)


def _refuse_empty(mask: Mask, spans: SpanSets, sizes: Lengths) -> None:
    """A mask that lets nobody see anything without spans, and no spans: a mistake, not a mask."""
    if not spans or mask.total or sizes.total_q == 0:
        return
    if all(own.host is not None and not any(own.host) for own in spans.values()):
        nothing: dict[str, SequenceSpans] = {name: () for name in spans}
        if not dense_mask(mask, 1, 1, nothing).any():
            raise InputError("ranges", f"at least one span, without which {mask!r} is empty", "none")


def check_mask(mask: object) -> None:
    if not isinstance(mask, Mask):
        got = repr(mask) if isinstance(mask, str) or callable(mask) else type(mask).__name__
        raise InputError("mask", "a fa4_prefixlm mask such as PrefixLM(window=1024)", got)


def check_same(spec: CallSpec, wanted: CallSpec, fields: tuple[str, ...]) -> None:
    """Refuse tensors that differ from those a plan was made for."""
    for field in fields:
        if getattr(spec, field) != getattr(wanted, field):
            expected = f"{field} = {getattr(wanted, field)}, as the plan was made for"
            raise InputError(_ARGUMENT.get(field, "q"), expected, getattr(spec, field))


_ARGUMENT = {"shape_k": "k", "heads_kv": "k", "page_size": "k", "head_dim_v": "v"}


def three(like: object) -> QKV:
    if not isinstance(like, tuple | list) or len(like) != 3:
        raise InputError("like", "the tensors (q, k, v)", type(like).__name__)
    return like[0], like[1], like[2]


class _Keys(NamedTuple):
    """What the user said of the keys."""

    cu_seqlens_k: CuSeqlens | None
    seqused_k: CuSeqlens | None
    page_table: torch.Tensor | None


def find_build(module: str | None) -> Build | None:
    found = builds.installed(module)
    if module is not None and found is None:
        raise InputError("build", f"an importable FA4, such as {' or '.join(builds.MODULES)}", repr(module))
    return found


def _lengths(spec: CallSpec, cu_q: CuSeqlens | None, keys: _Keys, max_q: int | None, max_k: int | None) -> Lengths:
    cu_k = keys.cu_seqlens_k
    if keys.page_table is not None:
        return _paged_lengths(spec, cu_q, keys, max_q, max_k)
    if spec.batched:
        for name, value in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if value is not None:
                raise InputError(name, "None with (batch, seqlen, heads, head_dim) tensors", "a value")
        return lengths.batched(spec.shape_q[0], spec.shape_q[1], spec.shape_k[1], spec.device)
    for name, value in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if value is None:
            raise InputError(name, "(batch + 1,) int32 with packed (total, heads, head_dim) tensors", None)
    assert cu_q is not None
    assert cu_k is not None
    return lengths.packed(
        cu_q,
        cu_k,
        total_q=spec.shape_q[0],
        total_k=spec.shape_k[0],
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        device=spec.device,
    )


def _paged_lengths(
    spec: CallSpec, cu_q: CuSeqlens | None, keys: _Keys, max_q: int | None, max_k: int | None
) -> Lengths:
    assert spec.page_size is not None
    if keys.cu_seqlens_k is not None:
        raise InputError("cu_seqlens_k", "None with a page_table (seqused_k says how many keys there are)", "a value")
    for name, value in (("cu_seqlens_q", cu_q), ("seqused_k", keys.seqused_k)):
        if value is None:
            raise InputError(name, "int32 values with a page_table", None)
        if not hasattr(value, "__len__"):
            raise InputError(name, "an int32 tensor or a list of integers", value)
    assert cu_q is not None
    assert keys.seqused_k is not None
    table = paging.check_table(keys.page_table, len(cu_q) - 1, spec.device)
    return lengths.paged(
        cu_q,
        keys.seqused_k,
        total_q=spec.shape_q[0],
        capacity=table.shape[1] * spec.page_size,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        device=spec.device,
    )


def _causal_pairs(rows: int, keys: int) -> int:
    return rows * (keys - rows) + rows * (rows + 1) // 2


def _dims(spec: CallSpec) -> str:
    same = spec.head_dim == spec.head_dim_v
    return f"{spec.head_dim}, {spec.dtype}" if same else f"{spec.head_dim} (value {spec.head_dim_v}), {spec.dtype}"


def _share(flops: int, whole: int) -> str:
    return f"{flops / whole:.0%}" if whole else "0%"
