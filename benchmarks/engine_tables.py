"""Tables of kept results of whole engines as Markdown, quoted by pages of docs/.

python benchmarks/engine_tables.py
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from fa4_prefixlm.testing.tables import markdown

# The attention of `transformers_models.py` that looks at no scores.
FLOOR = "no attention"
# And the one that runs FA4's own causal kernel, which drops the images.
WITHOUT_IMAGES = "FA4, images dropped"
RESULTS = pathlib.Path(__file__).parent / "results"


def kept(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def vllm_times() -> str:
    """Milliseconds to the first token and tokens a second, a column for each backend."""
    return engine_table(kept("h100-vllm-time")["results"])


def vllm_times_gemma4() -> str:
    """The same without decoding, whose times of that run are too far apart to tell anything."""
    return engine_table([row for row in kept("h100-vllm-time-gemma4")["results"] if "ms" in row])


def vllm_gpu_times() -> str:
    """What the GPU works in a prefill and in a decoding step, a column for each backend."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in kept("h100-vllm-gpu-time")["results"]:
        for quantity in ("prefill, ms", "decoding, us a step"):
            key = (row["workload"].removeprefix("GPU, "), quantity)
            cells.setdefault(key, {})[row["backend"]] = f"{row[quantity]:.4g}"
    backends = list(dict.fromkeys(name for own in cells.values() for name in own))
    rows = [[*key, *(own.get(name, "") for name in backends)] for key, own in cells.items()]
    return "\n".join(markdown(["work", "GPU", *backends], rows))


def engine_table(results: list[dict[str, Any]]) -> str:
    backends = list(dict.fromkeys(row["backend"] for row in results))
    cells: dict[str, dict[str, str]] = {}
    for row in results:
        value = row.get("ms", row.get("tokens/s"))
        if value is not None:
            unit = "ms" if "ms" in row else "tokens/s"
            cells.setdefault(f"{row['workload']}, {unit}", {})[row["backend"]] = f"{value:.4g}"
    rows = [[work, *(own.get(name, "") for name in backends)] for work, own in cells.items()]
    return "\n".join(markdown(["work", *backends], rows))


def vllm_errors() -> str:
    """The largest error of a logprob, a row for each model and mode of CUDA graphs, a column for each backend."""
    return error_table(kept("h100-vllm-exactness")["results"])


def vllm_tensor_parallel() -> str:
    """The same on two GPUs."""
    return error_table(kept("h200-vllm-tensor-parallel")["results"])


def error_table(results: list[dict[str, Any]]) -> str:
    backends = list(dict.fromkeys(row["backend"] for row in results))
    errors: dict[tuple[str, str], dict[str, str]] = {}
    for row in results:
        largest = max(error for own in row["rounds"].values() for error in own.values())
        key = (row["model"], row["mode"])
        errors.setdefault(key, {"transformers, bfloat16": f"{row['transformers']:.3f}"})[row["backend"]] = (
            f"{largest:.3f}"
        )
    columns = [*backends, "transformers, bfloat16"]
    rows = [[model, mode, *(own.get(name, "-") for name in columns)] for (model, mode), own in errors.items()]
    return "\n".join(markdown(["model", "mode", *columns], rows))


def transformers_prefill() -> str:
    return stack_table(kept("h100-transformers")["results"])


def transformers_gemma4() -> str:
    return stack_table(kept("h100-transformers-gemma4")["results"])


def transformers_training() -> str:
    """A table for each stack."""
    results = kept("h100-transformers-training")["results"]
    stacks = dict.fromkeys(row["stack"] for row in results)
    return "\n\n".join(stack_table([row for row in results if row["stack"] == name]) for name in stacks)


