"""The mask function that is registered with transformers: row bounds instead of a dense mask.

What it returns goes from layer to layer as it is, so every layer of a kind gets the same object. `known` finds by it
what was read back of it, once a forward for all masks that were made until then.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import transformers
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from fa4_prefixlm.device_checks import has_triton
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.geometry.traits import MOST_INTERVALS
from fa4_prefixlm.integrations.transformers.mask_functions import (
    AllOf,
    Documents,
    Expression,
    Unpadded,
    is_bidirectional,
    is_known,
    read,
)
from fa4_prefixlm.integrations.transformers.row_bounds import Grid, NotIntervals, bounds_of, first_runs
from fa4_prefixlm.integrations.transformers.row_runs import bounds_of_runs
from fa4_prefixlm.integrations.transformers.row_terms import FAR, ids_of, real_of, terms_of
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO
from fa4_prefixlm.runtime.plans import Plan

# A forward of this few queries (decoding, the candidates of assisted decoding) runs SDPA under SDPA's own mask: no
# kernel of FA4's is made for it, and its dense mask is small.
FEW_QUERIES = 16
# A mask function that is not transformers' own is evaluated for this many (query, key) pairs at a time.
EVALUATED_PAIRS = 2**24
# In the place of bounds that are no good: no row's interval begins here, so whoever has some of the rows can tell.
NO_GOOD = -1
# More than any bound and number of rows together.
LIMIT = 2**31 - 1

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What the host has read of a mask.

    Attributes:
        intervals: of a row, at most.
        overflow: a row sees more intervals than the bounds hold, which are then not its mask, and `NO_GOOD`.
        from_key_0: no row's first interval begins past key 0.
        longest: keys between a row's first and last, at most.
        end: no row sees a key from here on. A static cache has more slots than that.
        causal: rows see just what comes before them, or the last `longest` of it, where the last row stands at the last
            key before `end`.
    """

    intervals: int
    overflow: bool
    from_key_0: bool
    longest: int
    end: int
    causal: bool

    @classmethod
    def of(cls, numbers: list[int]) -> Seen:
        """From `Reading.numbers`."""
        intervals, overflow, empty, longest, end, latest, earliest, shortest = numbers
        # Each row ends a key after the one before it, and those that begin past key 0 see as many keys as any.
        diagonal = latest == LIMIT - earliest and shortest in (0, LIMIT - longest)
        causal = intervals == 1 and not empty and diagonal
        return cls(intervals, bool(overflow), not shortest, longest, end, causal)


class Reading:
    """Numbers of the device on their way to the host: eight, each the largest of all rows.

    Intervals of a row; 1 where the bounds are `NO_GOOD`; 1 of a row that sees nothing; keys from the first to the last
    of a row; their end; where the last row would end, if from each on they ended a key after the one before; `LIMIT`
    less that; and of rows that begin past key 0, `LIMIT` less the keys from the first to the last.

    Their copy begins when this is made, so whoever waits for them does not wait for what was launched since: a GPU that
    still has a first layer's projections to do is not idle while the host makes that layer's plan.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.device = values.device
        self.copy = values.to("cpu", non_blocking=values.is_cuda)  # elsewhere there is no event to wait for
        self.copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def numbers(self) -> list[int]:
        """Waits for them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.copy.tolist()


@dataclass(eq=False)
class Record:
    """What belongs to the bounds of one forward and one kind of layer.

    Attributes:
        kv_length: keys that the mask is for.
        read: what `Seen` is made of.
        dense: makes SDPA's own mask, bool `(batch, 1, q, kv)`.
        general: makes bounds of several intervals, where those that it belongs to are of one; None: they are the same.
        several: what it made.
        uses_several: `read` and `seen` are of those: the ones of one interval overflow.
        seen: once it was read.
        plans: by the tensors they are for, made by the first layer of a kind and used by all.
    """

    kv_length: int
    read: Reading
    dense: Callable[[], torch.Tensor]
    general: Callable[[], torch.Tensor] | None = None
    several: torch.Tensor | None = None
    uses_several: bool = False
    seen: Seen | None = None
    dense_mask: torch.Tensor | None = None
    plans: dict[object, Plan | str] = field(default_factory=dict)

    def as_dense(self) -> torch.Tensor:
        """SDPA's own mask, made once."""
        if self.dense_mask is None:
            self.dense_mask = self.dense()
        return self.dense_mask

    def in_several(self) -> torch.Tensor:
        """Bounds of several intervals, made once."""
        assert self.general is not None
        if self.several is None:
            self.several = self.general()
        return self.several


