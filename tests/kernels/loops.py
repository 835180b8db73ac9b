"""The innermost loops of the integer products, as compiled."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from .emulated import FLAGS, ROOT


def disassembled(folder: Path, compiler: str, objdump: str, paths: Collection[str]) -> str:
    """The products of these paths alone, compiled as setup.py does and taken apart."""
    source, result = folder / "products.cpp", folder / "products.o"
    names = ", ".join(f"dfqvit::quant::{path}::multiply" for path in paths)
    used = f"decltype(&dfqvit::quant::portable::multiply) used[] = {{{names}}};"
    source.write_text(f'#include "dfqvit/quant_linear_multiply.h"\n{used}\n')
    include = f"-I{ROOT / 'csrc' / 'include'}"
    subprocess.run([compiler, *FLAGS, "-O3", include, "-c", "-o", str(result), str(source)], check=True)
    command = [objdump, "-dC", "--no-show-raw-insn", str(result)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops_of(disassembly: str, function: str, jump: str) -> list[list[str]]:
    """The instructions of every loop of a function, each with its operands.

    Args:
        disassembly: What `disassembled` gives.
        function: A regular expression for its name, from the first letter on.
        jump: One for the name of a conditional jump.
    """
    found = re.search(rf"<{function}\(.*?>:\n(.*?)(?:\n\n|\Z)", disassembly, re.DOTALL)
    assert found, function
    lines = [line.split("\t") for line in found[1].splitlines()]
    code = {int(place.strip(" :"), 16): " ".join(words) for place, *words in lines if words}
    loops = []
    for end, words in code.items():
        target = re.search(rf"^{jump}\s+([0-9a-f]+)", words)
        if target and (begin := int(target[1], 16)) < end:
            loops.append([words for place, words in code.items() if begin <= place <= end])
    return loops
