"""Plans for engines: allocated once, updated for every batch without a synchronisation, captured in CUDA graphs."""

from __future__ import annotations

import abc
import dataclasses

import torch

from fa4_prefixlm.backends.base import Gradients, Prepared
from fa4_prefixlm.backends.causal import CausalCall
from fa4_prefixlm.backends.fa4_verdicts import outputs
from fa4_prefixlm.backends.native import NativeCall, native_kernel
from fa4_prefixlm.backends.select import BACKENDS, Choice, choose
from fa4_prefixlm.backends.two_pass import TwoPasses
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.batch.arguments import BatchArguments
from fa4_prefixlm.batch.integers import as_int32, whole_number
from fa4_prefixlm.batch.keys import Keys, check_table
from fa4_prefixlm.batch.lengths import CuSeqlens, Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.ranges import NamedRanges
from fa4_prefixlm.batch.tensors import QKV, CallSpec, describe
from fa4_prefixlm.device_checks import host_knows, is_capturing, to_device
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.launch import PADDING
from fa4_prefixlm.geometry.traits import Traits, text_only, traits_of_any
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.interval_lists import END_OF_KEYS
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.runtime.callable_plan import CallablePlan
from fa4_prefixlm.runtime.execute import check_same
from fa4_prefixlm.runtime.fallback_warnings import warn_of_fallback
from fa4_prefixlm.runtime.plans import Plan, check_mask, find_build, plan_for, three


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest batch. keys: of one sequence, what a row of the page table can hold."""

    tokens: int
    sequences: int
    pages: int
    page_size: int

    @property
    def keys(self) -> int:
        return self.pages * self.page_size

    def largest_batch(self) -> Lengths:
        """One sequence of all the tokens, on the host."""
        keys = max(self.keys, self.tokens)
        return lengths.cached(
            [0, self.tokens],
            [keys],
            total_q=self.tokens,
            capacity=keys,
            max_seqlen_q=None,
            max_seqlen_k=None,
            device=torch.device("cpu"),
        )


@dataclasses.dataclass(frozen=True)
class Update:
    """One update, its shapes checked.

    Attributes:
        rows: of `q`, at least; None if only the device knows.
        pages: that the cache has at least, as far as the host knows.
    """

    ranges: NamedRanges
    cu_seqlens_q: CuSeqlens
    seqused_k: CuSeqlens
    page_table: torch.Tensor
    rows: int | None
    pages: int

    @property
    def size(self) -> int:
        return len(self.cu_seqlens_q) - 1

    @property
    def lengths_on_host(self) -> bool:
        return host_knows(self.cu_seqlens_q) and host_knows(self.seqused_k)

    def host_lengths(self, capacity: int) -> Lengths:
        """The lengths, checked, with their tensors on the host."""
        assert self.rows is not None
        return lengths.cached(
            _on_host(self.cu_seqlens_q),
            _on_host(self.seqused_k),
            total_q=int(self.cu_seqlens_q[-1]),
            capacity=capacity,
            max_seqlen_q=None,
            max_seqlen_k=None,
            device=torch.device("cpu"),
        )


class ServingPlan(CallablePlan):
    """Made by `serving_plan`: keys in pages, `update` for each batch.

    Attributes:
        mask: the mask.
        limits: the largest batch.
        choice: the backends, forward and backward, with their reasons.
        spec: what `q`, `k`, `v` must look like, but for their numbers of tokens and pages.
        in_place: `update` writes the buffers that kernels read, so a CUDA graph captured with this plan runs the batch
            of the last update. Where it is False (no backend that reads such buffers runs the mask), `update` makes a
            new plan, and running it in a capture raises.
    """

    def __init__(
        self, mask: Mask, spec: CallSpec, limits: Limits, build: Build | None, graphs_take_any_batch: bool
    ) -> None:
        self.mask, self._spec, self.limits = mask, spec, limits
        self._state = _state(mask, spec, limits, build, graphs_take_any_batch)
        self.in_place = isinstance(self._state, _InPlace)
        self._rows = self._pages = 0
        self._updated = False

    @property
    def spec(self) -> CallSpec:
        return self._spec

    @property
    def choice(self) -> Choice:
        return self._state.choice

    def update(
        self,
        ranges: NamedRanges = None,
        *,
        cu_seqlens_q: CuSeqlens,
        seqused_k: CuSeqlens,
        page_table: torch.Tensor,
        total_q: int | None = None,
    ) -> None:
        """Take the next batch. Never synchronises; values on the device are checked by a device-side assertion.

        Args:
            ranges: as for `plan`, for the sequences of this batch, and only read here. A span past the keys of its
                sequence is one that is not prefilled yet; one that a chunk cuts is an error (see `safe_chunk_end`).
                With None, or spans on the host that no query token is in, the batch runs FA4's own causal call; a
                captured graph runs what it captured, with the same result.
            cu_seqlens_q: `(batch + 1,)` int32, at most `max_sequences` sequences.
            seqused_k: `(batch,)` int32, the keys in the pages, those of this batch's tokens included.
            page_table: `(batch, pages)` int32, at most `max_pages` wide; copied.
            total_q: rows of `q`, if `cu_seqlens_q` is on the device and `q` has fewer than `max_tokens`. Rows past
                `cu_seqlens_q[-1]` are left alone. Where the plan is not `in_place`, there must be none.
        """
        given = _checked(ranges, cu_seqlens_q, seqused_k, page_table, total_q, self)
        self._state.take(given)
        self._rows = self.limits.tokens if given.rows is None else given.rows
        self._pages, self._updated = given.pages, True

    @property
    def prepared(self) -> Prepared:
        prepared = self._state.prepared()
        # A graph that is captured before the first update runs the batches of later ones.
        return prepared if self._updated or is_capturing() else _BeforeTheFirst(prepared)

    def gradients(self, deterministic: bool) -> Gradients:
        """There are none: a serving plan has keys in pages."""
        raise UnsupportedError("q, k, v", f"no gradient: {self.choice.backward.reason}", "requires_grad")

    def check(self, spec: CallSpec) -> None:
        """Refuse tensors that the plan was not made for."""
        check_same(spec, self.spec, ("heads_q", "heads_kv", "head_dim", "head_dim_v", "page_size", "dtype", "device"))
        if spec.shape_k[0] < self._pages:
            expected = f"a cache of at least {self._pages} pages, which the page_table of the last update names"
            raise InputError("k", expected, f"{spec.shape_k[0]} pages")
        rows, exactly = spec.shape_q[0], not self.in_place and self._updated
        if not self._rows <= rows <= (self._rows if exactly else self.limits.tokens):
            expected = f"{self._rows} rows" if exactly else f"{self._rows} to {self.limits.tokens} rows"
            raise InputError("q", f"{expected}, as the plan's batch has", rows)

    def __str__(self) -> str:
        size = self.limits
        lines = [
            ("at most", f"{size.sequences} sequences, {size.tokens} queries, {size.keys} keys each"),
            ("mask", str(self.mask)),
            ("backend", str(self.choice)),
            *[("not", f"{name}: {reason}") for name, reason in self.choice.passed_over],
            *self._state.describe(),
        ]
        return "\n".join(f"{label:8} {text}" for label, text in lines)


def serving_plan(
    *,
    like: QKV,
    max_tokens: int,
    max_sequences: int,
    max_pages: int,
    mask: Mask = PrefixLM(),  # noqa: B008 (an immutable value)
    build: str | None = None,
    graphs_take_any_batch: bool = True,
) -> ServingPlan:
    """Allocate a plan for an engine.

    Call `attention` with it once before the first `update`, to compile its kernel: there is no batch yet, so all rows
    give 0 and an LSE of -inf. (A plan that is not `in_place` compiles at its first batch instead.)

    Args:
        like: the `(q, k_cache, v_cache)` that the plan is for: packed queries of any length, and caches
            `(pages, page_size, kv_heads, head_dim)`; only shapes, dtypes and devices matter.
        max_tokens, max_sequences: the largest batch.
        max_pages: width of the page table, pages of one sequence at most.
        mask, build: as for `plan`.
        graphs_take_any_batch: False: a graph runs batches of at most as many sequences as the last update before its
            capture had, which is quicker by the sequences that `max_sequences` has beyond them. For engines that pad
            their batches to the sizes that they capture.
    """
    spec = describe(*three(like), cache="pages")
    given = {"max_tokens": max_tokens, "max_sequences": max_sequences, "max_pages": max_pages}
    sizes = {name: whole_number(name, value, "a positive integer", least=1) for name, value in given.items()}
    for name, size in sizes.items():
        if size > END_OF_KEYS:
            raise InputError(name, f"at most {END_OF_KEYS}, int32", size)
    if not isinstance(graphs_take_any_batch, bool):
        raise InputError("graphs_take_any_batch", "True or False", graphs_take_any_batch)
    check_mask(mask)
    assert spec.page_size is not None
    if sizes["max_pages"] * spec.page_size > END_OF_KEYS:
        raise InputError("max_pages", f"at most {END_OF_KEYS // spec.page_size} pages of {spec.page_size}", max_pages)
    limits = Limits(sizes["max_tokens"], sizes["max_sequences"], sizes["max_pages"], spec.page_size)
    return ServingPlan(mask, spec, limits, find_build(build), graphs_take_any_batch)


class _State(abc.ABC):
    choice: Choice

    @abc.abstractmethod
    def take(self, batch: Update) -> None: ...

    @abc.abstractmethod
    def prepared(self) -> Prepared: ...

    @abc.abstractmethod
    def describe(self) -> list[tuple[str, str]]: ...


def _state(mask: Mask, spec: CallSpec, limits: Limits, build: Build | None, graphs_take_any_batch: bool) -> _State:
    found = traits_of_any(mask, dict.fromkeys(mask.names, limits.keys), dict.fromkeys(mask.names, 2))
    largest = limits.largest_batch()
    choice = choose_in_place(spec, found, build)
    if choice is not None and build is not None:
        warn_of_fallback(choice, spec, found, largest, build)
        return _InPlace(choice, mask, spec, found, limits, build, graphs_take_any_batch)
    return _Rebuilt(mask, spec, choose("auto", spec, found, largest, build), build)


def choose_in_place(spec: CallSpec, traits: Traits, build: Build | None) -> Choice | None:
    """The backend that reads buffers which an update writes in place; None if none of them runs the mask."""
    passed_over: dict[str, str] = {}
    if traits.closed_form is not None and build is not None:
        for name in ("causal", "native", "two_pass"):
            refusal = BACKENDS[name].refusal(spec, traits, build)
            if refusal is None:
                return Choice.serving(passed_over, name)
            passed_over[name] = refusal
    return None


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The calls of batches without and with spans, for so many sequences."""

    sequences: int
    causal: CausalCall
    with_spans: Prepared


