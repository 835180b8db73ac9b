# mypy: allow-untyped-defs
"""`quant_attention` in Triton: for GPUs, and in the interpreter on CPUs.

A program takes a block of queries of one head of one window and walks the keys twice: for the greatest score of each query,
then for the steps of 1/255 and their product with the values. (The steps are rounded against the final maximum, so an online
softmax would not give the same integers; with one block of keys the compiler keeps the scores and the second walk is free.)
Tokens are read where `index` says, so windows are never copied. The tensor cores take operands of one type: q, k, v and the
steps are moved to the signed range (- 128), and the sums put right by those of the rows and columns, in integers, exactly.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..triton_rounding import quantize, round_even


@dataclass(frozen=True)
class Tile:
    """What one program makes, and how: queries, keys of a step, depth, warps, stages of the pipeline."""

    queries: int
    keys: int
    depth: int
    warps: int
    stages: int


def tile_of(tokens: int, depth: int, addends: bool) -> Tile:
    """Powers of two from the least that the tensor cores take, so large that nothing spills (docs/kernels/quant_attention.md)."""
    width, tokens = max(triton.next_power_of_2(depth), 32), triton.next_power_of_2(tokens)
    return Tile(
        min(max(tokens, 16), 64),
        min(max(tokens, 32), 64),
        width,
        4 if width <= 64 and not (addends and tokens > 64) else 8,
        1 if addends else 2,
    )


@triton.jit
def _bytes(base, tokens, inside, stride: tl.constexpr, depth: tl.constexpr, DEPTH: tl.constexpr):
    """The bytes [tokens, DEPTH] minus 128, int8; zero outside."""
    d = tl.arange(0, DEPTH)
    place = base + tokens.to(tl.int64)[:, None] * stride + d[None, :]
    value = tl.load(place, mask=inside[:, None] & (d < depth)[None, :], other=128)
    return (value ^ 128).to(tl.int8, bitcast=True)


@triton.jit
def _tokens(index, at, inside):
    """Which tokens of the image are those at `at` of the window; index may be None."""
    if index is None:
        return at
    else:
        return tl.load(index + at, mask=inside, other=0)


@triton.jit
def _scores(
    q, q_sums, q_shift, k_shift, base, index, bias, mask, factor, rows, start,
    tokens: tl.constexpr, stride: tl.constexpr, depth: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The scores float32 of the queries with the keys from `start` on; -inf where there is no key."""
    at = start + tl.arange(0, KEYS)
    k = _bytes(base, _tokens(index, at, at < tokens), at < tokens, stride, depth, DEPTH)
    total = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    k_sums = tl.sum(k.to(tl.int32), axis=1)
    total += (q_sums * k_shift + depth * q_shift * k_shift)[:, None] + (k_sums * q_shift)[None, :]
    s = total.to(tl.float32) * factor
    cells = (rows < tokens)[:, None] & (at < tokens)[None, :]
    place = rows[:, None] * tokens + at[None, :]
    if bias is not None:
        s += tl.load(bias + place, mask=cells, other=0.0)
    if mask is not None:
        s += tl.load(mask + place, mask=cells, other=0.0)
    return tl.where((at < tokens)[None, :], s, -float("inf"))


