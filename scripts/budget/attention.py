"""quant_attention: the CUDA kernel, for the 197 tokens of a ViT."""

from __future__ import annotations

from . import sass
from .kernel import Kernel, Launch, Prediction, found
from .machine import Gpu, wavefronts

SOURCE = """#include "dfqvit/quant_attention.cuh"
namespace dfqvit {{ namespace quant {{ namespace attention {{
template __global__ void attention_kernel<{depth}, {kept}, false>(const Heads);
}}}}}}
"""
ROWS, STEP = 16, 32  # queries of a warp at a time, keys of a product with the values
WORK = ["IMMA", "MUFU.EX2", "FFMA.SAT", "STG.E$", "STS", "LDS.128", "LDSM", "LDGSTS"]
LOOPS = [("tiles", "IMMA"), ("copies", "LDGSTS"), ("starts", "IDP"), ("values", r"LDSM\S*MT")]


def kernel(tokens: int, depth: int) -> Kernel:
    """The kernel for images of so many tokens, without bias, mask or index."""
    kept = 208 if depth == 64 and 64 < tokens <= 208 else 64
    if tokens > kept:
        raise ValueError(f"tokens was {tokens}; the walk of one run is counted, of up to {kept}")
    code = next(iter(sass.compiled(SOURCE.format(depth=depth, kept=kept)).values()))
    one = found(f"attention, {tokens} tokens", code, WORK, LOOPS)
    # A lane's sums begin where two neighbouring keys' do.
    one.conflicts["LDS.64"] = wavefronts([8 * (lane % 4) for lane in range(32)], 8)
    one.cached = ("LDG.E",)  # scales and zero points, the same for all blocks
    first = next(i for i in one.path if code[i].operation.startswith("LDGSTS"))
    # The index is null, and what is read through it has a predicate.
    one.absent = [i for i in one.path if i > first and code[i].operation == "LDG.E" and code[i].line[0] == "@"]
    return one


def predict(one: Kernel, tokens: int, depth: int, warps: int, resident: int, heads: int, gpu: Gpu) -> Prediction:
    """`heads` heads of all windows of all images; `warps` of a block and `resident` blocks as `warps_for` has them."""
    tiles, padded = -(-tokens // ROWS), -(-tokens // STEP) * STEP

    def rounds(count: int, number: int) -> int:
        return len(range(number, count, warps))

    def trips(kind: str, number: int) -> int:
        if kind == "tiles":
            return rounds(tiles, number)
        if kind == "values":
            return rounds(padded // STEP, number)
        if kind == "starts":
            return -(-padded // (32 * warps))
        together = sum(one.code[i].operation.startswith("LDGSTS") for loop, name in one.loops.items() if name == kind
                       for i in one.path if loop[0] <= i <= loop[1])  # fmt: skip
        return -(-padded * depth // 16 * 2 // (32 * warps * together))

    return one.predict(warps, trips, Launch(heads, resident, heads * tokens * depth * 4), gpu)
