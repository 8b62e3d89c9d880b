"""Random batches, forward and backward, against float64: `python benchmarks/fuzz_backward.py --save FILE` on Hopper.

Each batch is judged as in tests/backends/test_gpu_backward.py: the gradients as a whole, and the worst row, against the
error of FA4's roundings after this very forward. Gradients are written into memory that held NaN.
What is wrong is printed with its seed and kept in the file; the same seed makes the same batch.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import torch
from harness import provenance, write

import fa4_prefixlm as fp
from fa4_prefixlm.fa4.kernels import backward_tiles
from fa4_prefixlm.fa4.kernels.backward_tiles import MANY_KEY_TILES
from fa4_prefixlm.masks import causal, key_in, prefix, window
from fa4_prefixlm.testing.batches import Batch, random_batch, random_mask
from fa4_prefixlm.testing.gradients import (
    TYPICAL,
    Errors,
    Kind,
    errors_of,
    exact_of,
    forward_of,
    gradients_of,
    inputs_of,
    plan_of,
    rounded_of,
)

BAND = 1.25
LIMIT_S = 200
KINDS = [
    Kind((64, 64)),
    Kind((128, 128)),
    Kind((128, 128), (4, 4)),
    Kind((256, 256)),
    Kind((256, 256), (4, 4)),
    Kind((96, 96), (3, 3)),
    Kind((192, 128), (3, 3)),
    Kind((128, 128), (4, 1), with_lse=True),
]
# Each is a kernel of its own at some head dim: drawn for one head dim alone.
WIDE_MASKS = (causal & (prefix("image") | window(60)), causal & (window(40) | key_in("image")))


def case(seed: int) -> tuple[Kind, Batch, fp.Mask, str, bool, bool]:
    """(kind, batch, mask, backward, deterministic, whether query heads are folded) of a seed."""
    rng = random.Random(seed)
    kind, batch = rng.choice(KINDS), random_batch(rng, longest=rng.choice([100, 400, 900]))
    mask: fp.Mask = random_mask(rng)
    backward = "packed" if rng.random() < 0.25 else "native"
    ordered = backward == "native" and rng.random() < 0.25 and kind.dims in ((64, 64), (128, 128))
    if kind == KINDS[0] and rng.random() < 0.2:
        mask, ordered = rng.choice(WIDE_MASKS), rng.random() < 0.4
        backward = "native" if ordered else backward
        batch = Batch(batch.seqlens, tuple(((0, min(30, keys)),) * bool(keys) for _, keys in batch.seqlens))
    folded = backward == "native" and not ordered and kind.heads[0] > kind.heads[1] and rng.random() < 0.5
    return kind, batch, mask, backward, ordered, folded


def judge(seed: int) -> tuple[str, list[str]]:
    """(what was called, what is outside of its band)."""
    kind, batch, mask, backward, ordered, folded = case(seed)
    # These batches have few key tiles.
    backward_tiles.MANY_KEY_TILES = 0 if folded else MANY_KEY_TILES
    own = inputs_of(kind, batch, seed)
    plan = plan_of(own, batch, mask, backward)
    got = gradients_of(own, plan, True if ordered else None)
    exact = exact_of(own, batch, mask)
    rounding = errors_of(rounded_of(own, batch, mask, forward_of(own, plan)), exact)
    whole, row = TYPICAL[own.q.dtype]
    band = Errors(
        {name: max(whole, error) for name, error in rounding.whole.items()},
        {name: max(row, error) for name, error in rounding.row.items()},
    )
    name = f"{backward}{' deterministic' * ordered}{' folded' * folded}, {kind}"
    return name, errors_of(got, exact).within(band, BAND, BAND)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its share of the batches")
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="keep the counts as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("the fuzzer needs a Hopper GPU")
        return 2
    began = time.monotonic()
    if arguments.jobs > 1:
        found = _in_processes(arguments)
    else:
        found = _in_this_process(arguments.first, arguments.count, arguments.seconds)
    seconds = time.monotonic() - began
    print(f"{found['batches']} batches from seed {arguments.first}, {len(found['wrong'])} wrong, {seconds:.0f} s")
    if arguments.save:
        content = {**provenance(), "first_seed": arguments.first, **found}
        write(arguments.save, content)
    return 1 if found["wrong"] else 0


def _in_this_process(first: int, count: int, seconds: float) -> dict:
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[dict[str, object]] = []
    began = time.monotonic()
    for seed in range(first, first + count):
        if time.monotonic() - began > seconds:
            break
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # a miscounted deterministic tile hangs
        name, outside = judge(seed)
        counts[name] += 1
        if outside:
            wrong.append({"seed": seed, "call": name, "mask": str(case(seed)[2]), "outside": outside})
            print(wrong[-1], flush=True)
    faulthandler.cancel_dump_traceback_later()
    return {"batches": sum(counts.values()), "wrong": wrong, "by_call": dict(sorted(counts.items()))}


def _in_processes(arguments: argparse.Namespace) -> dict:
    """Each process has its share of the seeds. One that dies counts as wrong."""
    share = -(-arguments.count // arguments.jobs)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for index in range(arguments.jobs):
            part = pathlib.Path(folder) / f"{index}.json"
            own = ["--first", str(arguments.first + index * share), "--count", str(share), "--save", str(part)]
            command = [sys.executable, __file__, *own, "--seconds", str(arguments.seconds)]
            running.append((part, subprocess.Popen(command)))
        whole: dict = {"batches": 0, "wrong": [], "by_call": collections.Counter()}
        for part, process in running:
            process.wait()
            if not part.exists():
                whole["wrong"].append({"process": part.stem, "outside": [f"died with {process.returncode}"]})
                continue
            found = json.loads(part.read_text())
            whole["batches"] += found["batches"]
            whole["wrong"] += found["wrong"]
            whole["by_call"].update(found["by_call"])
    return {**whole, "by_call": dict(sorted(whole["by_call"].items()))}


if __name__ == "__main__":
    sys.exit(main())
