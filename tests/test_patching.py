"""`dfqvit.patch` against a two-step fake-quant model written here, and everything that it must leave as it was."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import dfqvit
from dfqvit import live
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.kernels import pack_weight
from dfqvit.models import load_model

from .conftest import _lively, small_swin, small_vit

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 7,
}
MODELS = {
    "vit_tiny_patch16_224": {**VIT, "qk_norm": True, "scale_attn_norm": True},
    "vit_small_patch14_reg4_dinov2": {**VIT, "init_values": 0.5},  # register tokens, LayerScale
    "vit_base_patch32_clip_quickgelu_224": VIT,  # an activation that is not fused
    "vit_base_patch16_siglip_224": VIT,  # attention pooling, gelu_tanh in some
    "vit_giant_patch14_dinov2": {**VIT, "init_values": 0.5},  # gated MLPs
    "deit_tiny_patch16_224": {**VIT, "drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "deit_small_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": {**VIT, "init_values": 0.5},
    "swin_tiny_patch4_window7_224": {**SWIN, "drop_path_rate": 0.4},
    "swin_s3_tiny_224": {**SWIN, "img_size": 40},  # windows that need padding
}
LAYER = re.compile(r"(attn\.(qkv|proj|gate)|mlp\.(fc1|fc2|fc1_g|fc1_x)|downsample\.reduction)$")


def build(name, **kwargs):
    return _lively(timm.create_model(name, **{**MODELS[name], **kwargs}))


def images_for(model, count=2):
    parameter = next(model.parameters())
    return torch.randn(count, 3, *model.patch_embed.img_size, dtype=parameter.dtype)


@pytest.fixture(params=list(MODELS))
def variant(request, seed):
    return build(request.param)


class TwoStep(nn.Module):
    """Fake-quantize the input, fake-quantize the weight, multiply: nothing fused, nothing of dfqvit."""

    def __init__(self, linear, w_bits, a_bits):
        super().__init__()
        self.weight, self.bias, self.w_bits, self.a_bits, self.ends = linear.weight, linear.bias, w_bits, a_bits, None

    def forward(self, x):
        low, high = self.ends or (x.detach().min().float(), x.detach().max().float())
        steps = 2**self.a_bits - 1
        scale = (high.clamp(min=0) - low.clamp(max=0)) / steps
        zero = (-low.clamp(max=0) / scale).round().clamp(0, steps)
        half = 2 ** (self.w_bits - 1)
        w_scale = self.weight.detach().abs().amax(1, keepdim=True).float() / ((2**self.w_bits - 1) / 2)
        fake_x = fake(x, scale.to(x.dtype), zero.to(x.dtype), 0, steps)
        return F.linear(fake_x, fake(self.weight, w_scale.to(x.dtype), 0, -half, half - 1), self.bias)


def fake(value, scale, zero, low, high):
    """The straight-through estimator, written out: the gradient of `value` is 1 where it was not clamped, else 0."""
    q = (value.detach() / scale).round() + zero
    grid = (q.clamp(low, high) - zero) * scale
    return grid + (value - value.detach()) * ((q >= low) & (q <= high))


def two_step(model, w_bits, a_bits):
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and LAYER.search(name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, TwoStep(module, w_bits, a_bits))
    return model


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else sum(y)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model):
    """All there is to know about a model's modules: identity, class, and the identity of everything they hold."""
    return {
        name: (id(module), type(module), {k: v if k == "training" else id(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


def buffers(model):
    return {
        name: (tuple(module._buffers), set(module._non_persistent_buffers_set))
        for name, module in model.named_modules()
    }


# ---- ten models: exact way back, agreement with the unfused model, gradients


def test_unpatch_restores_everything_exactly(variant):
    x, classes = images_for(variant), {type(m): type(m).forward for m in variant.modules()}
    before, held, logits = snapshot(variant), buffers(variant), variant(x)
    handle = dfqvit.patch(variant, 4, 8, calib=x)
    assert not torch.equal(variant(x), logits)
    handle.unpatch()
    assert snapshot(variant) == before
    assert buffers(variant) == held
    assert torch.equal(variant(x), logits)
    assert all(cls.forward is forward for cls, forward in classes.items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 6)])
def test_outputs_and_gradients_equal_the_unfused_models(variant, w_bits, a_bits, training):
    """In float64, so that no rounding error moves a value across a tie; with dropout and stochastic depth when training."""
    variant = variant.double().train(training)
    x, reference = images_for(variant), two_step(variant, w_bits, a_bits)
    torch.manual_seed(1)
    wanted, wanted_gradients = gradients(reference, x)
    with dfqvit.patch(variant, w_bits, a_bits):
        torch.manual_seed(1)
        found, found_gradients = gradients(variant, x)
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)
    assert found_gradients.keys() == wanted_gradients.keys()
    assert any(LAYER.search(name.rpartition(".")[0]) for name in found_gradients)
    for name, gradient in wanted_gradients.items():
        assert torch.allclose(found_gradients[name], gradient, rtol=1e-7, atol=1e-8), name


def test_calibrated_ranges_are_those_of_the_float_model(variant):
    variant = variant.double()
    calib, x = images_for(variant, 3), images_for(variant) * 1.5  # beyond the ranges, so that clamping shows
    reference = two_step(variant, 8, 8)

    def watch(name):
        def record(_, args):
            reference.get_submodule(name).ends = (args[0].min().float(), args[0].max().float())

        return record

    for name, module in variant.named_modules():
        if LAYER.search(name):
            module.register_forward_pre_hook(watch(name))
    variant(calib)
    for module in variant.modules():
        module._forward_pre_hooks.clear()
    with dfqvit.patch(variant, calib=calib):
        wanted, wanted_gradients = gradients(reference, x)
        found, found_gradients = gradients(variant, x)
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)
    assert all(torch.allclose(found_gradients[n], g, rtol=1e-7, atol=1e-8) for n, g in wanted_gradients.items())


