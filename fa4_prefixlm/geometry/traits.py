"""What a mask asks of a kernel: how many intervals a row, of what shape, and whether the mask is causal."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from fa4_prefixlm.batch.frozen import with_changes
from fa4_prefixlm.batch.lengths import Lengths, first_query
from fa4_prefixlm.batch.ranges import HostSpans, SpanSets
from fa4_prefixlm.masks.atoms import same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.closed_form import ClosedForm, closed_form
from fa4_prefixlm.masks.protocols import Reach

# Intervals per row that the mask_mods are made for. A mask that may need more runs on other backends.
MOST_INTERVALS = 4


# FA4 counts keys in int32, and adds windows to them. No sequence is as long.
WIDEST = 2**30


@dataclass(frozen=True)
class CausalWindow:
    """The mask of FA4's own causal call.

    Attributes:
        window: `query - key < window` besides causal, in tokens; None: no window.
    """

    window: int | None


@dataclass(frozen=True)
class Traits:
    """What a mask with these spans asks of a kernel, known on the host.

    Attributes:
        intervals: per row, at most.
        tagged: tags beside the intervals, see `intervals.Tags`.
        banded: every row sees one interval around its own position, so neighbouring rows see intervals that touch.
        reach: how far a row sees, where the mask is banded.
        custom: the mask brings its own kernel code.
        closed_form: of the mask; None: it has none.
        causal_part: a causal mask contained in this one, of which every row sees one interval; None: there is none.
        causal_only: the causal mask that this one is for all rows of the batch; None: it is another, or the host
            can't know.
        from_key_0: no row's first interval begins past key 0, as far as is known without a closed form.
    """

    intervals: int
    tagged: bool
    banded: bool
    reach: Reach
    custom: bool = False
    closed_form: ClosedForm | None = None
    causal_part: CausalWindow | None = None
    causal_only: CausalWindow | None = None
    from_key_0: bool = False


def traits(mask: Mask, spans: SpanSets, lengths: Lengths) -> Traits:
    """The traits of a mask for one batch."""
    found = traits_of_any(mask, {name: own.longest for name, own in spans.items()}, most_spans(spans))
    if not lengths.is_bottom_right:
        return with_changes(found, causal_part=None, causal_only=None)
    causal_only = _causal_only(found, spans, lengths)
    return found if causal_only == found.causal_only else with_changes(found, causal_only=causal_only)


def traits_of_any(mask: Mask, longest: Mapping[str, int], most: Mapping[str, int]) -> Traits:
    """The traits for any spans: at most `most[name]` in a sequence, of at most `longest[name]` tokens."""
    sizes = tuple(longest.items()), tuple(most.items())
    if mask.evaluated or mask.custom_kernel is not None or not isinstance(mask, Hashable):
        return _by_sizes.__wrapped__(mask, *sizes)  # the cache would keep its tensors alive
    return _by_sizes(mask, *sizes)


@functools.lru_cache(maxsize=256)
def _by_sizes(mask: Mask, longest: tuple[tuple[str, int], ...], most: tuple[tuple[str, int], ...]) -> Traits:
    """The same for every batch with these spans, at most."""
    spans = dict(most)
    base, tags = as_run(mask, spans)
    form = closed_form(mask)
    causal = None if form is None else causal_outside(form)
    banded = base.around_position and base.no_empty_rows and tags is None
    return Traits(
        intervals=base.count(spans),
        tagged=tags is not None,
        banded=banded,
        reach=base.reach(dict(longest)) if banded else Reach(None, None),
        custom=mask.custom_kernel is not None,
        closed_form=form,
        causal_part=causal,
        causal_only=causal if form is not None and not form.telling else None,
    )


def as_run(mask: Mask, most: Mapping[str, int]) -> tuple[Mask, str | None]:
    """The cheapest form of the mask: (what runs by intervals, the span set that runs by tags).

    `one_block` of a single span is that span. With more spans than kernels take intervals, it runs by tags.

    Args:
        most: spans of a sequence, at most, by name.
    """
    block = mask.split_block()
    if block is None:
        return mask, None
    rest, name = block
    if most[name] <= 1:
        return rest | same_span(name), None
    return (rest, name) if mask.count(most) > MOST_INTERVALS else (mask, None)


def most_spans(spans: SpanSets) -> dict[str, int]:
    """Spans of a sequence, at most, by name."""
    return {name: own.values.shape[1] for name, own in spans.items()}


def causal_outside(form: ClosedForm) -> CausalWindow | None:
    """What rows outside of spans see, if that is causal."""
    if not form.is_causal_outside:
        return None
    if form.outside.begin != "window" or form.window is None:
        return CausalWindow(None)
    return CausalWindow(min(form.window, WIDEST))


def text_only(spans: HostSpans, seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...]) -> bool:
    """No query row is in a span, under bottom-right alignment."""
    for own, rows, keys in zip(spans, seqlens_q, seqlens_k, strict=True):
        if any(start < keys and end > first_query(rows, keys) for start, end in own) and rows:
            return False
    return True


def in_words(count: int, *, tagged: bool) -> str:
    """What a row sees, for `print(plan)`: "2 intervals a row and tags"."""
    return f"{count} interval{'s' * (count > 1)} a row{' and tags' * tagged}"


def _causal_only(found: Traits, spans: SpanSets, lengths: Lengths) -> CausalWindow | None:
    """The causal mask that the mask is for these spans; None if it is another, or if the host cannot tell."""
    form = found.closed_form
    if form is None or found.causal_part is None:
        return None
    for own in (spans[inside.span] for inside in form.telling):
        if own.values.shape[1] == 0:
            continue
        if own.host is None or lengths.seqlens_q is None or lengths.seqlens_k is None:
            return None
        if not text_only(own.host, lengths.seqlens_q, lengths.seqlens_k):
            return None
    return found.causal_part
