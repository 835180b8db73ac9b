"""quant_linear: instructions counted in the loops of its `wgmma` kernels, and the times of a model's layers.

For each loop the instructions of the shortest way round that does its work: the step over K, and the three loops of the epilogue
(bytes, GELU to bytes, float32). From these come, for each layer, the cycles that a multiprocessor's four schedulers issue and that
its tensor cores multiply, the bytes, and the time that the greatest of them takes. No waiting is in it: a floor of this code.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import sass
from .machine import H200, HERTZ, PARTS, PROCESSORS

MULTIPLIED = 4096  # multiply-adds of bytes on the tensor cores, a cycle, by wgmma
BF16_SHARE, BF16_PEAK = 0.77, 495e12  # what cuBLAS reaches of its peak, in multiply-adds a second
TILE, STEP, WARPS = 128, 128, 8  # rows and outputs of a tile, depth of a step, warps of a block (Group)
SOURCE = """#include "dfqvit/{header}"
namespace dfqvit::quant::tile {{
template __global__ void {kernel}const Operands, const Epilogue, int64_t);
}}
"""
TILES = "multiply_tiles_kernel<GroupOfTiles>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, "


@dataclass(frozen=True)
class Counts:
    """Instructions of one warp: of a step over K; of each loop of the epilogue, for 32 lanes with one output each."""

    step: float
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


def shortest(code: sass.Code, first: int, last: int, work: str | tuple[str, ...]) -> int:
    """Instructions of the shortest way from `first` to `last` that meets all the loop's `work`, or as much of it as it can."""
    return len(sass.way(code, first, last, work))


def count(bits: int, tiles: bool = False) -> Counts:
    """The counts of the kernel for weights of `bits`; `tiles`: of the one that copies whole tiles."""
    header, kernel = (
        ("quant_linear_tiles.cuh", TILES) if tiles else ("quant_linear.cuh", f"multiply_kernel<Group, {bits}>(")
    )
    every = sass.compiled(SOURCE.format(header=header, kernel=kernel))
    code = next(code for name, code in every.items() if "multiply_" in name)
    found: dict[str, float] = {}
    for first, last in sass.innermost(code):
        names = [one.operation for one in code[first : last + 1]]
        stores = [name for name in names if name.startswith("STG")]
        if any(name.startswith("IGMMA") for name in names):
            if tiles:  # one warp of the block asks for the copies
                asking, other = (shortest(code, first, last, work) for work in (("IGMMA", "UTMALDG"), "IGMMA"))
                found["step"] = (asking + (WARPS - 1) * other) / WARPS
            else:
                found["step"] = last - first + 1  # all of it: what is left out in the last two steps is not counted out
        elif stores and all(name == "STG.E.128" for name in stores):
            found["floats"] = shortest(code, first, last, "STG") / (4 * len(stores))
        elif stores and all(name == "STG.E" for name in stores):
            kind = "gelu_bytes" if sum(name == "MUFU.EX2" for name in names) else "bytes"
            found[kind] = shortest(code, first, last, "STG") / (4 * len(stores))
    writes = 0.5  # an int2 a store: one for two sums
    return Counts(found["step"], found["bytes"], found["gelu_bytes"], found["floats"], writes)


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
        issue = tiles * (WARPS * steps * counts.step + epilogue) / PARTS * microseconds
        tensor = tiles * TILE * TILE * steps * STEP / MULTIPLIED * microseconds
        moved = rows * depth + outputs * depth + rows * outputs * (8 if kind == "floats" else 1)
        bf16 = rows * outputs * depth / (BF16_PEAK * BF16_SHARE) * 1e6
        found.append(Layer(name, outputs, depth, kind, issue, tensor, moved / H200.bytes_a_second * 1e6, bf16))
    return found


def table(counts: Counts, bits: int, tiles: bool) -> str:
    """Markdown, of DeiT-B at batch 256; then the sums of the linear layers of each model."""
    brought = ", by copies of whole tiles" if tiles else ""
    per = (
        f"a step over K of 128: {counts.step:.0f}; an output: bytes {counts.bytes:.1f}, GELU {counts.gelu_bytes:.1f}, "
    )
    lines = [
        f"Weights of {bits} bits{brought}, instructions of a warp. {per}float32 {counts.floats:.1f}, all + {counts.panel}.",
        "",
    ]
    lines += [
        "| DeiT-B, batch 256 | N x K | issue | tensor cores | bytes | predicted | bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = 256 * 197
    for layer in layers(counts, 768, rows):
        times = f"{layer.issue:.0f} us | {layer.tensor:.0f} us | {layer.memory:.0f} us | {layer.time:.0f} us | {layer.bf16:.0f} us"
        lines.append(f"| {layer.name} | {layer.outputs} x {layer.depth} | {times} |")
    return "\n".join(lines)
