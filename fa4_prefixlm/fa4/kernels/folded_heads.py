"""All query heads of a key head in one CTA: dK and dV are summed in registers, not in float32 in memory.

FA4's loops over the query tiles of one head run over tiles of all of them instead: tile `t` is query tile `t // heads`
of query head `t % heads`. To FA4, these heads are one, of tensors whose rows are counted so: its loads, its storing
warp and its products stay as they are, and what masks a tile asks which it is. The arithmetic is that of layouts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

# What has rows of queries, `(rows, ..., key heads, query heads of one)` as the kernel gets it.
OF_QUERIES = ("mQ", "mdO", "mLSE", "mdPsum")


def in_turn(tensor: Any, heads: int, size: int) -> Any:
    """`(rows, ..., key heads, heads)` as `((size, heads, tiles), ..., key heads)`: a tile of each head in turn."""
    tiled = cute.flat_divide(tensor, (size,))
    shape, stride = tiled.shape, tiled.stride
    layout = cute.make_layout(
        ((size, heads, shape[1]), *shape[2:-1]), stride=((stride[0], stride[-1], stride[1]), *stride[2:-1])
    )
    return cute.make_tensor(tiled.iterator, layout)


def query_tile(tile: Any, heads: int) -> Any:
    """Which one `tile` is of its head. Unsigned: a shift where `heads` is a power of two, and never a branch."""
    return tile if heads == 1 else Int32(Uint32(tile) // heads)


@functools.cache
def lengths_class(module: str) -> type:
    """The class for the build imported as `module`."""
    base: Any = importlib.import_module(f"{module}.seqlen_info").SeqlenInfoQK

    @dataclasses.dataclass(frozen=True)
    class FoldedLengths(base):
        """Finds the rows of a sequence in tensors that are `in_turn`."""

        def offset_batch_Q(self, mQ: Any, *_: Any, padded: bool = False, **__: Any) -> Any:
            offset = self.padded_offset_q if padded else self.offset_q
            return cute.domain_offset(((offset, None, None), *(None,) * (cute.rank(mQ) - 1)), mQ)

    return FoldedLengths


def fold_loads(module: str, kernel: Any, given: dict[str, Any]) -> None:
    """Change the arguments of FA4's `load`."""
    for name in OF_QUERIES:
        given[name] = in_turn(given[name], kernel.folded, kernel.tile_m)
    _replace_lengths(module, given)


def fold_sums(module: str, kernel: Any, given: dict[str, Any]) -> None:
    """Change the arguments of FA4's `dQaccum_store`.

    It looks for a sequence's first element by number, which counts all heads: of 64, 32 bits end at 262144 tokens.
    """
    given["mdQaccum"] = in_turn(given["mdQaccum"], kernel.folded, kernel.tile_m * kernel.tile_hdim)
    _replace_lengths(module, given, by_number=kernel.folded)


def _replace_lengths(module: str, given: dict[str, Any], *, by_number: int = 0) -> None:
    make = given["SeqlenInfoCls"]

    def lengths(batch_idx: Any) -> Any:
        own = make(batch_idx)
        fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        if by_number:
            fields["padded_offset_q"] = Int64(own.padded_offset_q) * by_number
        return lengths_class(module)(**fields)

    given["SeqlenInfoCls"] = lengths
