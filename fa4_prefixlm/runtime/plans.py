"""A plan: bounds, block lists and the choice of backend for one batch and one mask, reused by every layer."""

from __future__ import annotations

import torch

from fa4_prefixlm.backends.base import Gradients, MaskedBatch, Prepared
from fa4_prefixlm.backends.rows import fills_in_one_launch
from fa4_prefixlm.backends.select import Choice, choose
from fa4_prefixlm.backends.select_backward import Backward, prepare_backward
from fa4_prefixlm.batch.arguments import BatchArguments
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import CuSeqlens, Lengths
from fa4_prefixlm.batch.ranges import MaxRange, NamedRanges, SpanSets, assert_valid
from fa4_prefixlm.batch.ranges import parse as parse_ranges
from fa4_prefixlm.batch.tensors import QKV, CallSpec, describe
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.telling_rows import TellingRows, measured
from fa4_prefixlm.geometry.tiles import TileCounts
from fa4_prefixlm.geometry.traits import Traits, in_words, traits
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.runtime.callable_plan import CallablePlan
from fa4_prefixlm.runtime.execute import check_same
from fa4_prefixlm.runtime.fallback_warnings import warn_of_fallback, warn_of_slow_backward


class Plan(CallablePlan):
    """Made by `plan`. `print(plan)` shows the backend and why, the tiles and the exact work (which synchronises).

    Attributes:
        mask: the mask.
        choice: the backends, forward and backward, with their reasons.
        spec: what `q`, `k`, `v` must look like.
        lengths: of the sequences, in tokens: `cu_seqlens_q` and `cu_seqlens_k`, int32 `(batch + 1,)`, and on the host
            `total_q`, `total_k`, `max_seqlen_q` and `max_seqlen_k`.
        spans: the checked ranges by name, `values` int32 `(batch, max_spans, 2)`: half-open key positions of the
            sequence, unused rows `(0, 0)`.
        traits: what the mask asks of a kernel (intervals per row, a block of tags).
        bounds: the keys each row sees, `lo` and `hi` int32 `(total_q, K)`: half-open intervals of keys of the row's own
            sequence, counted from its first, disjoint and ascending; an empty one is `(2**31 - 1, 0)`. `tags`, of a
            `one_block` that runs by tags, are keys it sees besides; else None.
        keys: where the keys are: contiguous, `cu_seqlens_k`, int32 `(batch + 1,)`; or in pages, `seqused_k`, int32
            `(batch,)`, keys of each sequence, and `page_table`, int32 `(batch, max_pages)`.
        build: the FA4 it runs on.
        prepared: the backend's own state.
    """

    def __init__(self, batch: MaskedBatch, choice: Choice, backward: str = "auto") -> None:
        self._batch, self._choice, self._asked = batch, choice, backward
        self._gradients: dict[bool, tuple[Backward, Gradients]] = {}
        self._prepared = choice.prepare(batch)

    @property
    def mask(self) -> Mask:
        return self._batch.mask

    @property
    def choice(self) -> Choice:
        return self._choice

    @property
    def spec(self) -> CallSpec:
        return self._batch.spec

    @property
    def lengths(self) -> Lengths:
        return self._batch.lengths

    @property
    def spans(self) -> SpanSets:
        return self._batch.spans

    @property
    def traits(self) -> Traits:
        return self._batch.traits

    @property
    def bounds(self) -> Bounds:
        return self._batch.bounds

    @property
    def keys(self) -> Keys:
        return self._batch.keys

    @property
    def build(self) -> Build | None:
        return self._batch.build

    @property
    def prepared(self) -> Prepared:
        return self._prepared

    @prepared.setter
    def prepared(self, value: Prepared) -> None:
        self._prepared = value

    def gradients(self, deterministic: bool = False) -> Gradients:
        """The backward's state, made at the first call and reused by every layer."""
        if deterministic not in self._gradients:
            chosen, state = prepare_backward(
                self._asked, self._batch, forward=self.choice.name, deterministic=deterministic
            )
            warn_of_slow_backward(chosen, self.spec)
            self._gradients[deterministic] = chosen, state
        return self._gradients[deterministic][1]

    def check(self, spec: CallSpec) -> None:
        """Refuse tensors that the plan was not made for."""
        fields = ("shape_q", "shape_k", "heads_q", "heads_kv", "head_dim", "head_dim_v", "dtype", "device")
        check_same(spec, self.spec, fields)

    def tiles(self) -> TileCounts | None:
        """Tiles of one head visited in full, in part, and skipped; None for the reference. Synchronises."""
        return self.prepared.tile_counts()

    def flops(self) -> int:
        """Exact floating point operations of the forward: `2 * heads * (head_dim + head_dim_v)` for every pair of a
        query and a key it sees. Synchronises.
        """
        return self._flops(int(self.bounds.visible_pairs(self._batch.where)))

    def causal_flops(self) -> int:
        """The same for a plain causal mask without a window."""
        return self._flops(sum(_causal_pairs(rows, keys) for rows, keys in zip(*self.lengths.on_host(), strict=True)))

    def dense_flops(self) -> int:
        """The same if every query saw every key of its sequence."""
        return self._flops(sum(rows * keys for rows, keys in zip(*self.lengths.on_host(), strict=True)))

    def _flops(self, pairs: int) -> int:
        return 2 * self.spec.heads_q * (self.spec.head_dim + self.spec.head_dim_v) * pairs

    def __str__(self) -> str:
        flops, causal, dense = self.flops(), self.causal_flops(), self.dense_flops()
        size = self.lengths
        lines = [
            ("batch", f"{size.batch} sequences, {size.total_q} queries, {size.total_k} keys"),
            ("mask", f"{self.mask}, {in_words(self.bounds.count, tagged=self.traits.tagged)}"),
            ("heads", f"{self.spec.heads_q} query, {self.spec.heads_kv} key, head dim {_dims(self.spec)}"),
            ("backend", str(self.choice)),
            *[("not", f"{name}: {reason}") for name, reason in self.choice.passed_over],
            *self.prepared.describe(),
        ]
        tiles = self.tiles()
        if tiles is not None:
            lines.append(("tiles", f"{tiles.full} full, {tiles.partial} partial, {tiles.skipped} skipped (a head)"))
        share = f"{_share(flops, causal)} of plain causal, {_share(flops, dense)} of dense"
        lines.extend(self._backward_lines())
        lines.append(("work", f"{flops / 1e9:.3f} GFLOP exact, {share}"))
        return "\n".join(f"{label:8} {text}" for label, text in lines)

    def _backward_lines(self) -> list[tuple[str, str]]:
        """What was chosen, or what ran: the values of a mask may rule out the first choice."""
        if not self._gradients:
            return [("backward", str(self.choice.backward))]
        lines = []
        for backward, state in self._gradients.values():
            lines.append(("backward", str(backward)))
            lines.extend(("not", f"{name}: {reason}") for name, reason in backward.passed_over)
            lines.append(("kernel", state.describe()))
        return lines

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
    backward: str = "auto",
    build: str | None = None,
) -> Plan:
    """Prepare one batch under one mask. Builds on the device of `like`, without synchronising it (but on `cudnn`).

    Args:
        ranges: bidirectional spans, half-open `[start, end)` in absolute key positions. One list of pairs per sequence,
            `[[(4, 260)], [(0, 256), (300, 556)]]`, or an int32 tensor `(batch, max_ranges, 2)` on the host or the
            device with unused rows `(0, 0)`. None: no spans. They must not overlap; adjacent spans stay two spans.
            A mask that reads several span sets takes a dictionary, `{"image": [[(8, 24)]], "prompt": [[(0, 8)]]}`.
            Spans may lie past the keys that are present, to be prefilled later; what a chunk must hold of them is the
            mask's to say (`Mask.whole`, `safe_chunk_end`), and a chunk that does not is an error.
        like: the `(q, k, v)` that the plan is for; only shapes, dtypes and devices matter. Packed
            `(total, heads, head_dim)` with both `cu_seqlens`, or `(batch, seqlen, heads, head_dim)` without. With a
            `page_table`: `q` packed, `k` and `v` the cache, `(pages, page_size, kv_heads, head_dim)`. With `seqused_k`
            alone: a static cache, `(batch, max_seqlen, kv_heads, head_dim)`, and `q` packed or batched.
        cu_seqlens_q, cu_seqlens_k: `(batch + 1,)` int32 cumulative lengths, on the host (checked) or the device.
            Queries are the last `seqlen_q` of the `seqlen_k` positions of their sequence; they may be more than the
            keys for masks that do not use their position (`key_in`).
        seqused_k: `(batch,)` int32, the keys that each sequence has in the cache, those of this call included.
        page_table: `(batch, max_pages)` int32, on the host (checked) or the device: the pages of each sequence in
            order; entries past its last key are not read. Rows of the last page past the last key must be finite. Goes
            with `seqused_k`, instead of `cu_seqlens_k`.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; they spare memory when `cu_seqlens` is on the device.
        max_range: upper bound of a span's length in tokens, or one per name; it spares memory when `ranges` is on the
            device.
        mask: what the spans mean: `PrefixLM`, one of `fa4_prefixlm.masks`, or your own.
        backend: "auto", "causal", "native", "varlen", "packed", "two_pass", "cudnn", "flex" or "reference".
        backward: what computes gradients: "auto", "causal", "native", "packed", "cudnn", "flex" or "reference". Its
            tables are made when a gradient is first needed.
        build: the FA4 to run on, the package it is imported as. Default: "flash_attn.cute", or vLLM's
            "vllm.vllm_flash_attn.cute" where that is the only one.

    Returns:
        a `Plan`, to be called with tensors like `like`, or given to `attention`.

    Raises:
        InputError: an argument is wrong, or there is no such `backend`, `backward` or `build`; nothing was launched.
            Values that are on the device are checked by a device-side assertion instead (or here, in debug mode).
        UnsupportedError: the `backend` or `backward` that was named can't run this call exactly; "auto" finds one that
            can. A named backward that only the mask's values rule out says so when a gradient is first needed.
    """
    batch = BatchArguments(
        ranges, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_q, max_seqlen_k, max_range
    )
    batch = batch.checked()
    return plan_for(describe(*three(like), cache=batch.cache), batch, mask, find_build(build), backend, backward)


