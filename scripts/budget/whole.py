"""A vision transformer at batch 256, end to end: the predictions of its kernels, summed."""

from __future__ import annotations

from dataclasses import dataclass

from . import linear
from .machine import H200

BATCH, TOKENS, BLOCKS, PATCHES, CLASSES = 256, 197, 12, 196, 1000
MODELS = {"DeiT-T": 192, "DeiT-S": 384, "DeiT-B": 768}
GAP = 1.0  # microseconds from one kernel to the next in a CUDA graph
FLASH = (
    150e12  # multiply-adds a second that flash attention makes at such sizes (arXiv 2407.08608, heads of 64, forward)
)


@dataclass(frozen=True)
class Whole:
    """Milliseconds; `bf16`: by cuBLAS and flash attention, all that is not a product at the speed of memory."""

    name: str
    linear: float
    attention: float
    norms: float
    rest: float
    bf16: float

    @property
    def total(self) -> float:
        """Of all."""
        return self.linear + self.attention + self.norms + self.rest


def model(name: str, counts: linear.Counts, attention: float, norm: float) -> Whole:
    """`attention`: microseconds of DeiT-B's 12 heads; `norm`: of one LayerNorm of this model."""
    width, rows = MODELS[name], BATCH * TOKENS
    layers = linear.layers(counts, width, rows)
    heads = width / 64
    bf16_bytes = rows * width * 2
    squares = 2 * BATCH * heads * TOKENS**2 * 64 / FLASH
    # Both norms read and write, both residual sums read twice and write, GELU reads and writes four times the width.
    others = bf16_bytes * (4 + 6 + 8) / H200.bytes_a_second
    # 768 to the width: as DeiT-B's proj, in rows of patches
    embedding = linear.layers(counts, width, BATCH * PATCHES)[1]
    embedding_time = embedding.time * 768 / width
    return Whole(
        name,
        (BLOCKS * sum(layer.time for layer in layers) + embedding_time) / 1e3,
        BLOCKS * attention * heads / 12 / 1e3,
        (2 * BLOCKS + 1) * norm / 1e3,
        (BLOCKS * 7 + 8) * GAP / 1e3,
        (BLOCKS * (sum(layer.bf16 for layer in layers) + (squares + others) * 1e6) + embedding.bf16 * 768 / width)
        / 1e3,
    )
