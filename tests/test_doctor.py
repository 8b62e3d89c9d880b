"""doctor: what it reads from builds, what it says of them, with and without an FA4."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.build.locate import given
from fa4_prefixlm.tools import cli, doctor
from tests.fa4.build.written import write_build

REFUSES_VARLEN = '\nraise NotImplementedError("mask_mod with aux_tensors is not yet supported for varlen sequences")'


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkout of a fork: old, and with sinks in bfloat16 only."""
    folder = tmp_path / "fork" / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    write_build(folder, extra=f"{REFUSES_VARLEN}  # learnable_sink.dtype == torch.bfloat16")
    text = (folder / "interface.py").read_text()
    (folder / "interface.py").write_text(
        f"import cutlass.cute as cute\nfrom flash_attn.cute import utils\n{text}\nHERE = 'the fork'\n"
    )
    (folder / "utils.py").touch()
    return tmp_path / "fork"


def test_a_checkout_is_found_by_its_folder(checkout: pathlib.Path) -> None:
    for path in (checkout, checkout / "flash_attn", checkout / "flash_attn" / "cute"):
        found = given(str(path))
        assert (found.module, found.installed) == ("flash_attn.cute", False)
        assert found.describe().name == "flash_attn.cute in fork"
        assert not found.describe().varlen_mask


def test_a_process_imports_the_checkout_in_place_of_what_is_installed(
    checkout: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (checkout / "flash_attn" / "cute" / "interface.py").write_text("HERE = 'the fork'\n")
    environment = given(str(checkout)).environment(tmp_path / "links")
    command = [sys.executable, "-c", "from flash_attn.cute import interface; print(interface.HERE)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "the fork\n"


def test_a_checkout_of_a_vendored_fork_is_imported_as_it_imports_itself(tmp_path: pathlib.Path) -> None:
    write_build(tmp_path)
    (tmp_path / "flash_fwd.py").write_text("import cutlass.cute as cute\nfrom vllm.vllm_flash_attn.cute import mask\n")
    assert given(str(tmp_path)).module == "vllm.vllm_flash_attn.cute"


@pytest.mark.parametrize("text", ["no.such.module", "/no/such/folder", "json"])
def test_what_is_no_fa4_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="build: expected"):
        given(text)


def test_a_folder_without_an_interface_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--build", str(tmp_path)]) == 2
    assert "with an interface.py" in capsys.readouterr().err


def test_the_report_says_what_each_call_takes(checkout: pathlib.Path) -> None:
    report = doctor.examine([given(str(checkout))], ["sm_90"])
    choices = {kind: own[0].name for kind, own in report.takes["sm_90"].items()}
    assert choices == {
        "text only": "causal",
        "spans": "packed",
        "spans, window 1024": "packed",
        "spans, head dim 256": "packed",
        "spans, pages of 16": "two_pass",
        "spans, window, pages of 128": "two_pass",
        "spans, head dim 512": "reference",
        "two intervals a row": "packed",
        "many images, one block": "reference",
        "gradients": "reference",
        "float32": "reference",
    }
    text = str(report)
    assert "varlen mask_mod             no" in text
    assert "sink-bfloat16-only" in text
    assert "cured: other sinks are applied to the kernel's output" in text
    assert "spans, pages of 16           two_pass" in text


def test_json(checkout: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--arch", "sm_100", "--build", str(checkout)]) == 0
    report = json.loads(capsys.readouterr().out)
    (build,) = report["builds"]
    assert build["facts"]["varlen mask_mod"] == "no"
    assert [defect["name"] for defect in build["defects"]] == ["sink-bfloat16-only", "paged-block-lists"]
    spans = report["takes"]["sm_100"]["spans"]["flash_attn.cute in fork"]
    assert (spans["backend"], spans["gathered"]) == ("packed", False)
    assert "refuses mask_mod" in spans["passed_over"]["varlen"]
    assert report["machine"]["torch"]


def test_without_any_fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "all_installed", list)
    report = doctor.examine()
    assert list(report.builds) == []
    assert "No FA4 found" in str(report)


def test_several_builds_side_by_side(checkout: pathlib.Path) -> None:
    pytest.importorskip("flash_attn")
    report = doctor.examine([given("flash_attn.cute"), given(str(checkout))], ["sm_90"])
    assert [choice.name for choice in report.takes["sm_90"]["spans"]] == ["native", "packed"]
    assert report.builds[0].name.startswith("flash-attn-4 ")


def test_tracing_compiles_a_kernel_of_each_backend() -> None:
    pytest.importorskip("flash_attn")
    report = doctor.examine([given("flash_attn.cute")], ["sm_90"], trace=True)
    (lines,) = report.traces.values()
    assert [line.split(":")[0] for line in lines] == ["native", "varlen", "packed", "two_pass"]
    assert all("sm_90" in line and "Error" not in line for line in lines)
    assert "compiled, not run" in str(report)
