"""`scripts/coverage.py` in its short form: a few dozen architectures by structure, a few of them computed."""

from __future__ import annotations

import re
from pathlib import Path

from .fresh import python

ROOT = Path(__file__).parent.parent
COMPUTED = (
    "deit3_small",
    "vit_relpos_small",
    "eva02_tiny",
    "dinov3",
    "swinv2",
    "beit_base",
    "vit_small_patch16_18x2",
    "pit_ti",
)


def coverage(*arguments):
    return python(ROOT / "scripts" / "coverage.py", *arguments, cwd=ROOT)


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


def test_what_they_compute_is_right():
    """One process for all: each would spend its time importing timm."""
    found = coverage("--run", "--only", *COMPUTED)
    assert found.returncode == 0, found.stdout + found.stderr
    right = re.findall(r"^(\S+) +right \(w8 ", found.stdout, re.MULTILINE)
    assert all(any(text in name for name in right) for text in COMPUTED), found.stdout
    assert len(right) == len(found.stdout.splitlines())
