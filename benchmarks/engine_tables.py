"""Tables of kept results of whole engines as Markdown, quoted by pages of docs/.

python benchmarks/engine_tables.py
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from fa4_prefixlm.testing.tables import markdown

# The attention of `transformers_models.py` that looks at no scores.
FLOOR = "no attention"
# And the one that runs FA4's own causal kernel, which drops the images.
WITHOUT_IMAGES = "FA4, images dropped"
# What pages quote of what the engine's benchmark measures.
UNITS = ("ms", "tokens/s", "prefill, ms", "decoding, us a step")
RESULTS = pathlib.Path(__file__).parent / "results"


Cells = dict[tuple[str, ...], dict[str, str]]


def kept(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def across(cells: Cells, *keys: str, columns: Sequence[str] = (), missing: str = "") -> str:
    """A table of a row for each key of the cells, and a column for each name in them.

    Args:
        cells: by key, then by column.
        keys: what the parts of a key are called.
        columns: which ones, in their order; none: all, as they come.
        missing: what a row has where it has no cell.
    """
    columns = columns or list(dict.fromkeys(name for own in cells.values() for name in own))
    rows = [[*key, *(own.get(name, missing) for name in columns)] for key, own in cells.items()]
    return "\n".join(markdown([*keys, *columns], rows))


def vllm_times() -> str:
    """Milliseconds to the first token and tokens a second, a column for each backend."""
    return engine_table(kept("h100-vllm-time")["results"])


def vllm_times_gemma4() -> str:
    """The same without decoding, whose times of that run are too far apart to tell anything."""
    return engine_table([row for row in kept("h100-vllm-time-gemma4")["results"] if "ms" in row])


def vllm_gpu_times() -> str:
    """What the GPU works in a prefill and in a decoding step of each model."""
    return engine_table(kept("h100-vllm-gpu-time")["results"], models=True)


def vllm_decoding() -> str:
    """Tokens a second, a step in the fastest four of all rounds, and a step's calls; one backend twice as a control."""
    cells: Cells = {}
    for row in kept("h200-vllm-decode")["results"]:
        fastest, calls = row["fastest steps, us a step, best"], row["calls of functions a step"]
        cell = f"{row['tokens/s']:.0f} tokens/s, {fastest:.0f} us, {calls:.0f} calls"
        cells.setdefault((row["model"], row["workload"].removeprefix("decode, ")), {})[row["backend"]] = cell
    return across(cells, "model", "decoding")


def engine_table(results: list[dict[str, Any]], *, models: bool = False) -> str:
    """A row for each workload and unit, and model where asked for, and a column for each backend."""
    cells: Cells = {}
    for row in results:
        for unit in UNITS:
            if unit in row:
                key = (*((row["model"],) if models else ()), f"{row['workload']}, {unit}")
                cells.setdefault(key, {})[row["backend"]] = f"{row[unit]:.4g}"
    return across(cells, *(("model", "work") if models else ("work",)))


def vllm_errors() -> str:
    """The largest error of a logprob, a row for each model and mode of CUDA graphs, a column for each backend."""
    return error_table(kept("h100-vllm-exactness")["results"])


def vllm_tensor_parallel() -> str:
    """The same on two GPUs."""
    return error_table(kept("h200-vllm-tensor-parallel")["results"])


def error_table(results: list[dict[str, Any]]) -> str:
    own_error = "transformers, bfloat16"
    cells: Cells = {}
    for row in results:
        largest = max(error for own in row["rounds"].values() for error in own.values())
        of_mode = cells.setdefault((row["model"], row["mode"]), {own_error: f"{row['transformers']:.3f}"})
        of_mode[row["backend"]] = f"{largest:.3f}"
    backends = dict.fromkeys(row["backend"] for row in results)
    return across(cells, "model", "mode", columns=[*backends, own_error], missing="-")


def transformers_prefill() -> str:
    return stack_table(kept("h100-transformers")["results"])


def transformers_gemma4() -> str:
    return stack_table(kept("h100-transformers-gemma4")["results"])


def transformers_training() -> str:
    return stack_table(kept("h100-transformers-training")["results"])


def transformers_training_h200() -> str:
    """A table for each stack."""
    results = kept("h200-transformers-training")["results"]
    stacks = dict.fromkeys(row["stack"] for row in results)
    return "\n\n".join(stack_table([row for row in results if row["stack"] == name]) for name in stacks)


