"""The code blocks of the README and the docs run, in order, as one program a page."""

from __future__ import annotations

import dataclasses
import json
import linecache
import pathlib
import re
import sys

import pytest

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
        exec(compile(self.code, self.file, "exec", dont_inherit=True), names)  # as a program of its own has it


def blocks(page: pathlib.Path) -> list[Block]:
    return [
        Block(code, f"<{page.name}, block {index}>", tuple(filter(None, needs.split(", "))))
        for index, (needs, code) in enumerate(BLOCK.findall(page.read_text()))
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page: pathlib.Path) -> None:
    """A page is left, as skipped, at the first block that lacks a module."""
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        for module in block.needs:
            pytest.importorskip(module, reason=f"{block.file} needs {module}")
        block.run(names)


def test_code_that_does_not_run_is_not_called_python() -> None:
    """A fence of another name would be left out by this file without a word."""
    fences = {fence for page in PAGES for fence in re.findall(r"^```(\w+)$", page.read_text(), flags=re.MULTILINE)}
    assert fences <= {"python", "text", "console", "bash"}


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


def test_every_kept_result_says_what_it_came_from() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(file.read_text())
        for own in content.get("builds", [content]):
            assert own["device"].startswith("NVIDIA "), file.name
            assert own["commit"], file.name
            assert {"torch", "flash-attn-4"} <= set(own["versions"]), file.name


def test_pages_quote_the_kept_results_of_engines() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from engine_tables import QUOTED

    for page, tables in QUOTED.items():
        text = (ROOT / page).read_text()
        assert all(table() in text for table in tables), page


def test_the_page_of_builds_quotes_the_kept_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "h200-builds.json").read_text())
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from builds import tables

    assert tables(results) in (ROOT / "docs" / "builds.md").read_text()
