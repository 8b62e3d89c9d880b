"""Every mask of the model families, each with an example that shows its rule. Pictures and tests go through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models import (
    bagel,
    bd3lm,
    diffusion_gemma,
    embedding_gemma,
    gemma3,
    gemma4,
    hrm_text,
    modernbert,
    molmo2,
    moondream3,
    paligemma,
    pi0,
    rswa,
    streaming,
    t5,
    t5gemma,
    video,
)
from fa4_prefixlm.masks.packing import in_documents
from fa4_prefixlm.masks.prefix_tree import Tree, prefix_trees
from fa4_prefixlm.masks.spans import drop_longer

SpanList = Sequence[tuple[int, int]]

# Two images; the first is longer than the window.
IMAGES: SpanList = ((5, 21), (28, 36))
WINDOW = 8
# Those that vLLM keeps for Gemma 3 and PaliGemma 2.
KEPT: SpanList = tuple(drop_longer([IMAGES], WINDOW)[0])
GAPS: SpanList = ((0, 9), (14, 22), (30, 36))
FRAMES: SpanList = ((4, 9), (12, 17), (20, 25), (28, 33), (36, 41))
PREFIX: SpanList = ((0, 18),)
# One prompt with three answers; two turns, of which the second was answered in two ways, one of them going on in two.
ANSWERS: Tree = ((None, 18), (0, 12), (0, 8), (0, 10))
TURNS: Tree = ((None, 10), (0, 8), (1, 6), (1, 6), (3, 6), (3, 5), (0, 7))
CANVAS: SpanList = ((38, 48),)


@dataclass(frozen=True)
class Example:
    """A mask and one sequence for it: `example.mask.show(seqlen=example.seqlen, ranges=example.ranges)`.

    Attributes:
        mask: the mask.
        ranges: half-open `(start, end)` positions, by name where the mask reads several sets; None where it reads none.
        seqlen: tokens of the sequence.
    """

    mask: Mask
    ranges: SpanList | Mapping[str, SpanList] | None = IMAGES
    seqlen: int = 48


def _tree(tree: Tree) -> Example:
    trees = prefix_trees([tree])
    return Example(trees.mask, {name: own[0] for name, own in trees.ranges.items()})


CATALOGUE: dict[str, Example] = {
    "gemma3-global": Example(gemma3.global_layers()),
    "gemma3-local-transformers": Example(gemma3.local_layers(WINDOW, like="transformers")),
    "gemma3-local-vllm": Example(gemma3.local_layers(WINDOW, like="vllm"), KEPT),
    "gemma4-global": Example(gemma4.global_layers(), None),
    "gemma4-local": Example(gemma4.local_layers(WINDOW)),
    "gemma4-unified-global-forward": Example(gemma4.unified_global_layers(like="transformers-forward")),
    "gemma4-unified-global-static-cache": Example(gemma4.unified_global_layers(like="transformers-static-cache"), None),
    "gemma4-unified-local-forward": Example(gemma4.unified_local_layers(WINDOW, like="transformers-forward")),
    "gemma4-unified-local-static-cache": Example(gemma4.unified_local_layers(WINDOW, like="transformers-static-cache")),
    "paligemma-global-transformers": Example(paligemma.global_layers(like="transformers"), PREFIX),
    "paligemma-global-gaps": Example(paligemma.global_layers(like="transformers", gaps=True), GAPS),
    "paligemma-global-vllm": Example(paligemma.global_layers(like="vllm"), ((0, 12),)),
    "paligemma2-local-transformers": Example(paligemma.local_layers(WINDOW, like="transformers"), PREFIX),
    "paligemma2-local-gaps": Example(paligemma.local_layers(WINDOW, like="transformers", gaps=True), GAPS),
    "paligemma2-local-vllm": Example(paligemma.local_layers(WINDOW, like="vllm"), ((0, WINDOW),)),
    "molmo2-transformers": Example(molmo2.all_layers(like="transformers"), FRAMES),
    "molmo2-vllm": Example(molmo2.all_layers(like="vllm"), FRAMES),
    # The model's own span is moondream3.IMAGE_SPAN, 730 tokens.
    "moondream3": Example(moondream3.all_layers(), ((0, 30),)),
    "bagel": Example(bagel.all_layers(), ((4, 16), (16, 28), (36, 44))),
    "rswa": Example(rswa.all_layers(WINDOW), ((0, 14),)),
    "t5-prefix-lm": Example(t5.prefix_lm(), PREFIX),
    "hrm-text": Example(hrm_text.all_layers(), PREFIX),
    "hrm-text-gaps": Example(hrm_text.all_layers(gaps=True), GAPS),
    "sinks": Example(streaming.all_layers(WINDOW), ((0, 4),)),
    "modernbert-global": Example(modernbert.global_layers(), None),
    "modernbert-local": Example(modernbert.local_layers(2 * WINDOW), None),
    "embedding-gemma-local": Example(embedding_gemma.local_layers(WINDOW, version=1), None),
    "embedding-gemma2-local": Example(embedding_gemma.local_layers(WINDOW, version=2), None),
    "t5gemma-encoder-local": Example(t5gemma.encoder_local_layers(WINDOW, version=1), None),
    "t5gemma2-encoder-local": Example(t5gemma.encoder_local_layers(WINDOW, version=2), None),
    "t5gemma2-merged-global": Example(
        t5gemma.merged_global_layers(), {"encoder": ((0, 12), (16, 20)), "decoder": ((20, 48),)}
    ),
    "t5gemma2-merged-local": Example(
        t5gemma.merged_local_layers(WINDOW), {"encoder": ((0, 12), (16, 20)), "decoder": ((20, 48),)}
    ),
    "pi0-expert": Example(pi0.expert_layers(), ((38, 48),)),
    "pi0-expert-padding": Example(
        pi0.expert_layers(padding=True), {"action": ((38, 48),), "real": ((0, 12), (18, 30), (37, 48))}
    ),
    "diffusion-gemma-canvas-local": Example(diffusion_gemma.canvas_local_layers(WINDOW), CANVAS),
    "diffusion-gemma-encoder-local": Example(
        diffusion_gemma.encoder_local_layers(WINDOW, like="transformers-generate", canvas=True),
        {"image": ((5, 21),), "canvas": CANVAS},
    ),
    "bagel-training": Example(bagel.training_layers(), {"image": ((16, 24),), "noised": ((6, 14), (28, 34), (38, 44))}),
    "bd3lm": Example(bd3lm.all_layers(6), {"noised": ((0, 24),), "clean": ((24, 48),)}),
    "teacher-forcing": Example(video.teacher_forcing(8), {"clean": ((0, 24),), "noised": ((24, 48),)}),
    "frame-causal": Example(video.frame_causal(), tuple(video.frames([48], 8)[0])),
    "shared-prompt": _tree(ANSWERS),
    "prefix-tree": _tree(TURNS),
    "documents": Example(
        in_documents(gemma3.global_layers()), {"image": ((4, 12), (26, 36)), "document": ((0, 20), (20, 44))}
    ),
}
