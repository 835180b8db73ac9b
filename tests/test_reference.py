"""The API reference: every public name says what it takes, gives and raises, and the pages build without a warning."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import pytest

import dfqvit
import dfqvit.kernels

from .fresh import python

ROOT = Path(__file__).parent.parent
NAMES = sorted(
    {
        (module.__name__, name)
        for module in (dfqvit, dfqvit.kernels)
        for name in module.__all__
        if callable(getattr(module, name))
    }
)


def section(text: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_docstring_is_complete(module, name):
    thing = getattr(sys.modules[module], name)
    text = inspect.getdoc(thing) or ""
    assert re.match(r"\S.*[.:]", text), "a first sentence"
    if inspect.isclass(thing):
        return
    signature = inspect.signature(thing)
    said = re.findall(r"^    (\w+):", section(text, "Args"), re.MULTILINE)
    assert said == list(signature.parameters), "Args names every parameter, in order"
    if signature.return_annotation not in ("None", "Iterator[None]"):
        assert section(text, "Returns")
    if signature.parameters:
        assert section(text, "Raises")


def test_pages_build_without_warnings(tmp_path):
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("pdoc is not installed; it is in the extra `docs`")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = python(ROOT / "scripts" / "api_reference.py", "--out", tmp_path, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    for module, name in NAMES:
        page = tmp_path / Path(*module.split(".")).with_suffix(".html")
        assert f'id="{name}"' in page.read_text(), f"{module}.{name} is not on its page"
