"""What a mask is: an immutable value that says the same thing twice, and tests hold the two together.

- `intervals`: per query row, the few half-open intervals of keys it sees. This is what kernels read.
- `visible`: per (query, key) pair, whether the query sees the key, written as the mask is said. The reference backend,
  the FlexAttention form and the tests evaluate it.

`And` and `Or` are interval algebra per query row; `atoms` has what they combine. A mask of your own subclasses `Mask`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.batch.ranges import NamedRanges, Whole, one_sequence
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.closed_form import RowEdges, edges_of, speaks_for_itself
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.masks.flex_export import to_flex
from fa4_prefixlm.masks.interval_lists import Intervals, emptied, normalised
from fa4_prefixlm.masks.picture import MaskPicture
from fa4_prefixlm.masks.protocols import Ahead, CustomKernel, Ends, MaskMod, Pairs, Reach, Rows


class Mask(abc.ABC):
    """Which keys each query sees. Immutable: equality, hash and repr are by value.

    Attributes:
        around_position: each row sees one interval, which holds the row's own position, or nothing.
        no_empty_rows: every row sees some key.
        evaluated: `intervals` looks at values and synchronises.
        uses_position: what a row sees depends on where it stands. Only a mask of which that is not true may have more
            queries than keys (cross-attention).
        block_of: the span set of which the mask is `one_block`; None for any other mask.
    """

    around_position: bool = False
    no_empty_rows: bool = False
    evaluated: bool = False
    uses_position: bool = True
    block_of: str | None = None

    @property
    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Names of the span sets the mask reads."""

    @abc.abstractmethod
    def count(self, spans: Mapping[str, int]) -> int:
        """Upper bound of the number of intervals of a row, where `spans[name]` is the most spans of a sequence."""

    @abc.abstractmethod
    def intervals(self, rows: Rows) -> Intervals:
        """`(lo, hi)`, each int32 `(total_q, K)`: the row sees keys `[lo[k], hi[k])` of its sequence, `lo >= hi` none.

        The K intervals of a row are disjoint and ascending, empty ones last. `hi = END_OF_KEYS` is the end of the
        sequence's keys; any other key outside of them is an error.
        """

    def unordered_intervals(self, rows: Rows) -> Intervals:
        """As `intervals`, but in any order; they may overlap, and empty ones are anywhere.

        `&` and `|` put theirs together of these, so that only the whole mask's are put in order.
        """
        return self.intervals(rows)

    @abc.abstractmethod
    def visible(self, pairs: Pairs) -> torch.Tensor:
        """Bool, in the shape that `pairs.query` and `pairs.key` broadcast to, or one that broadcasts to that."""

    def reach(self, longest: Mapping[str, int]) -> Reach:
        """Upper bound over all rows, for spans of at most `longest[name]` tokens. It sizes buffers, nothing else."""
        return Reach(None, None)

    def ahead(self) -> Ahead:
        """Up to where rows may see past their own position. A bound: it may say too much.

        A mask of your own that does not say it is taken to see to the end of the keys.
        """
        return Ahead(keys=True, spans=self.names)

    def whole(self, name: str) -> Whole:
        """What a chunk of a prefill must hold of the spans of `name`, so that its rows see what they would see later.

        "nothing": a span may be cut, because no row sees ahead of itself on its account. "span": each span is in one
        chunk. "block": all spans are in the chunk that holds a token of one. "all": they are in the first chunk.
        """
        return ahead_of(self).whole(name)

    def ends(self) -> Ends | None:
        """Where intervals may begin and end; None: anywhere.

        A mask that says it is evaluated at few rows, on the host: those at which an end may pass another. Between them
        all rows see as many intervals, and each end stays where it is or moves along with the row.
        """
        return None

    def split_block(self) -> tuple[Mask, str] | None:
        """`(rest, name)` if the mask is written as `rest | one_block(name)`; None if it is not."""
        return None

    def edges(self) -> RowEdges | None:
        """What rows see, for masks that have a closed form (see `closed_form`); None for all others.

        A subclass that overrides `intervals` or `visible` and not this one is taken to have none.
        """
        return None

    @property
    def custom_kernel(self) -> CustomKernel | None:
        """Kernel code that the mask brings itself (`from_cute`); None: the library's mask_mods run it."""
        return None

    def __and__(self, other: Mask) -> Mask:
        return And(self, _operand("&", other))

    def __bool__(self) -> bool:
        raise TypeError("a mask is neither true nor false: combine masks with & and |, not with `and`, `or`, `not`")

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _operand("|", other))

    def __rand__(self, other: object) -> Mask:
        return And(_operand("&", other), self)

    def __ror__(self, other: object) -> Mask:
        return Or(_operand("|", other), self)

    def __invert__(self) -> Mask:
        raise TypeError(f"~mask: a mask has no complement; {_ANY_RULE}")

    def dense(self, *, seqlen: int, ranges: NamedRanges = None, seqlen_q: int | None = None) -> torch.Tensor:
        """The mask of one sequence as a dense tensor.

        Args:
            seqlen: keys of the sequence, in tokens.
            ranges: `[(8, 24), (40, 56)]`, or by name: `{"image": [(8, 24)], "prompt": [(0, 8)]}`.
            seqlen_q: the queries are the last `seqlen_q` positions; None: all of them.

        Returns:
            bool `(seqlen_q, seqlen)` on the CPU, True attends.

        Raises:
            InputError: a length is no number of tokens; `seqlen_q` is more than `seqlen` (which masks may have that do
                not use the position, such as `key_in`); or `ranges` are not spans of the sets that the mask reads,
                overlap, or are cut by the end of the keys where that hides some from a row.
        """
        rows = self._checked_rows(seqlen, seqlen_q)
        return dense_mask(self, rows, seqlen, one_sequence(self, ranges, seqlen))

    def show(self, *, seqlen: int, ranges: NamedRanges = None, seqlen_q: int | None = None) -> MaskPicture:
        """A picture of the mask of one sequence: text in a terminal (`print` it), an image in a notebook.

        Args:
            seqlen, ranges, seqlen_q: as for `dense`.

        Returns:
            a picture with `image()`, for Pillow, and `save(path)`.

        Raises:
            InputError: as `dense`; ranges are looked at when it is drawn.
        """
        self._checked_rows(seqlen, seqlen_q)
        return MaskPicture(self, seqlen, ranges, seqlen_q)

    def flex(
        self, *, seqlen: int, ranges: NamedRanges = None, seqlen_q: int | None = None, device: str = "cpu"
    ) -> MaskMod:
        """The mask as a `torch.nn.attention.flex_attention` mask_mod `(b, h, q_idx, kv_idx)`.

        Args:
            seqlen, seqlen_q: as for `dense`; `q_idx` counts from the first query.
            ranges: per batch entry, as `plan` takes them for batched tensors. None: no spans, in a batch of any size.
            device: where the mask_mod will be evaluated.

        Returns:
            a function of integer tensors, 0-d under `torch.vmap`, that returns a bool one. `b` indexes the sequences of
            `ranges`, and is not checked; `h` is ignored.

        Raises:
            InputError: as `dense`, but that there is one list of spans per sequence; or `device` is no device.
        """
        self._checked_rows(seqlen, seqlen_q)
        return to_flex(self, seqlen=seqlen, ranges=ranges, seqlen_q=seqlen_q, device=device)

    def _checked_rows(self, seqlen: int, seqlen_q: int | None) -> int:
        """The number of queries."""
        for name, value in (("seqlen", seqlen), ("seqlen_q", seqlen if seqlen_q is None else seqlen_q)):
            whole_number(name, value, "a number of tokens, at least 0")
        if seqlen_q is not None and seqlen_q > seqlen and self.uses_position:
            raise InputError("seqlen_q", f"at most seqlen = {seqlen}: the queries are its last positions", seqlen_q)
        return seqlen if seqlen_q is None else seqlen_q


