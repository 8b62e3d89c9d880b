"""Where each sequence of a packed batch begins and ends, for queries and for keys.

Positions are absolute positions in a sequence. By default its first key stands at 0 and its queries are the last
`seqlen_q` of `seqlen_k` positions (FlashAttention's bottom-right alignment, `first_query`).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.device_checks import assert_on_device, host_knows, to_device
from fa4_prefixlm.errors import InputError

CuSeqlens = torch.Tensor | Sequence[int]


def first_query(seqlen_q: int, seqlen_k: int) -> int:
    """The position of the first query under bottom-right alignment: the last query stands at the last key."""
    return seqlen_k - seqlen_q


@dataclass(frozen=True)
class Lengths:
    """Sequence lengths of one batch, and where its sequences stand.

    Valid by construction where the host knows them; values that only the device knows are valid once an assertion on
    the device has seen them, `assert_valid` or that of `kernels.row_update`.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: `(batch + 1,)` int32 on the device, `[0, 2, 6]` for lengths 2 and 4. Of keys in
            pages, `cu_seqlens_k` counts them as if they were packed.
        total_q, total_k: tokens of the whole batch. Of keys in pages whose lengths the host does not know, `total_k` is
            an upper bound.
        max_seqlen_q, max_seqlen_k: upper bounds, known on the host.
        seqlens_q, seqlens_k: the lengths themselves where the host knows them, else None.
        same: every sequence is known to have as many queries as keys.
        more_queries: a sequence may have more queries than keys.
        exact_total_k: `total_k` is the number of keys; else it is an upper bound.
        key_start: `(batch,)` int32 on the device, the position of each sequence's first key; None: 0.
        query_start: `(batch,)` int32 on the device, that of its first query; None: bottom-right alignment.
        deferred: the tensors are still to be made, of what the host knows; see `BatchArguments.on_device`.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    total_q: int
    total_k: int
    max_seqlen_q: int
    max_seqlen_k: int
    seqlens_q: tuple[int, ...] | None
    seqlens_k: tuple[int, ...] | None
    same: bool
    more_queries: bool = False
    exact_total_k: bool = True
    key_start: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    deferred: bool = False

    @property
    def is_bottom_right(self) -> bool:
        """The last query of every sequence stands at its last key: what kernels mean by causal."""
        return self.query_start is None

    @property
    def is_aligned(self) -> bool:
        """`is_bottom_right`, and the first key of every sequence stands at 0: the lengths say where all stand."""
        return self.is_bottom_right and self.key_start is None

    def key_starts(self) -> torch.Tensor:
        """The position of each sequence's first key, `(batch,)` int32 on the device."""
        return self.key_start if self.key_start is not None else torch.zeros_like(self.cu_seqlens_k.diff())

    def query_starts(self) -> torch.Tensor:
        """The position of each sequence's first query, `(batch,)` int32 on the device."""
        if self.query_start is not None:
            return self.query_start
        aligned = self.cu_seqlens_k.diff() - self.cu_seqlens_q.diff()
        return aligned if self.key_start is None else aligned + self.key_start

    def starts_on_host(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(first queries, first keys) by sequence; synchronises where they are on the device alone."""
        seqlens_q, seqlens_k = self.on_host()
        keys = (0,) * self.batch if self.key_start is None else tuple(self.key_start.tolist())
        if self.query_start is not None:
            return tuple(self.query_start.tolist()), keys
        aligned = map(first_query, seqlens_q, seqlens_k)
        return tuple(start + own for start, own in zip(keys, aligned, strict=True)), keys

    @property
    def known(self) -> bool:
        """The host knows the lengths."""
        return self.seqlens_q is not None and self.seqlens_k is not None

    def assert_valid(self) -> None:
        """Check values that the host does not know by an assertion on the device, which does not synchronise."""
        if not self.known:
            _assert_on_device(self)

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens_q.device

    def as_on_host(self) -> Lengths:
        """The same lengths with their tensors on the host, from what the host knows."""
        seqlens_q, seqlens_k = self.on_host()
        key_start, query_start = (own.cpu() if own is not None else None for own in (self.key_start, self.query_start))
        return dataclasses.replace(
            self,
            cu_seqlens_q=_cumulative(seqlens_q),
            cu_seqlens_k=_cumulative(seqlens_k),
            key_start=key_start,
            query_start=query_start,
        )

    def on_host(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(seqlens_q, seqlens_k); reads them from the device, which synchronises, where the host does not know them."""
        if self.seqlens_q is not None and self.seqlens_k is not None:
            return self.seqlens_q, self.seqlens_k
        return _differences(self.cu_seqlens_q.tolist()), _differences(self.cu_seqlens_k.tolist())


def packed(
    cu_seqlens_q: CuSeqlens,
    cu_seqlens_k: CuSeqlens,
    *,
    total_q: int,
    total_k: int,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    device: torch.device,
    more_queries: bool = False,
    deferred: bool = False,
) -> Lengths:
    """Lengths of a varlen batch. Host values (lists, CPU tensors) are checked; device values are in debug mode.

    more_queries: a sequence may have more queries than keys. deferred: do not make the tensors yet, of values that are
    all on the host.
    """
    for name, values in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not hasattr(values, "__len__"):
            raise InputError(name, "an int32 tensor or a list of batch + 1 integers", values)
    host_q = _host_values("cu_seqlens_q", cu_seqlens_q, total_q, device)
    alike = cu_seqlens_k is cu_seqlens_q and total_k == total_q
    host_k = host_q if alike else _host_values("cu_seqlens_k", cu_seqlens_k, total_k, device)
    batch_q, batch_k = len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1
    if batch_q != batch_k:
        raise InputError("cu_seqlens_k", f"{batch_q + 1} entries, as in cu_seqlens_q", f"{batch_k + 1}")
    seqlens_q = _differences(host_q) if host_q is not None else None
    seqlens_k = seqlens_q if alike else _differences(host_k) if host_k is not None else None
    if seqlens_q is not None and seqlens_k is not None and not alike:
        for index, (rows, keys) in enumerate(zip(seqlens_q, seqlens_k, strict=True)):
            if rows > keys and not more_queries:
                raise InputError(
                    f"cu_seqlens_q (sequence {index})", f"seqlen_q <= seqlen_k = {keys}", f"seqlen_q = {rows}"
                )
    own_cu_seqlens_q = _later(batch_q) if deferred else _on_device(cu_seqlens_q, device)
    one = deferred or cu_seqlens_k is cu_seqlens_q
    lengths = Lengths(
        cu_seqlens_q=own_cu_seqlens_q,
        cu_seqlens_k=own_cu_seqlens_q if one else _on_device(cu_seqlens_k, device),
        total_q=total_q,
        total_k=total_k,
        max_seqlen_q=_upper_bound("max_seqlen_q", max_seqlen_q, seqlens_q, total_q),
        max_seqlen_k=_upper_bound("max_seqlen_k", max_seqlen_k, seqlens_k, total_k),
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        same=cu_seqlens_q is cu_seqlens_k or (seqlens_q is not None and seqlens_q == seqlens_k),
        more_queries=more_queries,
        deferred=deferred,
    )
    if cu_seqlens_q is cu_seqlens_k and total_q != total_k:
        raise InputError("k", f"total_k = {total_q}, as q, with the same cu_seqlens", total_k)
    return lengths


def cached(
    cu_seqlens_q: CuSeqlens,
    seqused_k: CuSeqlens,
    *,
    total_q: int,
    capacity: int,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    device: torch.device,
    more_queries: bool = False,
) -> Lengths:
    """Lengths of a batch whose keys are in a cache.

    capacity: keys of a sequence that the cache has room for. more_queries: see `packed`.
    """
    host_q = _host_values("cu_seqlens_q", cu_seqlens_q, total_q, device)
    host_k = _host_seqused(seqused_k, capacity, device)
    batch = len(cu_seqlens_q) - 1
    if len(seqused_k) != batch:
        raise InputError("seqused_k", f"{batch} entries, one per sequence", f"{len(seqused_k)}")
    seqlens_q, seqlens_k = _differences(host_q) if host_q is not None else None, host_k
    if seqlens_q is not None and seqlens_k is not None:
        for index, (rows, keys) in enumerate(zip(seqlens_q, seqlens_k, strict=True)):
            if rows > keys and not more_queries:
                raise InputError(f"seqused_k[{index}]", f"at least the sequence's {rows} queries", keys)
    longest_k = _upper_bound("max_seqlen_k", max_seqlen_k, seqlens_k, capacity)
    if seqlens_k is not None:
        cu_seqlens_k = to_device(_cumulative(seqlens_k), device)
    else:
        keys_on_device = _on_device(seqused_k, device)
        cu_seqlens_k = torch.nn.functional.pad(keys_on_device.cumsum(0, dtype=torch.int32), (1, 0))
    return Lengths(
        cu_seqlens_q=_on_device(cu_seqlens_q, device),
        cu_seqlens_k=cu_seqlens_k,
        total_q=total_q,
        total_k=sum(seqlens_k) if seqlens_k is not None else batch * longest_k,
        max_seqlen_q=_upper_bound("max_seqlen_q", max_seqlen_q, seqlens_q, total_q),
        max_seqlen_k=longest_k,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        same=False,
        more_queries=more_queries,
        exact_total_k=False,
    )


def batched(batch: int, seqlen_q: int, seqlen_k: int, device: torch.device, *, more_queries: bool = False) -> Lengths:
    """Lengths of a `(batch, seqlen, heads, head_dim)` batch, all alike. more_queries: see `packed`."""
    if seqlen_q > seqlen_k and not more_queries:
        raise InputError("q", f"seqlen_q <= seqlen_k = {seqlen_k}", f"seqlen_q = {seqlen_q}")
    steps = torch.arange(batch + 1, device=device, dtype=torch.int32)
    return Lengths(
        cu_seqlens_q=steps * seqlen_q,
        cu_seqlens_k=steps * seqlen_k,
        total_q=batch * seqlen_q,
        total_k=batch * seqlen_k,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        seqlens_q=(seqlen_q,) * batch,
        seqlens_k=(seqlen_k,) * batch,
        same=seqlen_q == seqlen_k,
        more_queries=more_queries,
    )


def as_one_sequence(lengths: Lengths) -> Lengths:
    """The batch seen as a single sequence of `total_q` queries and `total_k` keys."""
    steps = torch.arange(2, device=lengths.device, dtype=torch.int32)
    return Lengths(
        cu_seqlens_q=steps * lengths.total_q,
        cu_seqlens_k=steps * lengths.total_k,
        total_q=lengths.total_q,
        total_k=lengths.total_k,
        max_seqlen_q=lengths.total_q,
        max_seqlen_k=lengths.total_k,
        seqlens_q=(lengths.total_q,),
        seqlens_k=(lengths.total_k,),
        same=lengths.total_q == lengths.total_k,
    )


def _on_device(values: CuSeqlens, device: torch.device) -> torch.Tensor:
    """A copy of the plan's own: what the caller writes to its buffer later does not reach the plan."""
    if isinstance(values, torch.Tensor):
        return to_device(values, device) if values.device != device else values.clone()
    return to_device(list(values), device)


def _assert_on_device(lengths: Lengths) -> None:
    cu_q, cu_k = lengths.cu_seqlens_q.long(), lengths.cu_seqlens_k.long()
    rows, keys = cu_q.diff(), cu_k.diff()
    fine = (
        (rows >= 0)
        & (keys >= 0)
        & ((rows <= keys) | lengths.more_queries)
        & (rows <= lengths.max_seqlen_q)
        & (keys <= lengths.max_seqlen_k)
    )
    last_k = cu_k.narrow(0, -1, 1)
    if not lengths.exact_total_k:
        last_k = torch.full_like(last_k, lengths.total_k)
    ends = torch.stack([cu_q.narrow(0, 0, 1), cu_q.narrow(0, -1, 1), cu_k.narrow(0, 0, 1), last_k])
    first_and_last = torch.arange(4, device=ends.device).remainder(2).unsqueeze(1)  # 0, 1, 0, 1
    totals = torch.arange(4, device=ends.device).div(2, rounding_mode="floor").unsqueeze(1)  # 0, 0, 1, 1
    wanted = first_and_last * (lengths.total_q + totals * (lengths.total_k - lengths.total_q))
    message = "lengths: not ascending from 0 to the tensor's length, or seqlen_q > seqlen_k, or above max_seqlen"
    assert_on_device(fine.all() & (ends == wanted).all(), message)


def _host_values(name: str, values: CuSeqlens, total: int, device: torch.device) -> list[int] | None:
    """Check one cu_seqlens; its values if they are on the host (or debug mode reads them), else None."""
    host = _if_known(name, values, device, least=1)
    if host is None:
        return None
    if host[0] != 0:
        raise InputError(f"{name}[0]", "0", host[0])
    for index in range(1, len(host)):
        if host[index] < host[index - 1]:
            raise InputError(f"{name}[{index}]", f"an ascending value, at least {host[index - 1]}", host[index])
    if host[-1] != total:
        raise InputError(f"{name}[-1]", f"the tensor's length {total}", host[-1])
    return host


def _host_seqused(values: CuSeqlens, capacity: int, device: torch.device) -> tuple[int, ...] | None:
    """Check `seqused_k`; its values if they are on the host (or debug mode reads them), else None."""
    name = "seqused_k"
    host = _if_known(name, values, device, least=0)
    if host is None:
        return None
    for index, keys in enumerate(host):
        if not 0 <= keys <= capacity:
            raise InputError(f"{name}[{index}]", f"0 to {capacity} keys, which the cache has room for", keys)
    return tuple(host)


def _if_known(name: str, values: CuSeqlens, device: torch.device, *, least: int) -> list[int] | None:
    """Check a 1-D int32 argument of `batch + least` entries; its values if the host knows them (or debug mode reads
    them), else None.
    """
    if not isinstance(values, torch.Tensor):
        return _integers(name, values, least) if len(values) or least else []
    if values.dtype != torch.int32:
        raise InputError(name, "dtype torch.int32", values.dtype)
    if values.ndim != 1 or values.shape[0] < least:
        raise InputError(name, "shape (batch + 1,)" if least else "shape (batch,)", tuple(values.shape))
    if values.device.type != "cpu" and values.device != device:
        raise InputError(name, f"a tensor on the CPU or on q's device {device}", values.device)
    return values.tolist() if host_knows(values) else None


def _integers(name: str, values: object, least: int) -> list[int]:
    try:
        host = [operator.index(value) for value in values]  # type: ignore[attr-defined]
    except TypeError:
        host = []
    if not host or any(isinstance(value, bool) for value in values):  # type: ignore[attr-defined]
        raise InputError(name, f"an int32 tensor or a list of batch{' + 1' * least} integers", values)
    return host


def check_upper_bound(name: str, given: int | None, seqlens: tuple[int, ...] | None) -> None:
    """Refuse a given upper bound that is none."""
    if given is None:
        return
    given, longest = whole_number(name, given, "a non-negative integer"), max(seqlens or (), default=0)
    if given < longest:
        raise InputError(name, f"at least the longest sequence, {longest}", given)


def _upper_bound(name: str, given: int | None, seqlens: tuple[int, ...] | None, total: int) -> int:
    check_upper_bound(name, given, seqlens)
    if seqlens is None:
        return total if given is None else min(given, total)
    return max(seqlens, default=0)


def _later(batch: int) -> torch.Tensor:
    """In the place of a cu_seqlens that is still to be made."""
    return torch.empty(batch + 1, dtype=torch.int32, device="cpu")


def cumulative(seqlens: Sequence[int]) -> list[int]:
    """`[0, 2, 6]` for lengths 2 and 4."""
    return [0, *itertools.accumulate(seqlens)]


def _cumulative(seqlens: Sequence[int]) -> torch.Tensor:
    return torch.tensor(cumulative(seqlens), dtype=torch.int32, device="cpu")


def _differences(cumulative: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in itertools.pairwise(cumulative))
