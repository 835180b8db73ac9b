# mypy: allow-untyped-defs
"""`layer_norm_quantize` in Triton: for GPUs, and in the interpreter on CPUs.

A program holds a few whole rows in registers: one read, one write. Mean and variance are taken in two steps, as the variance
of what lies far from zero needs. Values are multiplied by the inverses of the deviation and of the scale, since two divisions
of every value took most of the time; nothing is contracted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..triton_rounding import quantize

CELLS = 4096  # of a program


@dataclass(frozen=True)
class Launch:
    """What one program makes, and its warps."""

    rows: int
    width: int
    warps: int


def launch_of(channels: int) -> Launch:
    """Rows of at most CELLS cells together, 32 cells a thread."""
    width = triton.next_power_of_2(channels)
    rows = max(1, min(CELLS // width, 16))
    return Launch(rows, width, min(max(rows * width // 1024, 1), 16))


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, scale, zero, eps, rows, channels,
    greatest: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    place = row[:, None] * channels + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.zeros([ROWS], dtype=tl.float32) + channels
    mean = tl.div_rn(tl.sum(value, axis=1), count)
    centred = tl.where(inside, value - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=1), count) + eps)
    gain = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    inverse = tl.div_rn(tl.zeros_like(deviation) + 1.0, deviation)
    steps = tl.div_rn(1.0, tl.maximum(tl.load(scale), 2.0**-126))  # finite, so that 0 stays 0
    normed = centred * inverse[:, None] * gain[None, :] + shift[None, :]
    q = quantize(normed * steps, tl.load(zero), greatest)
    tl.store(out + place, q.to(tl.int32).to(tl.uint8), mask=inside)


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """As `reference.layer_norm_quantize`."""
    x, channels = x.contiguous(), x.shape[-1]
    rows, launch = x.shape[:-1].numel(), launch_of(channels)
    out = torch.empty_like(x, dtype=torch.uint8)
    if not out.numel():
        return out
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _layer_norm_kernel[(triton.cdiv(rows, launch.rows),)](
            x, weight.contiguous(), bias.contiguous(), out, scale, zero_point, eps, rows,
            channels=channels, greatest=float((1 << bits) - 1), ROWS=launch.rows, WIDTH=launch.width,
            num_warps=launch.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out
