"""A loaded quantized file as a backbone: features of every stage beside the float model's, by every way timm offers."""

from __future__ import annotations

import pytest
import torch
from timm.models._features import FeatureGetterNet

import dfqvit
from dfqvit import demo
from dfqvit.evaluation.data import open_images, spread_images
from dfqvit.models import Preprocessing, load_model

from ..conftest import SMALL, made_once, small_distilled

quantize = made_once(dfqvit.quantize)


@pytest.fixture(params=["demo", "demo-swin", "distilled"])
def pair(request, seed, tmp_path):
    """(float model, the same from a W8/A8 file in the integer runtime, images that calibration did not see)."""
    if request.param == "distilled":
        model, images = small_distilled(), torch.randn(12, 3, 32, 32)
        options = {"model_kwargs": SMALL["distilled"]}
    else:
        model, options = load_model(request.param), {}
        images = spread_images(open_images(demo.TEST_IMAGES, Preprocessing.of(model)), 12)
    qmodel = quantize(model, 8, calib=images[:8], rounding="nearest", **options)
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    loaded = dfqvit.load(path, runtime="integer")
    return model, loaded, images[8:]


def check(found, expected):
    """Of the same shape, and within a few percent of the float features' own spread."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / (expected - expected.mean()).norm()) < 0.06


@torch.no_grad()
def test_forward_features_and_head(pair):
    model, loaded, images = pair
    features = loaded.forward_features(images)
    check(features, model.forward_features(images))
    assert torch.equal(loaded.forward_head(features), loaded(images))
    check(loaded.forward_head(features, pre_logits=True), model.forward_head(model.forward_features(images), True))


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_every_stage(pair, norm):
    model, loaded, images = pair
    final, stages = loaded.forward_intermediates(images, norm=norm)
    expected_final, expected = model.forward_intermediates(images, norm=norm)
    check(final, expected_final)
    assert torch.equal(final, loaded.forward_features(images))
    assert len(stages) == len(expected) > 1
    for ours, theirs in zip(stages, expected, strict=True):
        assert ours.dim() == 4
        check(ours, theirs)


@torch.no_grad()
def test_chosen_stages_in_the_formats_of_timm(pair):
    model, loaded, images = pair
    _, stages = loaded.forward_intermediates(images)
    only = loaded.forward_intermediates(images, indices=1, intermediates_only=True, stop_early=True)
    assert len(only) == 1
    assert torch.equal(only[0], stages[-1])
    first = loaded.forward_intermediates(images, indices=[0], intermediates_only=True, stop_early=True)
    assert torch.equal(first[0], stages[0])
    if hasattr(model, "num_prefix_tokens") and model.num_prefix_tokens:
        options = {"indices": [0, 1], "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
        found = loaded.forward_intermediates(images, **options)
        expected = model.forward_intermediates(images, **options)
        for (ours, prefix), (theirs, their_prefix) in zip(found, expected, strict=True):
            check(ours, theirs)
            check(prefix, their_prefix)
            assert prefix.shape[1] == model.num_prefix_tokens


@torch.no_grad()
def test_as_a_wrapped_backbone(pair):
    """What detection and segmentation code does with `features_only`."""
    model, loaded, images = pair
    expected = FeatureGetterNet(model, out_indices=[0, 1])(images)
    found = FeatureGetterNet(loaded, out_indices=[0, 1])(images)
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        check(ours, theirs)


@torch.no_grad()
def test_without_the_classifier_or_the_last_stages(pair):
    model, loaded, images = pair
    for each in (model, loaded):
        each.prune_intermediate_layers([0], prune_norm=False, prune_head=True)
    check(loaded(images), model(images))


def test_blocks_really_run_in_integers(pair):
    _, loaded, _ = pair
    kinds = {type(block).__name__ for block in loaded.modules() if "Block" in type(block).__name__}
    assert kinds <= {"IntegerVitBlock", "IntegerSwinBlock"}
    assert kinds


@torch.no_grad()
@pytest.mark.parametrize(("size", "window"), [(56, None), (56, 7), (42, 7), (40, 7)])
def test_swin_of_another_input_size(seed, tmp_path, size, window):
    """As dense prediction sets it, after calls at the old size; 40 pads its windows, which stays simulated."""
    path = dfqvit.save(
        dfqvit.quantize(load_model("demo-swin"), 8, calib="noise", samples=4), tmp_path / "m.safetensors"
    )
    integer, simulated = dfqvit.load(path, runtime="integer"), dfqvit.load(path, runtime="simulated")
    small, large = torch.randn(2, 1, 28, 28), torch.randn(2, 1, size, size)
    before = integer(small)
    for each in (integer, simulated):
        each.set_input_size((size, size), window_size=window)
    for ours, theirs in zip(
        integer.forward_intermediates(large)[1], simulated.forward_intermediates(large)[1], strict=True
    ):
        check(ours, theirs)
    check(integer(large), simulated(large))
    for each in (integer, simulated):
        each.set_input_size((28, 28), window_size=7)
    check(integer(small), simulated(small))
    if window == 7:  # else the tables of position biases were resized to other windows and back, which loses a little
        assert torch.equal(integer(small), before)


@torch.no_grad()
def test_position_biases_resized_between_two_calls_are_seen(seed):
    model = load_model("demo-swin")
    integer, simulated = (
        dfqvit.quantize(model, 8, calib="noise", samples=4, seed=1, runtime=runtime)
        for runtime in ("integer", "simulated")
    )
    images = torch.randn(2, 1, 28, 28)
    before = integer(images)
    for each in (integer, simulated):
        each.set_input_size((56, 56))
        each.set_input_size((28, 28))  # the same geometry as before, other biases
    assert not torch.equal(integer(images), before)
    check(integer(images), simulated(images))


@torch.no_grad()
@pytest.mark.parametrize("runtime", ["integer", "simulated"])
def test_correction_for_another_number_of_tokens_is_refused(seed, runtime):
    model = load_model("demo-swin")
    qmodel = dfqvit.quantize(model, 4, calib="noise", samples=4, acm="sequential", acm_blocks=[0], runtime=runtime)
    qmodel(torch.randn(1, 1, 28, 28))
    qmodel.set_input_size((56, 56), window_size=7)
    with pytest.raises(ValueError, match=r"acm was made for 196 tokens an image; these have 784"):
        qmodel(torch.randn(1, 1, 56, 56))
