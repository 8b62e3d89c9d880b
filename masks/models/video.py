"""Video models that generate frame by frame (CausVid, Self-Forcing): frame-causal, and its teacher-forcing form.

A frame is a latent frame of the video, or as many of them as are denoised together; `frame` is its tokens.

- Generation with a cache, and training on one copy of the video: `causal | same_span("frame")`, each frame a span. A
  row sees its own frame and all before it: one interval.
- Teacher forcing, `[clean | noised]`: `block_diffusion(frame)`. A noised frame sees itself and the clean frames before
  it, a clean frame the clean ones up to itself: at most two intervals.

Not these masks: a window of frames (`local_attn_size`), whose left edge is that of a frame.

Spans: `frames(lengths, frame)`; for teacher forcing `noised_and_clean(lengths, first="clean")`.

Source: `_prepare_blockwise_causal_attn_mask` and `_prepare_teacher_forcing_mask` in `wan/modules/causal_model.py` of
Self-Forcing (Huang et al., arXiv 2506.08009), read. Tokens of their padding see themselves there, here nothing.
transformers 5.24.0 does not have the models.
"""

from __future__ import annotations

from collections.abc import Sequence

from fa4_prefixlm.batch.integers import whole_number, whole_numbers
from fa4_prefixlm.masks.atoms import causal, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.noised_copy import block_diffusion, noised_and_clean
from fa4_prefixlm.masks.spans import BatchSpans

__all__ = ["frame_causal", "frames", "noised_and_clean", "teacher_forcing"]


def frame_causal() -> Mask:
    """All layers, of one copy of the video."""
    return causal | same_span("frame")


def teacher_forcing(frame: int) -> Mask:
    """All layers, of a clean and a noised copy.

    Args:
        frame: tokens of a frame.

    Raises:
        InputError: `frame` is no positive number of tokens.
    """
    return block_diffusion(whole_number("frame", frame, "a positive number of tokens", least=1))


def frames(lengths: Sequence[int], frame: int) -> BatchSpans:
    """The frames of videos as spans. `frames([7, 3], 3)` is `[[(0, 3), (3, 6), (6, 7)], [(0, 3)]]`.

    Args:
        lengths: tokens of each video.
        frame: tokens of a frame.

    Returns:
        per video a list of half-open `(start, end)`, ascending; its last frame may be shorter.

    Raises:
        InputError: `lengths` are no numbers of tokens, or `frame` is no positive one.
    """
    frame = whole_number("frame", frame, "a positive number of tokens", least=1)
    known = whole_numbers("lengths", lengths, "a number of tokens, at least 0")
    return [[(start, min(start + frame, length)) for start in range(0, length, frame)] for length in known]
