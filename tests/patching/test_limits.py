"""`dfqvit.patch`: what it leaves float and says so, what it refuses, and that the model is then as it was."""

from __future__ import annotations

import copy
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import dfqvit
from dfqvit.errors import DfqvitError, UsageError

from ..conftest import _lively, small_vit
from .two_step import VIT, gradients, images_for, snapshot, two_step

# ---- what stays float


def test_what_patch_does_not_know_stays_float(seed):
    class OwnAttention(timm.layers.Attention):
        pass

    model = small_vit(depth=3).double()
    model.blocks[0].attn.__class__ = OwnAttention
    nn.utils.parametrize.register_parametrization(model.blocks[1].mlp.fc2, "weight", nn.Identity())
    fc1 = model.blocks[2].mlp.fc1
    fc1.forward = lambda x: F.linear(x, fc1.weight, fc1.bias)
    x, reference = images_for(model), two_step(model, 8, 8)
    names = {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc2", "blocks.2.mlp.fc1"}
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(reference.get_submodule(parent), child, model.get_submodule(name))
    with dfqvit.patch(model) as handle:
        assert names < handle.skipped.keys()
        assert "part of a OwnAttention" in handle.skipped["blocks.0.attn.qkv"]
        assert handle.skipped["blocks.1.mlp.fc2"] == "a ParametrizedLinear, not a plain nn.Linear"
        assert "its own forward" in handle.skipped["blocks.2.mlp.fc1"]
        assert torch.allclose(model(x), reference(x), atol=1e-8)


def test_blocks_that_read_their_weights_themselves_stay_float():
    model = timm.create_model(
        "vit_tiny_patch16_224", **VIT, block_fn=timm.models.vision_transformer.ParallelScalingBlock
    )
    with pytest.raises(UsageError, match="model has no layer that can be patched"):
        dfqvit.patch(model)


def test_gated_attention(seed):
    if "gated" not in inspect.signature(timm.layers.Attention).parameters:
        pytest.skip("this timm has no gated attention")
    model = small_vit()
    for block in model.blocks:
        block.attn = _lively(timm.layers.Attention(48, num_heads=3, qkv_bias=True, gated=True))
    model = model.double()
    x = images_for(model)
    wanted, wanted_gradients = gradients(two_step(model, 8, 8), x)
    with dfqvit.patch(model) as handle:
        assert "blocks.0.attn.gate" in handle.patched
        found, found_gradients = gradients(model, x)
    assert torch.allclose(found, wanted, atol=1e-8)
    assert all(torch.allclose(found_gradients[n], g, rtol=1e-7, atol=1e-8) for n, g in wanted_gradients.items())


def test_excluded_layers_stay_float(seed):
    model = small_vit()
    with dfqvit.patch(model, exclude=["blocks.0.*", "*.proj"]) as handle:
        assert handle.skipped["blocks.0.mlp.fc1"] == "excluded by 'blocks.0.*'"
        assert handle.skipped["blocks.1.attn.proj"] == "excluded by '*.proj'"
        assert type(model.blocks[0].mlp.fc1) is nn.Linear
        assert type(model.blocks[0].mlp) is timm.layers.Mlp
        assert handle.patched[:2] == ["blocks.1.attn.qkv", "blocks.1.mlp.fc1"]


# ---- errors, and the way out of them


def test_the_with_block_restores_also_after_an_exception(model):
    x = images_for(model)
    before, logits = snapshot(model), model(x)
    with pytest.raises(ZeroDivisionError), dfqvit.patch(model, calib=x) as handle:
        raise ZeroDivisionError
    assert snapshot(model) == before
    assert torch.equal(model(x), logits)
    handle.unpatch()  # nothing left to do
    with dfqvit.patch(model) as second:
        handle.unpatch()  # nor may an old handle undo a newer patch
        assert not torch.equal(model(x), logits)
        assert repr(second).startswith(f"PatchHandle(W8/A8, {len(second.patched)} layers patched")
    assert repr(second).startswith("PatchHandle(unpatched")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x: x[0], UsageError, r"calib was \(3, 32, 32\); it must be a tensor \[n, 3, H, W\]"),
        (lambda x: x[:, :1], UsageError, r"calib was \(2, 1, 32, 32\)"),
        (lambda x: x[:0], UsageError, r"calib was \(0, 3, 32, 32\)"),
        (lambda x: "synthetic", UsageError, "calib was str"),
        (lambda x: x * torch.nan, UsageError, "calib must be a float tensor of finite values"),
        (lambda x: x.long(), UsageError, "calib must be a float tensor"),
        (lambda x: x[..., :24, :24], AssertionError, "doesn't match model"),  # timm's own words
        (lambda x: x.abs() * 100, UsageError, "calib held values from .* like pixels from 0 to 255"),
        (
            lambda x: x.sigmoid() * 0.8,
            UsageError,
            "calib held values from .* like pixels from 0 to 1 before normalisation",
        ),
    ],
)
def test_calibration_that_fails_leaves_the_model_as_it_was(seed, spoil, error, message):
    model = small_vit()
    x = images_for(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        dfqvit.patch(model, calib=spoil(x))
    assert snapshot(model) == before


def test_calibration_of_a_model_that_overflows(seed):
    model = small_vit()
    with torch.no_grad():
        model.blocks[0].norm1.weight.fill_(3e38)
    before = snapshot(model)
    with pytest.raises(DfqvitError, match="an activation held NaN or Inf"):
        dfqvit.patch(model, calib=images_for(model))
    assert snapshot(model) == before


def test_packing_that_fails_leaves_the_model_as_it_was(seed):
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="w held NaN or Inf"):
        dfqvit.patch(model, trainable=False)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w_bits": 9}, "w_bits was 9; it may be a whole number from 2 to 8"),
        ({"a_bits": 1}, "a_bits was 1; it may be"),
        ({"quantizer": "best"}, "quantizer was 'best'; it may be 'minmax'"),
        ({"exclude": "blocks.7.*"}, r"exclude held 'blocks.7.\*'; it must match the name of a layer"),
        (
            {"exclude": ["*"]},
            "model has no layer that can be patched; it may be quantized already, or all are excluded",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        dfqvit.patch(small_vit(), **arguments)


def test_what_cannot_be_patched(seed):
    with pytest.raises(UsageError, match="model was a ResNet; it may be"):
        dfqvit.patch(timm.create_model("resnet18"))
    model = small_vit()
    quantized = dfqvit.quantize(model, calib=images_for(model), model_kwargs={**VIT, "depth": 3})
    with pytest.raises(UsageError, match="model has no layer that can be patched; it may be quantized already"):
        dfqvit.patch(quantized)


def test_patching_twice_is_an_error_and_so_is_quantizing_a_patched_model(model):
    with dfqvit.patch(model) as handle:
        for twin in (model, copy.deepcopy(model)):
            with pytest.raises(UsageError, match=r"model is patched already; call unpatch\(\) on its handle first"):
                dfqvit.patch(twin)
        with pytest.raises(UsageError, match="model is patched; quantize"):
            dfqvit.quantize(model, calib="noise")
        assert len(handle.patched) > 0
    with pytest.raises(UsageError, match="model is not patched any more"):
        handle.calibrate(images_for(model))
    with pytest.raises(UsageError, match="model is not patched; it may be a deep copy"):
        handle.unpatch(model)


def test_unpatch_refuses_a_layer_that_changed_its_class(seed):
    model = small_vit()
    handle = dfqvit.patch(model)
    fc1 = model.blocks[0].mlp.fc1
    nn.utils.parametrize.register_parametrization(fc1, "weight", nn.Identity())
    with pytest.raises(UsageError, match="a patched layer became a ParametrizedLiveQuantLinear; undo that before"):
        handle.unpatch()
    nn.utils.parametrize.remove_parametrizations(fc1, "weight")
    handle.unpatch()
    assert type(fc1) is nn.Linear
