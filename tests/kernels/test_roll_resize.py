"""roll_resize on every backend and CPU path against one pixel at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dfqvit.kernels import roll_resize, use_backend

from ..conftest import DTYPES

CASES = [((2, 3, 7, 5), (4, 9)), ((1, 1, 1, 1), (3, 2)), ((3, 2, 16, 20), (16, 20)), ((1, 4, 33, 18), (5, 40))]


def grid(shape, size):
    """Random positions, some outside the image, some whole numbers; shifts over several rounds."""
    batch, _, height, width = shape
    rows = torch.rand(batch, size[0]) * (height + 3) - 2
    columns = torch.rand(batch, size[1]) * (width + 3) - 2
    columns[:, ::3] = columns[:, ::3].round()
    return rows, columns, torch.randint(-3 * height, 3 * height + 1, (batch, 2))


def brute_force(images, rows, columns, shift):
    batch, channels, height, width = images.shape
    result = torch.zeros(batch, channels, rows.shape[1], columns.shape[1], dtype=torch.float64)
    for b in range(batch):
        rolled = images[b].double().roll((-int(shift[b, 0]), -int(shift[b, 1])), (1, 2))
        for i in range(rows.shape[1]):
            for j in range(columns.shape[1]):
                y = min(max(float(rows[b, i]), 0.0), height - 1)
                x = min(max(float(columns[b, j]), 0.0), width - 1)
                top, left = math.floor(y), math.floor(x)
                bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                upper = rolled[:, top, left] * (1 - x + left) + rolled[:, top, right] * (x - left)
                lower = rolled[:, bottom, left] * (1 - x + left) + rolled[:, bottom, right] * (x - left)
                result[b, :, i, j] = upper * (1 - y + top) + lower * (y - top)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_brute_force(seed, isa, backend, shape, size, dtype):
    images, where = torch.randn(shape).to(dtype), grid(shape, size)
    with use_backend(backend):
        found = roll_resize(images, *where)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype
    assert torch.allclose(found.double(), brute_force(images, *where), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_gradient_is_the_transpose(seed, isa, shape, size):
    """The operation is linear, so <resize(a), b> = <a, gradient(b)> says that the backward is right."""
    images, where = torch.randn(shape, requires_grad=True), grid(shape, size)
    with use_backend("cpu"):
        found = roll_resize(images, *where)
        outer = torch.randn_like(found)
        found.backward(outer)
    forward = float((found.detach().double() * outer.double()).sum())
    assert forward == pytest.approx(float((images.detach().double() * images.grad.double()).sum()), rel=1e-4, abs=1e-4)
    with use_backend("reference"):
        leaf = images.detach().clone().requires_grad_()
        roll_resize(leaf, *where).backward(outer)
    assert torch.allclose(images.grad, leaf.grad, rtol=1e-5, atol=1e-5)


def test_reference_gradient_in_float64(seed):
    images = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    rows, columns, shift = grid(images.shape, (3, 6))
    assert torch.autograd.gradcheck(lambda x: roll_resize(x, rows.double(), columns.double(), shift), images)


def test_integer_positions_roll_and_flip_exactly(seed, isa):
    images = torch.randn(1, 2, 6, 8)
    rows, columns = torch.arange(6.0)[None], torch.arange(7.0, -1.0, -1.0)[None]
    found = roll_resize(images, rows, columns, torch.tensor([[2, -3]]))
    assert torch.equal(found, images.roll((-2, 3), (2, 3)).flip(3))


def test_operator_contract(seed):
    images, where = torch.randn(2, 3, 5, 6), grid((2, 3, 5, 6), (4, 4))
    torch.library.opcheck(torch.ops.dfqvit.roll_resize.default, (images, *where))
    torch.library.opcheck(torch.ops.dfqvit.roll_resize_backward.default, (torch.randn(2, 3, 4, 4), *where, 5, 6))


def test_bad_input():
    images, (rows, columns, shift) = torch.randn(2, 3, 5, 6), grid((2, 3, 5, 6), (4, 4))
    with pytest.raises(ValueError, match=r"images had shape \(2, 3, 5\)"):
        roll_resize(images[..., 0], rows, columns, shift)
    with pytest.raises(TypeError, match=r"rows had dtype torch.float64; for these images it must be torch.float32"):
        roll_resize(images, rows.double(), columns, shift)
    with pytest.raises(ValueError, match=r"columns had shape \(1, 4\); it must be \[2, positions\]"):
        roll_resize(images, rows, columns[:1], shift)
    with pytest.raises(TypeError, match=r"shift had dtype torch.float32; it must be int64"):
        roll_resize(images, rows, columns, shift.float())
    with pytest.raises(ValueError, match=r"shift had shape \(2, 1\); it must be \[2, 2\]"):
        roll_resize(images, rows, columns, shift[:, :1])
