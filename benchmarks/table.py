"""Results as Markdown: `python benchmarks/table.py benchmarks/results/h200-forward.json`, quoted by the README."""

from __future__ import annotations

import json
import pathlib
import sys

from fa4_prefixlm.testing.tables import markdown


def table(content: dict) -> str:
    """One row per workload, one column per path: milliseconds, and exact TFLOP/s relative to the baseline's."""
    results = content["results"]
    workloads = list(dict.fromkeys(result["workload"] for result in results))
    paths = list(dict.fromkeys(result["path"] for result in results))
    cells = {(result["workload"], result["path"]): _cell(result) for result in results}
    rows = [[work, *(cells.get((work, path), "") for path in paths)] for work in workloads]
    lines = markdown(["workload", *paths], rows)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join([*lines, "", f"{content['device']}; {versions}; commit {content['commit']}."])


def _cell(result: dict) -> str:
    if result["ms"] is None:
        return f"wrong ({result['error']:.1e})"
    return f"{result['ms']:.3f} ms, {result['tflops']:.0f} TFLOP/s ({result['of_baseline']:.2f})"


if __name__ == "__main__":
    print(table(json.loads(pathlib.Path(sys.argv[1]).read_text())))
