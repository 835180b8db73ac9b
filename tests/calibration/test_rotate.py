"""Rotated heads: what the model computes stays, and the rows that are rounded are mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfqvit.calibration import convert, observe
from dfqvit.calibration.rotate import random_orthogonal, rotate_heads
from dfqvit.quantization.recipe import Recipe

from ..conftest import small_swin, small_vit
from .test_equalize import FAMILIES, quantized, small


@pytest.mark.parametrize("size", [1, 2, 16, 65])
def test_matrices_are_orthogonal_and_differ(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (random_orthogonal(size, generator) for _ in range(2))
    for matrix in (first, second):
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert size == 1 or not torch.allclose(first, second)


@pytest.mark.parametrize("make", [small_vit, small_swin, *FAMILIES])
def test_the_function_stays(make: Any, seed: int) -> None:
    model = (make() if callable(make) else small(make)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    qmodel = convert(model, Recipe(4, 8))
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    turned = rotate_heads(qmodel)
    assert any("values" in name for name in turned)
    rotary = isinstance(make, str) and ("eva" in make or "dinov3" in make or "rope" in make)
    assert any("scores" in name for name in turned) == (not rotary)
    for name in turned:
        weight = f"{name.rpartition(' ')[0]}.weight"
        assert not torch.allclose(qmodel.state_dict()[weight], before[weight])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted, found = model(images), qmodel(images)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp_min(1)


@pytest.mark.parametrize("a_bits", [4, 8])
def test_part_of_scaling_channels(seed: int, a_bits: int) -> None:
    model, images = small_vit(), torch.randn(4, 3, 32, 32)
    weights = {}
    for scaling in ("none", "channels"):
        recipe = Recipe(4, a_bits, scaling=scaling)
        qmodel: Any = convert(model, recipe)
        observe(qmodel, images, recipe)
        weights[scaling] = qmodel.blocks[0].attn.qkv.weight
    assert (weights["none"] - weights["channels"]).norm() > 0.3 * weights["none"].norm()


def test_the_same_for_the_same_model(seed: int) -> None:
    model, images = small_vit(), torch.randn(8, 3, 32, 32)
    first, second = (quantized(model, 4, 8, images, model_kwargs=None) for _ in range(2))
    assert torch.equal(first(images), second(images))
