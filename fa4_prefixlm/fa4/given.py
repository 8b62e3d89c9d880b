"""A build named by a user: a module path, or the folder of a checkout that is not installed."""

from __future__ import annotations

import os
import pathlib
import re
from dataclasses import dataclass

from ..errors import InputError
from .build import MODULES, Build, describe, find_folder, name_of

_OWN_IMPORT = re.compile(r"^(?:from|import)\s+((?!cutlass\b)[\w.]+\.cute)\b", re.MULTILINE)


@dataclass(frozen=True)
class GivenBuild:
    """module: what the build is imported as. folder: its `cute` folder. installed: `module` is found without help."""

    module: str
    folder: pathlib.Path
    installed: bool

    def describe(self) -> Build:
        return describe(self.folder, self.module, name_of(self.folder, self.module))

    def environment(self, scratch: pathlib.Path) -> dict[str, str]:
        """The environment of a process in which `module` is this build. Writes links under `scratch` for that.

        A checkout takes the place of an installed build of the same name; its other packages are not there.
        """
        environment = dict(os.environ)
        if self.installed:
            return environment
        *parents, name = self.module.split(".")
        here = scratch
        for parent in parents:
            here = here / parent
            here.mkdir(parents=True, exist_ok=True)
            (here / "__init__.py").touch()
        (here / name).symlink_to(self.folder.resolve(), target_is_directory=True)
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(scratch), *([before] if before else [])])
        return environment


def given(build: str) -> GivenBuild:
    """The build of a module path ("flash_attn.cute") or of a folder: a checkout, or the `cute` package in it.

    Raises `InputError` if there is no FA4.
    """
    path = pathlib.Path(build).expanduser()
    if path.is_dir():
        for folder in (path, path / "cute", path / "flash_attn" / "cute"):
            if (folder / "interface.py").is_file():
                return GivenBuild(_imported_as(folder), folder, installed=False)
        raise InputError("build", "a checkout of flash_attn/cute, with an interface.py", repr(build))
    found = find_folder(build) if re.fullmatch(r"[\w.]+", build) else None
    if found is None:
        raise InputError("build", f"an importable FA4, such as {' or '.join(MODULES)}, or a checkout", repr(build))
    return GivenBuild(build, found, installed=True)


def _imported_as(folder: pathlib.Path) -> str:
    """The name by which the files of a `cute` package import one another."""
    for file in ("interface.py", "flash_fwd.py"):
        text = (folder / file).read_text() if (folder / file).is_file() else ""
        found = _OWN_IMPORT.search(text)
        if found:
            return found[1]
    return "flash_attn.cute"