def plan_for(
    spec: CallSpec,
    arguments: BatchArguments,
    mask: Mask,
    build: Build | None,
    backend: str = "auto",
    backward: str = "auto",
) -> Plan:
    """`plan`, for tensors that are already described."""
    check_mask(mask)
    check_ranges(arguments.ranges)
    sizes = arguments.lengths(spec, more_queries=not mask.uses_position)
    spans = parse_ranges(mask, arguments.ranges, sizes, arguments.max_range)
    sizes, spans, keys = arguments.on_device(spec, sizes, spans)
    telling = TellingRows(mask, spans, sizes)
    found = measured(traits(mask, spans, sizes), telling)
    choice = choose(backend, spec, found, sizes, build, backward)
    warn_of_fallback(choice, spec, found, sizes, build)
    in_one_launch = _in_one_launch(choice, spec, found, sizes)
    batch = MaskedBatch(spec, mask, spans, sizes, found, keys, build, in_one_launch, telling)
    if not batch.in_one_launch:
        sizes.assert_valid()
        for own in spans.values():
            assert_valid(own, sizes)
    return Plan(batch, choice, backward)


def _in_one_launch(choice: Choice, spec: CallSpec, found: Traits, sizes: Lengths) -> bool:
    """The backend reads nothing but what a single launch can fill."""
    return choice.backend.reads_kernel_rows and not choice.gathered and fills_in_one_launch(spec, found, sizes)


