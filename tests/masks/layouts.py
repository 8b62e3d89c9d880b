"""Sequences as models lay them out, for masks whose sets of spans belong together: (mask, batch, ranges) by name."""

from __future__ import annotations

from fa4_prefixlm import Mask
from fa4_prefixlm.masks import (
    bagel,
    bd3lm,
    diffusion_gemma,
    noised_and_clean,
    pi0,
    prefix_trees,
    streaming,
    t5gemma,
    video,
)
from fa4_prefixlm.testing.batches import Batch

Layout = tuple[Mask, Batch, dict[str, list]]


def layouts(scale: int = 1) -> dict[str, Layout]:
    """Batches of two or three sequences of about 300 `scale` tokens."""
    tokens = [100 * scale, 64 * scale]
    trees = prefix_trees(
        [
            [(None, 90 * scale), *[(0, own * scale) for own in (40, 33, 64, 7)]],
            [(None, 50 * scale), (0, 31 * scale), (1, 40 * scale), (1, 22 * scale), (0, 65 * scale)],
            [(None, 120 * scale)],
        ]
    )
    whole = ((234 * scale,) * 2, (208 * scale,) * 2, (120 * scale,) * 2)
    copies = ((200 * scale,) * 2, (128 * scale,) * 2)
    canvas = {"image": [[(20, 130 * scale)], []], "canvas": [[], [(200 * scale, 264 * scale)]]}
    policy = {
        "real": [[(0, 90 * scale), (130 * scale, 260 * scale)], [(0, 40 * scale), (45 * scale, 130 * scale)]],
        "action": [[(211 * scale, 260 * scale)], [(81 * scale, 130 * scale)]],
    }
    images = {
        "image": [[(60 * scale, 90 * scale)], []],
        "noised": [[(10, 40 * scale), (100 * scale, 130 * scale)], [(0, 30 * scale)]],
    }
    return {
        "trees": (trees.mask, _batch(whole), trees.ranges),
        "block diffusion": (bd3lm.all_layers(32), _batch(copies), noised_and_clean(tokens)),
        "teacher forcing": (video.teacher_forcing(24 * scale), _batch(copies), noised_and_clean(tokens, first="clean")),
        "merged attention": (
            t5gemma.merged_local_layers(40 * scale),
            _batch(((100 * scale, 250 * scale), (1, 151 * scale))),
            t5gemma.merged_ranges([150 * scale, 150 * scale], [100 * scale, 1]),
        ),
        "canvas": (
            diffusion_gemma.encoder_local_layers(80 * scale, like="transformers-generate", canvas=True),
            _batch(((240 * scale,) * 2, (64 * scale, 264 * scale))),
            canvas,
        ),
        "policy": (
            pi0.expert_layers(padding=True),
            _batch(((50 * scale, 260 * scale), (50 * scale, 130 * scale))),
            policy,
        ),
        "noised images": (bagel.training_layers(), _batch(((160 * scale,) * 2, (90 * scale,) * 2)), images),
        "sinks": (
            streaming.all_layers(50 * scale),
            _batch(((260 * scale,) * 2, (1, 190 * scale))),
            {"sink": streaming.sinks(2, 4)},
        ),
    }


def _batch(seqlens: tuple[tuple[int, int], ...]) -> Batch:
    return Batch(seqlens, ((),) * len(seqlens))
