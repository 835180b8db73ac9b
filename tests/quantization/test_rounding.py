"""Second-order rounding against brute force and against rounding to nearest."""

import pytest
import torch

import dfqvit
from dfqvit.quantization.layers import QuantLinear
from dfqvit.quantization.levels import levels_of
from dfqvit.quantization.quantizers import mse_weight_scale
from dfqvit.quantization.recipe import Recipe
from dfqvit.quantization.rounding import (
    INPUT_DAMPING,
    MOST_OUTPUTS,
    OUTPUT_DAMPING,
    SecondMoments,
    round_together,
    sensitivity,
)

from ..conftest import SMALL, small_vit


def unit(x):
    return (x.double() / x.double().norm(dim=-1, keepdim=True)).flatten(0, -2)


def moments_of(x, gradients, together=True):
    found = SecondMoments(x.shape[-1], gradients.shape[-1] if together else None, x.device)
    found.observe(x, gradients)
    return found


def test_moments_are_sums_over_tokens():
    """Of inputs of unit length, weighted by their gradients' length, and of the gradients."""
    x, gradients = torch.randn(5, 7, 24) * torch.rand(5, 7, 1) * 100, torch.randn(5, 7, 10)
    found = SecondMoments(24, 10, x.device)
    for part in range(5):
        found.observe(x[part], gradients[part])
    g = gradients.double().flatten(0, 1)
    expected = (unit(x) * g.norm(dim=1, keepdim=True)).T @ unit(x)
    assert torch.allclose(found.inputs.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found.outputs.double(), g.T @ g, rtol=1e-5, atol=1e-4)
    inputs, outputs = found.damped()
    assert inputs.diagonal().mean() == pytest.approx(1 + INPUT_DAMPING, rel=1e-5)
    assert outputs.diagonal().mean() == pytest.approx(1 + OUTPUT_DAMPING, rel=1e-5)


def test_watched_outputs_bring_their_gradients():
    x, weight, after = torch.randn(2, 5, 6), torch.randn(4, 6, requires_grad=True), torch.randn(2, 5, 4)
    found, y = SecondMoments(6, 4, x.device), x @ weight.T
    found.watch(x, y)
    assert not found.inputs.any()
    (y * after).sum().backward()  # so that the gradient of y is `after`
    expected = moments_of(x, after)
    assert torch.allclose(found.inputs, expected.inputs)
    assert torch.allclose(found.outputs, expected.outputs)


@pytest.mark.parametrize("out_features", [None, MOST_OUTPUTS + 1])
def test_rows_are_independent_where_outputs_are_not_asked_for_or_too_many(out_features):
    assert SecondMoments(3, out_features, torch.device("cpu")).damped()[1] is None


def test_sensitivity_draws_from_the_fisher_information():
    logits = torch.randn(1, 4).expand(200_000, 4).clone().requires_grad_(True)
    sensitivity(logits, torch.Generator().manual_seed(torch.seed() % 2**31)).backward()
    p = logits[0].detach().double().softmax(0)
    found = logits.grad.double().T @ logits.grad.double() / len(logits)
    assert torch.allclose(found, p.diag() - p[:, None] * p, atol=5e-3)


@pytest.mark.parametrize("together", [True, False])
def test_moments_of_nothing_but_zeros_still_round(together):
    found = moments_of(torch.zeros(4, 9), torch.zeros(4, 3), together)
    weight = torch.randn(3, 9)
    rounded, scale = round_together(weight, *found.damped(), levels_of("uniform", 4))
    assert torch.allclose(rounded * scale[:, None], weight, atol=0.5)


def test_uncorrelated_inputs_give_the_nearest_integers():
    weight = torch.randn(8, 40)
    for outputs in (None, torch.eye(8)):
        rounded, scale = round_together(weight, torch.eye(40), outputs, levels_of("uniform", 4))
        assert torch.equal(scale, mse_weight_scale(weight, 4))
        assert torch.equal(rounded.float(), (weight / scale[:, None]).round().clamp(-8, 7))


def test_outputs_on_other_inputs_of_the_same_kind_are_closer():
    """Also where only some directions of the outputs are heard, which the gradients show."""
    mixing, heard = torch.randn(20, 60), torch.randn(30, 4)
    inputs, others = (torch.randn(400, 20) @ mixing + 0.3 * torch.randn(400, 60) for _ in range(2))
    found = moments_of(inputs, torch.randn(400, 4) @ heard.T)
    weight = torch.randn(30, 60)
    nearest_scale = mse_weight_scale(weight, 3)
    nearest = (weight / nearest_scale[:, None]).round().clamp(-4, 3) * nearest_scale[:, None]

    def error(rounded):
        return (others @ (rounded - weight).T @ heard).square().mean()

    inner, outer = found.damped()
    errors = []
    for outputs in (None, outer):
        rounded, scale = round_together(weight, inner, outputs, levels_of("uniform", 3))
        errors.append(error(rounded * scale[:, None]))
    assert errors[0] < 0.8 * error(nearest)
    assert errors[1] < 0.8 * errors[0]


def test_a_layer_of_8_bits_keeps_no_moments_of_its_outputs():
    layers = [QuantLinear.from_float(torch.nn.Linear(4, 3), bits, 8, "mse") for bits in (8, 7)]
    for layer in layers:
        layer.observe_inputs()
    assert [layer._moments.outputs is None for layer in layers] == [True, False]


def test_recipe_resolves_what_is_left_open():
    assert (Recipe().rounding, Recipe().edge_bits) == ("second-order", 8)
    assert (Recipe(3, placement="psaq").rounding, Recipe(3, placement="psaq").edge_bits) == ("nearest", 3)
    assert Recipe(quantizer="minmax").rounding == "nearest"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_bits": 1}, "w_bits was 1; it may be a whole number from 2 to 8"),
        ({"a_bits": 9}, "a_bits was 9; "),
        ({"edge_bits": True}, "edge_bits was True; "),
        ({"placement": "gem"}, "placement was 'gem'; it may be 'gemm', 'psaq'"),
        ({"rounding": "up"}, "rounding was 'up'; it may be 'nearest', 'second-order'"),
        ({"rounding": "second-order", "quantizer": "minmax"}, "quantizer must be 'mse'"),
    ],
)
def test_a_recipe_that_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"acm": "sequential", "acm_blocks": None}, {"w_bits": 3, "rounding": "nearest"}]
)
def test_the_order_of_the_calibration_images_does_not_matter(seed, settings):
    """Crops and gradients' signs are drawn for the images in an order of their own: once logits moved by 0.46."""
    model = small_vit()
    images = torch.randn(9, 3, 32, 32)
    options = {"w_bits": 4, "model_kwargs": SMALL["vit"], **settings}
    x = torch.randn(4, 3, 32, 32)
    expected = dfqvit.quantize(model, calib=images, **options)(x)
    found = dfqvit.quantize(model, calib=images[torch.randperm(9)], **options)(x)
    assert torch.equal(found, expected)