def check_ranges(ranges: object) -> None:
    """Refuse a mask in the place of ranges."""
    if isinstance(ranges, Mask):
        raise InputError("ranges", "spans; a mask goes to mask=", repr(ranges))


def check_mask(mask: object) -> None:
    """Refuse what is not a mask."""
    if not isinstance(mask, Mask):
        raise InputError("mask", "a fa4_prefixlm mask such as PrefixLM(window=1024)", _no_mask(mask))


def _no_mask(value: object) -> str:
    """What came in the place of a mask, with what was probably meant."""
    if isinstance(value, type) and issubclass(value, Mask):
        return f"the class {value.__name__} (its masks are made by a call: {value.__name__}(...))"
    if callable(value):
        return f"{value!r} (a rule of positions becomes a mask by from_flex(...))"
    return repr(value) if isinstance(value, str) else type(value).__name__


def three(like: object) -> QKV:
    """The tensors of `like`."""
    if not isinstance(like, tuple | list) or len(like) != 3:
        got = f"{len(like)} of them" if isinstance(like, tuple | list) else type(like).__name__
        raise InputError("like", "the tensors (q, k, v)", got)
    return like[0], like[1], like[2]


def find_build(module: str | None) -> Build | None:
    """The build that the user named, or the default one."""
    if module is not None and not isinstance(module, str):
        raise InputError("build", "the name of a package, a string", module)
    found = locate.installed(module)
    if module is not None and found is None:
        raise InputError("build", f"an importable FA4, such as {' or '.join(locate.MODULES)}", repr(module))
    return found


def _causal_pairs(rows: int, keys: int) -> int:
    rows = min(rows, keys)  # of more queries than keys, the first see nothing
    return rows * (keys - rows) + rows * (rows + 1) // 2


def _dims(spec: CallSpec) -> str:
    same = spec.head_dim == spec.head_dim_v
    return f"{spec.head_dim}, {spec.dtype}" if same else f"{spec.head_dim} (value {spec.head_dim_v}), {spec.dtype}"


def _share(flops: int, whole: int) -> str:
    return f"{flops / whole:.0%}" if whole else "0%"
