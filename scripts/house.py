"""Draws the house for CONTRIBUTING.md: the rooms of dfqvit/ and what they import, read from the sources, as SVG text.

    python scripts/house.py [--check]      writes docs/images/house-{light,dark}.svg; --check writes nothing, and fails where a
                                           file is not what the sources say

A room is a folder of dfqvit/ or one of its files. A line leads from a room down to one that it imports; it is left out where
another room between them already leads there.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from html import escape
from pathlib import Path

from drawing import framed, write_or_check

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dfqvit"
IMAGES = ROOT / "docs" / "images"
# Which every room may use, or which only starts one.
APART = {"errors", "version", "progress", "distributed", "__main__"}
THEMES = {  # text, text of less weight, lines, rooms, edges of rooms, the operators, the compiled code
    "light": ("#1c2128", "#57606a", "#8c959f", "#f6f8fa", "#d0d7de", "#ddf4ff", "#fff1e5"),
    "dark": ("#e6edf3", "#9aa5b1", "#6e7681", "#161b22", "#30363d", "#0c2d4a", "#3b2300"),
}
WIDTH, ROOM, HIGH, GAP = 640, 148, 34, 26


def imports(path: Path) -> set[str]:
    """The rooms that a file of dfqvit/ imports when it is loaded or called; not those for type checkers alone."""
    package = ["dfqvit", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, node.module or ""]).strip(".") + f".{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dfqvit.")}
    return found


def rooms() -> dict[str, set[str]]:
    """{room: those that it imports}, `kernels` among the latter."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name not in APART | {"__init__"}:
            found.setdefault(name, set()).update(imports(path))
    known = found.keys() | {"kernels"}
    return {name: (uses & known) - {name} for name, uses in found.items()}


def floors(uses: Mapping[str, set[str]]) -> list[list[str]]:
    """The rooms from the top: each stands one floor above the highest that it imports. ValueError where imports run in a ring."""
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"imports run in a ring: {' > '.join((*above, name))}")
        if name not in heights:
            heights[name] = 1 + max((height(each, (*above, name)) for each in uses.get(name, ())), default=-1)
        return heights[name]

    for name in sorted(uses):
        height(name)
    top = max(heights.values())
    return [sorted(name for name, at in heights.items() if at == top - row) for row in range(top + 1)]


def direct(uses: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no chain of others implies."""

    def reached(name: str) -> set[str]:
        return set().union(*({each} | reached(each) for each in uses.get(name, ())))

    return sorted(
        (name, each)
        for name, below in uses.items()
        for each in below
        if not any(each in reached(other) for other in below - {each})
    )


def drawing(uses: Mapping[str, set[str]], theme: str) -> str:
    """The picture as SVG text."""
    text, soft, line, room, edge, operators, compiled = THEMES[theme]
    rows = [*floors(uses), ["csrc"]]
    at: dict[str, tuple[float, float]] = {}
    for row, names in enumerate(rows):
        step = WIDTH / len(names)
        at |= {name: (step * (k + 0.5), 44 + row * (HIGH + GAP)) for k, name in enumerate(names)}
    height = 44 + len(rows) * (HIGH + GAP) + 4
    title = "The rooms of dfqvit; each imports only what stands below it"
    pairs = [*direct(uses), ("kernels", "csrc")]
    said = "; ".join(f"{a} uses {b}" for a, b in pairs)
    parts = []
    for a, b in pairs:
        (x, y), (u, v) = at[a], at[b]
        y += HIGH
        middle = (y + v) / 2
        parts.append(
            f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}" stroke="{line}" fill="none"/>'
        )
    for name, (x, y) in at.items():
        fill = {"kernels": operators, "csrc": compiled}.get(name, room)
        label = name if name in ("kernels", "csrc") or (PACKAGE / name).is_dir() else f"{name}.py"
        label += "/" if "." not in label else ""
        parts.append(
            f'<rect x="{x - ROOM / 2:.0f}" y="{y:.0f}" width="{ROOM}" height="{HIGH}" rx="6" fill="{fill}" stroke="{edge}"/>'
        )
        parts.append(f'<text x="{x:.0f}" y="{y + 22:.0f}" text-anchor="middle" fill="{text}">{escape(label)}</text>')
    note = f'<text x="0" y="34" font-size="12" fill="{soft}">Lines that others imply are left out.</text>'
    return framed(WIDTH, height, title, said, text, [note, *parts])


def main() -> int:
    uses = rooms()
    drawn = {IMAGES / f"house-{theme}.svg": drawing(uses, theme) for theme in THEMES}
    return write_or_check(__doc__, drawn, "the sources")


if __name__ == "__main__":
    raise SystemExit(main())