@dataclass(frozen=True, repr=False)
class _Two(Mask):
    """Two masks, combined."""

    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        for part in (self.left, self.right):
            if part.custom_kernel is not None:
                expected = "masks without a kernel of their own (from_cute): the kernel has to say the whole mask"
                raise InputError("mask", expected, repr(part))

    @property
    def evaluated(self) -> bool:  # type: ignore[override]
        return self.left.evaluated or self.right.evaluated

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names

    @property
    def uses_position(self) -> bool:  # type: ignore[override]
        return self.left.uses_position or self.right.uses_position

    def _unordered_parts(self, rows: Rows) -> tuple[Intervals, Intervals]:
        return unordered_of(self.left, rows), unordered_of(self.right, rows)

    def _joined_ends(self) -> Ends | None:
        left, right = ends_of(self.left), ends_of(self.right)
        return None if left is None or right is None else left.joined(right)

    @property
    def around_position(self) -> bool:  # type: ignore[override]
        # Intervals that hold the row's own position meet in one, and join to one.
        return self.left.around_position and self.right.around_position


class And(_Two):
    def ahead(self) -> Ahead:
        return ahead_of(self.left).met(ahead_of(self.right))

    @property
    def no_empty_rows(self) -> bool:  # type: ignore[override]
        return self.around_position and self.left.no_empty_rows and self.right.no_empty_rows

    def count(self, spans: Mapping[str, int]) -> int:
        return self.left.count(spans) + self.right.count(spans) - 1

    def intervals(self, rows: Rows) -> Intervals:
        one, other = self._unordered_parts(rows)
        if not _any_single(one, other):
            return _met(one, other)
        lo, hi = _clipped(one, other)
        return emptied(lo, hi) if lo.shape[1] == 1 else normalised(lo, hi)

    def unordered_intervals(self, rows: Rows) -> Intervals:
        one, other = self._unordered_parts(rows)
        return _clipped(one, other) if _any_single(one, other) else _met(one, other)

    def ends(self) -> Ends | None:
        return self._joined_ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return self.left.visible(pairs) & self.right.visible(pairs)

    def reach(self, longest: Mapping[str, int]) -> Reach:
        a, b = self.left.reach(longest), self.right.reach(longest)
        return Reach(_least(a.left, b.left), _least(a.right, b.right))

    def edges(self) -> RowEdges | None:
        left, right = edges_of(self.left), edges_of(self.right)
        return None if left is None or right is None else left.met(right)

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in (self.left, self.right))


