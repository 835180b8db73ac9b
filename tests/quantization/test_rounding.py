"""Second-order rounding against brute force and against rounding to nearest."""

from itertools import product

import pytest
import torch

import dfqvit
from dfqvit.quantization.quantizers import mse_weight_scale
from dfqvit.quantization.recipe import Recipe
from dfqvit.quantization.rounding import DAMPING, SecondMoment, round_second_order, sensitivity

from ..conftest import SMALL, small_vit


def correlated(rows, features):
    """Inputs as layers see them: a few directions carry most of the variance."""
    return torch.randn(rows, features // 3 + 1) @ torch.randn(features // 3 + 1, features) + 0.1 * torch.randn(
        rows, features
    )


def error(weight, rounded, scale, moment):
    e = (weight - rounded * scale[:, None]).double()
    return ((e @ moment.double()) * e).sum(1)


def moment_of(x):
    """Of vectors that all count the same."""
    found = SecondMoment(x.shape[-1], x.device)
    found.observe(x, torch.ones(x.shape[:-1]))
    return found


def test_moment_is_the_weighted_sum_over_vectors_of_unit_length():
    x, weights = torch.randn(5, 7, 24) * torch.rand(5, 7, 1) * 100, torch.rand(5, 7)
    found = SecondMoment(24, x.device)
    for part in range(5):
        found.observe(x[part], weights[part])
    units = (x.double() / x.double().norm(dim=-1, keepdim=True)).flatten(0, 1)
    assert torch.allclose(found.sum, (units * weights.flatten()[:, None]).T @ units, atol=1e-5)
    assert found.damped().diagonal().mean() == pytest.approx(1 + DAMPING, rel=1e-5)


def test_watched_outputs_weigh_by_the_length_of_their_gradients():
    x, weight, after = torch.randn(2, 5, 6), torch.randn(4, 6, requires_grad=True), torch.randn(2, 5, 4)
    found, y = SecondMoment(6, x.device), x @ weight.T
    found.watch(x, y)
    assert not found.sum.any()
    (y * after).sum().backward()  # so that the gradient of y is `after`
    expected = SecondMoment(6, x.device)
    expected.observe(x, after.square().sum(-1).sqrt())
    assert torch.allclose(found.sum, expected.sum)


def test_sensitivity_draws_from_the_fisher_information():
    logits = torch.randn(1, 4).expand(200_000, 4).clone().requires_grad_(True)
    sensitivity(logits, torch.Generator().manual_seed(torch.seed() % 2**31)).backward()
    p = logits[0].detach().double().softmax(0)
    found = logits.grad.double().T @ logits.grad.double() / len(logits)
    assert torch.allclose(found, p.diag() - p[:, None] * p, atol=5e-3)


def test_moment_of_nothing_but_zeros_still_rounds():
    found = moment_of(torch.zeros(4, 9))
    weight = torch.randn(3, 9)
    rounded, scale = round_second_order(weight, found.damped(), 4)
    assert torch.allclose(rounded * scale[:, None], weight, atol=0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 1), (1, 63), (17, 64), (9, 150)])
def test_no_single_integer_can_be_moved_to_lower_the_error(shape, bits):
    moment = moment_of(correlated(200, shape[1]))
    weight, moment = torch.randn(shape), moment.damped()
    rounded, scale = round_second_order(weight, moment, bits)
    half = 1 << (bits - 1)
    assert rounded.dtype == torch.int8
    assert torch.equal(rounded, rounded.clamp(-half, half - 1))
    least = error(weight, rounded, scale, moment)
    worse = 0
    for k in torch.randperm(shape[1])[:20].tolist():
        for step in (-1, 1):
            moved = rounded.clone()
            moved[:, k] = (moved[:, k] + step).clamp(-half, half - 1)
            worse = max(worse, ((least - error(weight, moved, scale, moment)) / least.clamp_min(1e-12)).max().item())
    assert worse < (1e-3 if bits < 8 else 2e-2)  # the sweeps are bounded, and float32


def test_close_to_the_best_of_all_integers():
    """Brute force over all 4^5 rows of 2-bit integers."""
    moment = moment_of(correlated(100, 5))
    weight, moment = torch.randn(40, 5), moment.damped()
    rounded, scale = round_second_order(weight, moment, 2)
    every = torch.tensor(list(product(range(-2, 2), repeat=5)), dtype=torch.float32)
    best = torch.stack([error(weight, row.expand(40, 5), scale, moment) for row in every]).amin(0)
    nearest = (weight / scale[:, None]).round().clamp(-2, 1)
    found, plain = error(weight, rounded, scale, moment), error(weight, nearest, scale, moment)
    assert (found >= best * (1 - 1e-4)).all()
    assert (found <= plain * (1 + 1e-4)).all()
    assert (found - best).sum() < 0.5 * (plain - best).sum()


def test_uncorrelated_inputs_give_the_nearest_integers():
    weight = torch.randn(8, 40)
    rounded, scale = round_second_order(weight, torch.eye(40), 4)
    assert torch.equal(scale, mse_weight_scale(weight, 4))
    assert torch.equal(rounded.float(), (weight / scale[:, None]).round().clamp(-8, 7))


def test_outputs_on_other_inputs_of_the_same_kind_are_closer():
    mixing = torch.randn(20, 60)
    inputs, others = (torch.randn(400, 20) @ mixing + 0.3 * torch.randn(400, 60) for _ in range(2))
    moment = moment_of(inputs)
    weight = torch.randn(30, 60)
    rounded, scale = round_second_order(weight, moment.damped(), 3)
    nearest_scale = mse_weight_scale(weight, 3)
    nearest = (weight / nearest_scale[:, None]).round().clamp(-4, 3) * nearest_scale[:, None]
    wanted = others @ weight.T
    found = (others @ (rounded * scale[:, None]).T - wanted).square().mean()
    assert found < 0.8 * (others @ nearest.T - wanted).square().mean()


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