class _InPlace(_State):
    """Kernels over buffers that stay where they are: native, two-pass, or FA4's causal one for an always plain mask."""

    def __init__(
        self,
        choice: Choice,
        mask: Mask,
        spec: CallSpec,
        traits: Traits,
        limits: Limits,
        build: Build,
        graphs_take_any_batch: bool,
    ) -> None:
        from fa4_prefixlm.kernels.row_update import RowBuffers

        self.choice, name = choice, choice.name
        assert traits.closed_form is not None
        self._mask, self._form, self._limits, self._device = mask, traits.closed_form, limits, spec.device
        kernel = native_kernel(spec, traits, limits.tokens) if name == "native" else None
        tile = (kernel.tokens, kernel.tile.n) if kernel is not None else (128, 128)
        self._rows = RowBuffers.allocate(
            limits.tokens, limits.sequences, *tile, limits.pages, device=spec.device, padding=PADDING
        )
        self._build, self._kernel, self._two_passes = build, kernel, name == "two_pass"
        self._window = None if traits.causal_part is None else traits.causal_part.window
        self._graphs_take_any_batch = graphs_take_any_batch
        self._of_any_size = self._of_this_size = self._calls(limits.sequences)
        self._text_only = False

    def _calls(self, sequences: int) -> _Calls:
        """Calls over the first sequences of the buffers: a kernel has work to skip for each that it is launched for."""
        rows = self._rows
        cu_seqlens_q = rows.cu_seqlens_q.narrow(0, 0, sequences + 1)
        used, table = (own.narrow(0, 0, sequences) for own in (rows.seqused_k, rows.page_table))
        keys = Keys(self._limits.keys, seqused_k=used, page_table=table)
        causal = CausalCall(self._build, cu_seqlens_q, self._limits.tokens, keys, self._window)
        if self._kernel is not None:
            call = NativeCall(self._build, self._kernel, rows.bounds, rows.tiles, cu_seqlens_q, keys)
            return _Calls(sequences, causal, call)
        return _Calls(sequences, causal, TwoPasses(causal, rows.bounds) if self._two_passes else causal)

    def take(self, batch: Update) -> None:
        from fa4_prefixlm.kernels.row_update import update_rows

        spans, self._text_only = self._read(batch)
        sequences = max(1, batch.size)
        if sequences != self._of_this_size.sequences:
            self._of_this_size = self._calls(sequences)
        update_rows(
            self._form,
            self._rows,
            _int32(batch.cu_seqlens_q, self._device),
            _int32(batch.seqused_k, self._device),
            spans,
            page_table=_int32(batch.page_table, self._device),
            max_rows=batch.rows,
            max_keys=self._room(batch),
        )

    def _room(self, batch: Update) -> int:
        """Keys that this batch's page table has room for; past it there are pages of an earlier batch."""
        return batch.page_table.shape[1] * self._limits.page_size

    def _read(self, batch: Update) -> tuple[list[torch.Tensor | None], bool]:
        """(the spans of each set on the device, whether the host knows that no query token is in one)."""
        names, causal_outside = [own.span for own in self._form.inside], self._form.is_causal_outside
        if batch.lengths_on_host and not ranges.on_device(batch.ranges):
            sizes = batch.host_lengths(self._room(batch))
            sets = ranges.parse(self._mask, batch.ranges, sizes)
            used = {name: own for name, own in sets.items() if own.host is not None and own.values.shape[1]}
            plain = causal_outside and all(text_only(own.on_host(), *sizes.on_host()) for own in used.values())
            return [to_device(used[name].values, self._device) if name in used else None for name in names], plain
        if batch.lengths_on_host:
            batch.host_lengths(self._room(batch))  # which checks them
        spans = ranges.to_tensors(self._mask, batch.ranges, batch.size, self._device)
        return [spans[name] for name in names], causal_outside and all(own is None for own in spans.values())

    def describe(self) -> list[tuple[str, str]]:
        return self._of_any_size.with_spans.describe()

    def prepared(self) -> Prepared:
        if is_capturing():
            # A graph outlives this batch: it has to capture the kernel that is right for every batch.
            return (self._of_any_size if self._graphs_take_any_batch else self._of_this_size).with_spans
        return self._of_this_size.causal if self._text_only else self._of_this_size.with_spans


