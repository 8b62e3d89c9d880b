"""The metadata of vLLM 0.33's FlashAttention backend, turned into plans. Imports nothing of vLLM.

    plans = GroupPlans({"layers.0": layer_mask(1024, clamp=False), "layers.1": layer_mask(1024, clamp=False)}, ...)
    plans.update(mm_ranges={0: [(4, 259)]}, ...)  # once a step
    plans.attention("layers.0", q, kv_cache, out)  # in every layer

`backend` has these lines in vLLM's classes. Positions are vLLM's: counted from the start of the request, with inclusive
ends in `mm_ranges` and nowhere else. A *block* is vLLM's word for a page of the cache; it is used in this module only.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fa4_prefixlm.backends.flex import Flex
from fa4_prefixlm.backends.reference import Reference
from fa4_prefixlm.batch.tensors import DTYPES
from fa4_prefixlm.device_checks import to_device
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.masks import PrefixLM, causal
from fa4_prefixlm.masks import window as sliding_window
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.spans import BatchSpans, drop_longer
from fa4_prefixlm.runtime.public_call import attention
from fa4_prefixlm.runtime.serving_plans import ServingPlan, serving_plan

VENDORED = "vllm.vllm_flash_attn.cute"

MMRanges = Mapping[int, Sequence[tuple[int, int]]]
HostIntegers = torch.Tensor | Sequence[int]
KVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def find_build() -> str | None:
    """The `build` to give to `GroupPlans`: vLLM's own FA4 if it is installed, else None, the default."""
    return VENDORED if locate.installed(VENDORED) is not None else None


def layer_mask(window: int | None, *, clamp: bool, prefix_lm: bool = True) -> Mask:
    """The mask of a layer.

    Args:
        window: the layer's sliding window in tokens, the query's own included (`Attention.sliding_window`); None: none.
        clamp: the layer's `mm_prefix_clamp_sliding_window`. True: (causal or span) and window. False: (causal and
            window) or span. Without a window there is nothing to clamp.
        prefix_lm: False where the model ignores spans in this layer, as Gemma 4 does in its global ones.
    """
    if not prefix_lm:
        return causal if window is None else causal & sliding_window(window)
    return PrefixLM() if window is None else PrefixLM(window=window, clamp=clamp)


def spans_from_mm_ranges(
    mm_ranges: MMRanges | None,
    *,
    query_start_loc: HostIntegers,
    seq_lens: HostIntegers,
    window: int | None = None,
    clamp: bool = False,
) -> BatchSpans | None:
    """The spans that hold a query token of this step, half-open, one list per request; None if there are none.

    `{1: [(4, 259)]}` with `query_start_loc` [0, 7, 307] and `seq_lens` [90, 300] is `[[], [(4, 260)]]`.

    Args:
        mm_ranges: by request index, all inclusive `(start, end)` of the request, in any order. As in vLLM, one with
            `start >= end` is ignored.
        query_start_loc: `(requests + 1,)` on the host, exact.
        seq_lens: `(requests,)` on the host, keys of each request, this step's included. May be too large where all
            query tokens of a request are past its ranges (decoding).
        window, clamp: of the model, not of a layer. Without clamp, ranges longer than the window are dropped. vLLM has
            dropped them already when its builders see the ranges, so builders can leave these out.

    Raises:
        InputError: a range is cut by the end of the chunk (see `safe_chunk_end`), two overlap, or one is negative.
    """
    rows, keys = _lengths(query_start_loc, seq_lens)
    return _spans(mm_ranges or {}, rows, keys, None if clamp else window)


@dataclasses.dataclass(frozen=True)
class Placed:
    """What the host knows of a step, the same for all groups of layers.

    rows, keys: query tokens and keys of each request. spans: see `spans_from_mm_ranges`.
    """

    rows: list[int]
    keys: list[int]
    spans: BatchSpans | None

    @functools.cached_property
    def tokens(self) -> int:
        """Query tokens of the step."""
        return sum(self.rows)

    @functools.cached_property
    def longest(self) -> int:
        """Keys of the longest request."""
        return max(self.keys, default=0)

    def spans_on(self, device: torch.device) -> torch.Tensor | None:
        """The spans on a device, `(requests, max_ranges, 2)` int32, copied once and without waiting for it."""
        if self.spans is None:
            return None
        if device not in self._copies:
            width = max(map(len, self.spans))
            padded = [own + [(0, 0)] * (width - len(own)) for own in self.spans]
            self._copies[device] = to_device(padded, device)
        return self._copies[device]

    @functools.cached_property
    def _copies(self) -> dict[torch.device, torch.Tensor]:
        return {}


