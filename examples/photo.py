"""A photo between two pieces of text: what exact PrefixLM attention changes. `python examples/photo.py --out demo.png`

Photos are cut into patches of 14x14 pixels, one token each. Queries and keys come from the same projection, so patches
that look alike attend to each other. Runs on a Hopper GPU with FlashAttention-4 where there is one, else on the CPU.
Needs Pillow, which `make demo` installs, as does `pip install -e ".[pictures]"` in this checkout.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

import fa4_prefixlm as fp
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.kernels import tiles
from fa4_prefixlm.geometry import tiles as tiling
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.masks.picture import mask_image, side_by_side
from fa4_prefixlm.testing import accuracy
from fa4_prefixlm.tools.crosscompile import Variant, compile_in_subprocess

PHOTO = pathlib.Path(__file__).with_name("photo.jpg")
PATCH, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 14, 512, 8, 4, 128
SHARPNESS = (9.0, 15.0)  # the two query heads of a key head: one looks around, one only at what is most alike
BROW = 5 * 16 + 8  # the patch in the picture: row 5, column 8 of the 18 x 16 patches of the first photo
LARGEST_ERROR = 0.01
ORANGE, GREY = (255, 140, 0), (244, 245, 247)

Part = str | Image.Image


@dataclass(frozen=True)
class Batch:
    """Packed sequences. tokens: `(total, WIDTH)`; seqlens and spans: per sequence, spans half-open in its tokens."""

    tokens: torch.Tensor
    seqlens: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def cu_seqlens(self) -> list[int]:
        return [sum(self.seqlens[:index]) for index in range(len(self.seqlens) + 1)]

    def is_image(self) -> torch.Tensor:
        """`(total,)` bool: the tokens inside spans."""
        result = torch.zeros(sum(self.seqlens), dtype=torch.bool)
        for first, own in zip(self.cu_seqlens, self.spans, strict=False):
            for start, end in own:
                result[first + start : first + end] = True
        return result


def sequences(photo: Image.Image) -> list[list[Part]]:
    """What is in the batch: two images, none, one large one, and one that comes before all text."""
    face = photo.crop((56, 42, 168, 154))
    large = photo.resize((280, 308))
    return [
        ["This is the official portrait of a computer scientist. ", photo, " Her face again: ", face, " Who is she?"],
        ["Text alone sees what came before it, and nothing that comes after. " * 8],
        ["The same photo with more pixels has more patches. ", large, " They all see each other."],
        [face, " An image may come first; the text after it sees all of it, and the image none of the text."],
    ]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[0] ** 0.5


def embed(part: Part) -> torch.Tensor:
    """`(tokens, WIDTH)`: a row of a table per byte of text, a projection of the pixels per patch of a photo."""
    if isinstance(part, str):
        return random(256, WIDTH, seed=1)[list(part.encode())] * 16
    pixels = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8).float() / 255
    pixels = pixels.view(part.height // PATCH, PATCH, part.width // PATCH, PATCH, 3).transpose(1, 2).flatten(0, 1)
    return (pixels - pixels.mean(dim=(0, 1, 2))).flatten(1) @ random(PATCH * PATCH * 3, WIDTH, seed=2)


def pack(parts_of: list[list[Part]]) -> Batch:
    tokens, seqlens, spans = [], [], []
    for parts in parts_of:
        length, own = 0, []
        for part in parts:
            tokens.append(embed(part))
            if not isinstance(part, str):
                own.append((length, length + len(tokens[-1])))
            length += len(tokens[-1])
        seqlens.append(length)
        spans.append(tuple(own))
    return Batch(torch.cat(tokens), tuple(seqlens), tuple(spans))


def project(tokens: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make q `(total, HEADS, HEAD_DIM)` and k, v `(total, KV_HEADS, HEAD_DIM)`, bfloat16.

    A score, scaled, is the cosine of two keys times the sharpness of the query head.
    """
    key = (tokens @ random(WIDTH, KV_HEADS * HEAD_DIM, seed=3)).unflatten(1, (KV_HEADS, HEAD_DIM))
    key = torch.nn.functional.normalize(key, dim=2)
    value = (tokens @ random(WIDTH, KV_HEADS * HEAD_DIM, seed=4)).unflatten(1, (KV_HEADS, HEAD_DIM))
    query = (key.unsqueeze(2) * torch.tensor(SHARPNESS)[:, None]).flatten(1, 2)
    q, k, v = (tensor.to(device, torch.bfloat16) for tensor in (query, key * HEAD_DIM**0.5, value))
    return q, k, v


def choose_device() -> torch.device:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return torch.device("cuda" if hopper and locate.installed() is not None else "cpu")


