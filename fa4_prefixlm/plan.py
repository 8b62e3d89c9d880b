"""A plan: bounds, block lists and the choice of backend for one batch and one mask, reused by every layer."""

from __future__ import annotations

import warnings

from . import backends, call, intervals, lengths
from .backends import Choice, Prepared, Work
from .backends.reference import dense_mask
from .call import QKV, CallSpec
from .errors import InputError
from .lengths import CuSeqlens, Lengths
from .mask import Mask
from .masks import PrefixLM
from .ranges import MaxRange, NamedRanges, SequenceSpans, SpanSets
from .ranges import parse as parse_ranges
from .tiling import TileCounts


class Plan:
    """Made by `plan`. `print(plan)` shows the backend and why, the tiles and the exact work (which synchronises).

    Attributes: `mask`; `choice`, the backend with its reason; `call`, what `q`, `k`, `v` must look like; `lengths`;
    `spans`; `demand`, what the mask asks of a kernel (intervals per row, a block of tags); `bounds`, the keys each row
    sees; `prepared`, the backend's own state.
    """

    def __init__(self, work: Work, choice: Choice) -> None:
        self.mask, self.call, self.lengths, self.choice = work.mask, work.call, work.lengths, choice
        self.demand = work.demand
        self.spans, self.bounds, self._where = work.spans, work.bounds, work.where
        self.prepared: Prepared = choice.backend.prepare(work)

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
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    max_range: MaxRange = None,
    mask: Mask = PrefixLM(),  # noqa: B008 (an immutable value)
    backend: str = "auto",
) -> Plan:
    """Prepare one batch under one mask. Builds on the device of `like`, without synchronising it.

    Args:
        ranges: bidirectional spans, half-open `[start, end)` in absolute key positions. One list of pairs per sequence,
            `[[(4, 260)], [(0, 256), (300, 556)]]`, or an int32 tensor `(batch, max_ranges, 2)` on the host or the
            device with unused rows `(0, 0)`. None: no spans. They must not overlap; adjacent spans stay two spans.
            A mask that reads several span sets takes a dictionary, `{"image": [[(8, 24)]], "prompt": [[(0, 8)]]}`.
        like: the `(q, k, v)` that the plan is for; only shapes, dtypes and devices matter. Packed
            `(total, heads, head_dim)` with both `cu_seqlens`, or `(batch, seqlen, heads, head_dim)` without.
        cu_seqlens_q, cu_seqlens_k: `(batch + 1,)` int32 cumulative lengths, on the host (checked) or the device.
            Queries are the last `seqlen_q` of the `seqlen_k` positions of their sequence.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; they spare memory when `cu_seqlens` is on the device.
        max_range: upper bound of a span's length in tokens, or one per name; it spares memory when `ranges` is on the
            device.
        mask: what the spans mean: `PrefixLM`, one of `fa4_prefixlm.masks`, or your own.
        backend: "auto", "varlen", "packed" or "reference".

    Raises:
        InputError: an argument is wrong; nothing was launched. Values that are on the device are checked by a
            device-side assertion instead (or here, in debug mode).
        UnsupportedError: the named backend can't run this call exactly.
    """
    spec = call.describe(*_three(like))
    sizes = _lengths(spec, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not isinstance(mask, Mask):
        got = repr(mask) if isinstance(mask, str) or callable(mask) else type(mask).__name__
        raise InputError("mask", "a fa4_prefixlm mask such as PrefixLM(window=1024)", got)
    spans = parse_ranges(mask, ranges, sizes, max_range)
    _refuse_empty(mask, spans, sizes)
    demand = intervals.measured(mask, spans, sizes, intervals.demand(mask, spans))
    choice = backends.choose(backend, spec, demand, sizes)
    if choice.passed_over and choice.name == "reference" and spec.device.type == "cuda":
        why = choice.passed_over[0][1]
        warnings.warn(f"fa4_prefixlm takes the dense reference, slow on long sequences: {why}", stacklevel=2)
    where = intervals.tokens(sizes)
    bounds = intervals.row_bounds(mask, spans, sizes, where, demand.intervals if not demand.custom else None)
    return Plan(Work(spec, mask, spans, sizes, demand, where, bounds), choice)


def _refuse_empty(mask: Mask, spans: SpanSets, sizes: Lengths) -> None:
    """A mask that lets nobody see anything without spans, and no spans: a mistake, not a mask."""
    if not spans or mask.total or sizes.total_q == 0:
        return
    if all(own.host is not None and not any(own.host) for own in spans.values()):
        nothing: dict[str, SequenceSpans] = {name: () for name in spans}
        if not dense_mask(mask, 1, 1, nothing).any():
            raise InputError("ranges", f"at least one span, without which {mask!r} is empty", "none")


def _three(like: object) -> QKV:
    if not isinstance(like, tuple | list) or len(like) != 3:
        raise InputError("like", "the tensors (q, k, v)", type(like).__name__)
    return like[0], like[1], like[2]


def _lengths(
    spec: CallSpec, cu_q: CuSeqlens | None, cu_k: CuSeqlens | None, max_q: int | None, max_k: int | None
) -> Lengths:
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


def _causal_pairs(rows: int, keys: int) -> int:
    return rows * (keys - rows) + rows * (rows + 1) // 2


def _dims(spec: CallSpec) -> str:
    same = spec.head_dim == spec.head_dim_v
    return f"{spec.head_dim}, {spec.dtype}" if same else f"{spec.head_dim} (value {spec.head_dim_v}), {spec.dtype}"


def _share(flops: int, whole: int) -> str:
    return f"{flops / whole:.0%}" if whole else "0%"
