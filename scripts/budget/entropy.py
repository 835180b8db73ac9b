"""patch_similarity_entropy of float32: range, density and gradient of 12 layers x 32 images x 196 vectors x 64."""

from __future__ import annotations

from collections.abc import Collection

from . import sass
from .kernel import Launch, Prediction, found
from .machine import Gpu

LAYERS, IMAGES, ROWS, DEPTH = 12, 32, 196, 64
TILE, CHUNK, FOUR = 64, 32, 4  # cells of a tile in a row, depth of an operand, steps of depth in a round of the loop
PLACES = 6  # of 10, that the similarities of a warp with 32 others reach, where vectors are drawn at random
WARPS, BLOCKS, BLOCKS_BACKWARD = 2, 8, 4  # of a block; of a multiprocessor
NARROW, CORNER = 0.6, 0.45  # work of a tile with few columns, and with few rows besides, of that of a whole one
NORMALISE, FINISH = 4.0, 3.0  # microseconds: one pass over 19 MB; a few blocks that wait for memory
GAP = 1.5  # from the end of one kernel to the work of the next
SOURCE = """#include "dfqvit/patch_similarity_entropy.cuh"
namespace dfqvit { namespace entropy { namespace cuda {
template __global__ void range_kernel<float>(Sets<float>, float*);
template __global__ void density_kernel<float>(Sets<float>, const float*, int64_t, int, float, double*);
template __global__ void backward_kernel<float>(Sets<float>, const float*, const float*, const float*, int64_t, int64_t, int,
                                                float, float*, float*);
}}}
"""
WORK = ["FFMA", "MUFU.EX2", "LDG.E.128", "LDS", "STG", "STS.128"]
TILES = ["depth", "chunks", "multiply"]
LOOPS = {
    "range": [*TILES, "parts"],
    "density": [*TILES, "parts", "places", "sums", "many sums"],
    "backward": ["factors", "tiles", *TILES, "parts", "places", "product", "units", "add", "rows", *["never"] * 3],
}


def predictions(gpu: Gpu, names: Collection[str] = tuple(LOOPS)) -> dict[str, Prediction]:
    """Of these kernels."""
    codes = sass.compiled(SOURCE)
    sets, tiles = LAYERS * IMAGES, -(-ROWS // TILE)
    whole = tiles - 1
    pairs = round(sets * (whole * (whole + 1) / 2 + whole * NARROW + CORNER))
    panels = round(sets * (whole + NARROW))
    result = {}
    for name, blocks, resident, passes in (
        ("range", pairs, BLOCKS, 1),
        ("density", pairs, BLOCKS, 1),
        ("backward", panels, BLOCKS_BACKWARD, 2),
    ):
        if name not in names:
            continue
        code = next(code for key, code in codes.items() if f"{name}_kernelI" in key)
        one = found(name, code, WORK, LOOPS[name])
        # of 4 panels or more that read them
        one.cached = ("LDG.E.128", "LDG.E.128.CONSTANT", "LDG.E", "LDG.E.CONSTANT")
        multiply = next(loop for loop, kind in one.loops.items() if kind == "multiply")
        chunk = next(loop for loop, kind in one.loops.items() if kind == "chunks")
        each, before = (
            sum(code[i].operation == "FFMA" for i in one.path if low <= i <= high)
            for low, high in (multiply, (chunk[0], multiply[0] - 1))
        )
        rounds = {
            "depth": 1,
            "chunks": DEPTH // CHUNK,
            "multiply": (CHUNK * TILE - before) // each,  # the compiler takes the first round out of the loop
            "parts": 2,
            "places": PLACES,
            "sums": 1,
            "factors": 1,
            "tiles": tiles,
            "product": 1,
            "units": 2,
            "add": TILE // FOUR,
            "rows": TILE // WARPS,
        }
        launch = Launch(blocks, resident, sets * ROWS * DEPTH * 4 * passes)
        result[name] = one.predict(WARPS, lambda kind, _, rounds=rounds: rounds.get(kind, 0), launch, gpu)
    return result


def times(found_: dict[str, Prediction]) -> dict[str, float]:
    """Microseconds of `similarity_range` and the entropy, and of its gradient, with their small kernels and all launches."""
    result = {"forward": found_["range"].time + found_["density"].time + 2 * (NORMALISE + FINISH) + 6 * GAP}
    if "backward" in found_:
        result["backward"] = found_["backward"].time + NORMALISE + 2 * GAP
    return result
