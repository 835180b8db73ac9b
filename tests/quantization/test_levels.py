"""Levels that are not evenly spaced: where they come from, what they are worth, how they stand in memory and in a file."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import dfqvit
from dfqvit.errors import UsageError
from dfqvit.kernels.pack_weight import pack_integers, unpack_weight
from dfqvit.kernels.round_second_order.reference import nearest
from dfqvit.quantization.layers import QuantLinear
from dfqvit.quantization.levels import NONUNIFORM, PACKED, levels_of, narrowed, packed_bits, widened
from dfqvit.quantization.quantizers import minmax_weight_scale, mse_weight_scale, search_weight_scale
from dfqvit.quantization.recipe import Recipe

from ..conftest import small_vit


def lloyd(count):
    """The places above 0 of least squared error for exp(-x^1.5 / 1.5), 0 being a level; float64."""
    x = np.linspace(0, 12, 60_001)
    density, places = np.exp(-(x**1.5) / 1.5), np.linspace(0.4, 2.4, count)
    for _ in range(3000):
        ends = np.concatenate([[places[0] / 2], (places[1:] + places[:-1]) / 2])
        cell = np.searchsorted(ends, x)
        mass = np.bincount(cell, density, count + 1)
        places = (np.bincount(cell, density * x, count + 1) / mass)[1:]
    return places


@pytest.mark.parametrize("bits", list(NONUNIFORM))
def test_are_those_of_lloyds_algorithm(bits):
    half = 1 << (bits - 1)
    below, above = lloyd(half), lloyd(half - 1)
    wanted = np.concatenate([-below[::-1], [0], above]) * ((1 << (PACKED - 1)) - 1) / below[-1]
    assert np.abs(wanted - NONUNIFORM[bits]).max() < 0.51


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_levels_are_all_integers_of_their_bits(bits):
    assert levels_of("uniform", bits).tolist() == list(range(-(1 << (bits - 1)), 1 << (bits - 1)))
    assert packed_bits("uniform", bits) == bits
    assert packed_bits("nonuniform", bits) == (PACKED if bits <= 4 else bits)


@pytest.mark.parametrize("count", [500, 5000])  # one by one, and by a table
@pytest.mark.parametrize("kind", ["uniform", "nonuniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearest_by_brute_force(seed, bits, kind, count):
    levels = levels_of(kind, bits)
    ties = (levels[1:].float() + levels[:-1].float()) / 2
    beside = [ties.nextafter(torch.tensor(end)) for end in (-1e9, 1e9)]
    x = torch.cat([torch.randn(count) * 40, levels.float(), *beside, torch.tensor([-1e30, 1e30]), ties])
    found = nearest(x, levels)
    assert kind == "uniform" or torch.equal(found[-len(ties) :], levels[1:].float())
    distance = (x[:, None] - levels.float()).abs()
    assert torch.equal((x - found).abs(), distance.amin(1))
    assert set(found.tolist()) <= set(levels.tolist())


@pytest.mark.parametrize(("bits", "most"), [(2, 0.97), (3, 0.92), (4, 0.85)])
def test_bell_shaped_weights_lose_less(seed, bits, most):
    weight = torch.distributions.Laplace(0.0, 1.0).sample((16, 400)) + torch.randn(16, 400)

    def error(levels):
        scale = search_weight_scale(weight, levels)
        return float((nearest(weight / scale[:, None], levels) * scale[:, None] - weight).square().mean())

    assert error(levels_of("nonuniform", bits)) < most * error(levels_of("uniform", bits))
    assert torch.equal(search_weight_scale(weight, levels_of("uniform", bits)), mse_weight_scale(weight, bits))


@pytest.mark.parametrize("kind", ["uniform", "nonuniform"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_weight_is_as_far_from_0_as_the_levels_reach_on_average(seed, bits, kind):
    weight, levels = torch.randn(5, 7), levels_of(kind, bits).tolist()
    wanted = [2 * max(map(abs, row)) / (levels[-1] - levels[0]) for row in weight.tolist()]
    assert minmax_weight_scale(weight, bits, kind).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_file_has_places_in_place_of_integers(seed, bits):
    levels = levels_of("nonuniform", bits)
    integers = levels[torch.randint(len(levels), (5, 13))]
    packed = pack_integers(integers, PACKED)
    stored = narrowed(packed, levels, bits, 13)
    assert stored.shape == (5, 2 * bits)
    assert torch.equal(widened(stored, levels, bits, 13), packed)
    places = unpack_weight(stored, bits, 13).long() + len(levels) // 2
    assert torch.equal(levels[places], integers)


def test_other_integers_are_refused(seed):
    levels = levels_of("nonuniform", 3)
    for stranger in (1, 63, -64):
        with pytest.raises(ValueError, match="the weight held integers other than its 8 levels"):
            narrowed(pack_integers(torch.full((2, 8), stranger, dtype=torch.int8), PACKED), levels, 3, 8)


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_layer_multiplies_by_its_levels(seed, bits, rounding):
    """In float64, from the integers and scales that it has packed; more than 4 bits are as ever."""
    layer, x = QuantLinear.from_float(nn.Linear(37, 9), bits, 8, "mse", "nonuniform"), torch.randn(4, 6, 37)
    wanted = layer.weight.detach().clone()
    if rounding == "second-order":
        layer.observe_inputs()
        layer.requires_grad_()
        layer(x.clone().requires_grad_()).sum().backward()
    else:
        layer(x)
    layer.freeze()
    assert layer.packed_bits == (PACKED if bits <= 4 else bits)
    integers = unpack_weight(layer.weight_packed, layer.packed_bits, 37)
    assert set(integers.unique().tolist()) <= set(levels_of("nonuniform", bits).tolist())
    weight = integers.double() * layer.weight_scale.double()[:, None]
    assert (weight - wanted).abs().mean() < 0.3 * wanted.abs().mean() * 2 ** (4 - bits)
    scale, zero = layer.input.scale.double(), layer.input.zero_point.double()
    rounded = ((x.double() / scale).round() + zero).clamp(0, 255)
    expected = (rounded - zero) * scale @ weight.T + layer.bias.double()
    assert torch.allclose(layer(x).double(), expected, atol=1e-4)


def test_the_recipe_chooses_and_refuses():
    assert (Recipe().levels, Recipe(placement="psaq").levels, Recipe(quantizer="minmax").levels) == (
        "nonuniform",
        "uniform",
        "uniform",
    )
    with pytest.raises(UsageError, match="levels was 'log'; it may be 'uniform', 'nonuniform'"):
        Recipe(levels="log")
    with pytest.raises(UsageError, match=r"levels was 'nonuniform' and quantizer 'minmax'; .* quantizer must be 'mse'"):
        Recipe(quantizer="minmax", levels="nonuniform")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"w_bits": 8, "levels": "nonuniform"}, 1),
        ({"w_bits": 5, "levels": "uniform"}, 1),
        ({"w_bits": 4, "levels": "nonuniform"}, 0),
        ({"w_bits": 8, "edge_bits": 3, "levels": "nonuniform"}, 0),
        ({"w_bits": 8, "layer_bits": {"blocks.0.mlp.fc1": 2}, "levels": "uniform"}, 0),
        ({"w_bits": 8}, 0),
    ],
)
def test_levels_of_weights_that_have_none_are_told(seed, settings, told):
    settings |= {"calib": "noise", "samples": 2, "rounding": "nearest", "progress": False}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        dfqvit.quantize(small_vit(), **settings)
    said = [str(each.message) for each in found if str(each.message).startswith("levels was")]
    assert len(said) == told
    assert all(
        "it is for weights of 4 bits or fewer and activations of 6 or fewer, and changes nothing" in each
        for each in said
    )
