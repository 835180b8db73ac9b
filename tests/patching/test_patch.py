"""`dfqvit.patch` against the two-step fake-quant model of `two_step.py`, and everything that it must leave as it was."""

from __future__ import annotations

import copy
import functools
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dfqvit
from dfqvit.errors import DfqvitError
from dfqvit.kernels import pack_weight
from dfqvit.models import load_model
from dfqvit.patching import live

from ..conftest import small_swin, small_vit
from .two_step import LAYER, MODELS, buffers, build, gradients, images_for, snapshot, two_step


@pytest.fixture(params=list(MODELS))
def variant(request, seed):
    return build(request.param)


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


@pytest.mark.parametrize(("make", "blocks"), [(small_vit, {"depth": 1}), (small_swin, {"depths": (1, 2)})])
@pytest.mark.parametrize("trainable", [True, False])
def test_compiles_to_one_graph(seed, make, blocks, trainable):
    model = make(**blocks)  # few of them, since each is traced for itself
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
        ("quick_gelu", "quick_gelu"),
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
        handle.calibrate(images_for(model) * 2)  # 7 deviations from what is refused
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


def test_packed_weights_are_those_of_the_parameter_that_stands_there(seed):
    """Another in its place has a count of writes of its own, which may be the same."""
    model, other = small_vit(depth=1), small_vit(depth=1)
    x = images_for(model)
    with dfqvit.patch(other, 3, calib=x):
        wanted = other(x)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    for assign in (True, False):
        with dfqvit.patch(model, 3, calib=x, trainable=False) as handle:
            model(x)
            model.load_state_dict(state, assign=assign)
            handle.calibrate(x)
            assert torch.allclose(model(x), wanted, atol=1e-5)
    with dfqvit.patch(model, 3, trainable=False):
        plain = model(x)
        for factor in (0.5, 2.0, 1.0):
            weights = {key: value * factor for key, value in state.items()}
            found = torch.func.functional_call(model, weights, x)
            assert torch.allclose(found, plain, atol=1e-5) == (factor == 1.0)
        assert torch.allclose(model(x), plain, atol=1e-5)


def test_a_model_patched_in_inference_mode_has_gradients_after_it(seed):
    model = small_vit(depth=1)
    x = images_for(model)
    for trainable in (True, False):
        with torch.inference_mode():
            handle = dfqvit.patch(model, 8, calib=x, trainable=trainable)
            expected = model(x)
        found, _ = gradients(model, x)
        assert torch.allclose(found, expected, atol=1e-5)
        handle.unpatch()


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


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent.parent / "docs" / "patching.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "patching.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert f"# {printed[0]}" in text  # the comment beside print(handle)
    assert "'patch_embed.proj': 'a Conv2d, not a plain nn.Linear'" in printed[1]
    keys = torch.load(tmp_path / "weights.pth").keys()
    assert keys == load_model("demo").state_dict().keys()
