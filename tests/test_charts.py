"""scripts/charts.py: the charts in docs/images are what the rows say, byte for byte, and draw what they say."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "charts.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def charts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module("charts")


def test_the_files_are_what_the_rows_say():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_that_differs_is_told(charts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(charts, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["charts.py"])
    assert charts.main() == 0
    path = tmp_path / "speed-light.svg"
    path.write_text(path.read_text().replace("<svg", "<svg lang='en'", 1))
    monkeypatch.setattr(sys, "argv", ["charts.py", "--check"])
    assert charts.main() == 1
    assert capsys.readouterr().err == f"{path} is not what the rows say; run scripts/charts.py\n"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_bars_are_as_long_as_the_rows_say(charts, theme):
    """From the rows of the file to the widths in the picture, without the script's own reading."""
    root = ET.parse(ROOT / "docs" / "images" / f"speed-{theme}.svg").getroot()
    widths = [float(bar.get("width")) for bar in root.iter(f"{SVG}rect")]
    rows = [json.loads(line) for line in (charts.ROWS / "inference.jsonl").read_text().splitlines()]
    wanted = []
    for batch in (1, 32):
        for contender in charts.CONTENDERS:
            (row,) = (
                row
                for row in rows
                if row["commit"] == charts.SPEED_RUN
                and row["model"] == "deit_tiny"
                and row["batch"] == batch
                and row["contender"] == contender
            )
            wanted.append(row["images_per_s"])
    ratios = [width / value for width, value in zip(widths, wanted, strict=True)]
    assert max(ratios) < 1.01 * min(ratios)  # an axis from 0, one scale for both batches
    said = [text.text for text in root.iter(f"{SVG}text")]
    assert all(f"{value:.0f}" in said for value in wanted)


def test_nothing_sticks_out_and_nothing_is_missing(charts):
    for name, text in charts.charts().items():
        root = ET.fromstring(text)
        width, height = float(root.get("width")), float(root.get("height"))
        assert root.find(f"{SVG}title").text
        for bar in root.iter(f"{SVG}rect"):
            assert float(bar.get("x")) + float(bar.get("width")) < width, name
            assert float(bar.get("y")) + float(bar.get("height")) < height, name
        for path in root.iter(f"{SVG}path"):
            ends = [float(x) for x in re.findall(r"[MH]([\d.]+)", path.get("d"))]
            assert charts.LEFT - 1 <= min(ends) <= max(ends) <= width - charts.RIGHT + 1, name
        assert "nan" not in text


def test_a_row_that_is_missing_is_an_error(charts):
    with pytest.raises(KeyError):
        charts.speed([], 1)
    with pytest.raises(KeyError):
        charts.accuracy([], "DeiT-T")
