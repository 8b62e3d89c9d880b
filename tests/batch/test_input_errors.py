"""Bad input: each mistake gets an error that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from tests.batch.bad_calls import call, cu, qkv, rejects


def test_the_error_is_a_value_error_with_its_parts() -> None:
    with pytest.raises(ValueError, match="start below end") as caught:
        call([[], [(5, 5)]])
    error = caught.value
    assert isinstance(error, fp.InputError)
    assert (error.argument, error.expected, error.got) == ("ranges[1][0]", "start below end", (5, 5))
    assert str(error) == "ranges[1][0]: expected start below end, got (5, 5)"


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[(3, 1)], []], "ranges[0][0]: expected start below end, got (3, 1)"),
        ([[(0, 5)], []], "ranges[0]: expected spans that end within the 4 keys, or begin after them, got (0, 5)"),
        ([[], [(-1, 2)]], "ranges[1][0]: expected a start of at least 0, got (-1, 2)"),
        ([[], [(0, 3), (2, 5)]], "ranges[1]: expected spans that do not overlap, got (0, 3) and (2, 5)"),
        ([[], [(2, 5), (0, 3)]], "ranges[1]: expected spans that do not overlap, got (0, 3) and (2, 5)"),
        ([[]], "ranges: expected one list per sequence, 2, got 1"),
        (5, "ranges: expected an int32 tensor, or a list of spans per sequence, got int"),
        ([[], 4], "ranges[1]: expected a list of pairs (start, end), got 4"),
        ([[], [4]], "ranges[1][0]: expected a pair of integers (start, end), got 4"),
        ([[], [(False, 2)]], "ranges[1][0]: expected a pair of integers (start, end), got (False, 2)"),
        ([[], [(0, True)]], "ranges[1][0]: expected a pair of integers (start, end), got (0, True)"),
        ([[], [(0.5, 2)]], "ranges[1][0]: expected a pair of integers (start, end), got (0.5, 2)"),
        (torch.zeros(2, 1, 2), "ranges: expected dtype torch.int32 or torch.int64, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), "ranges: expected shape (batch, max_ranges, 2), got (2, 2)"),
        (torch.zeros(3, 1, 2, dtype=torch.int32), "ranges: expected one row per sequence, 2, got 3"),
        (torch.tensor([[[0, 0]], [[4, 2]]], dtype=torch.int32), "ranges[1][0]: expected start below end, got (4, 2)"),
    ],
)
def test_ranges(ranges, message: str) -> None:
    rejects(message, ranges)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0, 4, 2**31]), "cu_seqlens_q: expected values that fit int32, got 2147483648"),
        (torch.tensor([-(2**31) - 1, 4, 10]), "cu_seqlens_q: expected values that fit int32, got 2147483649"),
        (cu(0, 4, 9), "cu_seqlens_q[-1]: expected the tensor's length 10, got 9"),
        (cu(1, 4, 10), "cu_seqlens_q[0]: expected 0, got 1"),
        (cu(0, 7, 4, 10), "cu_seqlens_q[2]: expected an ascending value, at least 7, got 4"),
        (cu(0, 10).reshape(1, 2), "cu_seqlens_q: expected shape (batch + 1,), got (1, 2)"),
        ([False, 4, 10], "cu_seqlens_q: expected an int32 tensor or a list of batch + 1 integers"),
        ([0, 4.0, 10], "cu_seqlens_q: expected an int32 tensor or a list of batch + 1 integers"),
    ],
)
def test_cu_seqlens(values, message: str) -> None:
    rejects(message, cu_q=values)


def test_lengths_against_each_other() -> None:
    rejects("cu_seqlens_k: expected 3 entries, as in cu_seqlens_q, got 2", cu_k=cu(0, 10))
    rejects("cu_seqlens_q (sequence 0): expected seqlen_q <= seqlen_k = 3, got seqlen_q = 4", cu_k=cu(0, 3, 10))
    rejects("max_seqlen_q: expected at least the longest sequence, 6, got 5", max_seqlen_q=5)
    rejects("max_seqlen_k: expected a non-negative integer, got -1", max_seqlen_k=-1)
    rejects("max_range: expected a positive number of tokens, got 0", max_range=0)
    rejects("ranges[1][0]: expected at most max_range = 2 tokens, got (0, 3)", [[], [(0, 3)]], max_range=2)


def test_missing_or_superfluous_cu_seqlens() -> None:
    q, k, v = qkv()
    with pytest.raises(fp.InputError, match="cu_seqlens_q: expected .*packed"):
        fp.attention(q, k, v)
    with pytest.raises(fp.InputError, match="cu_seqlens_k: expected .*packed"):
        fp.attention(q, k, v, cu_seqlens_q=cu(0, 10))
    batched = tuple(tensor[None] for tensor in (q, k, v))
    with pytest.raises(fp.InputError, match="cu_seqlens_q: expected None with"):
        fp.attention(*batched, cu_seqlens_q=cu(0, 10), cu_seqlens_k=cu(0, 10))
    with pytest.raises(fp.InputError, match="q: expected seqlen_q <= seqlen_k = 4, got seqlen_q = 10"):
        fp.attention(batched[0], batched[1][:, :4], batched[2][:, :4])


def changed(index: int, change) -> tuple:
    tensors = list(qkv())
    tensors[index] = change(tensors[index])
    return tuple(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(0, lambda q: q[:, :3]), "q: expected a multiple of the 2 key heads, got 3 heads"),
        (changed(1, lambda k: k[..., :8]), "k: expected q's head_dim 16, got 8"),
        (changed(2, lambda v: v[:9]), "v: expected k's tokens and heads (10, 2), got (9, 2)"),
        (changed(1, lambda k: k.double()), "k: expected q's dtype torch.float32, got torch.float64"),
        (changed(2, lambda v: v.to("meta")), "v: expected q's device cpu, got meta"),
        (changed(0, lambda q: q[0]), "q: expected (total, heads, head_dim) or (batch, seqlen, heads, head_dim), got"),
        (changed(1, lambda k: k[None]), "k: expected 3 dimensions, as q, got shape (1, 10, 2, 16)"),
        (
            changed(0, lambda q: q.int()),
            "q: expected one of torch.bfloat16, torch.float16, torch.float32, torch.float64",
        ),
        (changed(0, lambda q: q.int()), "got torch.int32"),
        (changed(0, lambda q: q.to(torch.float8_e4m3fn)), "torch.float64, got torch.float8_e4m3fn"),
        (
            changed(0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2)),
            "q: expected a contiguous last dimension",
        ),
        (changed(2, lambda v: v[..., :0]), "v: expected at least one head and one head dimension"),
        (("q", None, None), "q: expected a torch.Tensor, got str"),
    ],
)
def test_tensors(tensors, message: str) -> None:
    rejects(message, tensors=tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_scale": float("nan")}, "softmax_scale: expected a positive finite number, got nan"),
        ({"softcap": -1.0}, "softcap: expected a non-negative finite number, 0.0 for none, got -1.0"),
        ({"learnable_sink": torch.zeros(2)}, "learnable_sink: expected shape (4,), one per query head, got (2,)"),
        ({"learnable_sink": torch.zeros(4, dtype=torch.int32)}, "learnable_sink: expected dtype float32"),
        ({"learnable_sink": torch.zeros(4, device="meta")}, "learnable_sink: expected q's device cpu, got meta"),
        ({"softmax_scale": 0.0}, "softmax_scale: expected a positive finite number, got 0.0"),
        ({"out": [1]}, "out: expected a torch.Tensor, got list"),
        ({"learnable_sink": [0.0] * 4}, "learnable_sink: expected a torch.Tensor, got list"),
        ({"out": torch.zeros(10, 4, 8)}, "out: expected shape (10, 4, 16), got (10, 4, 8)"),
        ({"out": torch.zeros(10, 4, 16).double()}, "out: expected q's dtype torch.float32, got torch.float64"),
        ({"out": torch.zeros(10, 16, 4).transpose(1, 2)}, "out: expected a contiguous tensor"),
        ({"out": torch.zeros(641)[1:].view(10, 4, 16)}, "out: expected memory aligned to 16 bytes, got an offset of 4"),
        ({"deterministic": "x"}, "deterministic: expected True, False or None, got 'x'"),
        ({"build": 3}, "build: expected the name of a package, a string, got 3"),
        ({"mask": "causal"}, "mask: expected a fa4_prefixlm mask such as PrefixLM(window=1024), got 'causal'"),
        (
            {"backend": "flash"},
            "backend: expected one of auto, causal, native, varlen, packed, two_pass, cudnn, flex, reference",
        ),
        ({"backend": 0}, "cudnn, flex, reference, got 0"),
        ({"backward": ""}, "backward: expected one of auto, causal, native, packed, cudnn, flex, reference, got ''"),
    ],
)
def test_options(options, message: str) -> None:
    rejects(message, **options)


@pytest.mark.parametrize("window", [0, -3, 1.5, "wide"])
def test_window(window) -> None:
    with pytest.raises(fp.InputError, match="window: expected a positive number of tokens"):
        fp.PrefixLM(window)


def test_numpy_like_integers_are_integers() -> None:
    import numpy as np

    numbers = [np.int64(0), np.int32(4), torch.tensor(10)]
    wanted = call([[(0, 3)], []])
    assert call([[(np.int64(0), np.int32(3))], []], cu_q=numbers).shape == wanted.shape


def test_names_of_span_sets() -> None:
    from fa4_prefixlm.masks import causal, prefix, same_span, window

    rejects("spans it does not use", [[(0, 2)], []], mask=causal & window(3))
    assert call([[], []], mask=causal & window(3)).shape == call(None, mask=causal & window(3)).shape
    two = (causal | same_span("image")) & (window(4) | prefix("prompt"))
    rejects("a dictionary with spans for ['image', 'prompt']", [[(0, 2)], []], mask=two)
    rejects("spans for 'prompt'", {"image": [[], []]}, mask=two)
    rejects("ranges['video']", {"image": [[], []], "prompt": [[], []], "video": [[], []]}, mask=two)
    rejects("ranges['image'][0][0]: expected start below end", {"image": [[(3, 1)], []], "prompt": [[], []]}, mask=two)
    with pytest.raises(fp.InputError, match="name: expected the name of a span set"):
        same_span("")
