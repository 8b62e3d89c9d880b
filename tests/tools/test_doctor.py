"""doctor: what it reads from builds, what it says of them, with and without an FA4."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest

import fa4_prefixlm
from fa4_prefixlm.errors import REPOSITORY, InputError, install_hint
from fa4_prefixlm.fa4.builds.locate import given
from fa4_prefixlm.tools import cli, doctor
from tests.fa4.builds.written import write_build

ROOT = pathlib.Path(__file__).parents[2]
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
        "spans, head dim 512": "flex",
        "two intervals a row": "packed",
        "many images, one block": "flex",
        "float32": "flex",
    }
    text = str(report)
    assert "varlen mask_mod             no" in text
    assert "sink-bfloat16-only" in text
    assert "worked around: other sinks are applied to the kernel's output" in text
    assert re.search(r"spans, pages of 16 +two_pass", text)
    assert re.search(r"spans, backward +flex", text), "the stand-in's backward has two arguments"


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


def test_json_in_a_file_beside_the_report(
    checkout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert cli.main(["doctor", "--json", str(file), "--build", str(checkout)]) == 0
    assert "varlen mask_mod" in capsys.readouterr().out
    assert json.loads(file.read_text())["builds"]
    assert cli.main(["doctor", "--json", str(tmp_path / "nowhere" / "out.json")]) == 2
    assert "--json: expected a file in an existing folder" in capsys.readouterr().err


@pytest.mark.slow
def test_whoever_reads_the_first_lines_only_sees_no_traceback(checkout: pathlib.Path) -> None:
    command = f"{sys.executable} -u -m fa4_prefixlm doctor --build {checkout} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_without_any_fa4_the_verdict_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "all_installed", list)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Here every call runs `reference`, because no FlashAttention-4 was found.\nTo install it, ")
    on_hopper = doctor.Diagnosis({}, "sm_90", [], {}, {}, doctor.doctor_vllm.examine([]))
    assert on_hopper.verdict()[0].startswith("Here every call runs `flex`, because no ")
    assert install_hint("fa4") in text
    sections = [line for line in text.splitlines() if line and not line.startswith(" ")][2:]
    assert sections == ["machine", "vLLM"], "no table is empty"


@pytest.mark.parametrize(
    ("here", "archs", "lines"),
    [
        (0, [], ["Here every call runs `reference`, because torch sees no CUDA GPU.", "On sm_90, ", "On sm_100, "]),
        (90, [], ["Here, with flash_attn.cute in fork, a call with spans takes `packed` (one FlashAttention-4 call"]),
        (90, ["sm_100"], ["On sm_100, with flash_attn.cute in fork, a call with spans takes `packed`"]),
        (0, ["sm_90"], ["On sm_90, with flash_attn.cute in fork, a call with spans takes `packed`"]),
        (80, [], ["Here, with flash_attn.cute in fork, every call runs `flex` (no kernel for sm_80: "]),
    ],
)
def test_the_verdict_says_what_a_normal_call_takes(
    checkout: pathlib.Path, monkeypatch: pytest.MonkeyPatch, here: int, archs: list[str], lines: list[str]
) -> None:
    monkeypatch.setattr(doctor, "device_arch", lambda device: here)
    found = doctor.examine([given(str(checkout))], archs)
    verdict = found.verdict()
    assert len(verdict) == len(lines)
    for said, wanted in zip(verdict, lines, strict=True):
        assert said.startswith(wanted)
    assert str(found).startswith("\n".join(verdict))
    if "packed" in lines[-1]:
        assert "Not `varlen`: flash_attn.cute in fork refuses mask_mod with aux_tensors" in verdict[-1]


@pytest.mark.parametrize("arch", ["hopper", "90", "sm_9", "sm_90a", "sm_", ""])
def test_what_is_no_architecture_is_refused(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--arch", arch]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--arch: expected sm_ and a compute capability, such as sm_90" in said.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fa4-prefixlm {fa4_prefixlm.__version__}\n"


def test_hints_name_no_package_index() -> None:
    """No index has this library: it comes from a checkout or from its repository."""
    assert f'Repository = "{REPOSITORY}"' in (ROOT / "pyproject.toml").read_text()
    assert f"git+{REPOSITORY}" in install_hint("pictures")
    assert "CUDA 13" in install_hint("fa4")
    from_an_index = re.compile(r"""pip install (?:-U )?["']?fa4[_-]prefixlm\b(?!(?:\[[\w,{}]+\])? @)""")
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").iterdir()]
    files += [file for folder in ("fa4_prefixlm", "masks") for file in (ROOT / folder).rglob("*.py")]
    assert from_an_index.search('pip install "fa4_prefixlm[fa4]"')
    named = [str(file) for file in files if file.suffix in (".md", ".py") and from_an_index.search(file.read_text())]
    assert named == []


def test_several_builds_side_by_side(checkout: pathlib.Path) -> None:
    pytest.importorskip("flash_attn")
    report = doctor.examine([given("flash_attn.cute"), given(str(checkout))], ["sm_90"])
    assert [choice.name for choice in report.takes["sm_90"]["spans"]] == ["native", "packed"]
    assert report.builds[0].name.startswith("flash-attn-4 ")


@pytest.mark.slow
def test_tracing_compiles_a_kernel_of_each_backend() -> None:
    pytest.importorskip("flash_attn")
    report = doctor.examine([given("flash_attn.cute")], ["sm_90"], trace=True)
    (lines,) = report.traces.values()
    assert [line.split(":")[0] for line in lines] == ["native", "varlen", "packed", "two_pass"]
    assert all("sm_90" in line and "Error" not in line for line in lines)
    assert "compiled, not run" in str(report)
