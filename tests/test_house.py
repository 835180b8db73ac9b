"""scripts/house.py: the picture in CONTRIBUTING.md shows the rooms that there are and the imports that they make."""

from __future__ import annotations

import importlib
import sys
import xml.etree.ElementTree as ET

import pytest

from .test_rooms import FLOORS, ROOT, imported, room

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def house():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT.parent / "scripts")
        return importlib.import_module("house")


def reached(pairs):
    """All (a, b) so that pairs lead from a to b."""
    found = set(pairs)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


def test_the_files_are_what_the_sources_say(house, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py", "--check"])
    assert house.main() == 0, capsys.readouterr().err
    monkeypatch.setattr(house, "IMAGES", tmp_path)
    assert house.main() == 1
    assert "run scripts/house.py" in capsys.readouterr().err


def test_every_import_is_shown_or_implied(house):
    uses = house.rooms()
    found = {
        (room(path), name)
        for path in ROOT.rglob("*.py")
        for name in imported(path, path.read_text())
        if room(path) in uses and name in {*uses, "kernels"} and name != room(path)
    }
    shown = set(house.direct(uses))
    assert shown <= found
    assert reached(shown) == reached(found)
    for pair in shown:
        assert pair not in reached(shown - {pair}), f"{pair} is implied by others"


def test_every_line_leads_down(house):
    uses = house.rooms()
    rows = house.floors(uses)
    height = {name: row for row, names in enumerate(rows) for name in names}
    assert set(height) == {*uses, "kernels"}
    assert all(height[a] < height[b] for a, b in house.direct(uses))
    for name in height:
        assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file() or name == "kernels"
        assert name in FLOORS


def test_a_ring_is_told(house):
    with pytest.raises(ValueError, match="imports run in a ring: a > b > c > a"):
        house.floors({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_holds_every_room_within_its_frame(house, theme):
    uses = house.rooms()
    picture = ET.fromstring(house.drawing(uses, theme))
    width, height = (float(picture.attrib[key]) for key in ("width", "height"))
    rooms = picture.findall(f"{SVG}rect")
    assert len(rooms) == len(uses) + 2  # kernels/ and csrc/ besides
    places = []
    for each in rooms:
        x, y, w, h = (float(each.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + w <= width
        assert y + h <= height
        assert all(y != v or abs(x - u) >= w for u, v in places), "two rooms overlap"
        places.append((x, y))
    assert len(picture.findall(f"{SVG}path")) == len(house.direct(uses)) + 1
    assert picture.find(f"{SVG}desc").text
