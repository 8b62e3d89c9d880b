"""Train a small PrefixLM on packed rows of photos and text: `python examples/train_prefix_lm.py`

A decoder as Gemma's is built: grouped query heads, rotary positions, gated MLPs; every other layer sees a sliding
window. Patches of a photo are tokens that all see each other; the text after them is learned byte by byte. Documents of
any length are packed into rows without padding, and one plan a mask serves all layers, forward and backward.

Beside `fa4_prefixlm`, the same steps run on PyTorch's SDPA with a dense mask, and on flex_attention: the same losses,
tokens per second and peak memory. Without a GPU everything is tiny, and flex_attention is left out (it has no backward
there). Needs Pillow: `pip install -e ".[pictures]"` in this checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import fa4_prefixlm as fp
from fa4_prefixlm.masks.dense import dense_mask

HERE = pathlib.Path(__file__).parent
TEXT = HERE.parent / "README.md"
PATCH = 14
# (layer's mask) -> attention of packed (tokens, heads, head_dim) tensors.
Attend = Callable[[fp.PrefixLM, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    """tokens: of a packed row. rows: a step, one after the other: their gradients are accumulated."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    tokens: int
    rows: int
    steps: int
    photo: int
    text: int


TINY = Size(64, 2, 4, 2, 16, window=48, tokens=320, rows=2, steps=25, photo=4, text=60)
LARGE = Size(1024, 8, 8, 4, 128, window=1024, tokens=16384, rows=2, steps=60, photo=16, text=700)


