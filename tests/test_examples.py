"""Every example runs, and what it shows is so."""

from __future__ import annotations

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