def stack_table(results: list[dict[str, Any]]) -> str:
    """Milliseconds of the first stack and work of the results, and the peak of memory, a row for each length.

    Last come the columns of what is no right answer: FA4's causal kernel, and the floor, a model without its attention.
    """
    results = [row for row in results if all(row[name] == results[0][name] for name in ("stack", "work"))]
    names = sorted(dict.fromkeys(row["attention"] for row in results), key=[WITHOUT_IMAGES, FLOOR].count)
    by_length: dict[int, dict[str, str]] = {}
    for row in results:
        timed = row["ms"] is not None
        cell = f"{row['ms']:.1f} ms, {row['peak_mib']:.0f} MiB" if timed else "not timed"
        by_length.setdefault(row["tokens"], {})[row["attention"]] = cell
    columns = [f"{name} (the floor)" if name == FLOOR else name for name in names]
    rows = [[str(tokens), *(own.get(name, "") for name in names)] for tokens, own in by_length.items()]
    return "\n".join(markdown(["tokens", *columns], rows))


def backward_times() -> str:
    """A row for each workload, a column for each path; the native backward's other way to mask is left out."""
    cells: dict[str, dict[str, str]] = {}
    for row in kept("h100-backward")["results"]:
        if not row["path"].startswith("native,"):
            cell = f"{row['ms']:.2f} ms, {row['tflops']:.0f} ({row['of_causal']:.2f})"
            cells.setdefault(row["workload"], {})[row["path"]] = cell
    columns = ["FA4 causal", "native", "packed", "mask_mod, every tile", "cuDNN flex_attention"]
    rows = [[work, *(own.get(name, "") for name in columns)] for work, own in cells.items()]
    return "\n".join(markdown(["workload", *columns], rows))


def training_steps() -> str:
    """What `examples/train_prefix_lm.py` printed."""
    rows = [
        [row["way"], str(row["tokens_per_s"]), f"{row['peak_mib']} MiB"]
        for row in kept("h100-train-prefix-lm")["results"]
    ]
    return "\n".join(markdown(["attention", "tokens a second", "peak memory"], rows))


def host_times() -> str:
    """Median microseconds of the host, one column for each kept file and length that it has."""
    cells: dict[str, dict[str, str]] = {}
    for device in ("H200", "H100"):
        for row in kept(f"{device.lower()}-host-time")["results"]:
            column = f"{device}, {row['tokens']} tokens"
            cells.setdefault(row["name"], {})[column] = f"{row['host']:.0f}"
    columns = list(dict.fromkeys(column for own in cells.values() for column in own))
    rows = [[name, *(own.get(column, "") for column in columns)] for name, own in cells.items()]
    return "\n".join(markdown(["call", *columns], rows))


def mask_times() -> str:
    """A row for each mask, a column for each backend: milliseconds, and exact TFLOP/s over those of FA4 causal."""
    cells: dict[str, dict[str, str]] = {}
    for row in kept("h100-masks")["results"]:
        if row["ms"] is not None:
            cells.setdefault(row["workload"], {})[row["path"]] = f"{row['ms']:.3f} ({row['of_baseline']:.2f})"
    columns = list(dict.fromkeys(path for own in cells.values() for path in own))
    columns.sort(key=lambda path: path.startswith("FlexAttention"))
    rows = [[work, *(own.get(name, "") for name in columns)] for work, own in cells.items()]
    return "\n".join(markdown(["mask", *columns], rows))


def mask_plans() -> str:
    """Milliseconds to plan `flex`, and to make FlexAttention's own block mask."""
    plans = kept("h100-masks")["plan_ms"]
    header = [name for name in plans[0] if name != "workload"]
    rows = [[own["workload"], *(f"{own[name]:.2f}" for name in header)] for own in plans]
    return "\n".join(markdown(["mask", *header], rows))


# The page that quotes each.
QUOTED = {
    "docs/vllm.md": (vllm_times, vllm_gpu_times, vllm_times_gemma4, vllm_errors, vllm_tensor_parallel),
    "docs/transformers.md": (transformers_prefill, transformers_training, transformers_gemma4),
    "docs/training.md": (backward_times, training_steps),
    "docs/host_time.md": (host_times,),
    "docs/other_kernels.md": (mask_times, mask_plans),
}

if __name__ == "__main__":
    for page, tables in QUOTED.items():
        print(f"\n# {page}\n\n" + "\n\n".join(table() for table in tables))
