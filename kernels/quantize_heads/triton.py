# mypy: allow-untyped-defs
"""`quantize_heads` in Triton: for GPUs, and in the interpreter on CPUs.

A program makes a block of channels of Q, K or V of one token: one read of each channel and, where it is rotated, of its
partner, which lies in the same cache line or the next; one write. Division is IEEE's and nothing is contracted.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..triton_rounding import quantize

CELLS = 1024  # of a program


@triton.jit
def _heads_kernel(
    q, k, v, in_scale, in_zero, rope, out, heads, depth, tokens, turned,
    q_batch, q_head, q_token, q_channel, k_batch, k_head, k_token, k_channel, v_batch, v_head, v_token, v_channel,
    rope_head, greatest: tl.constexpr, HALF: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """rope may be None; the grid is [tokens of all images, blocks of channels, 3]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    width = heads * depth
    inside = column < width
    head, channel = column // depth, column % depth
    image, token = row // tokens, row % tokens
    if part == 0:
        base, head_stride, channel_stride = q + image * q_batch + token * q_token, q_head, q_channel
    elif part == 1:
        base, head_stride, channel_stride = k + image * k_batch + token * k_token, k_head, k_channel
    else:
        base, head_stride, channel_stride = v + image * v_batch + token * v_token, v_head, v_channel
    line = base + head.to(tl.int64) * head_stride
    x = tl.load(line + channel * channel_stride, mask=inside, other=0.0).to(tl.float32)
    if rope is not None:
        turn = token - (tokens - turned)
        if (part < 2) & (turn >= 0):
            if HALF:
                first = channel < depth // 2
                other = tl.where(first, channel + depth // 2, channel - depth // 2)
            else:
                first = channel % 2 == 0
                other = tl.where(first, channel + 1, channel - 1)
            partner = tl.load(line + other * channel_stride, mask=inside, other=0.0).to(tl.float32)
            partner = tl.where(first, -partner, partner)
            at = rope + head.to(tl.int64) * rope_head + turn * 2 * depth + channel
            sine = tl.load(at, mask=inside, other=0.0)
            cosine = tl.load(at + depth, mask=inside, other=0.0)
            x = x * cosine + partner * sine
    scale = tl.load(in_scale + part) + tl.zeros_like(x)
    integers = quantize(tl.div_rn(x, scale), tl.load(in_zero + part), greatest)
    tl.store(out + (3 * row + part) * width + column, integers.to(tl.int32).to(tl.uint8), mask=inside)


def quantize_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    in_scale: torch.Tensor,
    in_zero: torch.Tensor,
    bits: int,
    rope: torch.Tensor | None,
    half: bool,
) -> torch.Tensor:
    """As `reference.quantize_heads`."""
    batch, heads, tokens, depth = q.shape
    out = q.new_empty((batch, tokens, 3 * heads * depth), dtype=torch.uint8)
    if not out.numel():
        return out
    turns = None if rope is None else rope.float().contiguous()
    per_head = 0 if turns is None or turns.dim() == 2 else turns.stride(0)
    grid = (batch * tokens, triton.cdiv(heads * depth, CELLS), 3)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _heads_kernel[grid](
            q, k, v, in_scale.contiguous(), in_zero.contiguous(), turns, out, heads, depth, tokens,
            0 if turns is None else turns.shape[-2],
            *q.stride(), *k.stride(), *v.stride(), per_head,
            greatest=float((1 << bits) - 1), HALF=half, CELLS=CELLS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