class Or(_Two):
    def ahead(self) -> Ahead:
        return ahead_of(self.left).joined(ahead_of(self.right))

    @property
    def no_empty_rows(self) -> bool:  # type: ignore[override]
        return self.left.no_empty_rows or self.right.no_empty_rows

    def count(self, spans: Mapping[str, int]) -> int:
        return 1 if self.around_position else self.left.count(spans) + self.right.count(spans)

    def intervals(self, rows: Rows) -> Intervals:
        if self.around_position:  # both hold the row's own position, or are empty, which min and max pass over
            (lo_a, hi_a), (lo_b, hi_b) = (part.intervals(rows) for part in (self.left, self.right))
            return torch.minimum(lo_a, lo_b), torch.maximum(hi_a, hi_b)
        return normalised(*self.unordered_intervals(rows))

    def unordered_intervals(self, rows: Rows) -> Intervals:
        if self.around_position:
            return self.intervals(rows)
        (lo_a, hi_a), (lo_b, hi_b) = self._unordered_parts(rows)
        return torch.cat([lo_a, lo_b], dim=1), torch.cat([hi_a, hi_b], dim=1)

    def ends(self) -> Ends | None:
        return self._joined_ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return self.left.visible(pairs) | self.right.visible(pairs)

    def reach(self, longest: Mapping[str, int]) -> Reach:
        a, b = self.left.reach(longest), self.right.reach(longest)
        left = None if a.left is None or b.left is None else max(a.left, b.left)
        right = None if a.right is None or b.right is None else max(a.right, b.right)
        return Reach(left, right)

    def edges(self) -> RowEdges | None:
        left, right = edges_of(self.left), edges_of(self.right)
        return None if left is None or right is None else left.joined(right)

    def split_block(self) -> tuple[Mask, str] | None:
        for block, rest in ((self.right, self.left), (self.left, self.right)):
            if block.block_of is not None:
                return rest, block.block_of
        return None

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"


def _any_single(one: Intervals, other: Intervals) -> bool:
    """One of them is one interval a row."""
    return min(one[0].shape[1], other[0].shape[1]) == 1


def _clipped(one: Intervals, other: Intervals) -> Intervals:
    """What both hold, of which one is one interval a row; in the order of the other's."""
    return torch.maximum(one[0], other[0]), torch.minimum(one[1], other[1])


def _met(one: Intervals, other: Intervals) -> Intervals:
    """What both hold, in order."""
    (lo_a, hi_a), (lo_b, hi_b) = normalised(*one), normalised(*other)
    lo = torch.maximum(lo_a.unsqueeze(2), lo_b.unsqueeze(1)).flatten(1)
    hi = torch.minimum(hi_a.unsqueeze(2), hi_b.unsqueeze(1)).flatten(1)
    # Two disjoint lists of k and l intervals meet in at most k + l - 1.
    most = lo_a.shape[1] + lo_b.shape[1] - 1
    lo, hi = normalised(lo, hi)
    return lo.narrow(1, 0, most), hi.narrow(1, 0, most)


_ANY_RULE = "any rule of positions can be written as from_flex(lambda b, h, q, kv: ...)"


def _operand(sign: str, value: object) -> Mask:
    if isinstance(value, Mask):
        return value
    raise TypeError(f"mask {sign} {type(value).__name__}: a mask is combined with masks; {_ANY_RULE}")


def ahead_of(mask: Mask) -> Ahead:
    """`mask.ahead()`; of a subclass that says anew what its rows see, and not that, what is safe for any mask."""
    return mask.ahead() if speaks_for_itself(mask, "ahead") else Mask.ahead(mask)


def unordered_of(mask: Mask, rows: Rows) -> Intervals:
    """`mask.unordered_intervals`; of a subclass that says anew what its rows see, and not that, its intervals."""
    return mask.unordered_intervals(rows) if speaks_for_itself(mask, "unordered_intervals") else mask.intervals(rows)


def ends_of(mask: Mask) -> Ends | None:
    """`mask.ends()`; None of a subclass that says anew what its rows see, and not that."""
    return mask.ends() if speaks_for_itself(mask, "ends") else None


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
