"""Tiles of all query heads of a key head, in turn: where a layout says that their elements are. No GPU is needed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import types

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")

import cutlass
from cutlass import cute

from fa4_prefixlm.fa4.kernels import native_backward_launch
from fa4_prefixlm.fa4.kernels.folded_heads import fold_sums, in_turn, query_tile

HEADS, SIZE, TILES = 3, 8, 5
ROW, KEY_HEAD, HEAD = 1000, 100_000, 1_000_000


@pytest.mark.parametrize("inner", [(), (16,)], ids=["numbers", "rows"])
def test_a_tile_of_each_head_in_turn(inner: tuple[int, ...]) -> None:
    """Of a sequence that begins in row 5 of its tensor, and of key head 1."""
    found: dict[tuple[int, int], int] = {}

    @cute.jit
    def look() -> None:
        plain = cute.make_layout((5 + SIZE * TILES, *inner, 2, HEADS), stride=(ROW, *(1,) * len(inner), KEY_HEAD, HEAD))
        layout = in_turn(cute.make_tensor(0, plain), HEADS, SIZE).layout
        begin = cute.crd2idx(((5, 0, 0), *(0,) * len(inner), 1), layout)
        for tile in cutlass.range_constexpr(TILES * HEADS):
            for row in cutlass.range_constexpr(SIZE):
                found[tile, row] = begin + cute.crd2idx((tile * SIZE + row, *(0,) * len(inner), 0), layout)

    look()
    assert len(found) == TILES * HEADS * SIZE
    for (tile, row), place in found.items():
        assert place == (5 + tile // HEADS * SIZE + row) * ROW + KEY_HEAD + tile % HEADS * HEAD


def test_which_query_tile_a_tile_is() -> None:
    found: list[int] = []

    @cute.jit
    def look() -> None:
        for tile in cutlass.range_constexpr(TILES * HEADS):
            found.append(query_tile(tile, HEADS).value)

    look()
    assert found == [tile // HEADS for tile in range(TILES * HEADS)]
    assert query_tile(7, 1) == 7


def test_sums_of_a_sequence_begin_after_those_of_all_heads() -> None:
    """Which FA4 finds by number, past 32 bits too."""
    given = importlib.import_module("flash_attn.cute.seqlen_info").SeqlenInfoQK
    begin, kernel = 2**30, types.SimpleNamespace(folded=HEADS, tile_m=2, tile_hdim=4)
    found: list[int] = []

    @cute.jit
    def look() -> None:
        names = [name for name in inspect.signature(given).parameters if name != "padded_offset_q"]
        own = given(**dict.fromkeys(names, 0), padded_offset_q=begin)
        sums = cute.make_tensor(0, cute.make_layout((SIZE * TILES, 2, HEADS), stride=(ROW, KEY_HEAD, HEAD)))
        arguments = {"mdQaccum": sums, "SeqlenInfoCls": lambda _: own}
        fold_sums("flash_attn.cute", kernel, arguments)
        found.append(arguments["SeqlenInfoCls"](0).padded_offset_q.value)
        found.append(cute.crd2idx((2 * 4, 0), arguments["mdQaccum"].layout))

    look()
    assert found == [begin * HEADS, HEAD]  # the second tile is the first one of the next head


def test_a_kept_kernel_is_of_the_sources_that_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the kernel imports of this library, so that a change of any of it compiles anew."""
    folder = pathlib.Path(native_backward_launch.__file__).parent
    wanted, waiting = set(), ["native_backward"]
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fa4_prefixlm.fa4.kernels."):
                own = node.module.removeprefix("fa4_prefixlm.fa4.kernels.")
                waiting += [own] * (own not in wanted)
    read: set[str] = set()
    read_bytes = pathlib.Path.read_bytes
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: read.add(path.stem) or read_bytes(path))
    native_backward_launch._own_source.__wrapped__()
    assert {"native_backward", "folded_heads"} <= wanted <= read
