# mypy: allow-untyped-defs
"""`gate_quantize` in Triton: for GPUs, and in the interpreter on CPUs.

A program makes a block of channels of one row: both halves are read once, and one byte is written for each pair. Division is
IEEE's and nothing is contracted.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..triton_activations import activate
from ..triton_rounding import quantize

CELLS = 1024  # of a program


@triton.jit
def _gate_kernel(
    gate, value, scale, zero, out, channels, gate_row, value_row, scale_step,
    greatest: tl.constexpr, ACTIVATION: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The grid is [rows, blocks of channels]; scale_step is 0 where all channels share a scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    inside = column < channels
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_row + column, mask=inside, other=0.0).to(tl.float32)
    steps = tl.load(scale + column * scale_step, mask=inside, other=1.0)
    q = quantize(tl.div_rn(activate(g, ACTIVATION) * v, steps), tl.load(zero), greatest)
    tl.store(out + row * channels + column, q.to(tl.int32).to(tl.uint8), mask=inside)


def gate_quantize(
    gate: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    activation: str,
) -> torch.Tensor:
    """As `reference.gate_quantize`."""
    channels, shape = gate.shape[-1], gate.shape
    out = torch.empty(shape, dtype=torch.uint8, device=gate.device)
    if not out.numel():
        return out
    gate, value = (_rows(part, channels) for part in (gate, value))
    with torch.cuda.device(gate.device) if gate.is_cuda else contextlib.nullcontext():
        _gate_kernel[(len(gate), triton.cdiv(channels, CELLS))](
            gate, value, scale.contiguous(), zero_point, out, channels, gate.stride(0), value.stride(0), int(scale.numel() > 1),
            greatest=float((1 << bits) - 1), ACTIVATION=activation, CELLS=CELLS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _rows(part: torch.Tensor, channels: int) -> torch.Tensor:
    """[rows, channels] with the channels side by side: a view where there is one."""
    rows = part.reshape(-1, channels)
    return rows if rows.stride(1) == 1 else rows.contiguous()
