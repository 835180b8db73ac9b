"""`scripts/coverage.py` in its short form: a few dozen architectures by structure, a few of them computed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def coverage(*arguments):
    command = [sys.executable, "scripts/coverage.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_few_dozen_architectures_are_accepted_and_can_be_loaded():
    found = coverage("--short")
    assert found.returncode == 0, found.stderr
    last = re.fullmatch(r"accepted (\d+) / integer (\d+) / loads (\d+) / total (\d+)", found.stdout.splitlines()[-1])
    assert last, found.stdout
    accepted, integer, loads, total = map(int, last.groups())
    assert total >= 36
    assert accepted == loads == total, found.stdout
    assert integer >= 22
    assert "Error" not in found.stdout


@pytest.mark.parametrize(
    "architecture",
    [
        "deit3_small",
        "vit_relpos_small",
        "eva02_tiny",
        "dinov3",
        "swinv2",
        "beit_base",
        "vit_small_patch16_18x2",
        "pit_ti",
    ],
)
def test_what_they_compute_is_right(architecture):
    found = coverage("--run", "--only", architecture)
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r" right \(w8 ", found.stdout)