def place(*, query_start_loc: HostIntegers, seq_lens: HostIntegers, mm_ranges: MMRanges | None) -> Placed:
    """A step's spans, to be given to the plans of all groups.

    Args:
        query_start_loc, seq_lens, mm_ranges: as for `spans_from_mm_ranges`.

    Raises:
        InputError: as there.
    """
    rows, keys = _lengths(query_start_loc, seq_lens)
    return Placed(rows, keys, _spans(mm_ranges or {}, rows, keys, None))


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer's cache, as views.

    Args:
        kv_cache: `(blocks, kv_heads, block_size, 2 * head_dim)`; the K and V of a token alternate in memory.

    Returns:
        (keys, values), each `(blocks, block_size, kv_heads, head_dim)`.
    """
    if kv_cache.ndim != 4 or kv_cache.shape[3] % 2:
        raise InputError("kv_cache", "shape (blocks, kv_heads, block_size, 2 * head_dim)", tuple(kv_cache.shape))
    both = kv_cache.transpose(1, 2)
    if 1 in both.shape:
        # Torch allows any stride in a dimension of one element; TMA needs multiples of 16 bytes.
        strides = [
            kv_cache.shape[3] if size == 1 else step for size, step in zip(both.shape, both.stride(), strict=True)
        ]
        both = both.as_strided(both.shape, strides)
    keys, values = both.chunk(2, dim=3)
    return keys, values


class GroupPlans:
    """The plans of one attention group, whose layers share block table, head dim and heads, but not always the mask.

    Owned by the group's metadata builder, one for each micro-batch. `attention` runs the batch of the last `update`, so
    a builder that has one must not let vLLM reuse its metadata for another group's block table.

    Attributes:
        plans: one `ServingPlan` for each distinct mask.
        text_only: no query token of the last update is in a span, so every layer is causal, with its window if it has
            one.
        in_place: a captured CUDA graph runs the batch of the last update, padded to as many requests as the update
            before the capture had.
    """

    def __init__(
        self,
        layers: Mapping[str, Mask],
        *,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        build: str | None = None,
    ) -> None:
        """Allocate the plans.

        Args:
            layers: the mask of each layer, by the name that `attention` gets.
            max_tokens, max_requests: `max_num_batched_tokens` and `max_num_seqs`.
            max_blocks: blocks of the longest request, `max_model_len / block_size` rounded up.
            block_size: tokens of a block, as the block table counts them.
            num_heads, num_kv_heads: of this rank.
            head_dim: of keys and values.
            dtype: of queries and cache.
            device: of queries and cache.
            build: the FA4 to run on, see `find_build`.

        Raises:
            UnsupportedError: a layer's mask reads spans, and no FA4 kernel runs it here (such as head dim 512 on
                upstream FA4).
        """
        if not layers:
            raise InputError("layers", "at least one layer", "none")
        if dtype not in DTYPES:
            raise InputError("dtype", f"one of {', '.join(map(str, DTYPES))}: FA4 has no fp8 here", dtype)
        row = torch.empty(head_dim, dtype=dtype, device=device)  # expanded, so the shapes below take no memory
        cache = row.expand(torch.iinfo(torch.int32).max, block_size, num_kv_heads, head_dim)
        like = (row.expand(1, num_heads, head_dim), cache, cache)
        limits = {"max_tokens": max_tokens, "max_sequences": max_requests, "max_pages": max_blocks}
        self.plans: dict[Mask, ServingPlan] = {}
        for name, mask in layers.items():
            if mask not in self.plans:
                # vLLM pads requests to those of the graph that it replays.
                self.plans[mask] = serving_plan(
                    like=like, mask=mask, build=build, graphs_take_any_batch=False, **limits
                )
                _refuse_without_fa4(name, mask, self.plans[mask])
        self._plan_of = {name: self.plans[mask] for name, mask in layers.items()}
        self._max_blocks, self._block_size, self._tokens = max_blocks, block_size, 0
        self.text_only = True

    @property
    def in_place(self) -> bool:
        return all(plan.in_place for plan in self.plans.values())

    def plan_of(self, layer: str) -> ServingPlan:
        """The plan that runs a layer, by its name in `layers`."""
        plan = self._plan_of.get(layer)
        if plan is None:
            raise InputError("layer", f"one of {', '.join(self._plan_of)}", repr(layer))
        return plan

    def update(
        self,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc_cpu: HostIntegers,
        seq_lens_cpu: HostIntegers,
        mm_ranges: MMRanges | None = None,
        exact_on_host: bool = False,
    ) -> None:
        """Take this step's batch. Copies what it keeps, and does not wait for the device.

        Args:
            query_start_loc: `(requests + 1,)` int32 on the device, its tail repeated for padded requests.
            seq_lens: `(requests,)` int32 on the device, 0 for padded requests.
            block_table: `(requests, blocks)` int32 on the device, of any width and stride.
            query_start_loc_cpu: `(requests + 1,)` on the host, exact.
            seq_lens_cpu: `(requests,)` on the host; upper bounds are enough for decoding requests.
            mm_ranges: see `spans_from_mm_ranges`.
            exact_on_host: `seq_lens_cpu` is exact for all requests. Saves memory on backends that are not in place.

        Raises:
            InputError: as `spans_from_mm_ranges`.
        """
        placed = place(query_start_loc=query_start_loc_cpu, seq_lens=seq_lens_cpu, mm_ranges=mm_ranges)
        on_device = {"query_start_loc": query_start_loc, "seq_lens": seq_lens, "block_table": block_table}
        self.take(placed, **on_device, exact_on_host=exact_on_host)

    def take(
        self,
        placed: Placed,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        exact_on_host: bool = False,
    ) -> None:
        """`update` with what is on the host placed already, once for the plans of all groups.

        Args:
            placed: the step.
            query_start_loc, seq_lens, block_table, exact_on_host: as for `update`.
        """
        held = max(1, -(-placed.longest // self._block_size))
        # vLLM's table is as wide as its longest request could be.
        table = block_table.narrow(1, 0, min(held, self._max_blocks, block_table.shape[1]))
        for mask, plan in self.plans.items():
            from_host = exact_on_host and not plan.in_place
            spans = placed.spans_on(plan.spec.device) if plan.in_place else placed.spans
            plan.update(
                spans if mask.names else None,
                cu_seqlens_q=[0, *itertools.accumulate(placed.rows)] if from_host else query_start_loc,
                seqused_k=placed.keys if from_host else seq_lens,
                page_table=table,
                total_q=placed.tokens,
            )
        self._tokens, self.text_only = placed.tokens, placed.spans is None

    def attention(
        self,
        layer: str,
        q: torch.Tensor,
        kv_cache: KVCache,
        out: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write one layer's attention to `out` and return it; rows past the batch's tokens are left alone.

        Args:
            layer: its name in `layers`.
            q, out: `(rows, heads, head_dim)`, with at least the batch's tokens. In a CUDA graph, all rows that the
                graph is padded to.
            kv_cache: of the layer, `(blocks, kv_heads, block_size, 2 * head_dim)`, with this step's tokens written; or
                the result of `split_cache`, which can be kept.
            softmax_scale, softcap, sinks: as for `fa4_prefixlm.attention`.
        """
        plan = self.plan_of(layer)
        keys, values = split_cache(kv_cache) if isinstance(kv_cache, torch.Tensor) else kv_cache
        rows, written = q, out
        if not plan.in_place:  # made for exactly the batch's rows, where a plan in place has them in its buffers
            rows, written = (tensor.narrow(0, 0, min(self._tokens, len(tensor))) for tensor in (q, out))
        attention(
            rows,
            keys,
            values,
            plan,
            softmax_scale=softmax_scale,
            softcap=softcap,
            learnable_sink=sinks,
            out=written,
        )
        return out

    def warm_up(
        self,
        kv_cache: KVCache | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> None:
        """Compile the kernels of batches with and without spans: once, before the first update and before CUDA graphs.

        Args:
            kv_cache: of any layer of the group; two tokens of block 0 are read. None: a cache of two blocks is made.
            progress: called after each call with what it was ("native, with spans") and the seconds that it took.
            options: `softcap` and `sinks` of the group's layers.
        """
        spec = next(iter(self.plans.values())).spec
        if kv_cache is None:
            size = (2, self._block_size, spec.heads_kv, 2 * spec.head_dim)
            kv_cache = torch.zeros(size, dtype=spec.dtype, device=spec.device).transpose(1, 2)
        q = torch.zeros(2, spec.heads_q, spec.head_dim, dtype=spec.dtype, device=spec.device)
        starts, keys, table = (
            torch.tensor(values, dtype=torch.int32, device=spec.device) for values in ([0, 2], [2], [[0]])
        )
        for what, mm_ranges in (("with spans", {0: [(0, 1)]}), ("without spans", None)):
            self.update(
                query_start_loc=starts,
                seq_lens=keys,
                block_table=table,
                query_start_loc_cpu=[0, 2],
                seq_lens_cpu=[2],
                mm_ranges=mm_ranges,
                exact_on_host=True,
            )
            for layer in {id(plan): name for name, plan in self._plan_of.items()}.values():
                began = time.monotonic()
                self.attention(layer, q, kv_cache, torch.empty_like(q), **options)
                if progress is not None:
                    progress(f"{self._plan_of[layer].mask}, {what}", time.monotonic() - began)


def _spans(mm_ranges: MMRanges, rows: list[int], keys: list[int], longest: int | None) -> BatchSpans | None:
    if not isinstance(mm_ranges, Mapping):
        expected = "a dictionary from request index to inclusive (start, end) pairs"
        raise InputError("mm_ranges", expected, type(mm_ranges).__name__)
    spans: BatchSpans = [[] for _ in rows]
    for request, own in mm_ranges.items():
        if not 0 <= request < len(rows):
            raise InputError("mm_ranges", f"requests of 0 to {len(rows) - 1}", request)
        end, begin = keys[request], keys[request] - rows[request]
        # First of all, since most requests decode: those that hold a query token, the last `rows` of `keys` positions.
        touched = [(start, last + 1) for start, last in own if begin <= last and start < end and start < last]
        if touched and begin < end:
            spans[request] = touched
    if longest is not None:
        spans = drop_longer(spans, longest)
    spans = [_checked(request, own, keys[request]) if own else own for request, own in enumerate(spans)]
    return spans if any(spans) else None


def _checked(request: int, touched: list[tuple[int, int]], keys: int) -> list[tuple[int, int]]:
    """The spans in order: none overlaps another, and the chunk cuts none."""
    before, touched = 0, sorted(touched)
    for start, end in touched:
        argument = f"mm_ranges[{request}]"
        if start < before:
            expected = "ranges that start at 0 or later" if before == 0 else "ranges that do not overlap"
            raise InputError(argument, expected, f"one from {start} on")
        if end > keys:
            cut = f"{(start, end - 1)}; a chunk holds a span whole or not at all, see safe_chunk_end"
            raise InputError(argument, f"ranges that end within the {keys} tokens so far", cut)
        before = end
    return touched


def _lengths(query_start_loc: HostIntegers, seq_lens: HostIntegers) -> tuple[list[int], list[int]]:
    """(query tokens, keys) of each request."""
    starts, keys = _host("query_start_loc_cpu", query_start_loc), _host("seq_lens_cpu", seq_lens)
    if len(starts) != len(keys) + 1:
        expected = f"{len(starts) - 1} entries, one per request of query_start_loc_cpu"
        raise InputError("seq_lens_cpu", expected, len(keys))
    return [end - start for start, end in itertools.pairwise(starts)], keys


def _host(name: str, values: HostIntegers) -> list[int]:
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise InputError(name, "values on the host: reading them from the device would wait for it", values.device)
        return [int(value) for value in values.tolist()]
    return [operator.index(value) for value in values]


def _refuse_without_fa4(layer: str, mask: Mask, plan: ServingPlan) -> None:
    if mask.names and plan.spec.device.type == "cuda" and plan.choice.name in (Flex.name, Reference.name):
        why = "; ".join(f"{name}: {reason}" for name, reason in plan.choice.passed_over)
        raise UnsupportedError(f"layers[{layer!r}]", f"a mask that FlashAttention-4 runs here ({why})", repr(mask))
