"""Scales and zero points against the formulas, in Python's own floats."""

from __future__ import annotations

import pytest
import torch

from dfqvit.errors import DfqvitError, UsageError
from dfqvit.quantization.quantizers import ActivationQuantizer, check_rule, minmax_weight_scale, mse_weight_scale
from dfqvit.quantization.ranges import MseRange, affine_parameters

BINS = 4096  # of MseRange, over both signs


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_scale_is_max_over_half_the_range(seed, bits):
    weight = torch.randn(5, 3, 2, 2)
    found = minmax_weight_scale(weight, bits)
    for channel in range(5):
        assert found[channel].item() == pytest.approx(
            max(abs(v) for v in weight[channel].flatten().tolist()) / ((2**bits - 1) / 2)
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_scale_is_the_best_of_its_grid_for_every_channel(seed, bits):
    weight = torch.randn(4, 60) ** 3
    found, half = mse_weight_scale(weight, bits), 1 << (bits - 1)

    def error(row, scale):
        return sum((max(-half, min(half - 1, round(v / scale))) * scale - v) ** 2 for v in row)

    for channel in range(4):
        row, widest = weight[channel].tolist(), minmax_weight_scale(weight, bits)[channel].item()
        least = min(error(row, sign * widest * (0.3 + 0.02 * step)) for step in range(41) for sign in (1, -1))
        assert error(row, found[channel].item()) == pytest.approx(least, rel=1e-2)
        assert error(row, found[channel].item()) <= error(row, widest) * 1.01


@pytest.mark.parametrize("bits", [2, 3])
def test_mse_scale_turns_the_grid_to_the_longer_side(bits):
    # every step of the grid, one more below
    below = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).float().repeat(7)[None]
    for weight in (below, -below):
        scale = mse_weight_scale(weight, bits)
        assert torch.allclose((weight / scale).round(), weight / scale, atol=0.1)
        assert scale.item() == pytest.approx(1.0 if weight is below else -1.0, rel=0.05)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ends", [(-1.5, 4.0), (0.0, 3.0), (-2.0, 0.0), (1.0, 2.0), (-3.0, -1.0)])
def test_affine_parameters(bits, ends):
    scale, zero = affine_parameters(*map(torch.tensor, ends), bits)
    ends, steps = (min(ends[0], 0), max(ends[1], 0)), 2**bits - 1
    assert scale.item() == pytest.approx((ends[1] - ends[0]) / steps)
    assert zero.item() == min(max(round(-ends[0] / scale.item()), 0), steps)


def test_quantizer_sees_several_batches_and_then_rounds(seed):
    quantizer = ActivationQuantizer(8)
    batches = [torch.randn(4, 5) * 3 for _ in range(3)]
    for batch in batches:
        assert quantizer(batch) is batch
    quantizer.freeze()
    seen = torch.cat(batches)
    assert quantizer.scale.item() == pytest.approx(float(seen.max() - seen.min()) / 255)
    error = (quantizer(seen) - seen).abs()
    assert float(error.max()) <= quantizer.scale.item() * 1.001  # half a step, and half a step of the zero point
    assert float(error.max()) > 0


def test_constant_activation_does_not_divide_by_zero():
    quantizer = ActivationQuantizer(8)
    quantizer(torch.zeros(3))
    quantizer.freeze()
    assert quantizer(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("middle", [-0.5, 0.25, 7.0])
def test_values_on_one_side_of_zero_are_rounded_and_not_clamped(seed, rule, bits, middle):
    """What a sigmoid or bright pixels give: far from zero, and close together."""
    quantizer = ActivationQuantizer(bits, rule)
    x = middle + 0.01 * torch.rand(50)
    quantizer(x)
    quantizer.freeze()
    assert torch.allclose(quantizer(x), x, rtol=0, atol=1.1 * abs(middle) / (2**bits - 1))


def test_errors():
    with pytest.raises(DfqvitError, match="an activation quantizer saw no values"):
        ActivationQuantizer(8).freeze()
    quantizer = ActivationQuantizer(8)
    quantizer(torch.tensor([1.0, float("inf")]))
    with pytest.raises(DfqvitError, match="an activation held NaN or Inf"):
        quantizer.freeze()
    with pytest.raises(UsageError, match="quantizer was 'gptq'; it may be 'minmax', 'mse'"):
        check_rule("gptq")


def squared_error(x, least, greatest, bits):
    """Of x on the affine grid of a range, by the formula."""
    scale, zero = affine_parameters(least, greatest, bits)
    rounded = ((x / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((rounded - zero) * scale - x).double().square().sum()


def lost(rule, x):
    """How much farther x is from the grid of a rule's range than from that of its ends, and what that may be.

    The rule takes every value for the middle of its bin, half a bin away at most. How far x is from the nearest points of a grid,
    as a vector, changes by no more than x does: the choice may cost that much for the range taken, and as much for the other.
    """
    taken, ends = (squared_error(x, *each, rule.bits).sqrt() for each in (rule.ends(), (x.min(), x.max())))
    return float(taken - ends), 2 * (rule.limit / BINS) * len(x) ** 0.5 * 1.001 + 1e-6  # and what float32 rounds off


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_mse_range_is_about_the_best_of_its_grid(seed, bits):
    parts = [torch.randn(300) ** 3 * size + 0.3 for size in (0.01, 1.0, 30.0, 5.0)]  # the histogram doubles in between
    rule = MseRange(bits)
    for part in parts:
        rule.observe(part)
    x = torch.cat(parts)
    assert int(rule.counts.sum()) == len(x)
    shares = torch.linspace(0.05, 1, 39)
    least = min(squared_error(x, x.min() * low, x.max() * high, bits) for low in shares for high in shares)
    assert squared_error(x, *rule.ends(), bits) <= 1.02 * least
    more, most = lost(rule, x)
    assert more <= most


def test_mse_range_clips_a_lone_outlier_at_four_bits_and_nothing_above_five():
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([20.0])])
    for bits, clipped in ((4, True), (6, False), (8, False)):
        quantizer = ActivationQuantizer(bits, "mse")
        quantizer.observe(x)
        quantizer.freeze()
        assert (quantizer.scale * (2**bits - 1) < 5) == clipped


@pytest.mark.parametrize("least", [0.0, 4.0, -5.0])
@pytest.mark.parametrize("width", [0.0, 1.0])
def test_mse_range_of_one_side_or_one_value(seed, least, width):
    x, rule = least + width * torch.rand(6), MseRange(4)
    rule.observe(x)
    more, most = lost(rule, x)
    assert more <= most
    assert rule.parameters()[0] > 0
