"""Every mask of the model families, each with an example that shows its rule. Pictures and tests go through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models import bagel, gemma3, gemma4, molmo2, moondream3, paligemma, rswa, t5
from fa4_prefixlm.masks.packing import in_documents
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
    "documents": Example(
        in_documents(gemma3.global_layers()), {"image": ((4, 12), (26, 36)), "document": ((0, 20), (20, 44))}
    ),
}