def test_every_layer_is_patched_or_listed(variant):
    wanted = {name for name, m in variant.named_modules() if isinstance(m, nn.Linear) and LAYER.search(name)}
    weighted = {name for name, m in variant.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    with dfqvit.patch(variant) as handle:
        assert set(handle.patched) == wanted
        assert set(handle.skipped) == weighted - wanted
        assert {n for n, m in variant.named_modules() if isinstance(m, live.LiveQuantLinear)} == wanted


def test_state_dict_and_parameters_are_the_same_objects(variant):
    before = {key: value.data_ptr() for key, value in variant.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in variant.named_parameters()}
    with dfqvit.patch(variant, calib=images_for(variant)):
        assert {key: value.data_ptr() for key, value in variant.state_dict().items()} == before
        assert {name: id(parameter) for name, parameter in variant.named_parameters()} == parameters
        variant.load_state_dict(variant.state_dict(), strict=True)


def test_deep_copies_stand_alone_and_can_be_restored(variant):
    x = images_for(variant)
    logits = variant(x)
    handle = dfqvit.patch(variant, 4, calib=x)
    twin, quantized = copy.deepcopy(variant), variant(x)
    assert torch.equal(twin(x), quantized)
    handle.unpatch()
    assert torch.equal(twin(x), quantized)
    handle.unpatch(twin)
    assert torch.equal(twin(x), logits)


# ---- float32, half precision, empty batches, compile, pickle


def test_float32_agrees_with_the_unfused_model(seed):
    model = small_swin()
    x = images_for(model, 4)
    wanted = two_step(model, 8, 8)(x)
    with dfqvit.patch(model):
        assert (model(x) - wanted).norm() < 0.01 * wanted.norm()  # a value may cross a tie


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(seed, dtype):
    model = small_vit()
    x = images_for(model)
    wanted = two_step(model, 8, 8)(x)
    with dfqvit.patch(model.to(dtype), calib=x):
        found = model(x.to(dtype))
        assert found.dtype == dtype
        assert (found.float() - wanted).norm() < 0.1 * wanted.norm()


def test_empty_batch(seed):
    model = small_vit()
    with dfqvit.patch(model):
        assert model(images_for(model, 0)).shape == (0, 7)


@pytest.mark.parametrize("make", [small_vit, small_swin])
@pytest.mark.parametrize("trainable", [True, False])
def test_compiles_to_one_graph(seed, make, trainable):
    model = make()
    x = images_for(model)
    with dfqvit.patch(model, calib=x, trainable=trainable):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_a_patched_model_can_be_pickled(seed):
    model = small_vit()
    x, file = images_for(model), io.BytesIO()
    with dfqvit.patch(model, calib=x):
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


# ---- fusion and hooks


@pytest.fixture
def calls(monkeypatch):
    """The activations that quant_linear was called with."""
    seen = []

    def spy(*args, activation=None, **kwargs):
        seen.append(activation)
        return quant_linear(*args, activation=activation, **kwargs)

    quant_linear = live.quant_linear
    monkeypatch.setattr(live, "quant_linear", spy)
    return seen


@pytest.mark.parametrize(
    ("act_layer", "fused"),
    [
        (nn.GELU, "gelu"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_tanh"),
        (functools.partial(nn.GELU, approximate="tanh"), "gelu_tanh"),
        (nn.ReLU, None),
    ],
)
def test_gelu_is_fused_into_fc1(seed, calls, act_layer, fused):
    model = small_vit(act_layer=act_layer, depth=1).double()
    x = images_for(model)
    wanted = two_step(model, 8, 8)(x)
    with dfqvit.patch(model):
        assert torch.allclose(model(x), wanted, atol=1e-8)
    assert calls == [None, None, fused, None]  # qkv, proj, fc1, fc2


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2"])
def test_hooks_fire_with_what_they_saw_before(seed, register, layer):
    """Registered before patching or after, they see the unfused model's values; and they outlive unpatch()."""
    model = small_vit(depth=1).double()
    x, reference, seen = images_for(model).requires_grad_(), two_step(model, 8, 8), {"model": [], "reference": []}

    def hook(key):
        return lambda module, *values: seen[key].append([v[0] if isinstance(v, tuple) else v for v in values])

    def attach(to, key):
        return getattr(to.blocks[0].get_submodule(layer), f"register_{register}_hook")(hook(key))

    attach(reference, "reference")
    reference(x).sum().backward()
    early = attach(model, "model")
    handle = dfqvit.patch(model)
    late = attach(model, "model")
    model(x).sum().backward()
    assert len(seen["model"]) == 2
    for values in seen["model"]:
        for found, wanted in zip(values, seen["reference"][0], strict=True):
            assert torch.allclose(found, wanted, atol=1e-8)
    handle.unpatch()
    early.remove()
    model(x).sum().backward()
    assert len(seen["model"]) == 3
    late.remove()
    model(x).sum().backward()
    assert len(seen["model"]) == 3


def test_a_global_hook_sees_fc1_too(seed):
    model, names = small_vit(depth=1), []
    with dfqvit.patch(model):
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
        try:
            model(images_for(model))
        finally:
            hook.remove()
    assert "GELU" in names
    assert names.count("LiveQuantLinear") == 4


# ---- training, modes, weights


def test_an_optimizer_made_before_patching_trains_the_weights(seed):
    model = small_vit(depth=1)
    x, weight = images_for(model), model.blocks[0].mlp.fc1.weight
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), weight.detach().clone()
    with dfqvit.patch(model, 4):
        first = model(x)
        first.square().sum().backward()
        optimizer.step()
        assert not torch.equal(weight, before)
        assert not torch.equal(model(x), first)  # the live weight is what is quantized
    assert model.blocks[0].mlp.fc1.weight is weight


def test_train_and_eval_while_patched_outlive_it(seed):
    model = build("deit_tiny_patch16_224")
    handle = dfqvit.patch(model)
    model.train()
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(x := images_for(model)), model(x))  # drop path is on
    handle.unpatch()
    assert all(module.training for module in model.modules())


