"""Machine code of a kernel: compiled, disassembled, and the way that a warp takes through it.

Each instruction comes with what the compiler tells the scheduler about it (the 21 control bits of each 128, known since Maxwell
from public disassemblers): cycles to stall, the barrier that it sets when its result is there or its operands are read, and the
barriers that it waits for.
"""

from __future__ import annotations

import functools
import heapq
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NONE = 7  # no barrier


@dataclass(frozen=True)
class Instruction:
    """One instruction; `target` is where a branch goes, as an index, or -1."""

    line: str
    operation: str
    stall: int = 1
    set_when_written: int = NONE
    set_when_read: int = NONE
    waits: tuple[int, ...] = ()
    target: int = -1

    @property
    def conditional(self) -> bool:
        """Whether what follows it may come next too."""
        return self.line.startswith("@") or bool(re.search(r"BRA\S* \(?!?U?P\d|BRA\.DIV", self.line))


Code = list[Instruction]


@functools.cache
def tools() -> tuple[str, str] | None:
    """nvcc and cuobjdump, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    folders = [Path(top.group(1)).resolve() / "bin"] if top else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = [str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()]
    return (nvcc, found[0]) if found else None


def operation(line: str) -> str:
    """The instruction's name, without its predicate."""
    return line.split(maxsplit=1)[1].split()[0] if line.startswith("@") else line.split()[0]


def parsed(text: str) -> dict[str, Code]:
    """What `cuobjdump -sass` prints, by the kernels' (mangled) names."""
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        rows = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", part)
        at = {int(address, 16): index for index, (address, _, _) in enumerate(rows)}
        code = []
        for _, line, high in rows:
            line, control = line.strip(), int(high, 16) >> 41 & 0x1FFFFF
            # BRA.U.ANY is for more lanes than one
            branch = re.search(r"^(?:@\S+ )?BRA(?!\.U\.ANY).*?(0x[0-9a-f]+)$", line)
            code.append(
                Instruction(
                    line,
                    operation(line),
                    control & 15,
                    control >> 5 & 7,
                    control >> 8 & 7,
                    tuple(i for i in range(6) if control >> 11 + i & 1),
                    at[int(branch[1], 16)] if branch else -1,
                )
            )
        found[part.split()[0]] = code
    return found


def _needed() -> tuple[str, str]:
    found = tools()
    if found is None:
        raise SystemExit("no nvcc, or no cuobjdump")
    return found


def _said_of(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_needed()[1], option, str(path)], check=True, capture_output=True, text=True).stdout


def disassembled(cubin: bytes) -> dict[str, Code]:
    """The kernels of a cubin."""
    return parsed(_said_of(cubin, "-sass"))


def registers(cubin: bytes) -> int:
    """Of a thread, of its kernel; a warp gets them in eights."""
    said = re.search(r"REG:(\d+)", _said_of(cubin, "-res-usage"))
    if said is None:
        raise ValueError("cuobjdump said nothing of registers")
    return -(-int(said[1]) // 8) * 8


def compiled(source: str) -> dict[str, Code]:
    """The kernels that `source` instantiates, for sm_90a, with the flags of setup.py."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        flags = ["-std=c++17", "-O3", "--fmad=false", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
        command = [_needed()[0], *flags, f"-I{ROOT / 'csrc/include'}", "-o", str(path.with_suffix(".cubin")), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        return disassembled(path.with_suffix(".cubin").read_bytes())


def loops(code: Code) -> list[tuple[int, int]]:
    """(first, last) of every loop, outer ones before those that they hold."""
    found = {(one.target, last) for last, one in enumerate(code) if 0 <= one.target < last}
    return sorted(found, key=lambda loop: (loop[0], -loop[1]))


def innermost(code: Code) -> list[tuple[int, int]]:
    """The loops that hold no other."""
    every = loops(code)
    return [
        one for one in every if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in every)
    ]


def way(
    code: Code, first: int, last: int, work: str | Sequence[str], blocked: frozenset[int] | set[int] = frozenset()
) -> list[int]:
    """The shortest way onwards from `first` to `last` that meets all `work` between, or as much of it as can be met.

    ValueError where none leads there without the instructions that are `blocked`.
    """
    names = tuple([work] if isinstance(work, str) else work)
    done: dict[tuple[int, int], tuple[int, int] | None] = {}
    ends: dict[int, tuple[int, int]] = {}
    queue: list[tuple[int, int, int, tuple[int, int] | None]] = [(1, first, 0, None)]
    while queue:
        count, index, met, before = heapq.heappop(queue)
        if (index, met) in done:
            continue
        done[index, met] = before
        if index == last:
            ends.setdefault(met + is_one_of(code[index], names), (index, met))
            continue
        one, state = code[index], (index, met)
        onwards = [index + 1] if one.target < 0 or one.conditional or one.target <= index else []
        if one.target > index:
            onwards.append(one.target)
        if one.operation in ("EXIT", "RET.REL.NODEC") and not one.conditional:
            onwards = []
        for after in onwards:
            if after <= last and after not in blocked:
                heapq.heappush(queue, (count + 1, after, met + is_one_of(one, names), state))
    if not ends:
        raise ValueError(f"no way from {first} to {last}")
    at: tuple[int, int] | None = ends[max(ends)]
    found = []
    while at is not None:
        found.append(at[0])
        at = done[at]
    return found[::-1]


def is_one_of(one: Instruction, names: tuple[str, ...]) -> bool:
    """Whether the operation begins with one of the names; a name that ends in a dollar sign is all of it."""
    return any(one.operation == name[:-1] if name[-1] == "$" else one.operation.startswith(name) for name in names)


def trace(code: Code, path: Sequence[int], trips: dict[tuple[int, int], int]) -> list[int]:
    """What a warp issues that goes along `path`, and round each of its loops so many times."""
    inside = sorted(trips, key=lambda loop: (loop[0], -loop[1]))

    def emit(low: int, high: int, depth: int) -> list[int]:
        found: list[int] = []
        position = low
        while position < high:
            index = path[position]
            loop = next((one for one in inside[depth:] if one[0] == index), None)
            if loop is None:
                found.append(index)
                position += 1
                continue
            end = position
            while end < high and path[end] <= loop[1]:
                end += 1
            found += emit(position, end, inside.index(loop) + 1) * trips[loop]
            position = end
        return found

    return emit(0, len(path), 0)
