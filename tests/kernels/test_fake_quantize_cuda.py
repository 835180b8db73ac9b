"""The CUDA kernel of fake_quantize: its own source run on the CPU."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from dfqvit.kernels.fake_quantize import reference

from ..conftest import DTYPES
from .cuda_emulator import TYPES, Emulator, compiled
from .test_fake_quantize import SHAPES, brute_force, sample


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(compiled("fake_quantize", tmp_path_factory.mktemp("cuda")))


def run(emulator, grad, x, scale, zero, low, high, axis, blocks=None):
    """As csrc/cuda/fake_quantize_kernels.cu launches it."""
    out = torch.empty_like(x)
    out.view(torch.uint8).fill_(0xAB) if x.dim() else out.fill_(math.nan)
    inner = (
        math.prod(x.shape[(axis or 0) + 1 :]) if axis is None or axis >= 0 else math.prod(x.shape[x.dim() + axis + 1 :])
    )
    whole = ctypes.c_int64
    blocks = emulator("blocks", whole(x.numel())) if blocks is None else blocks
    sizes = (whole(x.numel()), whole(scale.numel()), whole(inner), float(low), float(high))
    emulator("fake_quantize", whole(blocks), TYPES[x.dtype], grad, x, out, scale, zero, *sizes)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [case for case in SHAPES if 0 not in case[0]], ids=str)
@pytest.mark.parametrize("bits", [2, 8])
def test_same_bits_as_one_value_at_a_time(seed, emulator, shape, axis, dtype, bits):
    x, scale, zero, low, high = sample(shape, axis, dtype, bits)
    found = run(emulator, None, x, scale, zero, low, high, axis)
    assert torch.equal(found, brute_force(x, scale, zero, low, high, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 2, None])
def test_gradient_and_blocks_that_take_more_than_their_share(seed, emulator, dtype, blocks):
    x, scale, zero, low, high = sample((3, 7, 301), 1, dtype, 3)
    grad = torch.randn(x.shape).to(dtype)
    found = run(emulator, grad, x, scale, zero, low, high, 1, blocks)
    assert torch.equal(found, reference.fake_quantize_backward(grad, x, scale, zero, low, high, 1))
    assert torch.equal(
        run(emulator, None, x, scale, zero, low, high, 1, blocks), brute_force(x, scale, zero, low, high, 1)
    )


def test_ties_infinity_and_nan(emulator):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, math.inf, -math.inf, math.nan, 1e30])
    found = run(emulator, None, x, torch.ones(1), torch.zeros(1), -8, 7, None)
    assert found[:6].tolist() == [0.0, 2.0, 2.0, 0.0, 7.0, -8.0]
    assert math.isnan(found[6])
    assert found[7] == 7.0


def test_blocks(emulator):
    """Four values a thread, and no more blocks than a launch should have."""
    found = [emulator("blocks", ctypes.c_int64(n)) for n in (1, 1024, 1025, 1 << 40)]
    assert found == [1, 1, 2, 1 << 20]
