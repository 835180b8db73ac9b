"""tests/slow.txt: every name in it is of a test that there is, so that what `make check` leaves out is what is meant."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .conftest import SLOW

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(SLOW))
def test_what_is_named_is_there(name):
    file, _, test = name.partition("::")
    assert (ROOT / file).is_file()
    if test:
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert file not in SLOW, "the whole file is named already"
    assert name in (ROOT / "tests" / "slow.txt").read_text().split("\n")  # one a line


def test_the_marker_is_set(request):
    """But for tests that want a GPU, which are never slow: `make gpu-check` runs them all."""
    for item in request.session.items:
        name = item.nodeid.partition("[")[0]
        if name in SLOW or name.partition("::")[0] in SLOW:
            assert item.get_closest_marker("slow") or item.get_closest_marker("gpu"), name
