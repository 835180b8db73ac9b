"""tests/slow.txt and tests/drawn.txt: what they name is there, so that what a run leaves out is what is meant."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

import pytest

from . import conftest
from .conftest import DRAWN, SLOW

ROOT = Path(__file__).parents[1]
NAMES = [(file, name) for file, names in (("slow", SLOW), ("drawn", DRAWN)) for name in sorted(names)]


@pytest.mark.parametrize(("listed", "name"), NAMES)
def test_what_is_named_is_there(listed, name):
    file, _, test = name.partition("::")
    assert (ROOT / file).is_file()
    if test:
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert (listed, file) not in NAMES, "the whole file is named already"
    assert name in (ROOT / "tests" / f"{listed}.txt").read_text().split("\n")  # one a line


def test_the_marker_is_set(request):
    """But for tests that want a GPU, which are never slow: `make gpu-check` runs them all."""
    for item in request.session.items:
        name = item.nodeid.partition("[")[0]
        if name in SLOW or name.partition("::")[0] in SLOW:
            assert item.get_closest_marker("slow") or item.get_closest_marker("gpu"), name


class Item:
    """As much of a collected test as drawing looks at."""

    def __init__(self, nodeid: str, gpu: bool = False) -> None:
        self.nodeid, self.gpu = nodeid, gpu

    def get_closest_marker(self, name: str) -> bool:
        return self.gpu and name == "gpu"


def test_every_set_of_parameters_is_drawn_sometimes_and_every_test_always(monkeypatch):
    """Of other tests, and of those that want a GPU, all are kept; one seed draws the same in every process."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(conftest, "DRAWN", ("tests/a.py::test_x", "tests/b.py"))
    monkeypatch.setattr(conftest, "SHARE", 3)
    counts = {"tests/a.py::test_x": 7, "tests/a.py::test_y": 5, "tests/b.py::test_z": 2, "tests/b.py::test_alone": 1}
    items = [Item(f"{name}[{index}]") for name, count in counts.items() for index in range(count)]
    items += [Item(f"tests/b.py::test_z[cuda{index}]", gpu=True) for index in range(4)]
    seen = set()
    for seed in range(60):
        monkeypatch.setattr(conftest, "SEED", str(seed))
        left_out = conftest.not_drawn(items)
        assert conftest.not_drawn(items) == left_out
        kept = [item for item in items if item not in left_out]
        found = collections.Counter(item.nodeid.partition("[")[0] for item in kept if not item.gpu)
        assert found == {
            "tests/a.py::test_x": 3,
            "tests/a.py::test_y": 5,
            "tests/b.py::test_z": 1,
            "tests/b.py::test_alone": 1,
        }
        assert sum(item.gpu for item in kept) == 4
        seen |= set(kept)
    assert seen == set(items)


def test_the_interpreter_draws_of_everything(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(conftest, "SHARE", 3)
    items = [Item(f"tests/any.py::test_x[{index}]") for index in range(6)]
    assert len(conftest.not_drawn(items)) == 4
