"""Batches that need no PrefixLM kernel: the mask is plainly causal, or windowed, for every query row of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from .lengths import Lengths
from .mask import Mask
from .ranges import HostSpans, SpanSets
from .span_form import SpanForm, span_form


@dataclass(frozen=True)
class Plain:
    """What FA4's own causal call computes: causal, and `query - key < window` where window is not None."""

    window: int | None


def plain(mask: Mask, spans: SpanSets, lengths: Lengths) -> Plain | None:
    """The plain mask that `mask` is for these spans; None if it is another, or if the host cannot tell."""
    form = span_form(mask)
    if form is None or not form.is_causal_outside:
        return None
    own = spans[form.span] if form.span is not None and form.inside != form.outside else None
    if own is None or own.values.shape[1] == 0:
        return outside(form)
    if own.host is None or lengths.seqlens_q is None or lengths.seqlens_k is None:
        return None
    return outside(form) if text_only(own.host, lengths.seqlens_q, lengths.seqlens_k) else None


def outside(form: SpanForm) -> Plain:
    """What rows outside of spans see, of a form that is causal there."""
    return Plain(form.window if form.outside.begin == "window" else None)


def text_only(spans: HostSpans, seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...]) -> bool:
    """No query row is in a span."""
    for own, rows, keys in zip(spans, seqlens_q, seqlens_k, strict=True):
        if any(start < keys and end > keys - rows for start, end in own) and rows:
            return False
    return True
