"""Noised and clean copies in blocks, against the words of their sources, pair by pair."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import fa4_prefixlm as fp
from fa4_prefixlm.masks import bd3lm, block_diffusion, noised_and_clean, video
from fa4_prefixlm.testing.batches import random_spans
from tests.masks.planned import visible_by_bounds


def bd3lm_by_its_words(tokens: int, block: int) -> torch.Tensor:
    """`[noised | clean]`: M_BD, M_OBC and M_BC of the paper."""
    result = torch.zeros(2 * tokens, 2 * tokens, dtype=torch.bool)
    for query in range(2 * tokens):
        for key in range(2 * tokens):
            query_is_clean, key_is_clean = query >= tokens, key >= tokens
            query_block, key_block = query % tokens // block, key % tokens // block
            block_diagonal = query_block == key_block and query_is_clean == key_is_clean
            offset_block_causal = query_block > key_block and key_is_clean and not query_is_clean
            block_causal = query_block >= key_block and key_is_clean and query_is_clean
            result[query, key] = block_diagonal or offset_block_causal or block_causal
    return result


def teacher_forcing_by_its_words(frames: int, frame: int) -> torch.Tensor:
    """`[clean | noised]`: clean frames see those up to them; noised ones themselves and the clean ones before."""
    result = torch.zeros(2 * frames * frame, 2 * frames * frame, dtype=torch.bool)
    for query in range(2 * frames * frame):
        for key in range(2 * frames * frame):
            own, other = query // frame, key // frame
            if own < frames:
                result[query, key] = other <= own
            else:
                result[query, key] = other == own or other < own - frames
    return result


@pytest.mark.parametrize("block", [1, 2, 3, 7, 20, 2**31 - 1, 2**40])
def test_block_diffusion(block: int) -> None:
    for tokens in (1, 2, 6, 7, 20):
        spans = {name: own[0] for name, own in noised_and_clean([tokens]).items()}
        wanted = bd3lm_by_its_words(tokens, block)
        mask = bd3lm.all_layers(block)
        assert mask.count({"noised": 1, "clean": 1}) == 2
        for rows in {2 * tokens, tokens + 1, 1}:
            assert torch.equal(mask.dense(seqlen=2 * tokens, seqlen_q=rows, ranges=spans), wanted[-rows:])
            assert torch.equal(visible_by_bounds(mask, spans, 2 * tokens, rows), wanted[-rows:])


@pytest.mark.parametrize(("frames", "frame"), [(1, 1), (1, 5), (4, 1), (5, 3), (3, 8)])
def test_teacher_forcing(frames: int, frame: int) -> None:
    keys = 2 * frames * frame
    spans = {name: own[0] for name, own in video.noised_and_clean([frames * frame], first="clean").items()}
    wanted = teacher_forcing_by_its_words(frames, frame)
    assert torch.equal(video.teacher_forcing(frame).dense(seqlen=keys, ranges=spans), wanted)
    assert torch.equal(visible_by_bounds(video.teacher_forcing(frame), spans, keys, keys), wanted)


@pytest.mark.parametrize(("tokens", "frame"), [(1, 1), (12, 4), (13, 4), (3, 9)])
def test_frame_causal(tokens: int, frame: int) -> None:
    spans = video.frames([tokens], frame)[0]
    wanted = torch.tensor([[key // frame <= query // frame for key in range(tokens)] for query in range(tokens)])
    assert torch.equal(video.frame_causal().dense(seqlen=tokens, ranges=spans), wanted)
    assert torch.equal(visible_by_bounds(video.frame_causal(), spans, tokens, tokens), wanted)


def test_any_spans() -> None:
    """Copies of any length, anywhere, with padding between; more than one of each; tokens in both."""
    rng = random.Random(0)
    for case in range(60):
        keys, block = rng.randint(1, 40), rng.randint(1, 9)
        spans = {name: random_spans(rng, keys) for name in ("noised", "clean")}
        rows = rng.randint(1, keys)
        mask = block_diffusion(block)
        wanted = torch.zeros(keys, keys, dtype=torch.bool)

        def place(name: str, position: int, spans=spans, block=block) -> tuple[int, int] | None:
            """(which span, which block in it)."""
            for index, (start, end) in enumerate(spans[name]):
                if start <= position < end:
                    return index, (position - start) // block
            return None

        for query in range(keys):
            for key in range(keys):
                noised, clean = place("noised", query), place("clean", query)
                key_noised, key_clean = place("noised", key), place("clean", key)
                if noised is not None:
                    earlier = key_clean is not None and key_clean[1] < noised[1]
                    wanted[query, key] = key_noised == noised or earlier
                elif clean is not None and key_clean is not None:
                    wanted[query, key] = clean[0] == key_clean[0] and key_clean[1] <= clean[1]
        assert torch.equal(mask.dense(seqlen=keys, seqlen_q=rows, ranges=spans), wanted[-rows:])
        assert torch.equal(visible_by_bounds(mask, spans, keys, rows), wanted[-rows:])
        if case % 10:
            continue
        flex = mask.flex(seqlen=keys, ranges={name: [own] for name, own in spans.items()})
        built = create_mask(flex, 1, 1, keys, keys, device="cpu")
        assert torch.equal(built[0, 0], wanted)


def test_attention_of_a_batch() -> None:
    """Copies of two lengths, packed; the reference against torch on the mask of the words."""
    lengths, block = [9, 6], 4
    cu = [0, 18, 30]
    q, k, v = (torch.randn(30, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    out = fp.attention(
        q, k, v, noised_and_clean(lengths), mask=block_diffusion(block), cu_seqlens_q=cu, cu_seqlens_k=cu
    )
    for index, tokens in enumerate(lengths):
        own = slice(cu[index], cu[index + 1])
        visible = bd3lm_by_its_words(tokens, block)
        heads_first = (each[own].transpose(0, 1) for each in (q, k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
        torch.testing.assert_close(out[own], wanted.transpose(0, 1))


def test_ranges() -> None:
    assert noised_and_clean([3, 0]) == {"noised": [[(0, 3)], []], "clean": [[(3, 6)], []]}
    assert noised_and_clean([3], first="clean") == {"noised": [[(3, 6)]], "clean": [[(0, 3)]]}
    assert video.frames([7, 3, 0], 3) == [[(0, 3), (3, 6), (6, 7)], [(0, 3)], []]
    assert repr(block_diffusion(4)) == "block_diffusion(4)"
    assert block_diffusion(4) == bd3lm.all_layers(4) == video.teacher_forcing(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_diffusion(0), "block: expected a positive number of tokens, got 0"),
        (lambda: block_diffusion(2.5), "block: expected a positive number of tokens"),  # type: ignore[arg-type]
        (lambda: noised_and_clean([3, -1]), r"lengths\[1\]: expected a number of tokens, at least 0, got -1"),
        (lambda: noised_and_clean([3], first="last"), "first: expected 'noised' or 'clean', got 'last'"),
        (lambda: video.frames([3], 0), "frame: expected a positive number of tokens"),
        (lambda: video.frames([-3], 1), r"lengths\[0\]: expected"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(fp.InputError, match=message):
        call()