def stack_table(results: list[dict[str, Any]]) -> str:
    """Milliseconds of the first stack and work of the results, and the peak of memory, a row for each length.

    Last come the columns of what is no right answer: FA4's causal kernel, and the floor, a model without its attention.
    """
    results = [row for row in results if all(row[name] == results[0][name] for name in ("stack", "work"))]
    titles = {FLOOR: f"{FLOOR} (the floor)"}
    names = sorted(dict.fromkeys(row["attention"] for row in results), key=[WITHOUT_IMAGES, FLOOR].count)
    cells: Cells = {}
    for row in results:
        timed = row["ms"] is not None
        cell = f"{row['ms']:.1f} ms, {row['peak_mib']:.0f} MiB" if timed else "not timed"
        cells.setdefault((str(row["tokens"]),), {})[titles.get(row["attention"], row["attention"])] = cell
    return across(cells, "tokens", columns=[titles.get(name, name) for name in names])


def backward_times() -> str:
    """A row for each workload, a column for each path; the native backward's other way to mask is left out."""
    cells: Cells = {}
    for row in kept("h100-backward")["results"]:
        if not row["path"].startswith("native,"):
            cell = f"{row['ms']:.2f} ms, {row['tflops']:.0f} ({row['of_causal']:.2f})"
            cells.setdefault((row["workload"],), {})[row["path"]] = cell
    columns = ("FA4 causal", "native", "packed", "mask_mod, every tile", "cuDNN flex_attention")
    return across(cells, "workload", columns=columns)


def training_steps() -> str:
    """What `examples/train_prefix_lm.py` printed."""
    rows = [
        [row["way"], str(row["tokens_per_s"]), f"{row['peak_mib']} MiB"]
        for row in kept("h100-train-prefix-lm")["results"]
    ]
    return "\n".join(markdown(["attention", "tokens a second", "peak memory"], rows))


def host_times() -> str:
    """Median microseconds of the host, one column for each kept file and length that it has."""
    cells: Cells = {}
    for device in ("H200", "H100"):
        for row in kept(f"{device.lower()}-host-time")["results"]:
            column = f"{device}, {row['tokens']} tokens"
            cells.setdefault((row["name"],), {})[column] = f"{row['host']:.0f}"
    return across(cells, "call")


def mask_times() -> str:
    """A row for each mask, a column for each backend: milliseconds, and exact TFLOP/s over those of FA4 causal."""
    cells: Cells = {}
    for row in kept("h100-masks")["results"]:
        if row["ms"] is not None:
            cells.setdefault((row["workload"],), {})[row["path"]] = f"{row['ms']:.3f} ({row['of_baseline']:.2f})"
    paths = dict.fromkeys(path for own in cells.values() for path in own)
    return across(cells, "mask", columns=sorted(paths, key=lambda path: path.startswith("FlexAttention")))


def mask_work() -> str:
    """Of `flex` and FlexAttention: milliseconds of a call, and microseconds that the GPU works in it."""
    content = kept("h100-masks-flex")
    cells: Cells = {}
    for row in content["results"]:
        cells.setdefault((row["workload"],), {})[f"{row['path']}, ms"] = f"{row['ms']:.3f}"
    for work in content["gpu_us"]:
        name = work.pop("workload")
        cells[(name,)] |= {f"{path}, GPU us": f"{us:.0f}" for path, us in work.items()}
    paths = ("flex", "FlexAttention, its own block mask")
    return across(cells, "mask", columns=[f"{path}, {unit}" for unit in ("ms", "GPU us") for path in paths])


def mask_plans() -> str:
    """Milliseconds to plan `flex`, and to make FlexAttention's own block mask."""
    plans = kept("h100-masks-flex")["plan_ms"]
    header = [name for name in plans[0] if name != "workload"]
    rows = [[own["workload"], *(f"{own[name]:.2f}" for name in header)] for own in plans]
    return "\n".join(markdown(["mask", *header], rows))


# The page that quotes each.
QUOTED = {
    "docs/vllm.md": (
        vllm_times,
        vllm_gpu_times,
        vllm_decoding,
        vllm_times_gemma4,
        vllm_errors,
        vllm_tensor_parallel,
    ),
    "docs/transformers.md": (
        transformers_prefill,
        transformers_training,
        transformers_training_h200,
        transformers_gemma4,
    ),
    "docs/training.md": (backward_times, training_steps),
    "docs/host_time.md": (host_times,),
    "docs/other_kernels.md": (mask_times, mask_work, mask_plans),
}

if __name__ == "__main__":
    for page, tables in QUOTED.items():
        print(f"\n# {page}\n\n" + "\n\n".join(table() for table in tables))
