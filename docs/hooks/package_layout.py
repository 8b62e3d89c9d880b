"""Two facts of the package that Griffe, which reads the docstrings without importing anything, does not see by itself.

The folder masks/ is the package `fa4_prefixlm.masks` (`package-dir` in pyproject.toml; Griffe looks for submodules in
the folder of their package alone). And a name that `__init__` imports hides a submodule of that name, as in Python.
"""

from __future__ import annotations

import pathlib
from typing import Any

import griffe

MASKS = pathlib.Path(__file__).resolve().parents[2] / "masks"


class PackageLayout(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if pkg.name != "fa4_prefixlm":
            return
        self._add("masks", MASKS / "__init__.py", pkg, loader)
        # All are found before one is hidden: the way to some leads through a hidden module.
        exported = {name: pkg.modules_collection[path] for name, path in pkg.imports.items() if name in pkg.exports}
        for name, found in exported.items():
            target = found.final_target if found.is_alias else found
            pkg.members[name] = griffe.Alias(name, target, parent=pkg)

    def _add(self, name: str, file: pathlib.Path, parent: griffe.Module, loader: griffe.GriffeLoader) -> None:
        module = griffe.visit(
            name,
            filepath=file,
            code=file.read_text(),
            extensions=loader.extensions,
            parent=parent,
            docstring_parser=loader.docstring_parser,
            docstring_options=loader.docstring_options,
            lines_collection=loader.lines_collection,
            modules_collection=loader.modules_collection,
        )
        parent.set_member(name, module)
        if file.name != "__init__.py":
            return
        for path in sorted(file.parent.iterdir()):
            if path.suffix == ".py" and path != file:
                self._add(path.stem, path, module, loader)
            elif (path / "__init__.py").is_file():
                self._add(path.name, path / "__init__.py", module, loader)
