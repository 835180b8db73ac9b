"""Triton on machines without a GPU: the tests that run it, in one process whose Triton interprets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
ROOT = Path(__file__).parents[2]
FILES = [
    "tests/kernels/test_gate_quantize_triton.py",
    "tests/kernels/test_layer_norm_quantize_triton.py",
    "tests/kernels/test_patch_similarity_entropy.py",
    "tests/kernels/test_quant_attention_triton.py",
    "tests/kernels/test_quant_linear_triton.py",
    "tests/kernels/test_quantize_heads_triton.py",
    "tests/runtime/test_triton.py",
]


@pytest.fixture(scope="module")
def finished() -> subprocess.CompletedProcess[str]:
    """The run of those tests of FILES whose names hold "triton"; a process for each file would import torch as often."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=short",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
        *FILES,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", FILES)
def test_a_file_in_the_interpreter(finished: subprocess.CompletedProcess[str], file: str) -> None:
    """All of its tests pass, and there are some; of a run that failed otherwise, none do."""
    ends = re.findall(rf"^([A-Z]+) {file}\b.*$", finished.stdout, re.MULTILINE)
    failures = finished.stdout.partition("= PASSES =")[0][-4000:]
    assert finished.returncode in (0, 1), failures + finished.stderr[-2000:]
    assert set(ends) == {"PASSED"}, failures


def test_every_file_that_runs_triton_is_among_them(finished: subprocess.CompletedProcess[str]) -> None:
    marked = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^@live_triton$", path.read_text(), re.MULTILINE)
    }
    assert marked
    assert {str(path.relative_to(ROOT)) for path in marked} <= set(FILES)
    assert finished.returncode == 0, finished.stdout[-2000:]
