"""Prefill in chunks: what a mask lets a scheduler cut, and that a safe chunk computes what the whole prefill does."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import (
    causal,
    from_flex,
    in_documents,
    key_in,
    molmo2,
    one_block,
    prefix,
    query_in,
    rswa,
    same_span,
    window,
)

FRAMES = [(2, 4), (6, 8), (10, 12), (14, 16)]
BLOCK = molmo2.all_layers(like="transformers")
PAGE = 4


def tensors(seqlen: int = 24, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(seqlen, 2, 8, generator=generator) for _ in range(3)]


def whole_and_chunks(mask: fp.Mask, ranges: object, ends: list[int], seqlen: int = 24) -> tuple[torch.Tensor, list]:
    """(the prefill at once; each chunk of it from a cache of pages, from contiguous keys, and by a serving plan)."""
    q, k, v = tensors(seqlen)
    named = {name: [own] for name, own in ranges.items()} if isinstance(ranges, dict) else [ranges]
    whole = fp.attention(q, k, v, named, cu_seqlens_q=[0, seqlen], cu_seqlens_k=[0, seqlen], mask=mask)
    table = torch.arange(seqlen // PAGE, dtype=torch.int32)[None]
    caches = [tensor.unflatten(0, (-1, PAGE)) for tensor in (k, v)]
    serving = fp.serving_plan(
        like=(q, *caches), max_tokens=seqlen, max_sequences=1, max_pages=table.shape[1], mask=mask
    )
    chunks = []
    for begin, end in itertools.pairwise([0, *ends]):
        rows = q[begin:end]
        paged = fp.attention(
            rows, *caches, named, mask=mask, cu_seqlens_q=[0, end - begin], seqused_k=[end], page_table=table
        )
        near = fp.attention(
            rows, k[:end], v[:end], named, mask=mask, cu_seqlens_q=[0, end - begin], cu_seqlens_k=[0, end]
        )
        serving.update(named, cu_seqlens_q=[0, end - begin], seqused_k=[end], page_table=table)
        chunks.append((begin, end, {"pages": paged, "contiguous": near, "serving": serving(rows, *caches)}))
    return whole, chunks


def ends_of(mask: fp.Mask, ranges: object, budget: int, seqlen: int = 24) -> list[int]:
    ends, begin = [], 0
    while begin < seqlen:
        room = budget
        end = fp.safe_chunk_end(min(begin + room, seqlen), ranges, mask)
        while end <= begin:
            room += 1
            end = fp.safe_chunk_end(min(begin + room, seqlen), ranges, mask)
        ends.append(end)
        begin = end
    return ends


def test_one_block_is_in_one_chunk() -> None:
    assert fp.safe_chunk_end(9, FRAMES, BLOCK) == 2
    assert fp.safe_chunk_end(16, FRAMES, BLOCK) == 16
    assert fp.safe_chunk_end(1, FRAMES, BLOCK) == 1
    assert fp.safe_chunk_end(9, FRAMES) == 9  # each frame by itself


@pytest.mark.parametrize("frames", [FRAMES, FRAMES[:3]], ids=["by tags", "by intervals"])
def test_a_block_with_keys_to_come_is_refused(frames: list[tuple[int, int]]) -> None:
    q, k, v = tensors()
    caches = (k.unflatten(0, (6, 4)), v.unflatten(0, (6, 4)))
    table = torch.arange(6, dtype=torch.int32)[None]
    with pytest.raises(fp.InputError, match=r"ranges\[0\]: .* one block of all spans.*safe_chunk_end"):
        fp.attention(q[:9], *caches, [frames], mask=BLOCK, cu_seqlens_q=[0, 9], seqused_k=[9], page_table=table)
    with pytest.raises(fp.InputError, match="one block of all spans"):
        fp.attention(q[:9], k[:9], v[:9], [frames], mask=BLOCK, cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 9])
    plan = fp.serving_plan(like=(q, *caches), max_tokens=24, max_sequences=1, max_pages=6, mask=BLOCK)
    with pytest.raises(fp.InputError, match="one block of all spans"):
        plan.update([frames], cu_seqlens_q=[0, 9], seqused_k=[9], page_table=table)
    # Before the first frame nothing of the block is needed.
    fp.attention(q[:2], *caches, [frames], mask=BLOCK, cu_seqlens_q=[0, 2], seqused_k=[2], page_table=table)


MASKS = {
    "prefix_lm": (fp.PrefixLM(), FRAMES),
    "window": (fp.PrefixLM(5), [(1, 9), (9, 12)]),
    "joined": (fp.PrefixLM(5, clamp=False), [(1, 9), (15, 24)]),
    "one block": (BLOCK, FRAMES),
    "rswa": (rswa.all_layers(4), [(0, 13)]),
    "documents": (in_documents(causal), [(0, 11), (11, 24)]),
    "images in documents": (
        in_documents(causal | same_span("image")),
        {"image": [(2, 5), (13, 18)], "document": [(0, 11), (11, 24)]},
    ),
    "real keys": (causal & key_in("real"), [(3, 24)]),
    "causal prompt": (causal & same_span("prompt"), [(0, 24)]),
    "prefix": (causal & (prefix("prompt") | window(3)), [(0, 10)]),
    "bidirectional prefix": (causal | prefix("prompt"), [(3, 10)]),
    "queries": (causal & (window(3) | query_in("x")), [(4, 20)]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("budget", [1, 3, 5, 7, 24])
def test_safe_chunks_compute_the_whole(name: str, budget: int) -> None:
    mask, ranges = MASKS[name]
    whole, chunks = whole_and_chunks(mask, ranges, ends_of(mask, ranges, budget))
    for begin, end, outs in chunks:
        for where, out in outs.items():
            torch.testing.assert_close(out, whole[begin:end], msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.parametrize("name", ["rswa", "documents", "real keys", "causal prompt", "prefix", "queries"])
def test_spans_that_nobody_sees_ahead_into_may_be_cut(name: str) -> None:
    mask, ranges = MASKS[name]
    assert [fp.safe_chunk_end(end, ranges, mask) for end in range(25)] == list(range(25))


def test_random_masks_and_chunks() -> None:
    """Any expression: chunks at safe ends give the whole's rows; nothing that is accepted is wrong."""
    rng = random.Random(7)

    def expression(depth: int) -> fp.Mask:
        if depth == 0 or rng.random() < 0.3:
            atoms = (causal, window(rng.randint(1, 6)), same_span("a"), key_in("a"), prefix("b"), one_block("b"))
            return rng.choice(atoms)
        left, right = expression(depth - 1), expression(depth - 1)
        return left & right if rng.random() < 0.5 else left | right

    accepted = refused = 0
    for _ in range(250):
        mask = causal & expression(2) if rng.random() < 0.5 else causal | (expression(2) & same_span("a"))
        spans = {"a": [(2, 5), (7, 12)], "b": [(1, 3), (8, 10), (13, 15)]}
        ranges = {name: spans[name] for name in mask.names}
        given = {name: [own] for name, own in ranges.items()}
        q, k, v = tensors(16)
        whole = fp.attention(q, k, v, given, cu_seqlens_q=[0, 16], cu_seqlens_k=[0, 16], mask=mask)
        begin = rng.randint(0, 14)
        end = rng.randint(begin + 1, 15)
        try:
            out = fp.attention(
                q[begin:end], k[:end], v[:end], given, cu_seqlens_q=[0, end - begin], cu_seqlens_k=[0, end], mask=mask
            )
        except fp.InputError:
            refused += 1
            assert fp.safe_chunk_end(end, ranges, mask) < end
            continue
        accepted += 1
        torch.testing.assert_close(out, whole[begin:end], msg=f"{mask}, {begin}:{end}")
    assert accepted > 50
    assert refused > 10


def test_a_mask_of_ones_own_is_taken_to_look_ahead() -> None:
    class Mine(fp.PrefixLM):
        def visible(self, pairs):  # type: ignore[no-untyped-def]
            return super().visible(pairs)

    assert Mine().whole("image") == "span"
    assert fp.safe_chunk_end(10, [(0, 24)], Mine()) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((4, [[(2, 6)]]), r"ranges\[0\]: expected a pair of integers.*one list too many"),
        ((4, [2, 6]), r"ranges\[0\]: expected a pair of integers"),
        ((4, [(6, 2)]), "pairs with 0 <= start < end"),
        ((-1, []), "position: expected at least 0"),
        (("a", []), "position: expected an integer"),
        ((4, [(2, 6)], "gemma3"), "mask: expected a fa4_prefixlm mask"),
        ((4, [(2, 6)], in_documents(causal | same_span("image"))), "a dictionary with spans for"),
    ],
)
def test_bad_input(arguments: tuple, text: str) -> None:
    with pytest.raises(fp.InputError, match=text):
        fp.safe_chunk_end(*arguments)


def test_a_function_of_positions_may_end_anywhere() -> None:
    assert fp.safe_chunk_end(5, None, from_flex(lambda b, h, q, kv: kv <= q)) == 5
