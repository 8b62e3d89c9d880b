"""What the GPU tests measured, in one small file:

    pytest -m gpu --gpu-report report.jsonl; python benchmarks/exactness.py report.jsonl --save FILE

Per backend and kernel kind, and per backend and mask for masks beyond PrefixLM: number of calls, largest relative
error, largest ratio to FA4's causal error on the same data (left out for batches of a few rows and for masks whose rows
see few keys, where the causal error is not a band), largest error of one token and head, largest LSE error. For vLLM's
layers the band is the error of the call that vLLM makes, a mask_mod without block sparsity.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import defaultdict

from harness import provenance, write


def summarise(lines: list[dict], by: str) -> list[dict[str, object]]:
    """One row per backend and `by`, which is "kind" or "mask"."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for line in lines:
        groups[line["backend"], line[by]].append(line)
    rows: list[dict[str, object]] = []
    for (backend, name), calls in sorted(groups.items()):
        banded = [call["error"] / call["band"] for call in calls if "batch" not in call and call["band"] > 0]
        row = {"backend": backend, by: name, "calls": len(calls)}
        row["largest_error"] = _short(max(call["error"] for call in calls))
        if banded:
            row["largest_ratio_to_causal"] = _short(max(banded))
        if all("row_error" in call for call in calls):
            row["largest_row_error"] = _short(max(call["row_error"] for call in calls))
        if all("lse_error" in call for call in calls):
            row["largest_lse_error"] = _short(max(call["lse_error"] for call in calls))
        rows.append(row)
    return rows


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--save", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.report.read_text().splitlines()]
    rows = summarise(lines, "kind")
    # tests/backends/test_gpu_masks.py labels its calls with the mask.
    masks = summarise([line for line in lines if line.get("batch") == line["mask"]], "mask")
    for row in [*rows, *masks]:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    what = (__doc__ or "").split("\n\n")[-1].replace("\n", " ").strip()
    write(arguments.save, {**provenance(), "what": what, "results": rows, "masks": masks})


if __name__ == "__main__":
    main()