class _BeforeTheFirst(Prepared):
    """Without a batch every row sees nothing. Runs what will run it, to have its kernel compiled."""

    def __init__(self, inner: Prepared | None) -> None:
        self._inner = inner

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = outputs(q, v, out) if self._inner is None else self._inner.run(q, k, v, options, out)
        return out.zero_(), lse.fill_(-torch.inf)

    def describe(self) -> list[tuple[str, str]]:
        return []


class _Rebuilt(_State):
    """A new plan for every batch, on the backends that are not native."""

    def __init__(self, mask: Mask, spec: CallSpec, choice: Choice, build: Build | None) -> None:
        self._mask, self._spec, self._build, self.choice = mask, spec, build, choice
        self._plan: Plan | None = None

    def take(self, batch: Update) -> None:
        if batch.rows is None:
            raise InputError("total_q", "the number of query tokens, which this backend has to know", None)
        known = _last(batch.cu_seqlens_q)
        if known is not None and known != batch.rows:
            raise InputError("total_q", f"{known}, cu_seqlens_q[-1]: this backend takes no rows past it", batch.rows)
        # The cache may have any number of pages: `like` was there for the shape of one.
        spec = dataclasses.replace(self._spec, shape_q=(batch.rows,), shape_k=(END_OF_KEYS, *self._spec.shape_k[1:]))
        self._plan = plan_for(
            spec,
            BatchArguments(
                batch.ranges,
                cu_seqlens_q=batch.cu_seqlens_q,
                seqused_k=batch.seqused_k,
                page_table=batch.page_table,
            ),
            self._mask,
            self._build,
        )
        self.choice = self._plan.choice

    def describe(self) -> list[tuple[str, str]]:
        return [] if self._plan is None else self._plan.prepared.describe()

    def prepared(self) -> Prepared:
        if self._plan is None:
            return _BeforeTheFirst(None)
        if is_capturing():
            expected = "no CUDA graph capture: this backend does not read buffers that update() writes in place"
            raise UnsupportedError("plan", expected, f"backend {self.choice.name}")
        return self._plan.prepared


