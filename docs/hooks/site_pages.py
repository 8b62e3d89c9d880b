"""What the site has besides docs/: pages from the repository's root, links out of docs/, the help of the commands.

Files are written for readers of the repository: a link is relative to its file, and works there. MkDocs only knows
what is inside docs/. So README.md, CONTRIBUTING.md and CHANGELOG.md become pages without being copied, links to other
files of the repository become links to its web page, and a link to nothing stays as it is, for `--strict` to refuse.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import pathlib
import posixpath
import re
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Files of the root, and the pages they become. One that is not there yet is left out.
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
FENCED = re.compile(r"^(```.*?^```)$", flags=re.MULTILINE | re.DOTALL)
CELL = re.compile(r"<td.*?</td>", flags=re.DOTALL)
HELP = re.compile(r"^<!-- help:(.*)-->$", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in ROOT_PAGES.items():
        if (ROOT / name).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = pathlib.Path(page.file.abs_src_path or "").resolve()
    here = posixpath.dirname(page.file.src_uri)
    blob = f"{(config.repo_url or '').rstrip('/')}/blob/main"

    def on_the_site(match: re.Match[str]) -> str:
        link = match[0]
        path, hash_, anchor = link.partition("#")
        target = (source.parent / path).resolve()
        if not path or ":" in path or not target.exists() or not target.is_relative_to(ROOT):
            return link
        if target.is_relative_to(DOCS):
            found = target.relative_to(DOCS).as_posix()
        elif target.parent == ROOT and target.name in ROOT_PAGES:
            found = ROOT_PAGES[target.name]
        else:
            return f"{blob}/{target.relative_to(ROOT).as_posix()}{hash_}{anchor}"
        return f"{posixpath.relpath(found, here or '.')}{hash_}{anchor}"

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(on_the_site, text) for text in parts[::2]]
    return HELP.sub(lambda match: f"```text\n{help_of(match[1].split())}```", "".join(parts))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A pipe in a cell is written `\\|`. In code too GitHub drops the backslash; Python-Markdown keeps it there."""
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)


def help_of(arguments: list[str]) -> str:
    """What `fa4-prefixlm ARGUMENTS --help` prints."""
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="fa4-prefixlm")
    text = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        command.load()([*arguments, "--help"])
    if not text.getvalue().startswith("usage:"):
        raise argparse.ArgumentTypeError(f"fa4-prefixlm {' '.join(arguments)} --help printed no usage")
    return text.getvalue()