def print_errors(batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> float:
    """Compare with float64, next to the two wrong answers. Returns the error of `out` over all tokens."""
    seqlens = (batch.seqlens, batch.seqlens)
    exact, _ = accuracy.exact_attention(q, k, v, mask=fp.PrefixLM(), spans=batch.spans, seqlens=seqlens)
    answers = {
        "fp.attention": out,
        "two passes that overlap": accuracy.overlapping_two_pass(
            q, k, v, window=None, spans=batch.spans, seqlens=seqlens
        ),
        "plain causal": accuracy.plain_causal(q, k, v, window=None, seqlens=seqlens),
    }
    image = batch.is_image().to(q.device)
    print(f"{'relative error against float64':32}{'all tokens':>12}{'image tokens':>15}")
    for name, answer in answers.items():
        everywhere = accuracy.relative_error(answer, exact)
        print(f"{name:32}{everywhere:12.2%}{accuracy.relative_error(answer[image], exact[image]):15.2%}")
    return accuracy.relative_error(out, exact)


def print_tiles(plan: fp.Plan) -> None:
    counts, how = plan.tiles(), "visited by the kernel that ran"
    if counts is None:
        longest = plan.lengths.max_seqlen_q
        tile = tiles.forward_tile(90, HEAD_DIM, HEAD_DIM, windowed=False, max_seqlen_q=longest)
        runs = tiling.tile_runs(plan.bounds, tiling.query_tiles(plan.lengths, tile.block_m), tile.block_m, tile.n)
        counts = tiling.count_tiles(runs, plan.lengths, tile.block_m, tile.n)
        how = f"computed for the sm_90 kernel with tile {tile}, not run: see above"
    share = counts.skipped / sum(counts)
    print(f"tiles: {counts.full} full, {counts.partial} partial, {counts.skipped} skipped ({share:.0%}); {how}")


def cross_compile() -> bool:
    """Compile the kernel for a GPU that is not here. Returns whether that worked, or could not be tried."""
    installed = locate.installed()
    if installed is None:
        print("sm_90 kernel: not compiled, flash-attn-4 is not installed")
        return True
    print("sm_90 kernel: compiling it, which takes some seconds ...", flush=True)
    try:
        report = compile_in_subprocess("sm_90", [Variant("varlen", HEAD_DIM, HEAD_DIM)])[0]
    except RuntimeError as error:
        report = {"error": error}
    if report["error"] is not None:
        print(f"sm_90 kernel: {installed} failed to compile it: {report['error']}")
        return False
    print(f"sm_90 kernel: compiled in {report['seconds']} s, not run ({report['kernel']})")
    return True


def attention_row(q: torch.Tensor, k: torch.Tensor, row: int, visible: torch.Tensor) -> torch.Tensor:
    """`(seqlen,)`: where the token `row` of the first sequence looks, averaged over the heads, in plain torch."""
    keys = k[: len(visible)].repeat_interleave(HEADS // KV_HEADS, dim=1).float()
    scores = torch.einsum("hd,khd->hk", q[row].float(), keys) / HEAD_DIM**0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=1).mean(dim=0)


def tinted(photo: Image.Image, weights: list[float], visible: list[bool], brightest: float) -> Image.Image:
    """The photo: a patch orange by its weight, washed out if hidden, and a box around the patch that looks."""
    scale, columns = 2, photo.width // PATCH
    picture = photo.convert("L").convert("RGB").resize((photo.width * scale, photo.height * scale))
    side = PATCH * scale
    for patch, (weight, seen) in enumerate(zip(weights, visible, strict=True)):
        x, y = patch % columns * side, patch // columns * side
        cut = picture.crop((x, y, x + side, y + side))
        strength = min(1.0, weight / brightest) ** 0.6 * 0.7 if seen else 0.9
        picture.paste(Image.blend(cut, Image.new("RGB", cut.size, ORANGE if seen else GREY), strength), (x, y))
    x, y = BROW % columns * side, BROW // columns * side
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="white", width=3)
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline="black", width=2)
    return picture


def draw(batch: Batch, photo: Image.Image, q: torch.Tensor, k: torch.Tensor) -> Image.Image:
    """The mask of the first sequence, and what one patch of its first photo sees without and with that mask."""
    length, spans = batch.seqlens[0], batch.spans[0]
    start, end = spans[0]
    row = start + BROW
    masks = [dense_mask(fp.PrefixLM(), length, length, {"image": own})[row] for own in ((), spans)]
    weights = [attention_row(q.cpu(), k.cpu(), row, mask)[start:end].tolist() for mask in masks]
    brightest = sorted(weights[1])[-8]
    pictures = [
        tinted(photo, weight, mask[start:end].tolist(), brightest) for weight, mask in zip(weights, masks, strict=True)
    ]
    later = sum(weights[1][BROW + 1 :])
    titles = [
        f"The mask of a sequence of {length} tokens\nwith two images",
        "Causal: the patch in the box sees those\nbefore it (orange: its attention)",
        f"PrefixLM: it sees the whole image; {later:.0%} of\nits attention is on what causal hides",
    ]
    return side_by_side([mask_image(fp.PrefixLM(), seqlen_k=length, ranges=spans, cell=1), *pictures], titles)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo.png"), help="the picture to write")
    parser.add_argument(
        "--no-compile", action="store_true", help="without a Hopper GPU, don't cross-compile the kernel"
    )
    options = parser.parse_args(arguments)
    if not options.out.absolute().parent.is_dir():
        print(f"photo.py: {InputError('--out', 'a file in an existing folder', options.out)}", file=sys.stderr)
        return 2
    photo = Image.open(PHOTO).convert("RGB")
    batch = pack(sequences(photo))
    q, k, v = project(batch.tokens, choose_device())
    cu = batch.cu_seqlens
    if q.device.type == "cuda":
        print("compiling the kernel on the first call, which takes some seconds ...", flush=True)
    plan = fp.plan(batch.spans, like=(q, k, v), cu_seqlens_q=cu, cu_seqlens_k=cu)
    out = fp.attention(q, k, v, plan)
    print(plan, end="\n\n")
    error = print_errors(batch, q, k, v, out)
    print()
    print_tiles(plan)
    compiled = cross_compile() if q.device.type == "cpu" and not options.no_compile else True
    draw(batch, photo, q, k).save(options.out, optimize=True)
    print(f"picture: {options.out.resolve()}")
    if not error <= LARGEST_ERROR:
        print(f"fp.attention is wrong: its error is {error:.2%}")
    return 0 if error <= LARGEST_ERROR and compiled else 1


if __name__ == "__main__":
    raise SystemExit(main())
