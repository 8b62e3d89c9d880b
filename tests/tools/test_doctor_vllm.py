"""What doctor says of vLLM. None is installed here."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

import pytest

from fa4_prefixlm.integrations.vllm import refusals
from fa4_prefixlm.tools import cli, doctor_vllm
from tests.fa4.builds.written import write_build


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch):
    """Call it with a version and the plugins that are installed."""

    def install(version: str, *plugins: str) -> None:
        ours = importlib.metadata.version

        def versions(package: str) -> str:
            return version if package == "vllm" else ours(package)

        monkeypatch.setattr(importlib.metadata, "version", versions)
        own = [SimpleNamespace(name=name) for name in plugins]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: own if group == doctor_vllm.GROUP else [])

    return install


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert str(doctor_vllm.examine({"sm_90": 90})) == "vLLM\n  not installed"


def test_a_vllm_that_finds_the_backends(with_vllm, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from fa4_prefixlm.fa4.builds import describe

    with_vllm("0.33.0", "another", "fa4_prefixlm")
    write_build(tmp_path)
    written = describe.describe(tmp_path, "flash_attn.cute", "an FA4")
    monkeypatch.setattr(refusals, "fa4", lambda: None)
    assert doctor_vllm.examine({"sm_90": 90}).verdict().endswith("refuse every layer: there is no FlashAttention-4")
    monkeypatch.setattr(refusals, "fa4", lambda: written)
    found = doctor_vllm.examine({"sm_90": 90, "sm_80": 80})
    assert found.trouble is None
    assert found.verdict() == "vLLM 0.33.0 will find FA4_PREFIXLM and FA4_PREFIXLM_ALL, which run on an FA4"
    hopper = found.takes["sm_90"]
    # The native kernel does not run on a build that is not known.
    assert hopper["local, head dim 256"] == hopper["global, head dim 128"] == "two_pass, in CUDA graphs too"
    assert hopper["local, head dim 512"].startswith("refused: head dim 512 on an FA4: SM90 takes head dims up to 256")
    assert all(said.startswith("refused: ") for said in found.takes["sm_80"].values())
    assert set(json.loads(json.dumps(found.as_json()))) == {"verdict", "version", "trouble", "build", "takes"}


@pytest.mark.parametrize(
    ("version", "plugins", "trouble"),
    [
        ("0.33.0", ["another"], "the entry point fa4_prefixlm of vllm.general_plugins is not installed"),
        ("0.34.0", ["fa4_prefixlm"], "this is vLLM 0.34.0, and the backends were made for 0.33"),
    ],
)
def test_a_vllm_that_does_not(with_vllm, version: str, plugins: list[str], trouble: str) -> None:
    with_vllm(version, *plugins)
    found = doctor_vllm.examine({})
    assert trouble in found.verdict()
    assert f"vLLM {version} will not find FA4_PREFIXLM" in str(found)


def test_the_command_says_it(with_vllm, capsys: pytest.CaptureFixture[str]) -> None:
    with_vllm("0.33.0", "fa4_prefixlm")
    assert cli.main(["doctor", "--arch", "sm_90", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["vllm"]
    assert said["verdict"].startswith("vLLM 0.33.0 will find FA4_PREFIXLM")
    assert set(said["takes"]["sm_90"]) == set(doctor_vllm.LAYERS)