def _checked(
    spans: NamedRanges,
    cu_seqlens_q: CuSeqlens,
    seqused_k: CuSeqlens,
    page_table: torch.Tensor,
    total_q: int | None,
    own: ServingPlan,
) -> Update:
    """Shapes and what the host knows by itself."""
    cu_seqlens_q, seqused_k = as_int32("cu_seqlens_q", cu_seqlens_q), as_int32("seqused_k", seqused_k)
    page_table = as_int32("page_table", page_table)
    for name, values in (("cu_seqlens_q", cu_seqlens_q), ("seqused_k", seqused_k)):
        if not hasattr(values, "__len__") or (isinstance(values, torch.Tensor) and values.ndim != 1):
            raise InputError(name, "a 1-D int32 tensor or a list of integers", values)
        if isinstance(values, torch.Tensor) and values.dtype != torch.int32:
            raise InputError(name, "dtype torch.int32", values.dtype)
        if not isinstance(values, torch.Tensor):
            for index, value in enumerate(values):
                whole_number(f"{name}[{index}]", value, "a non-negative integer")
    if total_q is not None:
        total_q = whole_number("total_q", total_q, "a non-negative integer")
    batch, limits = len(cu_seqlens_q) - 1, own.limits
    if not 0 <= batch <= limits.sequences:
        raise InputError("cu_seqlens_q", f"1 to {limits.sequences + 1} entries, as max_sequences allows", batch + 1)
    if len(seqused_k) != batch:
        raise InputError("seqused_k", f"{batch} entries, one per sequence", f"{len(seqused_k)}")
    table = check_table(page_table, batch, own.spec.device)
    if table.shape[1] > limits.pages:
        raise InputError("page_table", f"at most {limits.pages} pages a sequence, the plan's max_pages", table.shape[1])
    known = _last(cu_seqlens_q)
    rows = known if total_q is None else total_q
    if known is not None and known > limits.tokens:
        raise InputError("cu_seqlens_q[-1]", f"at most {limits.tokens} tokens, the plan's max_tokens", known)
    if total_q is not None and not (known or 0) <= total_q <= limits.tokens:
        raise InputError("total_q", f"{known or 0} to {limits.tokens} rows, the plan's max_tokens", total_q)
    return Update(spans, cu_seqlens_q, seqused_k, table, rows, _pages_named(table, seqused_k, limits.page_size))


def _pages_named(table: torch.Tensor, seqused_k: CuSeqlens, page_size: int) -> int:
    """One more than the largest page that holds keys, 0 where the host does not know."""
    if not (host_knows(table) and host_knows(seqused_k)):
        return 0
    largest = -1
    for index, (row, keys) in enumerate(zip(table.tolist(), _as_list(seqused_k), strict=True)):
        used = row[: -(-keys // page_size)]
        if used and min(used) < 0:
            raise InputError(f"page_table[{index}]", "pages of at least 0", min(used))
        largest = max(largest, *used) if used else largest
    return largest + 1


def _as_list(values: CuSeqlens) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


def _last(values: CuSeqlens) -> int | None:
    return None if not host_knows(values) or len(values) == 0 else int(values[-1])


def _on_host(values: CuSeqlens) -> CuSeqlens:
    return values.cpu() if isinstance(values, torch.Tensor) else values


def _int32(values: CuSeqlens, device: torch.device) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) and values.device == device else to_device(values, device)
