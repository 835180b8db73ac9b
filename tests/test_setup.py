"""setup.py's choice of GPU architectures, without compiling, and what nvcc makes of it; what `make setup` shows."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KNOWN = {f"sm_{code}" for code in (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)}  # of nvcc 13.0
BEFORE_BLACKWELL = {f"sm_{code}" for code in (50, 60, 70, 75, 80, 86, 87, 89, 90)}  # of nvcc 12.4


@pytest.fixture(scope="module")
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("dfqvit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asked", "archs", "said"),
    [
        ("8.0;8.6;8.9;9.0a;10.0;12.0+PTX", "8.0;8.6;8.9;9.0a;10.0;12.0+PTX", ""),
        ("7.5;8.6", "8.6", "7.5 left out, the kernels need 8.0"),
        ("Turing, Ampere", "8.0;8.6", "7.5 left out, the kernels need 8.0"),
        ("9.0", "9.0a", "9.0 built as 9.0a, for wgmma"),
        ("9.0+PTX", "9.0a+PTX", "9.0 built as 9.0a, for wgmma"),
        ("Hopper", "9.0a", "9.0 built as 9.0a, for wgmma"),
        ("hopper+PTX 8.0", "8.0;9.0a+PTX", "9.0 built as 9.0a, for wgmma"),
        ("9.0;9.0a;9.0+PTX", "9.0a+PTX", "9.0 built as 9.0a, for wgmma"),
        ("Blackwell", "10.0;12.0", ""),
        ("12.1a", "12.1a", ""),
        ("5.0 6.0 7.0+PTX", "", "5.0 left out, the kernels need 8.0; 6.0 left out"),
        ("13.0;8.0", "8.0", "13.0 left out, nvcc 13.0 does not know it"),
    ],
)
def test_architectures(build, asked, archs, said):
    found, changes = build.cuda_archs(asked, KNOWN, (13, 0))
    assert ";".join(found) == archs
    assert "; ".join(changes).startswith(said)
    assert bool(said) == bool(changes)


def test_the_default_covers_what_it_promises_and_ends_in_ptx(build):
    found, changes = build.cuda_archs(build.DEFAULT_ARCHS, KNOWN, (13, 0))
    assert found == ["8.0", "8.6", "8.9", "9.0a+PTX", "10.0", "12.0"]
    assert not changes


def test_an_older_nvcc_leaves_out_what_it_does_not_know_and_keeps_ptx(build):
    found, changes = build.cuda_archs(build.DEFAULT_ARCHS, BEFORE_BLACKWELL, (12, 4))
    assert found == ["8.0", "8.6", "8.9", "9.0a+PTX"]
    assert "12.0 left out, nvcc 12.4 does not know it" in changes
    found, changes = build.cuda_archs("8.0;12.0+PTX", BEFORE_BLACKWELL, (12, 4))
    assert found == ["8.0+PTX"]
    assert "PTX of 8.0 in its place" in changes
    assert build.cuda_archs("9.0", BEFORE_BLACKWELL, (11, 8)) == (["9.0"], [])  # which has no 9.0a


@pytest.mark.parametrize("word", ["Fermi", "8", "sm_80", "8.0+SASS", "9.0b"])
def test_a_word_that_is_no_architecture_is_refused(build, word):
    with pytest.raises(SystemExit, match=re.escape(f"TORCH_CUDA_ARCH_LIST held '{word}'; it may be numbers as 8.0")):
        build.cuda_archs(f"8.0;{word}", KNOWN, (13, 0))


def test_flags_of_nvcc(build):
    assert build.gencode(["8.0", "9.0a+PTX", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("asked", "line"), [("7.5;9.0", r"for 9\.0a from .* \(7\.5 left out"), ("7.5", r"no CUDA \(TORCH_")]
)
def test_the_summary_line_says_what_was_changed(build, monkeypatch, asked, line):
    if build.cuda_toolkit() is None:
        pytest.skip("no CUDA toolkit")
    monkeypatch.delenv("DFQVIT_BUILD", raising=False)
    monkeypatch.delenv("DFQVIT_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setenv("CUDA_HOME", str(build.cuda_toolkit()))
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    modules, _, summary = build.extension()
    assert re.search(line, summary), summary
    flags = " ".join(modules[0].extra_compile_args.get("nvcc", []))
    assert ("sm_90a" in flags) == ("9.0" in asked)
    assert "sm_75" not in flags


@pytest.mark.parametrize(
    ("machine", "paths"),
    [
        ("x86_64", "AMX, AVX-512, AVX2, portable"),
        ("AMD64", "AMX, AVX-512, AVX2, portable"),
        ("aarch64", "i8mm, dotprod, NEON, portable"),
        ("arm64", "i8mm, dotprod, NEON, portable"),
        ("riscv64", "portable"),
    ],
)
def test_the_summary_line_names_the_paths_of_the_machine(build, machine, paths):
    assert build.cpu_paths(machine) == paths


def test_windows_gets_the_python_and_the_reason(build, monkeypatch):
    monkeypatch.delenv("DFQVIT_BUILD", raising=False)
    monkeypatch.setattr(build.sys, "platform", "win32")
    modules, commands, summary = build.extension()
    assert (modules, commands) == ([], {})
    assert summary == ("no compiled module (the kernels need GCC or Clang on Linux or macOS; MSVC does not take them)")


def test_macos_links_the_module_to_a_library(build, monkeypatch):
    """As far as that can be seen elsewhere: no -l of a name that its linker does not look for; names relative to the package."""
    monkeypatch.delenv("DFQVIT_BUILD", raising=False)
    monkeypatch.setenv("DFQVIT_CUDA", "0")
    monkeypatch.setattr(build.sys, "platform", "darwin")
    (operators, module), _, _ = build.extension()
    assert "-Wl,-install_name,@rpath/libdfqvit_ops.so" in operators.extra_link_args
    assert "-Wl,-z,nodelete" not in operators.extra_link_args
    assert "dfqvit_ops" not in module.libraries
    assert module.extra_link_args == ["-Wl,-rpath,@loader_path"]


def test_nothing_is_built_for_this_machine_alone(build):
    flags = [word for word in (ROOT / "setup.py").read_text().split() if "-march" in word or "-mcpu" in word]
    assert not flags


def test_torch_adds_no_architectures_of_its_own(build):
    from torch.utils import cpp_extension

    assert cpp_extension._get_cuda_arch_flags(build.gencode(["8.0"])) == []


def test_the_makefile_builds_for_what_setup_takes(build):
    asked = re.search(r"^DFQVIT_ARCHS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert build.cuda_archs(asked, KNOWN, (13, 0)) == (["8.0+PTX", "9.0a"], [])


def quietly(log, *command):
    step = ["sh", str(ROOT / "scripts" / "quietly.sh"), str(log), "a step", *command]
    return subprocess.run(step, capture_output=True, text=True, check=False)


def test_a_step_of_the_setup_is_one_line(tmp_path):
    log = tmp_path / "setup.log"
    for _ in range(2):  # steps share the log
        done = quietly(log, "sh", "-c", "echo said; echo warned >&2")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"a step \.\.\. done in \d+ s\n", done.stdout)
    assert log.read_text() == "said\nwarned\n" * 2


def test_a_step_that_fails_shows_what_it_said_without_the_noise(tmp_path):
    log = tmp_path / "setup.log"
    log.write_text("of the step before\n")
    noise = "WARNING: Location 'file:///somewhere/' is ignored: it is neither a file nor a directory."
    done = quietly(log, "sh", "-c", f'echo "{noise}"; echo "ERROR: no such package" >&2; exit 3')
    assert done.returncode == 3
    first, rest = done.stdout.split("\n", 1)
    assert re.fullmatch(rf"a step \.\.\. failed after \d+ s; the end of {re.escape(str(log))}:", first)
    assert rest == "\nERROR: no such package\n"


def test_every_install_of_the_makefile_is_quiet():
    done = subprocess.run(
        ["make", "--dry-run", "setup", "VENV=absent", "PYTHON=python3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    installs = [line for line in lines if "pip" in line and "install" in line]
    assert len(installs) == 2
    assert all(line.startswith('sh scripts/quietly.sh absent/setup.log "set-up ') for line in installs)
    assert sum("minutes)" in line or "seconds)" in line for line in lines) == 3