def test_calibration_again_and_the_modes_of_modules(seed):
    model = build("deit_tiny_patch16_224").train()
    model.blocks[1].attn.eval()
    modes, before = [module.training for module in model.modules()], model.blocks[1].norm1.bias[0].item()
    with dfqvit.patch(model, calib=images_for(model)) as handle:
        assert [module.training for module in model.modules()] == modes
        scale = model.blocks[0].attn.qkv.input_scale
        handle.calibrate(images_for(model) * 3)
        assert model.blocks[0].attn.qkv.input_scale is not scale
        quantized = model.eval()(x := images_for(model))
        with torch.no_grad():
            model.blocks[1].norm1.bias[0] = torch.inf  # the first block's ranges can be had, the second's cannot
        with pytest.raises(DfqvitError, match="an activation held NaN or Inf"):
            handle.calibrate(x)
        with torch.no_grad():
            model.blocks[1].norm1.bias[0] = before
        assert torch.equal(model(x), quantized)  # a calibration that fails changes no layer


def test_calibration_runs_without_dropout(seed):
    model = build("deit_tiny_patch16_224")
    x, scales = images_for(model), []
    for training in (False, True):
        with dfqvit.patch(model.train(training), calib=x):
            scales.append([layer.input_scale for layer in model.modules() if isinstance(layer, live.LiveQuantLinear)])
    assert scales[0] == scales[1]


