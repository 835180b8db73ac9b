"""The levels of what a GELU gives: brute force is the oracle; and that a model computes with them, stores and exports them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import dfqvit
from dfqvit.calibration.levels import fit_levels, is_table, table_of
from dfqvit.quantization.layers import quantized_layers
from dfqvit.quantization.quantizers import ActivationQuantizer
from dfqvit.quantization.ranges import affine_parameters

from ..conftest import small_swin, small_vit
from .test_equalize import small


def values_of_a_gelu(count):
    values = torch.nn.functional.gelu(1.5 * torch.randn(count))
    cost = torch.rand(count) + 0.1
    return values, cost, values.min(), values.max()


def cost_of(values, cost, low, high, table):
    scale, zero = affine_parameters(low, high, 8)
    places = ((values / scale).round() + zero).clamp(0, 255).long()
    return float((((table[places].float() - zero) * scale - values).square() * cost).double().sum())


def test_no_two_levels_cost_less(seed):
    values, cost, low, high = values_of_a_gelu(400)
    top, table = fit_levels(values, cost, low, high, 1)
    found = cost_of(values, cost, low, top, table)
    pairs = itertools.combinations(range(0, 256), 2)
    scale, zero = affine_parameters(low, top, 8)
    places = ((values / scale).round() + zero).clamp(0, 255)
    least = torch.inf
    for pair in pairs:  # each value to the nearer of both, by its integer; the lower of two as near
        lower, upper = ((each - zero) * scale for each in pair)
        level = torch.where(2 * places <= pair[0] + pair[1], lower, upper)
        least = min(least, float(((level - values).square() * cost).double().sum()))
    assert found == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_other_levels_and_even_ones_cost_more(seed, bits):
    values, cost, low, high = values_of_a_gelu(3000)
    top, table = fit_levels(values, cost, low, high, bits)
    found = cost_of(values, cost, low, top, table)
    assert is_table(table, bits)
    assert 1 << bits >= len(table.unique()) > 1 << (bits - 1)
    levels = table.unique().long()
    for _ in range(200):
        other = levels.clone()
        place = torch.randint(len(levels), ())
        other[place] = (other[place] + torch.randint(-4, 5, ())).clamp(0, 255)
        assert cost_of(values, cost, low, top, table_of(other.unique())) >= found * (1 - 1e-6)
    steps = (1 << bits) - 1
    for share in torch.linspace(0.2, 1, 9):
        scale, zero = affine_parameters(low, high * share, bits)
        even = (((values / scale).round() + zero).clamp(0, steps) - zero) * scale
        assert float(((even - values).square() * cost).double().sum()) > 0.98 * found


def test_a_table_has_the_nearest_level_and_says_what_is_none(seed):
    levels = torch.randperm(256)[:16].sort().values
    table = table_of(levels)
    away = (torch.arange(256)[:, None] - levels).abs()
    assert torch.equal(table.long(), levels[away.argmin(1)])  # the first of two as near
    assert is_table(table, 4)
    assert not is_table(table, 3)
    assert not is_table(table.float(), 4)
    assert not is_table(table[:255], 4)
    assert not is_table(table.flip(0), 4)


def test_a_quantizer_rounds_to_the_nearest_level_and_passes_the_gradient(seed):
    values, cost, low, high = values_of_a_gelu(500)
    top, table = fit_levels(values, cost, low, high, 3)
    site = ActivationQuantizer(3)
    site.take_levels(low, top, table)
    site(values)  # is observed
    site.freeze()
    assert site.grid_bits == 8
    assert site.ends() == pytest.approx(((table.unique().float()[[0, -1]] - site.zero_point) * site.scale).tolist())
    x = torch.cat([values, values.new_tensor([-50.0, 50.0])]).requires_grad_()
    y = site(x)
    with torch.no_grad():
        places = ((x / site.scale).round() + site.zero_point).clamp(0, 255).long()
        wanted = (table[places].float() - site.zero_point) * site.scale
    assert torch.allclose(y, wanted, atol=1e-6)
    assert torch.equal(site(x.detach()), wanted)
    assert site(torch.tensor([torch.nan, 0.0])).isnan().tolist() == [True, False]
    assert len(wanted.unique()) <= 8
    y.sum().backward()
    inside = (places > 0) & (places < 255)
    assert torch.equal(x.grad[inside], torch.ones_like(x.grad[inside]))
    assert x.grad[-2:].tolist() == [0, 0]


MODELS = {"vit": small_vit, "swin": small_swin} | {
    name: functools.partial(small, name)
    for name in ("beit_base_patch16_224", "vit_relpos_small_patch16_224", "vit_base_patch16_rope_224")
}


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("name", MODELS)
def test_integers_are_those_of_the_simulation(seed, name, bits, tmp_path):
    qmodel = dfqvit.quantize(MODELS[name](), 8, bits, calib="noise", samples=4, rounding="nearest", progress=False)
    assert not any(dfqvit.integer_report(qmodel).values())
    tables = {
        key: layer.input.table for key, layer in quantized_layers(qmodel).items() if layer.input.table is not None
    }
    assert len(tables) == len(dfqvit.integer_report(qmodel))
    assert all(key.endswith("mlp.fc2") and is_table(table, bits) for key, table in tables.items())
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    simulated, hidden = dfqvit.load(path, runtime="simulated"), []
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = qmodel(x)
        assert torch.equal(dfqvit.load(path)(x), found)
        with dfqvit.kernels.use_backend("reference", "quant_block"):
            assert torch.equal(qmodel(x), found)
        for key in tables:
            simulated.get_submodule(f"{key}.input").register_forward_hook(lambda _, __, y: hidden.append(y))
        wanted = simulated(x)
    assert float((found - wanted).norm() / wanted.norm()) < (0.3 if bits == 4 else 0.1)  # a value tips to the next step
    assert len(hidden) == len(tables)
    assert all(len(each.unique()) <= 1 << bits for each in hidden)


@pytest.mark.parametrize(
    "arguments", [{"levels": "uniform"}, {"scaling": "none"}, {"quantizer": "minmax"}, {"a_bits": 7}]
)
def test_without_what_they_are_for_there_are_none(arguments):
    qmodel = dfqvit.quantize(
        small_vit(),
        **{"w_bits": 8, "a_bits": 4, "rounding": "nearest", **arguments},
        calib="noise",
        samples=2,
        progress=False,
    )
    assert all(layer.input.table is None for layer in quantized_layers(qmodel).values())


def test_a_table_that_was_changed_counts_and_one_that_is_none_is_not_saved(seed, tmp_path):
    qmodel = dfqvit.quantize(small_vit(), 8, 4, calib="noise", samples=2, rounding="nearest", progress=False)
    x = torch.randn(2, 3, 32, 32)
    table = next(layer.input.table for layer in quantized_layers(qmodel).values() if layer.input.table is not None)
    with torch.no_grad():
        before = qmodel(x)
        table.copy_(table_of(torch.arange(0, 256, 17)))
        after = qmodel(x)
        assert not torch.equal(before, after)
        assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "changed.safetensors"))(x), after)
        table.copy_(torch.arange(256).to(torch.uint8))
    with pytest.raises(dfqvit.UsageError, match=r"qmodel was changed .*input.table' has no levels of 4 bits"):
        dfqvit.save(qmodel, tmp_path / "none.safetensors")
