"""Where FA4 builds are: those installed, and those that a user names by module path or by the folder of a checkout."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
from dataclasses import dataclass

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.builds.describe import Build, describe
from fa4_prefixlm.fa4.builds.fingerprint import KNOWN, fingerprint

# Where an FA4 may be, in order of preference, and the distribution that contains it.
MODULES = {"flash_attn.cute": "flash-attn-4", "vllm.vllm_flash_attn.cute": "vllm"}

_OWN_IMPORT = re.compile(r"^(?:from|import)\s+((?!cutlass\b)[\w.]+\.cute)\b", re.MULTILINE)


def installed(module: str | None = None) -> Build | None:
    """The build imported as `module`; without it, the first of `MODULES` that is installed. None: there is none."""
    if module is None:
        return next(iter(all_installed()), None)
    return _installed(module)


def all_installed() -> list[Build]:
    """The builds of `MODULES` that are installed, in order of preference."""
    return [build for build in map(_installed, MODULES) if build is not None]


@functools.cache
def _installed(module: str) -> Build | None:
    folder = find_folder(module)
    return None if folder is None else describe(folder, module, name_of(folder, module))


def find_folder(module: str) -> pathlib.Path | None:
    """The folder of an FA4's `cute` package, by the name it is imported as. Imports nothing."""
    package, _, below = module.partition(".")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = pathlib.Path(location, *below.split(".")) if below else pathlib.Path(location)
        if (folder / "interface.py").is_file():
            return folder
    return None


def name_of(folder: pathlib.Path, module: str) -> str:
    """What to call the build in `folder`: its release, the release whose kernels it has, or its checkout."""
    folder = folder.resolve()
    below = pathlib.PurePath(*module.split("."))
    distribution = MODULES.get(module, module.partition(".")[0])
    root = folder.parents[len(below.parts) - 1] if folder.parts[-len(below.parts) :] == below.parts else folder.parent
    for found in importlib.metadata.distributions(name=distribution, path=[str(root)]):
        return f"{distribution} {found.version}"
    try:
        found = importlib.metadata.distribution(distribution)
        if pathlib.Path(str(found.locate_file(below))).resolve() == folder:
            return f"{distribution} {found.version}"
    except importlib.metadata.PackageNotFoundError:
        pass
    known = KNOWN.get(fingerprint(folder) or "")
    if known is not None and known.startswith(distribution):
        return f"{known} (by its source)"
    commit = _commit(folder)
    return f"{root.name} at {commit}" if commit else f"{module} in {root.name}"


def _commit(folder: pathlib.Path) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class GivenBuild:
    """A build that a user named.

    Attributes:
        module: what it is imported as.
        folder: its `cute` folder.
        installed: it can be imported as it is; False: it is a checkout.
    """

    module: str
    folder: pathlib.Path
    installed: bool

    def describe(self) -> Build:
        return describe(self.folder, self.module, name_of(self.folder, self.module))

    def environment(self, scratch: pathlib.Path) -> dict[str, str]:
        """The environment of a process in which `module` is this build.

        A checkout takes the place of an installed build of the same name, of which no other package can be imported
        then.

        Args:
            scratch: a folder in which links to a checkout are made.
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

    Raises:
        InputError: there is no FA4.
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
