"""What a type checker sees of the public names: mypy reads this file, nothing runs it.

A name that became Any would pass any annotation, so each is compared by `assert_type`.
"""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, from_flex, gemma3, prefix, same_span, window
from fa4_prefixlm.masks.models import paligemma
from fa4_prefixlm.masks.models.catalogue import CATALOGUE, Example


def calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert_type(fp.attention(q, k, v), torch.Tensor)
    assert_type(fp.attention(q, k, v, return_lse=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(fp.attention(q, k, v, return_lse=False), torch.Tensor)
    plan = fp.plan(None, like=(q, k, v))
    assert_type(plan, fp.Plan)
    assert_type(plan.choice, fp.Choice)
    assert_type(plan.flops(), int)
    serving = fp.serving_plan(like=(q, k, v), max_tokens=8, max_sequences=1, max_pages=1)
    assert_type(serving, fp.ServingPlan)
    assert_type(fp.attention(q, k, v, plan), torch.Tensor)
    assert_type(fp.attention(q, k, v, serving), torch.Tensor)
    assert_type(fp.safe_chunk_end(9, [(2, 12)]), int)


def masks() -> None:
    assert_type(causal | same_span("image"), fp.Mask)
    assert_type((causal & window(9)) | prefix("prompt"), fp.Mask)
    assert_type(from_flex(lambda b, h, q, kv: q >= kv), fp.Mask)
    assert_type(gemma3.local_layers(9, like="vllm"), fp.Mask)
    assert_type(gemma3.global_layers(), fp.Mask)
    assert_type(paligemma.global_layers(like="vllm"), fp.Mask)
    assert_type(CATALOGUE, dict[str, Example])
    mask = fp.PrefixLM(9, clamp=False)
    assert_type(mask, fp.PrefixLM)
    assert_type(mask.window, int | None)
    assert_type(mask.clamp, bool)
    assert_type(causal.dense(seqlen=9), torch.Tensor)


def errors(error: fp.InputError) -> None:
    assert_type(error.argument, str)
    assert_type(error.expected, str)
    assert_type(str(fp.UnsupportedError("q", "this", 3)), str)


def nothing_is_any() -> None:
    """Where one of these is Any its ignore is of no use, which mypy tells (`warn_unused_ignores`)."""
    numbers: list[int] = []
    numbers.append(fp.attention)  # type: ignore[arg-type]
    numbers.append(fp.plan)  # type: ignore[arg-type]
    numbers.append(fp.PrefixLM())  # type: ignore[arg-type]
    numbers.append(causal)  # type: ignore[arg-type]
    numbers.append(causal | window(9))  # type: ignore[arg-type]
    numbers.append(gemma3.global_layers())  # type: ignore[arg-type]