_records: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()  # models may run in several threads
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Say it the first time in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of a forward for one kind of layer. Registered as `fa4_prefixlm` with `AttentionMaskInterface`.

    The arguments are those that transformers gives any mask function, and are not checked here.

    Args:
        batch_size: sequences.
        q_length: queries of a sequence, in tokens.
        kv_length: keys of a sequence that the layer gets, in tokens.
        q_offset: position of the first query, in tokens; of a static cache a 0-d integer tensor.
        kv_offset: position of the first key, in tokens; not 0 where a cache has dropped keys.
        mask_function: transformers' `(batch_idx, head_idx, q_idx, kv_idx)` of positions, without padding. One that is
            not made of transformers' own functions is evaluated for every pair, of head 0.
        attention_mask: bool `(batch, positions)` on the device, False is padding, as are positions past its end. None:
            no padding.
        allow_is_bidirectional_skip: every query sees every key but for padding, and a window of `local_size`.
        use_vmap: evaluate a mask function by `torch.vmap`, and not on tensors that broadcast.
        device: of the mask.
        kwargs: `local_size`, the window of a mask that looks both ways, in tokens, and `dtype` are read.

    Returns:
        row bounds, int32 `(batch, 1, q, 2 * n)`, n at most 4: the keys `[bounds[..., k], bounds[..., n + k])`, counted
        from `kv_offset`, or -1 throughout where a row sees more runs than that; SDPA's dense mask, bool `(batch, 1, q,
        kv)`, for up to 16 queries; eager attention's, in `dtype`, of a mask that looks both ways by a function which
        is not transformers' own; or None where every query sees every key.

    Models that calculate with their masks (transformers has neither SDPA nor FlexAttention for them) get eager
    attention's, and `torch.jit.trace` SDPA's, for a trace would keep a plan of the one batch that it saw.
    """
    sizes: Sizes = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
        "allow_is_causal_skip": False,
    }
    local = kwargs.get("local_size")  # of a window that looks both ways, which may be narrower than the keys
    if allow_is_bidirectional_skip and attention_mask is None and (local is None or kv_length < local):
        return None
    if calculates_with_masks(type(kwargs.get("config")).__name__):
        return masking_utils.eager_mask(**{**kwargs, **sizes})
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _dense(sizes)
    if torch.compiler.is_compiling():
        return _dense(sizes) if q_length <= FEW_QUERIES else _evaluated(sizes)
    expression = read(mask_function)
    if not is_known(expression) and is_bidirectional(expression):
        # Models that work on such a mask themselves (Gemma 4's audio tower) take it as eager attention has it.
        return masking_utils.eager_mask(**{**kwargs, **sizes})
    if q_length <= FEW_QUERIES:
        return _dense(sizes)
    if isinstance(
        q_offset, torch.Tensor
    ):  # the cache's own, which its first layer moves on, before some masks are made
        sizes["q_offset"] = q_offset.clone()
    in_several = functools.partial(_bounds, expression, sizes)
    try:
        (bounds, reading), general = _one_interval(expression, sizes), in_several
    except NotIntervals:
        bounds, general = in_several(), None
        reading = _to_read(bounds.squeeze(1))
    with _lock:
        _records[bounds] = Record(kv_length, reading, functools.partial(_dense, sizes), general)
    return bounds


@torch.compiler.assume_constant_result
def calculates_with_masks(config: str) -> bool:
    """Models of this configuration class do arithmetic on their masks, or put others beside them.

    They are those that transformers has neither SDPA nor FlexAttention for, whose masks are not added to scores either.
    """
    calculates = _calculates.get(config)
    if calculates is None:
        models = [own for own in _below(transformers.PreTrainedModel) if config in _configurations(own)]
        takes = any(own._supports_sdpa or own._supports_flex_attn for own in models)
        calculates = _calculates[config] = bool(models) and not takes
    return calculates


_calculates: dict[str, bool] = {}


def _below(base: Any) -> Iterator[Any]:
    for own in base.__subclasses__():
        yield own
        yield from _below(own)


def _configurations(model: Any) -> list[str]:
    """Names of the classes that a model is configured by."""
    own: Any = model.config_class
    return [each.__name__ for each in (get_args(own) or (own,)) if isinstance(each, type)]


def known(bounds: torch.Tensor, kv_length: int) -> Record:
    """What belongs to `bounds`, with what was read of it.

    Waits for the device for the first of those that are not yet read, and once more for a mask of several intervals a
    row.

    Args:
        bounds: as `mask` returned them, or some of their rows.
        kv_length: keys of the layer that asks.

    Raises:
        InputError: the mask is for another number of keys.
    """
    return waited_for(found(bounds, kv_length))


def waited_for(record: Record) -> Record:
    """The record, with what was read of its mask. See `known`."""
    if record.seen is None:
        device = record.read.device
        with _lock:
            waiting = {id(own): own for own in _records.values() if own.seen is None and own.read.device == device}
        read_back(list(waiting.values()))
    assert record.seen is not None
    if record.seen.overflow and record.general is not None and not record.uses_several:
        read = _to_read(record.in_several().squeeze(1))
        with _lock:
            record.read, record.uses_several = read, True
        read_back([record])
    return record


def found(bounds: torch.Tensor, kv_length: int) -> Record:
    """What belongs to `bounds`, read or not. See `known`."""
    with _lock:
        record = _records.get(bounds) or _of_same_memory(bounds)
        if record is None:
            record = _records[bounds] = _of_some_rows(bounds) or record_of(bounds, kv_length)
    _check_keys(record, kv_length)
    return record


def made_here(bounds: torch.Tensor, kv_length: int) -> Record | None:
    """What belongs to `bounds` where eager code made them, and they are alive; None for a graph's own, and copies."""
    with _lock:
        record = _records.get(bounds) or _of_same_memory(bounds)
    if record is not None:
        _check_keys(record, kv_length)
    return record


def _check_keys(record: Record, kv_length: int) -> None:
    if record.kv_length != kv_length:
        expected = f"{record.kv_length} keys, as the mask was made for"
        raise InputError("key", f"{expected} (a cache that returns other keys can't be run exactly)", kv_length)


def record_of(bounds: torch.Tensor, kv_length: int) -> Record:
    """What belongs to bounds of which nothing else is known; not read yet.

    Raises:
        InputError: they are no bounds: a model has put something beside them, or padded them.
    """
    if bounds.shape[3] > 2:
        refuse_others(bounds)
    same = bounds.detach()  # another object: the record must not keep what it is found by
    return Record(kv_length, _to_read(bounds.squeeze(1)), lambda: alone(same, kv_length))


def alone(bounds: torch.Tensor, kv_length: int) -> torch.Tensor:
    """`visible` of bounds of which nothing else is known. Waits for the device.

    Raises:
        InputError: they are no bounds, or do not hold what rows see.
    """
    refuse_others(bounds)
    return visible(bounds, kv_length)


def refuse_others(bounds: torch.Tensor) -> None:
    """Raise `InputError` for what is not the bounds of a mask whose rows see no more runs of keys than those hold."""
    lo, hi = bounds.chunk(2, dim=3)
    fine = lo != NO_GOOD
    if bounds.shape[3] > 2:
        fine &= ((lo >= 0) & (lo < hi)) | ((lo == EMPTY_LO) & (hi == EMPTY_HI))
    if not bool(fine.all()):
        expected = f"a mask as the mask function made it, of at most {MOST_INTERVALS} runs of keys a row"
        hint = "a copy or a part of a mask, one that a model changed, or one of more runs in a graph of torch.compile"
        raise InputError("attention_mask", f"{expected} (run this batch without torch.compile)", hint)


def _of_some_rows(bounds: torch.Tensor) -> Record | None:
    """The record of a mask's rows from some on, `mask[:, :, begin:]`; None where it is of no mask that is known."""
    rows = bounds.shape[2]
    for own, record in _records.items():
        alike = own.stride() == bounds.stride() and (own.shape[:2], own.shape[3]) == (bounds.shape[:2], bounds.shape[3])
        if not alike or own.untyped_storage().data_ptr() != bounds.untyped_storage().data_ptr():
            continue
        begin, beside = divmod(bounds.storage_offset() - own.storage_offset(), own.stride(2))
        if not beside and 0 <= begin <= own.shape[2] - rows:
            return _narrowed(record, bounds, begin)
    return None


def _narrowed(record: Record, bounds: torch.Tensor, begin: int) -> Record:
    """The record of `bounds`, which are the rows from `begin` on of those of `record`."""
    rows = bounds.shape[2]
    return Record(
        record.kv_length,
        _to_read(bounds.squeeze(1)),
        lambda: record.as_dense().narrow(2, begin, rows),
        None if record.general is None else lambda: record.in_several().narrow(2, begin, rows),
    )


def _of_same_memory(bounds: torch.Tensor) -> Record | None:
    """The record of a mask that `bounds` is another view of, with all of its rows; it goes for both."""
    for own, record in _records.items():
        if own.data_ptr() == bounds.data_ptr() and own.shape == bounds.shape and own.stride() == bounds.stride():
            _records[bounds] = record
            return record
    return None


def read_back(waiting: list[Record]) -> None:
    """Read what the records wait for, all at once: the one time that a forward waits for the device."""
    for own in waiting:
        read = own.read
        seen = Seen.of(read.numbers())
        with _lock:
            if own.read is read:  # else another thread is at its several intervals already
                own.seen = seen


def visible(bounds: torch.Tensor, kv_length: int) -> torch.Tensor:
    """Bounds `(batch, 1, q, 2 * n)` as a dense mask, bool `(batch, 1, q, kv)`."""
    key = torch.arange(kv_length, device=bounds.device, dtype=torch.int32)
    n = bounds.shape[3] // 2
    seen = torch.zeros((), dtype=torch.bool, device=bounds.device)
    for k in range(n):
        seen = seen | ((key >= bounds[..., k : k + 1]) & (key < bounds[..., n + k : n + k + 1]))
    return seen


def _dense(sizes: Sizes) -> torch.Tensor:
    """SDPA's own mask."""
    made = masking_utils.sdpa_mask(**sizes)
    assert made is not None, "SDPA's mask is skipped only where that is allowed"
    return made


def _bounds(expression: Expression, sizes: Sizes) -> torch.Tensor:
    """Bounds of up to `MOST_INTERVALS` intervals a row, in the cheaper of the two ways."""
    try:
        return _marked(*bounds_of(*_unpadded(expression, sizes)))
    except NotIntervals:
        return _evaluated(sizes)


def _one_interval(expression: Expression, sizes: Sizes) -> tuple[torch.Tensor, Reading]:
    """Bounds of one interval a row, which overflow where a row sees several, and what is read of them.

    Raises:
        NotIntervals: see there.
    """
    if launches(torch.device(sizes["device"])):
        with contextlib.suppress(NotIntervals):
            return _in_one_launch(expression, sizes)
    bounds = _marked(*bounds_of_runs(*_unpadded(expression, sizes)))
    return bounds, _to_read(bounds.squeeze(1))


def launches(device: torch.device) -> bool:
    """Triton's kernels run there."""
    return device.type == "cuda" and has_triton()


def _in_one_launch(expression: Expression, sizes: Sizes) -> tuple[torch.Tensor, Reading]:
    """`_one_interval` of what the kernel takes. Raises `NotIntervals` for anything else."""
    from fa4_prefixlm.kernels.run_rows import run_rows

    if sizes["attention_mask"] is not None:
        expression = AllOf((expression, Unpadded(sizes["attention_mask"])))
    terms = terms_of(expression)
    own, real = ids_of(terms), real_of(terms)
    batch, rows, first, kv_begin = (sizes[name] for name in ("batch_size", "q_length", "q_offset", "kv_offset"))
    kv_end, device = kv_begin + sizes["kv_length"], torch.device(sizes["device"])

    def fits(tensor: torch.Tensor, *dtypes: torch.dtype) -> bool:
        rows_fit = tensor.ndim == 2 and tensor.shape[0] in (1, batch) and tensor.stride(1) == 1
        return rows_fit and tensor.dtype in dtypes and tensor.device == device

    if isinstance(first, torch.Tensor):
        near = first.numel() == 1 and first.device == device and not first.is_floating_point()
    else:
        near = first + rows < FAR  # the position after the last row, and `FAR` more, fits int32
    fitting = own is None or fits(own.ids, torch.int32, torch.int64), real is None or fits(real, torch.bool)
    if not (near and kv_end <= FAR and all(fitting)):
        raise NotIntervals(expression)
    bounds, numbers = run_rows(
        [(term.left, term.right, term.own is not None, term.unpadded is not None) for term in terms],
        None if own is None else own.ids,
        real,
        first,
        (batch, rows),
        (kv_begin, kv_end),
        device,
        negative=isinstance(own, Documents),
        no_good=NO_GOOD,
        limit=LIMIT,
    )
    return bounds, Reading(numbers)


def _unpadded(expression: Expression, sizes: Sizes) -> tuple[Expression, Grid]:
    """The expression without padding, and where its rows stand."""
    padding = masking_utils.prepare_padding_mask(sizes["attention_mask"], sizes["kv_length"], sizes["kv_offset"])
    if padding is not None:
        expression = AllOf((expression, Unpadded(padding)))
    position = torch.arange(sizes["q_length"], device=sizes["device"]) + sizes["q_offset"]
    return expression, Grid(position.expand(sizes["batch_size"], -1), sizes["kv_offset"], sizes["kv_length"])


def _marked(bounds: torch.Tensor, overflow: torch.Tensor) -> torch.Tensor:
    """Bounds `(batch, q, 2 * n)` as layers get them, `(batch, 1, q, 2 * n)`."""
    return bounds.unsqueeze(1).masked_fill(overflow, NO_GOOD)


def _evaluated(sizes: Sizes) -> torch.Tensor:
    """The same from the dense mask, some rows at a time."""
    q_length, kv_length, begin = sizes["q_length"], sizes["kv_length"], 0
    step = max(1, EVALUATED_PAIRS // max(1, sizes["batch_size"] * kv_length))
    if torch.compiler.is_compiling():
        step = q_length  # a compiler fuses it, and would unroll the loop
    los, his, overflows = [], [], []
    while begin < q_length:
        rows = min(step, q_length - begin)
        seen = _dense({**sizes, "q_length": rows, "q_offset": sizes["q_offset"] + begin})
        (lo, hi), overflow = first_runs(seen.reshape(-1, kv_length), MOST_INTERVALS)
        los.append(lo.view(-1, rows, MOST_INTERVALS))
        his.append(hi.view(-1, rows, MOST_INTERVALS))
        overflows.append(overflow.any())
        begin += rows
    bounds = torch.cat([torch.cat(los, dim=1), torch.cat(his, dim=1)], dim=2)
    return _marked(bounds, torch.stack(overflows).any())


def _to_read(bounds: torch.Tensor) -> Reading:
    """What `Seen` is made of. bounds: `(batch, q, 2 * n)`."""
    lo, hi = bounds.chunk(2, dim=2)
    intervals = (lo < hi).sum(2)
    empty = intervals == 0
    first, last = lo.amin(2).masked_fill(empty, 0), hi.amax(2)
    keys = last - first
    ends = last + torch.arange(bounds.shape[1] - 1, -1, -1, device=bounds.device)
    largest = (
        intervals.amax(),
        (lo == NO_GOOD).any(),
        empty.any(),
        keys.amax(),
        last.amax(),
        ends.amax(),
        LIMIT - ends.amin(),
        torch.where(first > 0, LIMIT - keys, 0).amax(),
    )
    return Reading(torch.stack([value.to(torch.int64) for value in largest]))
