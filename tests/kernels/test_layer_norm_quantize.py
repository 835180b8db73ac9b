"""layer_norm_quantize on every backend and CPU path against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfqvit.kernels import layer_norm_quantize, use_backend

from ..conftest import DTYPES, each_path

SHAPES = [(3, 5, 192), (7, 1), (2, 17), (1, 13, 33), (0, 8), (300, 768)]


def sample(shape, dtype):
    x = (torch.randn(shape) * 3 + torch.randn(shape[-1])).to(dtype)
    return x, torch.randn(shape[-1]), torch.randn(shape[-1])


def oracle(x, weight, bias, eps, scale, zero_point, bits):
    """(integers, how far each lies from the middle between two)."""
    wide = x.double().numpy()
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps)
    ratio = (normed * weight.double().numpy() + bias.double().numpy()) / scale
    q = np.clip(np.rint(ratio) + zero_point, 0, 2**bits - 1)
    return torch.from_numpy(q), torch.from_numpy(np.abs(np.abs(ratio - np.floor(ratio)) - 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("bits", "zero_point"), [(8, 0), (8, 131), (4, 15)])
def test_matches_numpy_but_for_ties(seed, isa, backend, shape, dtype, bits, zero_point):
    x, weight, bias = sample(shape, dtype)
    scale = 0.031 if bits == 8 else 0.5
    with use_backend(backend):
        found = layer_norm_quantize(x, weight, bias, eps=1e-6, scale=scale, zero_point=zero_point, bits=bits)
    expected, margin = oracle(x, weight, bias, 1e-6, np.float32(scale), zero_point, bits)
    assert found.dtype == torch.uint8
    assert found.shape == x.shape
    different = found.double() != expected
    assert bool((margin[different] < 2e-3).all())
    assert bool(((found.double() - expected).abs() <= 1).all())


def test_all_cpu_paths_agree_bit_for_bit(seed):
    x, weight, bias = sample((50, 100), torch.float32)
    results = [layer_norm_quantize(x, weight, bias, scale=0.02, zero_point=100) for _ in each_path()]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_extreme_values_are_clamped(isa):
    weight, bias = torch.tensor([1e20, -1e20, 0.0]), torch.zeros(3)
    with use_backend("cpu"):
        found = layer_norm_quantize(torch.tensor([[1.0, -1.0, 0.0]]), weight, bias, scale=1e-3, zero_point=7)
    assert found.tolist() == [[255, 255, 7]]


def test_non_contiguous_rows(seed):
    x = torch.randn(6, 4, 10).transpose(0, 1)
    weight, bias = torch.randn(10), torch.randn(10)
    found = layer_norm_quantize(x, weight, bias, scale=0.05, zero_point=9)
    assert torch.equal(found, layer_norm_quantize(x.contiguous(), weight, bias, scale=0.05, zero_point=9))


def test_operator_contract(seed):
    arguments = (torch.randn(3, 8), torch.randn(8), torch.randn(8), 1e-6, torch.tensor(0.1), torch.tensor(3.0), 8)
    torch.library.opcheck(torch.ops.dfqvit.layer_norm_quantize.default, arguments)


def test_bad_input():
    x, weight = torch.randn(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight had shape \(3,\); it must be \[4\]"):
        layer_norm_quantize(x, torch.ones(3), weight, scale=1.0, zero_point=0)
    with pytest.raises(ValueError, match=r"scale had 4 values; it must be a scalar"):
        layer_norm_quantize(x, weight, weight, scale=weight, zero_point=0)
    with pytest.raises(ValueError, match=r"scale held -1; every scale must be greater than 0"):
        layer_norm_quantize(x, weight, weight, scale=-1.0, zero_point=0)
    with pytest.raises(ValueError, match=r"bits was 9; it may be a whole number from 2 to 8"):
        layer_norm_quantize(x, weight, weight, scale=1.0, zero_point=0, bits=9)
    with pytest.raises(TypeError, match=r"x had dtype torch.int64"):
        layer_norm_quantize(torch.ones(2, 4, dtype=torch.int64), weight, weight, scale=1.0, zero_point=0)
