# mypy: allow-untyped-defs
"""Rounding to the integers of a grid, for the Triton kernels of all operators."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it leaves no room for a fraction, so the sum is rounded half to even.
ROUNDER = tl.constexpr(12582912.0)
LIMIT = tl.constexpr(4096.0)  # beyond every grid, and far within what ROUNDER can round


@triton.jit
def round_even(value):
    """`value` rounded half to even; float32, at most 2^22 in size."""
    return (value + ROUNDER) - ROUNDER


@triton.jit
def quantize(ratio, zero, greatest):
    """clamp(round(ratio) + zero, 0, greatest), half to even; float32."""
    near = tl.minimum(tl.maximum(ratio, -LIMIT), LIMIT)
    return tl.minimum(tl.maximum(round_even(near) + zero, 0.0), greatest)