def test_packed_weights(seed):
    """trainable=False: the same numbers, and no gradient for the weights."""
    model = small_vit()
    x = images_for(model)
    with dfqvit.patch(model, 3, calib=x):
        wanted, _ = gradients(model, x)
    with dfqvit.patch(model, 3, calib=x, trainable=False):
        found, found_gradients = gradients(model, x)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert "blocks.0.attn.qkv.weight" not in found_gradients
        assert "blocks.0.attn.qkv.bias" in found_gradients
        assert not any("packed" in key for key in model.state_dict())


def test_packed_weights_are_not_stale(seed):
    model = small_vit(depth=1)
    x = images_for(model)
    other = {key: value * 0.5 for key, value in model.state_dict().items()}
    with dfqvit.patch(model, 3, calib=x, trainable=False):
        model.load_state_dict(other)
        model(x)
        fc1 = model.blocks[0].mlp.fc1
        assert torch.equal(fc1.weight_packed, pack_weight(fc1.weight, fc1.weight_scale, 3))
        assert torch.allclose(fc1.weight_scale, fc1.weight.abs().amax(1) / 3.5)


def test_mse_scales_are_used(seed):
    model = small_vit(depth=1)
    x = images_for(model)
    with dfqvit.patch(model, 3, quantizer="mse"):
        searched = model(x)
    with dfqvit.patch(model, 3):
        assert not torch.allclose(model(x), searched, atol=1e-3)


def test_ranges_that_do_not_hold_zero(seed):
    """Inputs all above zero: a range that left zero out would have no zero point, and clamp everything."""
    linear = nn.Linear(6, 3)
    wanted = linear(x := torch.rand(5, 6) + 10)
    live.LiveQuantLinear.take(linear, settings := live.LiveSettings(8, 8, "minmax", True))
    assert torch.allclose(linear(x), wanted, rtol=0.02, atol=0.3)
    inputs = live.new_range(linear)
    inputs.observe(x)
    linear.fix_range(*inputs.parameters())
    assert torch.allclose(linear(x), wanted, rtol=0.02, atol=0.3)
    assert settings.observing is False


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
        (lambda x: x.sign() * 3e38, DfqvitError, "an activation held NaN or Inf"),
    ],
)
def test_calibration_that_fails_leaves_the_model_as_it_was(seed, spoil, error, message):
    model = small_vit()
    x = images_for(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        dfqvit.patch(model, calib=spoil(x))
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


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "patching.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "patching.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert f"# {printed[0]}" in text  # the comment beside print(handle)
    assert "'patch_embed.proj': 'a Conv2d, not a plain nn.Linear'" in printed[1]
    keys = torch.load(tmp_path / "weights.pth").keys()
    assert keys == load_model("demo").state_dict().keys()
