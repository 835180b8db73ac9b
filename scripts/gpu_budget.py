"""What the CUDA kernel of quant_linear costs on a GPU that is not there: instructions counted in its machine code, times predicted.

    python scripts/gpu_budget.py [--out FILE]

Compiles the large tile's kernel for sm_90a with nvcc, disassembles it with cuobjdump (the toolkit's, or the one that Triton brings
along), and counts, for each loop, the instructions of the shortest way round that does the loop's work: the step over K, and the
three loops of the epilogue (bytes, GELU to bytes, float32). From these come, for each layer of a model, the cycles that a
multiprocessor's four schedulers issue and that its tensor cores multiply, the bytes, and the time that the greatest of them
takes. No launch, cache or scheduling is in it: a floor of this code, not a measurement. Exit status 1 without tools.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROCESSORS, HERTZ, BYTES_A_SECOND = 132, 1.83e9, 4.8e12  # H200
ISSUED, MULTIPLIED = 4, 4096  # warps' instructions, and multiply-adds of bytes on the tensor cores, a cycle
BF16_SHARE, BF16_PEAK = 0.77, 495e12  # what cuBLAS reaches of its peak, in multiply-adds a second
TILE, STEP, WARPS = 128, 128, 8  # rows and outputs of a tile, depth of a step, warps of a block (Group)
TOKENS = {"deit": 197, "swin": 49 * 64}
SOURCE = """#include "dfqvit/quant_linear.cuh"
namespace dfqvit::quant::tile {{
template __global__ void multiply_kernel<Group, {bits}>(const Operands, const Epilogue, int64_t);
}}
"""


@dataclass(frozen=True)
class Counts:
    """Instructions of one warp: of a step over K; of each loop of the epilogue, for 32 lanes with one output each."""

    step: int
    bytes: float
    gelu_bytes: float
    floats: float
    panel: float  # of the sums' way through shared memory, which comes to each


@dataclass(frozen=True)
class Layer:
    """A layer at batch 256, and what its time is made of, in microseconds."""

    name: str
    outputs: int
    depth: int
    kind: str
    issue: float
    tensor: float
    memory: float
    bf16: float

    @property
    def time(self) -> float:
        """Of the busiest part."""
        return max(self.issue, self.tensor, self.memory)


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


def disassembled(bits: int) -> list[tuple[int, str]]:
    """(address, instruction) of the kernel for weights of `bits`, sm_90a."""
    found = tools()
    if found is None:
        raise SystemExit("no nvcc, or no cuobjdump")
    nvcc, cuobjdump = found
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        source.write_text(SOURCE.format(bits=bits))
        flags = ["-std=c++17", "-O3", "--fmad=false", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
        command = [nvcc, *flags, f"-I{ROOT / 'csrc/include'}", "-o", str(code), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        text = subprocess.run([cuobjdump, "-sass", str(code)], check=True, capture_output=True, text=True).stdout
    kernel = next(
        part for part in re.split(r"\n\s*Function : ", text) if part.startswith("_ZN6dfqvit5quant4tile15multiply")
    )
    return [(int(at, 16), line.strip()) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", kernel)]


def operation(line: str) -> str:
    """The instruction's name, without its predicate."""
    return line.split(maxsplit=1)[1].split()[0] if line.startswith("@") else line.split()[0]


def loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last) of the loops that hold no other, as indices."""
    at = {address: index for index, (address, _) in enumerate(code)}
    found = []
    for last, (address, line) in enumerate(code):
        target = re.search(r"^(?:@\S+ )?BRA.*?(0x[0-9a-f]+)$", line)
        if target and int(target[1], 16) < address:
            found.append((at[int(target[1], 16)], last))
    return [
        one for one in found if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in found)
    ]


def shortest(code: list[tuple[int, str]], first: int, last: int, work: str) -> int:
    """Instructions of the shortest way from `first` to `last` that meets all the loop's `work`, or as much of it as it can."""
    at = {address: index for index, (address, _) in enumerate(code)}

    def following(index: int) -> list[int]:
        line = code[index][1]
        if operation(line) != "BRA":
            return [index + 1]
        target = at[int(re.search(r"(0x[0-9a-f]+)$", line)[1], 16)]  # type: ignore[index]
        conditional = line.startswith("@") or re.search(r"\bU?P\d", line)
        return [index + 1, target] if conditional else [target]

    done: set[tuple[int, int]] = set()
    ends: dict[int, int] = {}
    queue = [(1, first, 0)]
    while queue:
        count, index, met = heapq.heappop(queue)
        if (index, met) in done:
            continue
        done.add((index, met))
        met += operation(code[index][1]).startswith(work)
        if index == last:
            ends.setdefault(met, count)
            continue
        for after in following(index):
            if first <= after <= last:
                heapq.heappush(queue, (count + 1, after, met))
    return ends[max(ends)]


