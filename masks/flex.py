"""A mask from FlexAttention's language: a `mask_mod(b, h, q_idx, kv_idx)`. `flex_export` goes the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO, Intervals
from fa4_prefixlm.masks.protocols import MaskMod, Pairs, Rows

# A mask_mod is evaluated for this many (query, key) pairs at a time.
EVALUATED_PAIRS = 2**24

# More runs of keys in a row are nearly always a mistake, and slow. Where they are meant, max_intervals allows them.
DEFAULT_MAX_INTERVALS = 4


def from_flex(mask_mod: MaskMod, *, max_intervals: int = DEFAULT_MAX_INTERVALS) -> Mask:
    """A mask from a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`.

    The function is evaluated for every pair when a plan is made, in chunks of `EVALUATED_PAIRS`, and must be a pure
    function of its indices that does not read `h`. `b` is the sequence of the packed batch, `q_idx` and `kv_idx` are
    absolute positions in it, never past its keys. A plan made from it synchronises.

    Args:
        mask_mod: takes four 0-d integer tensors (under `torch.vmap`) and returns a boolean one.
        max_intervals: how many separate runs of keys a row may see. The error for a row that sees more shows its runs.

    Raises:
        InputError: here if an argument is of the wrong kind; when a plan is made if the function is not one of the
            kind above, or a row sees more than `max_intervals` runs.
    """
    if not callable(mask_mod):
        raise InputError("mask_mod", "a function (b, h, q_idx, kv_idx) -> bool tensor", type(mask_mod).__name__)
    if not isinstance(max_intervals, int) or max_intervals < 1:
        raise InputError("max_intervals", "a positive number", max_intervals)
    return EvaluatedMask(mask_mod, max_intervals)


class _NoHead:
    """Stands in for the head index. A function that does more with it than pass it on is refused."""

    @classmethod
    def _refuse(cls, *arguments: object, **keywords: object) -> NoReturn:
        raise InputError("mask_mod", "one mask for all heads", "a function that reads h")

    __torch_function__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __floordiv__ = __rfloordiv__ = __and__ = __rand__ = __or__ = __ror__ = __neg__ = __invert__ = _refuse
    __bool__ = __int__ = __index__ = __float__ = __getattr__ = _refuse
    __hash__ = None  # type: ignore[assignment]


NO_HEAD: Any = _NoHead()


@dataclass(frozen=True)
class EvaluatedMask(Mask):
    """A mask that is known only by evaluating a function for every pair.

    Attributes:
        mask_mod: the function `(b, h, q_idx, kv_idx)`.
        max_intervals: runs of keys that a row may see; None: any number.
    """

    evaluated = True

    mask_mod: MaskMod
    max_intervals: int | None

    @property
    def names(self) -> frozenset[str]:
        return frozenset()

    def count(self, spans: Mapping[str, int]) -> int:
        return self.max_intervals or 1

    def visible(self, pairs: Pairs) -> torch.Tensor:
        sequence = torch.as_tensor(pairs.sequence, device=pairs.key.device)
        if pairs.query.ndim == 0:
            return self.mask_mod(sequence, NO_HEAD, pairs.query, pairs.key)
        query = pairs.query.flatten()
        return self._evaluate(sequence.expand(len(query)), query, pairs.key.expand(len(query), -1))

    def intervals(self, rows: Rows) -> Intervals:
        keys = int(rows.seqlen_k.max()) if len(rows.seqlen_k) else 0
        kv = torch.arange(keys, device=rows.position.device)
        step = max(1, EVALUATED_PAIRS // max(1, keys))
        chunks = []
        for begin in range(0, len(rows.position), step):
            part = slice(begin, begin + step)
            own = rows.seqlen_k[part].unsqueeze(1)
            where = rows.sequence[part], rows.position[part], torch.minimum(kv, own - 1)  # no key past its sequence
            visible = self._evaluate(*where)
            if begin == 0:
                self._check_pure(visible, *where)
            chunks.append(self._runs(visible & (kv < own), rows.sequence[part], rows.position[part]))
        width = max((lo.shape[1] for lo, _ in chunks), default=1)
        lo = [torch.nn.functional.pad(own, (0, width - own.shape[1]), value=EMPTY_LO) for own, _ in chunks]
        hi = [torch.nn.functional.pad(own, (0, width - own.shape[1]), value=EMPTY_HI) for _, own in chunks]
        empty = torch.zeros(0, width, dtype=torch.int32, device=rows.position.device)
        return torch.cat([empty, *lo]), torch.cat([empty, *hi])

    def _evaluate(self, b: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """`(rows, keys)` bool for the rows `b`, `q` `(rows,)` and the keys `kv` `(rows, keys)`."""

        def pair(b: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return self.mask_mod(b, NO_HEAD, q, kv)

        try:
            result = torch.vmap(torch.vmap(pair, in_dims=(None, None, 0)), in_dims=(0, 0, 0))(b, q, kv)
        except InputError:
            raise
        except Exception as error:  # whatever the user's function raised
            kind = "a function of index tensors that torch.vmap can run (no if, no and, no random numbers)"
            raise InputError("mask_mod", kind, f"{type(error).__name__}: {error}") from error
        if not isinstance(result, torch.Tensor) or result.dtype != torch.bool:
            raise InputError("mask_mod", "a boolean tensor for every pair", getattr(result, "dtype", type(result)))
        if result.shape != kv.shape:
            per_pair = tuple(result.shape[2:]) if result.ndim > 2 else tuple(result.shape)
            raise InputError("mask_mod", "one boolean, of shape (), for every pair", f"shape {per_pair}")
        return result

    def _check_pure(self, first: torch.Tensor, b: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> None:
        if not torch.equal(first, self._evaluate(b, q, kv)):
            raise InputError("mask_mod", "a pure function of its indices", "two answers to the same question")

    def _runs(self, visible: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor) -> Intervals:
        before = torch.nn.functional.pad(visible[:, :-1], (1, 0))
        after = torch.nn.functional.pad(visible[:, 1:], (0, 1))
        starts, ends = visible & ~before, visible & ~after
        count = starts.sum(1)
        most = int(count.max()) if count.numel() else 0
        if self.max_intervals is not None and most > self.max_intervals:
            row = int(count.argmax())
            runs = [(int(lo), int(hi) + 1) for lo, hi in zip(starts[row].nonzero(), ends[row].nonzero(), strict=True)]
            what = f"{most} in the row at position {int(position[row])} of sequence {int(sequence[row])}: {_some(runs)}"
            raise InputError("mask_mod", f"at most max_intervals = {self.max_intervals} intervals of keys a row", what)
        width = max(1, most)
        lo = torch.full((len(visible), width), EMPTY_LO, dtype=torch.int32, device=visible.device)
        hi = torch.full_like(lo, EMPTY_HI)
        for edges, into, shift in ((starts, lo, 0), (ends, hi, 1)):
            row_of, key_of = edges.nonzero(as_tuple=True)
            into[row_of, edges.cumsum(1)[row_of, key_of] - 1] = (key_of + shift).to(torch.int32)
        return lo, hi


def _some(runs: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"[{lo}, {hi})" for lo, hi in runs[:6])
    return shown + (", ..." if len(runs) > 6 else "")