@dataclasses.dataclass(frozen=True)
class Row:
    """Packed documents, each a photo and then text.

    Attributes:
        patches: `(photo tokens, 3 * PATCH * PATCH)`, of all photos in order.
        is_photo: `(tokens,)` bool.
        text: `(tokens,)` int64, the byte of a text token; 0 for a patch.
        position: `(tokens,)` int64, within its document.
        lengths, spans: of each document; where its photo is, half-open.
    """

    patches: torch.Tensor
    is_photo: torch.Tensor
    text: torch.Tensor
    position: torch.Tensor
    lengths: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def cu_seqlens(self) -> list[int]:
        return [sum(self.lengths[:index]) for index in range(len(self.lengths) + 1)]

    def document(self) -> torch.Tensor:
        """`(tokens,)` int64: whose token it is."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    def shifted_spans(self) -> tuple[tuple[int, int], ...]:
        """The photos in packed tokens."""
        pairs = zip(self.cu_seqlens, self.spans, strict=False)
        return tuple((first + start, first + end) for first, own in pairs for start, end in own)


def rows_of(size: Size, seed: int) -> Iterator[Row]:
    """Without end: pieces of one photo at one of two scales, and what the README says at a random place."""
    rng = random.Random(seed)
    photo = Image.open(HERE / "photo.jpg").convert("RGB")
    text = TEXT.read_bytes()
    while True:
        documents: list[tuple[torch.Tensor, bytes]] = []
        left = size.tokens
        while left > 0:
            side = rng.choice((size.photo // 2, size.photo))
            count = side * side if left > side * side + 8 else 0
            length = min(left - count, rng.randint(size.text // 2, size.text))
            begin = rng.randrange(len(text) - length)
            documents.append((_patches(photo, side if count else 0, rng), text[begin : begin + length]))
            left -= count + length
        lengths = tuple(len(patches) + len(own) for patches, own in documents)
        is_photo = [flag for patches, own in documents for flag in [True] * len(patches) + [False] * len(own)]
        written = [byte for patches, own in documents for byte in [0] * len(patches) + list(own)]
        yield Row(
            torch.cat([patches for patches, _ in documents]),
            torch.tensor(is_photo),
            torch.tensor(written),
            torch.cat([torch.arange(length) for length in lengths]),
            lengths,
            tuple(((0, len(patches)),) if len(patches) else () for patches, _ in documents),
        )


def _patches(photo: Image.Image, side: int, rng: random.Random) -> torch.Tensor:
    """`(side * side, 3 * PATCH * PATCH)` float32 of a square cut out of the photo."""
    if side == 0:
        return torch.zeros(0, 3 * PATCH * PATCH)
    edge = rng.randint(min(photo.size) // 2, min(photo.size))
    left, top = rng.randint(0, photo.width - edge), rng.randint(0, photo.height - edge)
    cut = photo.crop((left, top, left + edge, top + edge)).resize((side * PATCH, side * PATCH))
    pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(side, PATCH, side, PATCH, 3)
    return pixels.permute(0, 2, 1, 3, 4).reshape(side * side, -1).float() / 127.5 - 1


class Layer(nn.Module):
    def __init__(self, size: Size, mask: fp.PrefixLM) -> None:
        super().__init__()
        self.mask, self.shape = mask, (size.heads, size.kv_heads, size.head_dim)
        self.before_attention, self.before_mlp = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, (size.heads + 2 * size.kv_heads) * size.head_dim, bias=False)
        self.out = nn.Linear(size.heads * size.head_dim, size.width, bias=False)
        self.up = nn.Linear(size.width, 8 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor, attend: Attend) -> torch.Tensor:
        heads, kv_heads, head_dim = self.shape
        qkv = self.qkv(self.before_attention(hidden)).unflatten(-1, (-1, head_dim))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        out = attend(self.mask, rotated(q, angles), rotated(k, angles), v.contiguous())
        hidden = hidden + self.out(out.flatten(1))
        gate, value = self.up(self.before_mlp(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.gelu(gate, approximate="tanh") * value)


def rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)


class Model(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.patch = nn.Linear(3 * PATCH * PATCH, size.width)
        self.byte = nn.Embedding(256, size.width)
        masks = (fp.PrefixLM(size.window), fp.PrefixLM())
        self.layers = nn.ModuleList(Layer(size, masks[index % 2]) for index in range(size.layers))
        self.norm = nn.RMSNorm(size.width)

    def forward(self, row: Row, attend: Attend) -> torch.Tensor:
        """The mean loss of the next byte, where it is of the same document."""
        dim = self.size.head_dim
        rate = 1e4 ** (-torch.arange(0, dim, 2, device=row.position.device) / dim)
        angles = row.position.float().unsqueeze(1) * rate
        hidden = self.byte(row.text)
        hidden = hidden.masked_scatter(row.is_photo.unsqueeze(1), self.patch(row.patches).to(hidden.dtype))
        for layer in self.layers:
            hidden = layer(hidden, angles, attend)
        target = row.text.roll(-1)
        counted = ~row.is_photo.roll(-1) & (row.position.roll(-1) > 0)
        logits = self.norm(hidden[counted]) @ self.byte.weight.T
        return functional.cross_entropy(logits.float(), target[counted])


def to_device(row: Row, device: torch.device) -> Row:
    moved = {name: getattr(row, name).to(device) for name in ("patches", "is_photo", "text", "position")}
    return dataclasses.replace(row, **moved)


def with_plans(row: Row) -> Attend:
    """fa4_prefixlm: one plan a mask, made by the first layer that has it."""
    plans: dict[fp.PrefixLM, fp.Plan] = {}

    def attend(mask: fp.PrefixLM, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if mask not in plans:
            spans = [list(own) for own in row.spans]
            cu = row.cu_seqlens
            plans[mask] = fp.plan(spans, like=(q, k, v), cu_seqlens_q=cu, cu_seqlens_k=cu, mask=mask)
        return fp.attention(q, k, v, plans[mask])

    return attend


def with_sdpa(row: Row) -> Attend:
    """PyTorch's SDPA: a dense mask over the packed row, a bool for every pair of tokens."""
    dense: dict[fp.PrefixLM, torch.Tensor] = {}

    def attend(mask: fp.PrefixLM, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if mask not in dense:
            document = row.document()
            own = dense_mask(mask, len(q), len(q), {"image": row.shifted_spans()})
            dense[mask] = (own & (document.unsqueeze(1) == document)).to(q.device)
        heads = [own.transpose(0, 1).unsqueeze(0) for own in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads, attn_mask=dense[mask], enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attend


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def with_flex(row: Row) -> Attend:
    """flex_attention, Triton's kernels: a block mask that the mask's `flex` export makes."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    blocks: dict[fp.PrefixLM, BlockMask] = {}

    def attend(mask: fp.PrefixLM, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if mask not in blocks:
            document = row.document().to(q.device)
            own = mask.flex(seqlen=len(q), ranges=[list(row.shifted_spans())], device=str(q.device))

            def packed(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
                return own(b, h, i, j) & (document[i] == document[j])

            blocks[mask] = create_block_mask(packed, 1, None, len(q), len(q), device=str(q.device))
        heads = [own.transpose(0, 1).unsqueeze(0) for own in (q, k, v)]
        out = _compiled_flex()(*heads, block_mask=blocks[mask], enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attend


WAYS: dict[str, Callable[[Row], Attend]] = {
    "fa4_prefixlm": with_plans,
    "SDPA, dense mask": with_sdpa,
    "flex_attention": with_flex,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What training was like.

    Attributes:
        losses: by step, the mean over its rows.
        tokens_per_s: of the median step after the first two.
        peak_mib: on the GPU; None without one.
    """

    losses: list[float]
    tokens_per_s: float
    peak_mib: float | None


def train(size: Size, way: str, device: torch.device, steps: int, tell: Callable[[int, int, float], None]) -> Run:
    torch.manual_seed(0)
    model = Model(size).to(device)
    for own in model.parameters():
        if own.ndim == 2:
            nn.init.normal_(own, std=own.shape[1] ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if size is TINY else 6e-4, betas=(0.9, 0.95))
    rows, times, losses = rows_of(size, seed=0), [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        began = time.perf_counter()
        losses.append(0.0)
        for _ in range(size.rows):
            row = to_device(next(rows), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(row, WAYS[way](row)) / size.rows
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        tell(step + 1, steps, losses[-1])
    own_times = sorted(times[2:] or times)
    speed = size.tokens * size.rows / own_times[len(own_times) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return Run(losses, speed, peak)


def bar(way: str) -> Callable[[int, int, float], None]:
    """A progress bar on a terminal; elsewhere a line at the end."""

    def tell(step: int, steps: int, loss: float) -> None:
        if sys.stderr.isatty():
            done = math.floor(30 * step / steps)
            text = f"\r{way:18} [{'#' * done}{'.' * (30 - done)}] {step}/{steps}  loss {loss:.3f}"
            print(text, end="\n" if step == steps else "", file=sys.stderr, flush=True)

    return tell


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of training with fa4_prefixlm; the others run a few")
    parser.add_argument("--size", choices=("tiny", "large"), help="default: large on a GPU")
    parser.add_argument("--only", choices=WAYS, help="leave the others out")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = {"tiny": TINY, "large": LARGE}[arguments.size or ("large" if device.type == "cuda" else "tiny")]
    steps = arguments.steps or size.steps
    few = min(steps, 8)
    print(f"{size.rows} rows of {size.tokens} tokens a step, {size.layers} layers of width {size.width}, on {device}")
    runs: dict[str, Run] = {}
    for way in [arguments.only] if arguments.only else WAYS:
        if way == "flex_attention" and device.type != "cuda":
            continue
        runs[way] = train(size, way, device, few if runs else steps, bar(way))
        run = runs[way]
        memory = "" if run.peak_mib is None else f", {run.peak_mib:.0f} MiB at the peak"
        after = f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f} in {len(run.losses)} steps"
        print(f"{way:18} {after}, {run.tokens_per_s:.0f} tokens/s{memory}", flush=True)
    first, *others = runs.values()
    apart = max(
        (abs(a - b) / b for other in others for a, b in zip(other.losses, first.losses, strict=False)), default=0
    )
    print(f"losses of the same step differ by at most {apart:.1%}")
    if apart > 0.05:
        print("the ways do not agree", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
