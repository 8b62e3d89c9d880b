"""What a `mask_function` of transformers says, read from its closures.

transformers builds a mask from small functions of indices: `and_masks(or_masks(causal, blockwise), sliding_window)`.
Each of them is recognised by its code, and what it closed over (a window, the block of each token, the padding) is
what has to be known of it. A function that is not transformers' own is `Unknown`, and is evaluated pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from transformers import masking_utils

MaskFunction = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Causal:
    """`kv <= q`."""


@dataclass(frozen=True, eq=False)
class Everything:
    """Every key."""


@dataclass(frozen=True, eq=False)
class Window:
    """`kv > q - size`."""

    size: int


@dataclass(frozen=True, eq=False)
class WindowBothWays:
    """`|q - kv| <= size`."""

    size: int


@dataclass(frozen=True, eq=False)
class Chunks:
    """Query and key are in the same chunk of `size` tokens, counted from the end of the left padding `(batch,)`."""

    size: int
    left_padding: torch.Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """Query and key have the same id in `ids` `(batch, positions)`, and it is not negative."""

    ids: torch.Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Query and key have the same id in `ids` `(batch, positions)`."""

    ids: torch.Tensor


@dataclass(frozen=True, eq=False)
class Unpadded:
    """The key is True in `real` `(batch, positions)`."""

    real: torch.Tensor


@dataclass(frozen=True, eq=False)
class AtPositions:
    """`inner` of the positions `(batch, tokens)` that query and key have in their documents."""

    inner: Expression
    positions: torch.Tensor


@dataclass(frozen=True, eq=False)
class AllOf:
    """Every part."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class AnyOf:
    """Some part."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Unknown:
    """A function that is not transformers' own."""

    function: MaskFunction


Expression = (
    Causal
    | Everything
    | Window
    | WindowBothWays
    | Chunks
    | Blocks
    | Documents
    | Unpadded
    | AtPositions
    | AllOf
    | AnyOf
    | Unknown
)


def read(function: MaskFunction) -> Expression:
    """The expression of a mask function."""
    if function is masking_utils.causal_mask_function:
        return Causal()
    if function is masking_utils.bidirectional_mask_function:
        return Everything()
    reader = _READERS.get(getattr(function, "__code__", None))
    return Unknown(function) if reader is None else reader(_closed_over(function))


def is_known(expression: Expression) -> bool:
    """Nothing in it is `Unknown`."""
    if isinstance(expression, AllOf | AnyOf):
        return all(map(is_known, expression.parts))
    if isinstance(expression, AtPositions):
        return is_known(expression.inner)
    return not isinstance(expression, Unknown)


def is_bidirectional(expression: Expression) -> bool:
    """It is what `create_bidirectional_mask` begins with."""
    if isinstance(expression, AllOf | AnyOf):
        return any(map(is_bidirectional, expression.parts))
    return isinstance(expression, Everything | WindowBothWays)


def _closed_over(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _tokens(size: int) -> int:
    """A size, no larger than what can be added to a position in int32. No sequence is as long."""
    return min(size, 2**30)


def _parts(closed: dict[str, Any]) -> tuple[Expression, ...]:
    return tuple(map(read, closed["mask_functions"]))


def _code(maker: str, *arguments: object) -> CodeType | None:
    """The code of what transformers' `maker` returns; None if this version has no such maker."""
    found = getattr(masking_utils, maker, None)
    if found is None:
        return None
    made = found(*arguments)
    assert isinstance(made, FunctionType)
    return made.__code__


_ANY = masking_utils.causal_mask_function
_NONE = torch.zeros(1, 1, dtype=torch.long)
# By the code of the function that each maker returns: what its closure says.
_READERS: dict[CodeType | None, Callable[[dict[str, Any]], Expression]] = {
    _code("and_masks", _ANY): lambda closed: AllOf(_parts(closed)),
    _code("or_masks", _ANY): lambda closed: AnyOf(_parts(closed)),
    _code("sliding_window_overlay", 1): lambda closed: Window(_tokens(closed["sliding_window"])),
    _code("sliding_window_bidirectional_overlay", 1): lambda closed: WindowBothWays(_tokens(closed["sliding_window"])),
    _code("chunked_overlay", 1, _NONE): lambda closed: Chunks(_tokens(closed["chunk_size"]), closed["left_padding"]),
    _code("blockwise_overlay", _NONE): lambda closed: Blocks(closed["block_sequence_ids"]),
    _code("packed_sequence_mask_function", _NONE): lambda closed: Documents(closed["packed_sequence_mask"]),
    _code("padding_mask_function", _NONE): lambda closed: Unpadded(closed["padding_mask"]),
    _code("remap_positions_for_packed_sequence", _ANY, _NONE): lambda closed: AtPositions(
        read(closed["mask_function"]), closed["position_ids"]
    ),
}
_READERS.pop(None, None)
