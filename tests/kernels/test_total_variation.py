"""total_variation on every backend and CPU path against a loop over pixels in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfqvit.kernels import total_variation, use_backend

from ..conftest import DTYPES, threads

SHAPES = [(2, 3, 7, 5), (1, 1, 1, 1), (3, 2, 1, 9), (2, 1, 9, 1), (1, 4, 2, 2), (2, 3, 33, 70), (0, 3, 4, 4)]
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


def brute_force(images):
    """[B]: for each direction the root of the sum over pixel pairs, one pair at a time."""
    result = []
    for image in images.double().numpy():
        total = 0.0
        height, width = image.shape[1:]
        for down, across in NEIGHBOURS:
            pairs = [
                (image[:, y, x] - image[:, y + down, x + across])
                for y in range(height - down)
                for x in range(max(0, -across), width - max(0, across))
            ]
            total += np.sqrt(np.square(np.array(pairs)).sum())
        result.append(total)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_brute_force(seed, isa, backend, shape, dtype):
    images = torch.randn(shape).to(dtype)
    with use_backend(backend):
        found = total_variation(images)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), brute_force(images), rtol=2e-6, atol=1e-6)


def test_reference_gradient_in_float64(seed):
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, images)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_matches_the_float64_reference(seed, isa, shape, dtype):
    images = torch.randn(shape).to(dtype)
    outer = torch.randn(shape[0])
    gradients = []
    for backend, copy in (("cpu", images), ("reference", images.double())):
        leaf = copy.clone().requires_grad_()
        with use_backend(backend):
            total_variation(leaf).backward(outer.to(torch.float64 if backend == "reference" else torch.float32))
        gradients.append(leaf.grad)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert gradients[0].dtype == dtype
    assert torch.allclose(gradients[0].double(), gradients[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_constant_image_has_no_gradient(backend):
    images = torch.full((1, 3, 6, 6), 0.7, requires_grad=True)
    with use_backend(backend):
        value = total_variation(images)
        value.sum().backward()
    assert value.tolist() == [0.0]
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_results_do_not_depend_on_threads_or_strides(seed):
    images = torch.randn(5, 3, 40, 24).permute(0, 1, 3, 2)
    with threads(1):
        one = total_variation(images)
    with threads(2):
        two = total_variation(images.contiguous())
    assert torch.equal(one, two)


def test_operator_contract(seed):
    torch.library.opcheck(torch.ops.dfqvit.total_variation.default, (torch.randn(2, 3, 5, 6),))
    torch.library.opcheck(
        torch.ops.dfqvit.total_variation_backward.default, (torch.rand(2, 4), torch.randn(2, 3, 5, 6))
    )


def test_bad_input():
    with pytest.raises(ValueError, match=r"images had shape \(3, 4, 4\); it must be \[B, C, H, W\]"):
        total_variation(torch.randn(3, 4, 4))
    with pytest.raises(TypeError, match=r"images had dtype torch.int64"):
        total_variation(torch.ones(1, 3, 4, 4, dtype=torch.int64))
