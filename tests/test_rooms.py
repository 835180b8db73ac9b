"""The rooms of dfqvit/: nothing stands between them, and every import runs down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dfqvit"
# From the top: a room may import what stands after it.
FLOORS = (
    "__main__",
    "cli",
    "studies",
    "report",
    "evaluation",
    "storage",
    "torchao",
    "api",
    "patching",
    "runtime",
    "calibration",
    "synthesis",
    "models",
    "quantization",
    "progress",
    "distributed",
    "errors",
    "version",
    "kernels",
)
OUTSIDE = {
    "__init__.py",
    "__main__.py",
    "api.py",
    "errors.py",
    "version.py",
    "distributed.py",
    "progress.py",
    "torchao.py",
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path, source: str) -> set[str]:
    """The rooms of dfqvit that a file imports, also inside functions and for type checkers."""
    package = ["dfqvit", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dfqvit.")}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_no_file_stands_outside_a_room():
    assert {path.name for path in ROOT.glob("*.py")} == OUTSIDE
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path):
    own = FLOORS.index(room(path))
    higher = {name for name in imported(path, path.read_text()) if name in FLOORS and FLOORS.index(name) < own}
    assert not higher, f"{room(path)} imports {higher}, which stand above it"


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import dfqvit.cli.demo\nfrom dfqvit.api import quantize\nfrom ..storage import save\n"
        "def f():\n    from .. import distributed\nfrom .loop import Synthesis\nimport torch"
    )
    found = imported(ROOT / "synthesis" / "step.py", source)
    assert found == {"cli", "api", "storage", "distributed", "synthesis"}


def bound(source: str) -> tuple[set[str], set[str]]:
    """(the names in __all__, the names that imports, definitions and assignments of a file bind)."""
    listed, names = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.add(node.targets[0].id)
            if node.targets[0].id == "__all__":
                listed |= set(ast.literal_eval(node.value))
    return listed, names


@pytest.mark.parametrize("folder", [ROOT, ROOT.parent / "kernels"], ids=lambda folder: folder.name)
def test_what_a_room_offers_is_there(folder):
    """Found here: the room of the report offered `sizes`, which is storage's, so that `import *` of it failed."""
    for path in folder.rglob("*.py"):
        listed, names = bound(path.read_text())
        assert listed <= names, f"{path}: {listed - names}"
