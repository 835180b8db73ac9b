"""Every example runs, and what it shows is so."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWN = {
    "detector_on_swin": lambda found: found[0] < 0.1 and found[1] > 0,
    "segmenter_on_vit": lambda found: found[0] > 0.8 and found[1]["INT8"] == 18,
    "entropy_in_your_loop": lambda found: found[1] > found[0] + 0.05,
    "quant_linear_in_your_network": lambda found: 1e-4 < found < 0.1,
    "patch_a_model": lambda found: found[1] < 0.7 * found[0],
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, capsys):
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert capsys.readouterr().out.strip()
    assert SHOWN[name](found), found


NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text())


def test_the_notebook_runs(capsys):
    """Its code cells in a fresh namespace, in order, with fewer steps; each ends in something to see, or prints it."""
    names, shown = {}, {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).replace("samples=16, iters=200", "samples=16, iters=3")
        *before, last = ast.parse(source).body
        exec(compile(ast.Module(before, []), cell["id"], "exec"), names)
        shown[cell["id"]] = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
    assert shown["images"] == (16, 1, 28, 28)
    assert shown["picture"].size == (16 * 56, 56)
    assert "W4/A8" in shown["quantize"]._repr_html_()
    assert shown["file"] is True
    figures = re.search(r"float ([\d.]+) %, W4/A8 ([\d.]+) %, the same answer on ([\d.]+) %", capsys.readouterr().out)
    assert float(figures[1]) > 88
    assert float(figures[2]) > 60  # of three steps; chance is 10


def test_the_notebook_is_kept_without_outputs():
    """As nbformat 4.5 wants it: every cell has an id of its own."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["language_info"] == {"name": "python"}
    identities = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
