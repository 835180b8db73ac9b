"""fake_quantize on every backend and CPU path against a scalar computation in Python's own floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dfqvit.kernels import extension, fake_quantize, use_backend
from dfqvit.kernels.fake_quantize import op, reference

from ..conftest import DTYPES

SHAPES = [((), None), ((1,), None), ((7, 13), 0), ((7, 13), 1), ((2, 3, 5, 11), 1), ((2, 3, 5, 11), -1), ((0, 4), 1)]


def brute_force(x, scale, zero, quant_min, quant_max, axis):
    """One value at a time; np.float32 division, Python's round (half to even)."""
    flat = x.float().numpy()
    result = np.empty(flat.shape, dtype=np.float32)
    for index in np.ndindex(*flat.shape):
        channel = index[axis] if axis is not None else 0
        s, z = np.float32(scale[channel]), float(zero[channel])
        q = min(max(round(float(flat[index] / s)) + z, quant_min), quant_max)
        result[index] = np.float32(q - z) * s
    return torch.from_numpy(result).to(x.dtype)


def sample(shape, axis, dtype, bits=8, signed=False):
    x = (torch.randn(shape) * 3).to(dtype)
    channels = 1 if axis is None else x.shape[axis]
    scale = torch.rand(channels) * 0.05 + 1e-3
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    zero = torch.randint(low, high + 1, (channels,)).float()
    return x, scale, zero, low, high


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_matches_brute_force_on_every_cpu_path(seed, isa, shape, axis, dtype, bits):
    x, scale, zero, low, high = sample(shape, axis, dtype, bits)
    expected = brute_force(x, scale, zero, low, high, axis)
    with use_backend("cpu"):
        found = fake_quantize(x, scale, zero, quant_min=low, quant_max=high, axis=axis)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_reference_matches_brute_force(seed, shape, axis, dtype):
    x, scale, zero, low, high = sample(shape, axis, dtype, 4, signed=True)
    with use_backend("reference"):
        found = fake_quantize(x, scale, zero, quant_min=low, quant_max=high, axis=axis)
    assert torch.equal(found, brute_force(x, scale, zero, low, high, axis))


def test_halves_round_to_even(isa):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    with use_backend("cpu"):
        found = fake_quantize(x, 1.0, 0, quant_min=-8, quant_max=7)
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, -2.0]


def test_large_tensors_are_split_between_threads_without_seams(seed, isa):
    x, scale, zero, low, high = sample((3, 17, 4099), 1, torch.float32)
    with use_backend("cpu"):
        found = fake_quantize(x, scale, zero, quant_min=low, quant_max=high, axis=1)
    with use_backend("reference"):
        expected = fake_quantize(x, scale, zero, quant_min=low, quant_max=high, axis=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_not_a_number_stays_one(backend):
    if backend == "cpu" and extension.load()[0] is None:
        pytest.skip(extension.load()[1])
    with use_backend(backend):
        found = fake_quantize(torch.tensor([math.nan, 1.0]), 0.1, 0, quant_min=0, quant_max=255)
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_passes_where_nothing_was_clamped(seed, isa, dtype):
    x, scale, zero, low, high = sample((5, 33), 1, dtype, 3)
    x.requires_grad_()
    grad = torch.randn(33, 5).t().to(dtype)  # not contiguous
    with use_backend("cpu"):
        fake_quantize(x, scale, zero, quant_min=low, quant_max=high, axis=1).backward(grad)
    q = (x.detach().float() / scale).round() + zero
    assert torch.equal(x.grad, torch.where((q >= low) & (q <= high), grad, torch.zeros_like(grad)))


def test_reference_has_the_lsq_gradient_of_the_scale(seed):
    x = torch.randn(50, dtype=torch.float64) * 4
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = reference.fake_quantize(x, scale, torch.tensor(0.0, dtype=torch.float64), -8, 7, 0)
    (found,) = torch.autograd.grad(y.sum(), scale)
    ratio = x / 0.3
    inside = (ratio.round() >= -8) & (ratio.round() <= 7)
    expected = torch.where(inside, ratio.round() - ratio, ratio.round().clamp(-8, 7)).sum()
    assert found == pytest.approx(float(expected))


def test_non_contiguous_input(seed, device):
    x = torch.randn(6, 4, 5, device=device).transpose(0, 2)
    found = fake_quantize(x, 0.1, 3, quant_min=0, quant_max=15)
    assert torch.equal(found, fake_quantize(x.contiguous(), 0.1, 3, quant_min=0, quant_max=15))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_cuda_matches_reference_bit_for_bit(seed, shape, axis, dtype):
    x, scale, zero, low, high = sample(shape, axis, dtype)
    arguments = [t.cuda() for t in (x, scale, zero)]
    grad = torch.randn_like(arguments[0])
    results = []
    for backend in ("cuda", "reference"):
        leaf = arguments[0].clone().requires_grad_()
        with use_backend(backend):
            y = fake_quantize(leaf, *arguments[1:], quant_min=low, quant_max=high, axis=axis)
            y.backward(grad)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_opcheck(seed, device):
    x, scale, zero, low, high = sample((4, 9), 1, torch.float32)
    arguments = (*(t.to(device) for t in (x, scale, zero)), low, high, 1)
    torch.library.opcheck(torch.ops.dfqvit.fake_quantize, arguments)
    torch.library.opcheck(torch.ops.dfqvit.fake_quantize_backward, (x.to(device), *arguments))


def test_compiles_without_graph_breaks(seed):
    def step(x):
        return (fake_quantize(x * 2, 0.1, 7, quant_min=0, quant_max=15) * x).sum()

    x = torch.randn(3, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(step(x), x)
    (found,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.int32)}, "x had dtype torch.int32; it may be"),
        ({"x": [1.0]}, "x was a list; it must be a torch.Tensor"),
        ({"scale": 0.0}, "scale held 0; every scale must be greater than 0"),
        ({"scale": math.inf}, "scale held NaN or Inf"),
        ({"scale": torch.ones(3)}, "axis was None; with 3 scales"),
        ({"scale": torch.ones(2), "axis": 0}, "scale had 2 values; dimension 0 of x has 3 channels"),
        ({"scale": torch.ones(3), "axis": 4}, "axis was 4; x has 1 dimensions"),
        ({"scale": torch.ones(3, 1), "axis": 0}, "scale had shape"),
        ({"zero_point": torch.ones(2)}, "zero_point had 2 values; it must have 1 or 1"),
        ({"quant_min": 9}, "quant_min was 9; it must be less than quant_max"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(3), "scale": 1.0, "zero_point": 0, "quant_min": 0, "quant_max": 7} | change
    with pytest.raises((ValueError, TypeError), match=message):
        fake_quantize(arguments.pop("x"), **arguments)


def test_float64_runs_on_the_reference():
    arguments = (torch.zeros(2, dtype=torch.float64), torch.ones(1), torch.zeros(1), 0, 7, 0)
    assert op.forward.resolve(*arguments).name == "reference"
