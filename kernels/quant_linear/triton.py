# mypy: allow-untyped-defs
"""`quant_linear` in Triton: for GPUs that the compiled kernel is not built for, and in the interpreter on CPUs.

Two small kernels come first: the integers of a float x, and the sums of the weights' rows. The product then reads bytes only.
A program makes one BLOCK_M x BLOCK_N tile: activations are moved to the signed range (x - 128), because the tensor cores of
`tl.dot` take operands of one type; weights of fewer than 8 bits are unpacked in registers from the stream that `pack_weight`
writes, value k of a row in its bits [k * bits, (k + 1) * bits). Float operations come in the reference's order, each rounded by
itself: division is IEEE's, and products and sums are not contracted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..pack_weight import round_nearest
from ..triton_activations import activate
from ..triton_rounding import quantize


@dataclass(frozen=True)
class Tile:
    """What one program makes, and how: rows, outputs and depth of a step, warps, stages of the pipeline."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


# By the rows of x, up to and with: chosen by arithmetic (operands of a step fit the shared memory twice), not yet tuned on a GPU.
TILES = {
    32: Tile(32, 64, 128, 4, 4),
    1024: Tile(64, 64, 128, 4, 4),
    1 << 62: Tile(128, 128, 64, 8, 4),
}


def tile_of(rows: int) -> Tile:
    """The row of TILES for x of `rows` rows."""
    return next(tile for most, tile in TILES.items() if rows <= most)


@triton.jit
def _quantize_kernel(x, out, scale, zero, count, greatest: tl.constexpr, BLOCK: tl.constexpr):
    """The integers of x, uint8."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    q = quantize(tl.div_rn(value, tl.load(scale) + tl.zeros_like(value)), tl.load(zero), greatest)
    tl.store(out + index, q.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def _weights(weight, outputs, start, count, depth, row_bytes, BITS: tl.constexpr, DEPTH: tl.constexpr):
    """The integers int8 [outputs, DEPTH] of columns start to start + DEPTH; zero outside the matrix."""
    columns = start + tl.arange(0, DEPTH)
    inside = (outputs < count)[:, None] & (columns < depth)[None, :]
    rows = weight + outputs.to(tl.int64)[:, None] * row_bytes
    if BITS == 8:  # where the compiler sees that neighbours are neighbours, and copies 16 bytes at a time
        return tl.load(rows + columns[None, :], mask=inside, other=0).to(tl.int8, bitcast=True)
    else:
        bit = columns * BITS
        low = tl.load(rows + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a value may reach into the next byte, which the row then has
            more = inside & ((bit % 8 + BITS) > 8)[None, :]
            low += tl.load(rows + (bit // 8 + 1)[None, :], mask=more, other=0).to(tl.int32) * 256
        field = (low >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
        SIGN: tl.constexpr = 1 << (BITS - 1)
        return tl.where(inside, (field ^ SIGN) - SIGN, 0).to(tl.int8)


@triton.jit
def _sums_kernel(weight, sums, count, row_bytes, depth, BITS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """The sum of each row's integers, int32."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS], dtype=tl.int32)
    start = tl.program_id(0) * 0
    while start < depth:
        total += tl.sum(_weights(weight, outputs, start, count, depth, row_bytes, BITS, DEPTH).to(tl.int32), axis=1)
        start += DEPTH
    tl.store(sums + outputs, total, mask=outputs < count)


@triton.jit
def _product_kernel(
    x, weight, sums, bias, acm, residual, out, x_scale, x_zero, w_scale, out_scale, out_zero, rows, count, tokens, row_bytes,
    depth: tl.constexpr, BITS: tl.constexpr, ACTIVATION: tl.constexpr, greatest: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the result; bias, acm, residual and out_scale may be None."""
    across = tl.cdiv(count, BLOCK_N)
    program = tl.program_id(0)  # neighbours share their rows of x
    m = program // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < rows, n < count
    lines = x + m.to(tl.int64)[:, None] * depth
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        q = tl.load(lines + k[None, :], mask=inside_m[:, None] & (k < depth)[None, :], other=128)
        w = _weights(weight, n, start, count, depth, row_bytes, BITS, DEPTH)
        total = tl.dot((q ^ 128).to(tl.int8, bitcast=True), tl.trans(w), total, out_dtype=tl.int32)
    shift = 128 - tl.load(x_zero).to(tl.int32)
    total += (tl.load(sums + n, mask=inside_n, other=0) * shift)[None, :]

    scale = tl.load(x_scale) * tl.load(w_scale + n, mask=inside_n, other=0.0)
    y = scale[None, :] * total.to(tl.float32)
    cells = inside_m[:, None] & inside_n[None, :]
    addend = tl.zeros_like(y)
    if bias is not None:
        addend += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if acm is not None:
        addend += tl.load(acm + (m % tokens)[:, None] * count + n[None, :], mask=cells, other=0.0).to(tl.float32)
    y += addend
    y = activate(y, ACTIVATION)
    place = m.to(tl.int64)[:, None] * count + n[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=cells, other=0.0).to(tl.float32)
    if out_scale is not None:
        step = tl.load(out_scale + n, mask=inside_n, other=1.0)[None, :] + tl.zeros_like(y)
        y = quantize(tl.div_rn(y, step), tl.load(out_zero + n, mask=inside_n, other=0.0)[None, :], greatest).to(
            tl.int32
        )
    tl.store(out + place, y.to(out.dtype.element_ty), mask=cells)


def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_scale: torch.Tensor,
    a_bits: int,
    w_bits: int,
    activation: str,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero: torch.Tensor | None = None,
    out_bits: int = 8,
    out_dtype: torch.dtype | None = None,
    w_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.quant_linear`; the weight is float or packed."""
    depth, count = x.shape[-1], w_scale.numel()
    rows = x.shape[:-1].numel()
    out = x.new_empty((*x.shape[:-1], count), dtype=out_dtype or x.dtype)
    if out.numel() == 0:
        return out
    sums = None if w_sums is None or weight.dtype != torch.uint8 else w_sums.contiguous()
    if weight.is_floating_point():
        weight, w_bits = round_nearest(weight.float(), w_scale, w_bits).view(torch.uint8), 8
    weight, w_scale = weight.contiguous(), w_scale.contiguous()
    addends = [None if tensor is None else tensor.contiguous() for tensor in (bias, acm, residual)]
    outs = [None if tensor is None else tensor.contiguous() for tensor in (out_scale, out_zero)]
    tile = tile_of(rows)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        x = _integers(x.contiguous(), x_scale, x_zero, a_bits)
        if sums is None:
            sums = torch.empty(count, dtype=torch.int32, device=x.device)
            _sums_kernel[(triton.cdiv(count, 16),)](
                weight, sums, count, weight.shape[1], depth=depth, BITS=w_bits, OUTPUTS=16, DEPTH=128
            )
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(count, tile.outputs)
        _product_kernel[(programs,)](
            x, weight, sums, *addends, out, x_scale, x_zero, w_scale, *outs, rows, count,
            1 if acm is None else len(acm), weight.shape[1],
            depth=depth, BITS=w_bits, ACTIVATION=activation, greatest=float((1 << out_bits) - 1),
            BLOCK_M=tile.rows, BLOCK_N=tile.outputs, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _integers(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """x itself if it holds integers."""
    if x.dtype == torch.uint8:
        return x
    q = torch.empty_like(x, dtype=torch.uint8)
    if x.numel():
        block = 1024
        grid = (triton.cdiv(x.numel(), block),)
        _quantize_kernel[grid](x, q, scale, zero, x.numel(), greatest=float((1 << bits) - 1), BLOCK=block)
    return q
