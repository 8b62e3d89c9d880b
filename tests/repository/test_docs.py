"""The code blocks of the README and the docs run, in order, as one program a page."""

from __future__ import annotations

import dataclasses
import json
import linecache
import pathlib
import re
import sys
import types

import pytest
import torch

from fa4_prefixlm.integrations.vllm import layer_mask
from fa4_prefixlm.masks import causal
from fa4_prefixlm.testing.accuracy import exact_attention
from tests.repository import stand_ins

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- runs with: ([\w, ]+) -->\n\n)?^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """Python on a page. needs: modules that it imports and not everybody has."""

    code: str
    file: str
    needs: tuple[str, ...]

    def run(self, names: dict[str, object]) -> None:
        # Code that is compiled from its source (a CuTe kernel) looks it up by its file.
        linecache.cache[self.file] = (len(self.code), None, self.code.splitlines(keepends=True), self.file)
        exec(compile(self.code, self.file, "exec"), names)


def blocks(page: pathlib.Path) -> list[Block]:
    return [
        Block(code, f"<{page.name}, block {index}>", tuple(filter(None, needs.split(", "))))
        for index, (needs, code) in enumerate(BLOCK.findall(page.read_text()))
    ]


def run_page(page: pathlib.Path) -> dict[str, object]:
    """The names that its blocks define. A page is left, as skipped, at the first block that lacks a module."""
    names: dict[str, object] = {"__name__": page.stem, **(stand_ins.names() if page.name == "vllm.md" else {})}
    for block in blocks(page):
        for module in block.needs:
            pytest.importorskip(module, reason=f"{block.file} needs {module}")
        block.run(names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page: pathlib.Path) -> None:
    run_page(page)


def test_code_that_does_not_run_is_not_called_python() -> None:
    """A fence of another name would be left out by this file without a word."""
    fences = {fence for page in PAGES for fence in re.findall(r"^```(\w+)$", page.read_text(), flags=re.MULTILINE)}
    assert fences <= {"python", "text", "console", "bash"}


def test_the_backend_of_the_vllm_page() -> None:
    """One step on stand-ins: a builder with the masks of two layers, its metadata, and what a layer then computes."""
    names = run_page(ROOT / "docs" / "vllm.md")
    builder = names["Builder"](None, ["local", "global"], stand_ins.config("gemma3"), "cpu")
    assert set(builder.plans.plans) == {layer_mask(32, clamp=False), layer_mask(None, clamp=False)}
    only_causal = names["Builder"](None, ["global"], stand_ins.config("gemma4_text"), "cpu")
    assert set(only_causal.plans.plans) == {causal}
    assert names["Builder"](None, ["local"], stand_ins.config("llama", is_mm_prefix_lm=False), "cpu").plans is None
    step = stand_ins.step({0: [(10, 25)]})
    metadata = builder.build(0, step.common)
    q, out = torch.randn(40, 4, 16), torch.zeros(40, 4, 16)
    impl = names["Impl"]()
    impl.forward(types.SimpleNamespace(layer_name="local"), q, None, None, step.cache, metadata, out)
    exact, _ = exact_attention(
        q, *step.contiguous, mask=layer_mask(32, clamp=False), spans=(((10, 26),),), seqlens=((40,), (40,))
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    text = builder.build(0, stand_ins.step({}).common)
    given = (types.SimpleNamespace(layer_name="local"), q, None, None, step.cache, text, out)
    assert impl.forward(*given) == "vLLM's own"
    assert builder.build(0, stand_ins.step(None).common).prefix_lm is None
    assert names["Backend"].get_impl_cls() is names["Impl"]
    names["register"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: pathlib.Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "name"), [("README.md", "h200-forward"), ("docs/serving.md", "h200-serving")])
def test_pages_quote_the_kept_results(page: str, name: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from table import table

    assert table(results) in (ROOT / page).read_text()


def test_the_page_of_builds_quotes_the_kept_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "h200-builds.json").read_text())
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from builds import tables

    assert tables(results) in (ROOT / "docs" / "builds.md").read_text()
