"""ACM against its formula, computed from block outputs collected by the test."""

from __future__ import annotations

import copy

import pytest
import torch

from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.correction import STORED, add_corrections, choose_blocks
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models.adapters import find_adapter
from dfqvit.quantization.recipe import Recipe

from ..conftest import small_vit


def outputs_of(model, x):
    """Every block's output, by the test's own hooks."""
    found, handles = [], []
    for block in find_adapter(model).blocks():
        handles.append(block.register_forward_hook(lambda m, i, o: found.append(o.detach().flatten(1, -2).clone())))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(params=["gemm", "psaq"])
def pair(request, model):
    x = torch.randn(6, 3, 32, 32)
    qmodel = convert(model, Recipe(3, 8, request.param, "minmax"))
    calibrate(qmodel, x, Recipe(3, 8, request.param, "minmax"))
    return model, qmodel, x


def test_independent_is_the_formula_as_printed(pair):
    model, qmodel, x = pair
    wanted, plain = outputs_of(model, x), outputs_of(qmodel, x)
    add_corrections(model, qmodel, x, "independent")
    adapter = find_adapter(qmodel)
    for index, (w, p) in enumerate(zip(wanted, plain, strict=True)):
        expected = (w - p).mean(0).to(STORED)
        assert torch.allclose(adapter.get_acm(index).float(), expected.float(), atol=2e-3, rtol=2e-3)


def test_sequential_leaves_no_mean_shift_on_its_own_images(pair):
    model, qmodel, x = pair
    add_corrections(model, qmodel, x, "sequential")
    for w, f in zip(outputs_of(model, x), outputs_of(qmodel, x), strict=True):
        assert float((w - f).mean(0).abs().max()) < 5e-3 * max(1.0, float(w.abs().max()))


def test_sequential_leaves_less_divergence_than_none(pair):
    model, qmodel, x = pair
    left = add_corrections(model, qmodel, x, "sequential")
    assert set(left) == set(range(len(find_adapter(model).blocks())))
    assert 0 < left[max(left)] < 1


def test_correction_of_one_block_leaves_the_earlier_ones(pair):
    model, qmodel, x = pair
    before = outputs_of(qmodel, x)
    add_corrections(model, qmodel, x, blocks=[-1])
    after = outputs_of(qmodel, x)
    assert all(torch.equal(b, a) for b, a in zip(before[:-1], after[:-1], strict=True))
    assert not torch.equal(before[-1], after[-1])


def test_none_takes_earlier_corrections_away(pair):
    model, qmodel, x = pair
    before = qmodel(x)
    add_corrections(model, qmodel, x)
    assert not torch.equal(qmodel(x), before)
    assert add_corrections(model, qmodel, x, "none") == {}
    assert torch.equal(qmodel(x), before)


def test_top_chooses_the_blocks_of_greatest_divergence(pair):
    model, qmodel, x = pair
    wanted, plain = outputs_of(model, x), outputs_of(qmodel, x)
    divergence = [float((w - p).square().mean() / w.square().mean()) for w, p in zip(wanted, plain, strict=True)]
    left = add_corrections(model, qmodel, x, top=1)
    assert list(left) == [divergence.index(max(divergence))]


def test_rides_in_the_epilogue_of_the_last_linear_layer_where_it_can(seed):
    x = torch.randn(2, 3, 32, 32)
    for options, placement, in_epilogue in (
        ({}, "gemm", True),
        ({"init_values": 0.5}, "gemm", False),
        ({}, "psaq", False),
    ):
        model = small_vit(**options)
        qmodel = convert(model, Recipe(4, 8, placement, "minmax"))
        calibrate(qmodel, x, Recipe(4, 8, placement, "minmax"))
        add_corrections(model, qmodel, x, blocks=[1])
        assert (qmodel.blocks[1].mlp.fc2.acm is not None) == in_epilogue