def count(bits: int) -> Counts:
    """The counts of the kernel for weights of `bits`."""
    code = disassembled(bits)
    found: dict[str, float] = {}
    for first, last in loops(code):
        names = [operation(line) for _, line in code[first : last + 1]]
        stores = [name for name in names if name.startswith("STG")]
        if any(name.startswith("IGMMA") for name in names):
            found["step"] = last - first + 1  # all of it: what is left out in the last two steps is not counted out
        elif stores and all(name == "STG.E.128" for name in stores):
            found["floats"] = shortest(code, first, last, "STG") / (4 * len(stores))
        elif stores and all(name == "STG.E" for name in stores):
            kind = "gelu_bytes" if sum(name == "MUFU.EX2" for name in names) else "bytes"
            found[kind] = shortest(code, first, last, "STG") / (4 * len(stores))
    writes = 0.5  # an int2 a store: one for two sums
    return Counts(int(found["step"]), found["bytes"], found["gelu_bytes"], found["floats"], writes)


MODELS = {"DeiT-T": ("deit", 192), "DeiT-S": ("deit", 384), "DeiT-B": ("deit", 768)}


def layers(counts: Counts, width: int, rows: int) -> list[Layer]:
    """The four layers of a block of a ViT of `width`, with 8-bit integers between them and a float32 residual."""
    found = []
    for name, outputs, depth, kind in (
        ("qkv", 3 * width, width, "bytes"),
        ("proj", width, width, "floats"),
        ("fc1 + GELU", 4 * width, width, "gelu_bytes"),
        ("fc2", width, 4 * width, "floats"),
    ):
        tiles = -(-rows // TILE) * -(-outputs // TILE)
        steps = -(-depth // STEP)
        epilogue = TILE * TILE / 32 * (getattr(counts, kind) + counts.panel)
        microseconds = 1e6 / (PROCESSORS * HERTZ)
        issue = tiles * (WARPS * steps * counts.step + epilogue) / ISSUED * microseconds
        tensor = tiles * TILE * TILE * steps * STEP / MULTIPLIED * microseconds
        moved = rows * depth + outputs * depth + rows * outputs * (8 if kind == "floats" else 1)
        bf16 = rows * outputs * depth / (BF16_PEAK * BF16_SHARE) * 1e6
        found.append(Layer(name, outputs, depth, kind, issue, tensor, moved / BYTES_A_SECOND * 1e6, bf16))
    return found


def table(counts: Counts, bits: int) -> str:
    """Markdown, of DeiT-B at batch 256; then the sums of the linear layers of each model."""
    per = f"a step over K of 128: {counts.step}; an output: bytes {counts.bytes:.1f}, GELU {counts.gelu_bytes:.1f}, "
    lines = [
        f"Weights of {bits} bits, instructions of a warp. {per}float32 {counts.floats:.1f}, all + {counts.panel}.",
        "",
    ]
    lines += [
        "| DeiT-B, batch 256 | N x K | issue | tensor cores | bytes | predicted | bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = 256 * TOKENS["deit"]
    for layer in layers(counts, 768, rows):
        times = f"{layer.issue:.0f} us | {layer.tensor:.0f} us | {layer.memory:.0f} us | {layer.time:.0f} us | {layer.bf16:.0f} us"
        lines.append(f"| {layer.name} | {layer.outputs} x {layer.depth} | {times} |")
    for name, (_, width) in MODELS.items():
        found = layers(counts, width, rows)
        ours, theirs = (12 * sum(getattr(layer, field) for layer in found) / 1e3 for field in ("time", "bf16"))
        lines.append(f"\n{name}: linear layers of 12 blocks {ours:.2f} ms, bf16 {theirs:.2f} ms.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines of every layer are written here too")
    out = parser.parse_args().out
    if tools() is None:
        print("gpu_budget: no nvcc, or no cuobjdump: nothing can be counted", file=sys.stderr)
        return 1
    records = []
    for bits in (8, 4):
        counts = count(bits)
        print(table(counts, bits), end="\n\n")
        for layer in layers(counts, 768, 256 * TOKENS["deit"]):
            records.append({"bits": bits, **asdict(counts), **asdict(layer), "time": layer.time})
    if out:
        out.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
