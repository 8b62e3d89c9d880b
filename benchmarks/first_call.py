"""How long a user waits for the first call: `python benchmarks/first_call.py --save FILE` on a Hopper GPU.

Each kernel in fresh processes: with the cache switched off, with an empty cache that is filled, with the filled cache,
and with a cache that was filled by a process that saw no GPU (`fa4-prefixlm warmup --arch sm_90`). Every process checks
its output against float64, and says how many kernels it compiled and how many it loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

BAND = 4e-3
TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call that compiles one kernel."""

    name: str
    backend: str
    head_dim: int
    window: int | None = None
    page_size: int | None = None
    spans: bool = True


KERNELS = [
    Kernel("native, hd128", "native", 128),
    Kernel("native, hd256, window 1024", "native", 256, window=1024),
    Kernel("native, hd128, pages of 16", "native", 128, page_size=16),
    Kernel("causal, hd128", "causal", 128, spans=False),
    Kernel("varlen, hd256", "varlen", 256),
    Kernel("packed, hd128", "packed", 128),
    Kernel("two_pass, hd128", "two_pass", 128),
]
# What `warmup` compiles: the kernels that `auto` takes.
WARMED = ("native", "causal")


@dataclasses.dataclass(frozen=True)
class Run:
    """One process. seconds: of imports and CUDA, of the first call, of the second. kernels: by how it got them."""

    kernel: str
    cache: str
    importing: float
    first_call: float
    second_call: float
    compiled: int
    loaded: int
    error: float


def worker(kernel: Kernel) -> dict[str, float]:
    """Make the call twice, in this process."""
    began = time.perf_counter()
    import torch

    import fa4_prefixlm as fp
    from fa4_prefixlm.fa4.kernels import disk_cache
    from fa4_prefixlm.testing.accuracy import exact_attention, relative_error

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(TOKENS, heads, kernel.head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (16, 8, 8)
    )
    keys: dict[str, Any] = {"cu_seqlens_k": [0, TOKENS]}
    cache = [k, v]
    if kernel.page_size is not None:
        cache = [tensor.view(-1, kernel.page_size, 8, kernel.head_dim) for tensor in (k, v)]
        table = torch.arange(TOKENS // kernel.page_size, dtype=torch.int32, device="cuda").unsqueeze(0)
        keys = {"seqused_k": [TOKENS], "page_table": table}
    torch.cuda.synchronize()
    seconds = [time.perf_counter() - began]
    mask = fp.PrefixLM(kernel.window)
    spans: list[list[tuple[int, int]]] = [[(40, 200)]] if kernel.spans else [[]]
    for _ in range(2):
        began = time.perf_counter()
        out = fp.attention(
            q, cache[0], cache[1], spans, cu_seqlens_q=[0, TOKENS], mask=mask, backend=kernel.backend, **keys
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    exact, _ = exact_attention(q, k, v, mask=mask, spans=tuple(map(tuple, spans)), seqlens=((TOKENS,), (TOKENS,)))
    return {
        "importing": seconds[0],
        "first_call": seconds[1],
        "second_call": seconds[2],
        "compiled": disk_cache.counts["compiled"],
        "loaded": disk_cache.counts["loaded"],
        "error": relative_error(out, exact),
    }


def in_a_process(kernel: Kernel, cache: str, folder: pathlib.Path) -> Run:
    settings = {"FA4_PREFIXLM_CACHE": "0"} if cache == "off" else {"FA4_PREFIXLM_CACHE_DIR": str(folder)}
    settings["TRITON_CACHE_DIR"] = f"{folder}-triton"  # Triton's own, so that "empty" is empty for it as well
    environment = {name: value for name, value in os.environ.items() if name != "FA4_PREFIXLM_CACHE"} | settings
    command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(kernel))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kernel.name}, {cache}:\n{done.stderr}")
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return Run(kernel.name, cache, **said)


def without_a_gpu(kernel: Kernel, folder: pathlib.Path, sms: int) -> None:
    """Fill the cache for the kernel by `warmup --arch`, in a process that sees no GPU."""
    command = [sys.executable, "-m", "fa4_prefixlm", "warmup", "--arch", "sm_90", "--sms", str(sms), "--json"]
    command += ["--head-dim", str(kernel.head_dim), "--heads", "16", "--kv-heads", "8"]
    command += ["--window", str(kernel.window or 0)]
    command += ["--page-size", str(kernel.page_size)] if kernel.page_size is not None else []
    environment = {name: value for name, value in os.environ.items() if name != "FA4_PREFIXLM_CACHE"}
    environment |= {"FA4_PREFIXLM_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="keep the results as JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name holds TEXT")
    parser.add_argument("--worker", metavar="KERNEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(Kernel(**json.loads(arguments.worker)))))
        return 0
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("this benchmark needs a Hopper GPU")
        return 2
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    runs: list[Run] = []
    print(f"{'kernel':28} {'cache':18} {'imports s':>9} {'first s':>8} {'second s':>9} {'compiled':>8} {'loaded':>6}")
    for kernel in KERNELS:
        if arguments.only not in kernel.name:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            steps = [("off", "off"), ("empty", "own"), ("filled", "own")]
            if kernel.backend in WARMED:
                without_a_gpu(kernel, pathlib.Path(scratch, "cross"), sms)
                steps.append(("cross-compiled", "cross"))
            for cache, folder in steps:
                run = in_a_process(kernel, cache, pathlib.Path(scratch, folder))
                runs.append(run)
                seconds = f"{run.importing:9.2f} {run.first_call:8.2f} {run.second_call:9.4f}"
                print(f"{run.kernel:28} {run.cache:18} {seconds} {run.compiled:8} {run.loaded:6}", flush=True)
    wrong = [f"{run.kernel}, {run.cache}: relative error {run.error:.1e}" for run in runs if not run.error <= BAND]
    wrong += [f"{run.kernel}, {run.cache}: compiled" for run in runs if run.cache == "filled" and run.compiled]
    for what in wrong:
        print(f"WRONG: {what}")
    if arguments.save:
        from harness import provenance, write

        write(arguments.save, {**provenance(), "wrong": wrong, "results": [dataclasses.asdict(run) for run in runs]})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