def test_which_blocks():
    assert choose_blocks(12, 1) == list(range(12))
    assert choose_blocks(12, 5) == [1, 6, 11]
    assert choose_blocks(12, 40) == [11]
    assert choose_blocks(12, blocks=[-1, 0]) == [0, 11]
    assert choose_blocks(12, blocks=[]) == []
    for arguments, message in (
        ({"gamma": 0}, "gamma was 0; it must be at least 1"),
        ({"gamma": 2.5}, "gamma was 2.5; it must be a whole number, 1 or more"),
        ({"top": "1"}, "acm_top was '1'; it must be a whole number, 1 or more"),
        ({"blocks": [12]}, r"acm_blocks was \[12\]; the model has blocks 0 to 11"),
        ({"blocks": [-13]}, "the model has blocks 0 to 11"),
        ({"top": 13}, "acm_top was 13; the model has 12 blocks"),
        ({"top": 1, "blocks": [1]}, "both given"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_blocks(12, **arguments)


def test_overflow_is_an_error(pair):
    model, qmodel, x = pair
    broken = copy.deepcopy(model)
    find_adapter(broken).blocks()[0].mlp.fc2.bias.data.fill_(1e6)
    with pytest.raises(DfqvitError, match=r"ACM of block 0 reaches 1e\+06"):
        add_corrections(broken, qmodel, x)
    find_adapter(broken).blocks()[0].mlp.fc2.bias.data.fill_(float("nan"))
    with pytest.raises(DfqvitError, match="ACM of block 0 holds NaN or Inf"):
        add_corrections(broken, qmodel, x)


def test_unknown_mode(pair):
    model, qmodel, x = pair
    with pytest.raises(UsageError, match="acm was 'both'; it may be 'sequential', 'checked', 'independent', 'none'"):
        add_corrections(model, qmodel, x, "both")


def test_shapes_and_shrinkage_by_formula(pair):
    model, qmodel, x = pair
    wanted, plain = outputs_of(model, x)[0].double(), outputs_of(qmodel, x)[0].double()
    shift, adapter = wanted - plain, find_adapter(qmodel)
    for shape, dims in (("channel", 1), ("token", 2), ("element", None)):
        for shrink in (False, True):
            add_corrections(model, qmodel, x, blocks=[0], shape=shape, shrink=shrink)
            own = shift if dims is None else shift.mean(dims, keepdim=True)
            mean = own.mean(0)
            if shrink:
                squares = ((own - mean) ** 2).sum(0) / (len(x) - 1) / len(x)
                mean = mean * mean**2 / (mean**2 + squares)
            found = adapter.get_acm(0).double()
            assert found.shape == shift.shape[1:]
            assert torch.allclose(found, mean.expand_as(found), atol=2e-3, rtol=2e-3)


def test_checked_keeps_what_carries_over_and_drops_what_does_not(seed):
    """A shift that is the same on every image carries over; one of another sign on every other image does not.

    The shift is small beside the tokens: a large one saturates the last norm, and then the wrong sign may be the closer.
    """
    model, x = small_vit(), torch.randn(8, 3, 32, 32)
    constant, moody = copy.deepcopy(model), copy.deepcopy(model)
    shift, signs = 0.2 * torch.randn(1, 17, 48), torch.tensor([1.0, -1.0] * 4).view(-1, 1, 1)
    constant.blocks[1].register_forward_hook(lambda m, i, o: o + shift)
    moody.blocks[1].register_forward_hook(lambda m, i, o: o + shift * signs)
    for candidate, kept in ((constant, [1]), (moody, [])):
        recipe = Recipe(8, 8, "gemm", "minmax")
        qmodel = convert(model, recipe)
        calibrate(qmodel, x, recipe)
        assert sorted(add_corrections(candidate, qmodel, x, "checked", blocks=[1])) == kept
        assert (find_adapter(qmodel).get_acm(1) is not None) == bool(kept)


def test_checked_needs_images_and_shapes_have_names(pair):
    model, qmodel, x = pair
    with pytest.raises(UsageError, match="acm was 'checked' with 3 images; cross-validation needs 4 at least"):
        add_corrections(model, qmodel, x[:3], "checked")
    with pytest.raises(UsageError, match="acm_shape was 'row'; it may be 'element', 'channel', 'token'"):
        add_corrections(model, qmodel, x, shape="row")
