"""The shared library of operators, as a process without Python's dfqvit has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfqvit
from dfqvit.kernels import extension
from dfqvit.kernels.dispatch import _OPERATORS

LIBRARY = next(Path(dfqvit.__path__[0]).glob("libdfqvit_ops*"), None)
pytestmark = pytest.mark.skipif(LIBRARY is None or extension.load()[0] is None, reason="the operators are not built")
COMPILED = sorted(name for name, operator in _OPERATORS.items() if {"cpu", "cuda"} & operator.backends.keys())


def python(code, *arguments):
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_schemas_stand_in_the_library_as_in_python():
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]);"
        "[print(getattr(torch.ops.dfqvit, name).default._schema) for name in sys.argv[2:]]"
    )
    assert len(COMPILED) >= 13
    expected = [str(getattr(torch.ops.dfqvit, name).default._schema) for name in COMPILED]
    assert python(code, str(LIBRARY), *COMPILED) == expected


def test_operators_run_without_python_s_dfqvit_and_with_it_afterwards():
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, learnt = torch.linspace(-1, 1, 24).view(3, 8), [torch.ones(8, requires_grad=True)]
block = (x[None], learnt, [], [], [], [], [], [], [], [], 1, 1.0, None, None, None, None, None, "gelu")
arguments = (x, torch.tensor([0.25]), torch.tensor([0.0]), -2, 1, 0)
print(torch.ops.dfqvit.fake_quantize(*arguments).tolist())
try:
    torch.ops.dfqvit.fake_quantize(x.to("meta"), *arguments[1:])
except (ValueError, NotImplementedError) as error:
    print("refused")
watched = (x.clone().requires_grad_(), *arguments[1:])
for call in (lambda: torch.ops.dfqvit.fake_quantize(*watched), lambda: torch.ops.dfqvit.quant_block(*block)):
    try:
        call()
    except ValueError as error:
        print(error)
with torch.no_grad():
    assert torch.equal(torch.ops.dfqvit.fake_quantize(*watched), torch.ops.dfqvit.fake_quantize(*arguments))
assert not [name for name in sys.modules if name.startswith("dfqvit")]
import dfqvit.kernels as kernels
with kernels.use_backend("reference"):
    print(torch.ops.dfqvit.fake_quantize(*arguments).tolist())
    try:
        kernels.set_backend("triton")
        torch.ops.dfqvit.fake_quantize(*arguments)
    except kernels.BackendError:
        print("Python chooses")
"""
    before, refused, *wanted, after, chooses = python(code, str(LIBRARY))
    x = torch.linspace(-1, 1, 24).view(3, 8)
    expected = (x / 0.25).round().clamp(-2, 1) * 0.25
    assert torch.equal(torch.tensor(json.loads(before)), expected)
    assert torch.equal(torch.tensor(json.loads(after)), expected)
    said = "a gradient is wanted of the operator {}, which has none: use torch.no_grad()"
    assert [line.splitlines()[0] for line in wanted] == [said.format("fake_quantize"), said.format("quant_block")]
    assert (refused, chooses) == ("refused", "Python chooses")


def test_the_library_needs_no_python():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads an ELF file")
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "python" not in needed
