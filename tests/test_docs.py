"""Every command and every program in the documentation runs, at a small size; every link leads somewhere, every file is there."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfqvit import cli, demo

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What the documentation says -> what runs here: the embedded model in place of DeiT-T, its test images, few images and steps.
SMALLER = {
    'timm.create_model("deit_tiny_patch16_224", pretrained=True)': 'dfqvit.models.load_model("demo")',
    "deit_tiny_patch16_224": "demo",
    "--checkpoint FILE --data FOLDER --classes FILE": "--data test.npz",
    "IMAGE_FOLDER": "test.npz",
    "dfqvit.quantize(model, w_bits=4, a_bits=8)": "dfqvit.quantize(model, 4, 8, samples=2, iters=2)",
    '.convert("RGB")': '.convert("L")',
    "torch.randn(8, 3, 224, 224)": "torch.randn(8, 1, 28, 28)",
    "--batch 1,32": "--batch 1,2 --rounds 1",
    "--study method --study acm --seeds 3": "--study gamma --bits 4 --images 20",
    "--study method": "--study gamma --values 2 --bits 4 --images 20",
    "--values 8,16,32": "--values 2,3 --bits 4 --images 20",
}
APPENDED = dict.fromkeys(["quantize", "ablate"], "--samples 2 --iters 2")  # click takes the last of two values

# The beginnings of commands that do not run here, and why.
LEFT_OUT = {
    "make": "sets up an environment; CI does this itself",
    "pip": "installs; tests/test_package.py and tests/test_wheel.py install from the tree and from a wheel",
    ". .venv/bin/activate": "the tests run in their own environment",
    "dfqvit sweep": "many runs in processes of their own; tests/cli/test_sweep.py reads this file and makes smaller ones",
    "dfqvit benchmark model.safetensors --neighbours 2": "tests/evaluation/test_energy.py runs it, with processes beside it",
    "torchrun": "tests/synthesis/test_distributed.py runs these with gloo",
    "python benchmarks/accuracy.py": "needs real weights and images; tests/test_accuracy.py runs it where they are",
    "python benchmarks/accuracy_tables.py": "writes a page of docs; tests/test_benchmarks.py checks that it would change nothing",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page at which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text[: match.start(2)].count("\n") + 1) for match in found]


def commands(page: Path) -> list[tuple[int, str]]:
    """(line, command) of the page's bash blocks, without comments."""
    return [
        (block.line + offset, shlex.join(shlex.split(line, comments=True)))
        for block in blocks(page)
        if block.language == "bash"
        for offset, line in enumerate(block.text.splitlines())
        if shlex.split(line, comments=True)
    ]


def smaller(text: str) -> str:
    for said, run in SMALLER.items():
        text = text.replace(said, run)
    return text


def left_out(command: str) -> bool:
    return any(command == start or command.startswith(start + " ") for start in LEFT_OUT)


@pytest.fixture(scope="module")
def written():
    """{command: the files that it wrote}, of the pages so far."""
    return {}


@pytest.fixture(scope="module")
def given_files(tmp_path_factory):
    """What a page may take for granted: a saved model, images to evaluate on, and a photograph."""
    folder = tmp_path_factory.mktemp("given")
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(folder / "test.npz", images=file["images"][:40], labels=file["labels"][:40])
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "photo.jpg")
    assert cli.run(["quantize", "demo", "--calib", "noise", "--samples", "2", "--out", str(folder)]) == 0
    return folder


def run(command: str, written: dict[str, dict[Path, bytes]]) -> int:
    """In the working folder; a command that ran on an earlier page leaves the files again that it wrote there."""
    words = shlex.split(smaller(command))
    assert words[0] == "dfqvit", "only dfqvit's own commands run here; others stand in LEFT_OUT with a reason"
    if command not in written:
        before = set(Path().rglob("*"))
        appended = APPENDED.get(words[1], "")
        if "samples" in words:  # a study of their number, which takes no other
            appended = appended.replace("--samples 2", "")
        status = cli.run([*words[1:], *appended.split()])
        new = sorted(set(Path().rglob("*")) - before)
        written[command] = {path: path.read_bytes() for path in new if path.is_file()}
        return status
    for path, content in written[command].items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, given_files, written, tmp_path, monkeypatch, capsys):
    """From first to last in one folder, the programs sharing their names, as a reader would go through it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dfqvit.calibration.images.COMPANIONS", 4)
    for name in ("test.npz", "photo.jpg", "model.safetensors", "out/model/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(given_files / Path(name).name, tmp_path / name)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            source = "\n" * (block.line - 1) + smaller(block.text)  # so that a traceback has the page's lines
            exec(compile(source, str(page), "exec"), names)
        elif block.language == "bash":
            last = block.line + block.text.count("\n")
            for line, command in commands(page):
                if block.line <= line < last and not left_out(command):
                    assert run(command, written) == 0, f"{page}:{line}: {command}\n{capsys.readouterr().err}"
        else:
            pytest.fail(f"{page}:{block.line}: a block of '{block.language}'; it may be bash or python")


def test_tables_are_not_stale():
    everything = "\n".join(block.text for page in PAGES for block in blocks(page))
    spoken = [command for page in PAGES for _, command in commands(page)]
    for start in LEFT_OUT:
        assert any(command == start or command.startswith(start + " ") for command in spoken), f"LEFT_OUT: '{start}'"
    for said in SMALLER:
        assert said in everything, f"SMALLER: '{said}'"
    for name in APPENDED:
        assert any(command.startswith(f"dfqvit {name} ") for command in spoken), f"APPENDED: '{name}'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for label, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), f"{page}: [{label}]({target})"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", goal.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_code_that_are_named_are_there(page):
    """By their path, or the end of one; not where it has a placeholder, as <operator>/op.py."""
    named = set(re.findall(r"(?<![\w*>/.-])[\w./-]+\.(?:py|cpp|cuh|cu|h)\b", page.read_text()))
    folders = ("dfqvit", "kernels", "csrc", "scripts", "tests", "benchmarks", "examples")
    there = ["/setup.py", *(str(path) for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in there)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_are_there_and_say_what_they_show(page):
    text = page.read_text()
    for place in re.findall(r'(?:src|srcset)="([^"]+)"', text):
        assert (page.parent / place).is_file(), f"{page}: {place}"
        assert (page.parent / place).stat().st_size < 150_000
    assert all(len(label) > 20 for label in re.findall(r"!\[([^\]]*)\]\(", text)), page
    for tag in re.findall(r"<img [^>]*>", text):
        assert re.search(r'alt="[^"]{20,}"', tag), f"{page}: {tag}"
    for block in re.findall(r"<picture>.*?</picture>", text, re.DOTALL):  # the dark one by the reader's theme
        dark, light = re.search(r'srcset="([^"]+)"', block)[1], re.search(r'<img src="([^"]+)"', block)[1]
        assert dark.replace("-dark.", "-light.") == light


def test_every_page_is_in_an_index():
    index = (ROOT / "docs" / "README.md").read_text() + (ROOT / "docs" / "kernels" / "README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name in index, f"{page} is in no index"