@triton.jit
def _attention_kernel(
    qkv, in_scale, in_zero, scale, bias, mask, index, out_scale, out_zero, head_scale, out, windows,
    heads: tl.constexpr, tokens: tl.constexpr, depth: tl.constexpr, greatest: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block of queries; neighbours share their head's keys and values. What is not there is None."""
    blocks: tl.constexpr = (tokens + QUERIES - 1) // QUERIES
    program = tl.program_id(0)
    block, head, place = program % blocks, program // blocks % heads, program // (blocks * heads)
    window, image = place % windows, (place // windows).to(tl.int64)
    channels: tl.constexpr = heads * depth
    base = qkv + image * windows * tokens * (3 * channels) + head * depth
    if index is not None:
        index += window * tokens
    if bias is not None:
        bias += head * tokens * tokens
    if mask is not None:
        mask += window.to(tl.int64) * tokens * tokens
    q_shift = 128 - tl.load(in_zero).to(tl.int32)
    k_shift = 128 - tl.load(in_zero + 1).to(tl.int32)
    v_shift = 128 - tl.load(in_zero + 2).to(tl.int32)
    factor = scale * tl.load(in_scale) * tl.load(in_scale + 1)
    if head_scale is not None:
        factor *= tl.load(head_scale + head)

    rows = block * QUERIES + tl.arange(0, QUERIES)
    inside = rows < tokens
    row_tokens = _tokens(index, rows, inside)
    q = _bytes(base, row_tokens, inside, 3 * channels, depth, DEPTH)
    q_sums = tl.sum(q.to(tl.int32), axis=1)
    top = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    for start in range(0, tokens, KEYS):
        s = _scores(
            q, q_sums, q_shift, k_shift, base + channels, index, bias, mask, factor, rows, start,
            tokens, 3 * channels, depth, KEYS, DEPTH,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(s, axis=1))
    total = tl.zeros([QUERIES, DEPTH], dtype=tl.int32)
    v_sums = tl.zeros([DEPTH], dtype=tl.int32)
    sums = tl.zeros([QUERIES], dtype=tl.int32)
    for start in range(0, tokens, KEYS):
        s = _scores(
            q, q_sums, q_shift, k_shift, base + channels, index, bias, mask, factor, rows, start,
            tokens, 3 * channels, depth, KEYS, DEPTH,
        )  # fmt: skip
        p = round_even(255.0 * tl.exp(s - top[:, None])).to(tl.int32)
        at = start + tl.arange(0, KEYS)
        v = _bytes(base + 2 * channels, _tokens(index, at, at < tokens), at < tokens, 3 * channels, depth, DEPTH)
        total = tl.dot((p - 128).to(tl.int8), v, total, out_dtype=tl.int32)
        v_sums += tl.sum(v.to(tl.int32), axis=0)
        sums += tl.sum(p, axis=1)
    total += (128 * v_sums)[None, :] + (sums * v_shift)[:, None]

    y = tl.load(in_scale + 2) * total.to(tl.float32)
    y = tl.div_rn(y, sums.to(tl.float32)[:, None] + tl.zeros_like(y))
    if out_scale is not None:
        y = quantize(tl.div_rn(y, tl.load(out_scale) + tl.zeros_like(y)), tl.load(out_zero), greatest).to(tl.int32)
    d = tl.arange(0, DEPTH)
    lines = out + image * windows * tokens * channels + head * depth
    cells = inside[:, None] & (d < depth)[None, :]
    tl.store(lines + row_tokens.to(tl.int64)[:, None] * channels + d[None, :], y.to(out.dtype.element_ty), mask=cells)


def quant_attention(
    qkv: torch.Tensor,
    heads: int,
    in_scale: torch.Tensor,
    in_zero: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_zero: torch.Tensor | None,
    out_bits: int,
    head_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.quant_attention`."""
    batch, image, width = qkv.shape
    windows, tokens = (1, image) if index is None else index.shape
    depth = width // 3 // heads
    out = qkv.new_empty(batch, image, width // 3, dtype=torch.float32 if out_scale is None else torch.uint8)
    if not out.numel():
        return out
    tile = tile_of(tokens, depth, bias is not None or mask is not None)
    programs = triton.cdiv(tokens, tile.queries) * heads * windows * batch
    with torch.cuda.device(qkv.device) if qkv.is_cuda else contextlib.nullcontext():
        _attention_kernel[(programs,)](
            qkv.contiguous(), in_scale.contiguous(), in_zero.contiguous(), scale,
            *(None if t is None else t.contiguous() for t in (bias, mask, index)),
            out_scale, out_zero, None if head_scale is None else head_scale.contiguous(), out, windows,
            heads=heads, tokens=tokens, depth=depth, greatest=float((1 << out_bits) - 1),
            QUERIES=tile.queries, KEYS=tile.keys, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
