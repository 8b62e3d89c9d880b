"""What a report says of the machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import subprocess

import pytest

from fa4_prefixlm.testing import machine


def test_the_machine_as_facts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.describe_machine().facts()
    assert facts["torch"] == importlib.metadata.version("torch")
    assert set(facts) >= {"python", "CUDA of torch", "GPUs", "fa4_prefixlm"}
    assert str(pathlib.Path.home()) not in str(facts)
    for text in (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24\nGCC version:  gcc 12.2.0\n",
    ):
        (tmp_path / "version").write_text(text)
        monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
        assert machine.describe_machine().driver == "570.86.15"
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "nothing")
    assert machine.describe_machine().driver is None
    gpus = tuple(machine.Gpu("A GPU", arch) for arch in ("sm_90", "sm_80"))
    assert dataclasses.replace(machine.describe_machine(), gpus=gpus).facts()["GPUs"] == "A GPU (sm_90), A GPU (sm_80)"


def test_the_commit_is_that_of_this_checkout(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    root = pathlib.Path(machine.__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        found = machine.commit()
        assert found is not None
        assert head.stdout.startswith(found.removesuffix("-dirty"))
    # Installed in an environment that lies in somebody else's repository.
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "lib" / "site" / "fa4_prefixlm" / "testing" / "machine.py"))
    assert machine.commit() is None
    monkeypatch.setenv("COMMIT", "given")
    assert machine.commit() == "given"
