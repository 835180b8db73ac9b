"""The entry of a quantized model: no images, autocast, and what a trace keeps of its checks."""

from __future__ import annotations

import io
import pickle
import re
import warnings

import pytest
import timm
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.models.adapters import find_adapter, flattened
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate

from .. import networks
from ..conftest import MODELS
from . import test_blocks, test_families
from .test_residual import small

FORMS = ["integer", "simulated"]
FEATURES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def quantized(name, form, **sizes):
    """(a quantized model, images)."""
    if name == "beit":
        qmodel, images = test_blocks.quantized(small("beit_base_patch16_224", depth=1, init_values=0.3).eval())
    elif name in MODELS:
        qmodel, images = test_blocks.quantized(MODELS[name](**sizes))
    else:
        _, qmodel, images = test_families.quantized(name)
    if form == "integer":
        accelerate(qmodel)
    return qmodel, images


def shapes(found):
    """Of the tensors in what a model gives, with what holds them."""
    if isinstance(found, dict):
        return {key: shapes(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [shapes(value) for value in found]
    return tuple(found.shape[1:]), found.dtype


# ------------------------------------------------------------------ no images


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, "dinov3", "eva02", "swinv2", "convnext"])
def test_no_images_give_no_logits(seed, name, form):
    qmodel, images = quantized(name, form)
    none = images[:0]
    with torch.no_grad():
        assert qmodel(none).shape == (0, 7)
        assert qmodel(none.half()).dtype == torch.float16
        for run in (qmodel.forward_features, qmodel.forward_intermediates):
            assert shapes(run(none)) == shapes(run(images))
    differentiable = none.clone().requires_grad_()
    qmodel(differentiable).sum().backward()
    assert differentiable.grad.shape == none.shape


@pytest.mark.parametrize("form", FORMS)
def test_no_images_give_no_features(seed, form):
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **FEATURES)
    calib = torch.rand(2, 3, 32, 32) * 2 - 1
    qmodel = dfqvit.quantize(model, 8, calib=calib, rounding="nearest", runtime=form, progress=False)
    assert shapes(qmodel(calib[:0])) == shapes(qmodel(calib))


def test_methods_that_the_float_model_lacks(seed):
    """`hasattr` said that timm's features_only has `forward_features`, whose call ended in an AttributeError about `super`."""
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **FEATURES)
    names = ("forward_features", "forward_intermediates", "forward_head")
    expected = {name: hasattr(model, name) for name in names}
    qmodel = dfqvit.quantize(model, 8, calib="noise", samples=2, rounding="nearest", progress=False)
    assert {name: hasattr(qmodel, name) for name in names} == expected
    assert not all(expected.values())
    with pytest.raises(AttributeError, match="has no attribute 'forward_head'"):
        qmodel.forward_head(torch.zeros(1, 4))


def test_no_images_of_another_shape_are_refused(seed):
    qmodel, images = quantized("vit", "integer")
    with pytest.raises(dfqvit.UsageError, match=r"images had shape \[0, 1, 32, 32\]; they must be \[B, 3, H, W\]"):
        qmodel(images[:0, :1])


# ------------------------------------------------------------------ parts called alone


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, "dinov3", "convnext", "beit"])
def test_a_part_called_alone_refuses_what_it_cannot_take(seed, name, form):
    """Integers were taken for floats by a block, and bytes by a layer for codes; a blocked weight had room for other widths."""
    qmodel, images = quantized(name, form)
    block = next(iter(find_adapter(qmodel).blocks()))
    seen = {}
    parts = [block, *(part for part in (getattr(block, "attn", None), block.mlp, block.mlp.fc1) if part is not None)]
    handles = [part.register_forward_pre_hook(lambda part, given: seen.setdefault(part, given[0])) for part in parts]
    with torch.no_grad():
        qmodel(images)  # by hooks within: as simulated
        for handle in handles:
            handle.remove()
        for part, x in seen.items():
            part(x)
            for dtype in (torch.uint8, torch.int64, torch.bool):
                # LayerNorm and convolutions of torch refuse them where a block is simulated
                with pytest.raises((ValueError, TypeError, RuntimeError), match=r"dtype|same"):
                    part((x * 10).to(dtype))
            channels = 1 if name == "convnext" and part is block else -1
            with pytest.raises((ValueError, RuntimeError), match=r"shape|channels|must be float32"):
                part(x.narrow(channels, 0, x.shape[channels] - 8))
        for dtype in (torch.uint8, torch.int64):
            with pytest.raises(
                dfqvit.UsageError, match=f"x had dtype {dtype}; it must hold floats, which are quantized here"
            ):
                block.mlp.fc1(seen[block.mlp.fc1].to(dtype))


# ------------------------------------------------------------------ autocast


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, "dinov3", "convnext"])
def test_autocast_changes_nothing(seed, name, form):
    qmodel, images = quantized(name, form)

    def run():
        with torch.no_grad():
            features = qmodel.forward_features(images)
            found = [qmodel(images), features, qmodel.forward_head(features), *qmodel.forward_intermediates(images)[1]]
        return [*found, qmodel(images.half()).detach(), qmodel(prompted)]

    def gradient(logits):
        return torch.autograd.grad(logits.square().sum(), prompted)[0]

    prompted = images.clone().requires_grad_()
    expected = run()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = run()
            assert torch.is_autocast_enabled("cpu")
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.dtype == wanted.dtype
            assert torch.equal(ours, wanted)
        assert torch.equal(gradient(found[-1]), gradient(qmodel(prompted)))


def test_autocast_changes_nothing_in_a_network(seed):
    qmodel = dfqvit.quantize(networks.segmenter(), calib="procedural", samples=2, rounding="nearest", progress=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = qmodel(images)["out"]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(qmodel(images)["out"], expected)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_and_exported_under_autocast(seed, form):
    qmodel, images = quantized("vit", form, depth=1)  # each block is traced for itself

    def programs():
        yield torch.compile(qmodel, fullgraph=True, backend="aot_eager")(images)
        yield torch.export.export(qmodel, (images,)).module()(images)

    with torch.no_grad():
        expected = list(programs())
        with torch.autocast("cpu", torch.bfloat16):
            for found, wanted in zip(programs(), expected, strict=True):
                assert torch.equal(found, wanted)


def test_a_default_device_changes_nothing(seed):
    """SAM's positions were looked up by indices on meta, which hold no values: logits were 27 % off, or NaN."""
    sizes = {"window_size": 2, "global_attn_indexes": (), "neck_chans": 16, "num_classes": 7, "depth": 1}
    model = timm.create_model("samvit_base_patch16", **{**FEATURES, **sizes}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "pos" in key:  # zeros, as timm makes them
                parameter.normal_()
    recipe = Recipe(8, quantizer="minmax", rounding="nearest")
    qmodel, images = convert(model, recipe), torch.randn(2, 3, 32, 32)
    calibrate(qmodel, images, recipe)
    with torch.no_grad():
        for change in (lambda simulated: None, accelerate):
            change(qmodel)
            expected, features = qmodel(images), qmodel.forward_features(images)
            with torch.device("meta"):
                assert torch.equal(qmodel(images), expected)
                assert torch.equal(qmodel.forward_features(images), features)
                assert torch.equal(qmodel.forward_head(features), expected)


# ------------------------------------------------------------------ traces


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", [None, "forward_features"])
def test_a_traced_model_refuses_pixels(seed, form, of):
    qmodel, images = quantized("vit", form, depth=1)
    for layer in qmodel.blocks[0].mlp.fc2, qmodel.head:  # factors of channels, as outliers get
        layer.exponents = torch.randint(-3, 4, (layer.in_features,), dtype=torch.int8)
    file = io.BytesIO()
    with torch.no_grad():
        traced = torch.jit.trace(Part(qmodel, of).eval(), images)
        torch.jit.save(traced, file)
        file.seek(0)
        for program in (traced, torch.jit.load(file), torch.jit.freeze(traced)):
            for _ in range(3):  # the interpreter specialises its graphs
                assert torch.equal(program(images), Part(qmodel, of)(images))
            for dtype in (torch.uint8, torch.int64, torch.bool):
                with pytest.raises(
                    torch.jit.Error, match="images had an integer dtype; they must be floats, normalised"
                ):
                    program(torch.ones_like(images).to(dtype))
            for shape in ((64, 16), (16, 64)):  # of as many patches: positions of other places were added
                with pytest.raises(
                    torch.jit.Error, match=f"images were {shape[0]} x {shape[1]}; the model was traced for 32 x 32"
                ):
                    program(torch.randn(2, 3, *shape))
            assert torch.equal(program(images.half()), Part(qmodel, of)(images.half()))


@pytest.mark.parametrize("form", FORMS)
def test_a_traced_model_takes_images_of_four_dimensions(seed, form):
    """Crops [images, crops, C, H, W], as FiveCrop gives them, had one answer for all crops."""
    qmodel, images = quantized("vit", form, depth=1)
    height, width = images.shape[-2:]
    with torch.no_grad():
        traced = torch.jit.trace(qmodel, images)
        assert torch.equal(traced(images), qmodel(images))
        for shape in ((1, 5, 3, height, width), (2, 1, 3, height, width), (3, height, width)):
            said = re.escape(f"images had shape {list(shape)}; the model was traced for tensors of 4 dimensions")
            with pytest.raises(torch.jit.Error, match=said):
                traced(torch.randn(shape))
        for channels in (1, 4):
            shape = (2, channels, height, width)
            said = re.escape(f"images had shape {list(shape)}; they must be [B, 3, H, W]")
            with pytest.raises(torch.jit.Error, match=said):
                traced(torch.randn(shape))


def test_a_traced_network_refuses_pixels(seed):
    qmodel = dfqvit.quantize(networks.pair(), calib="procedural", samples=2, rounding="nearest", progress=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(qmodel, images)
        assert torch.equal(traced(images)[0], qmodel(images)[0])
        with pytest.raises(torch.jit.Error, match="images had an integer dtype"):
            traced(torch.ones(2, 3, 32, 32, dtype=torch.uint8))


POSITIONS = {
    "naflex": lambda: timm.create_model("naflexvit_base_patch16_gap", **NAFLEX),
    "naflex by rows and columns": lambda: timm.create_model("naflexvit_base_patch16_parfac_gap", **NAFLEX),
    "mobilevit": lambda: timm.create_model("mobilevitv2_050", num_classes=7),
    "a network": networks.shallow_segmenter,
}
NAFLEX = {**FEATURES, "depth": 1, "num_classes": 7, "pos_embed_grid_size": (4, 4)}
NAFLEX.pop("img_size")


@pytest.mark.parametrize("name", list(POSITIONS))
def test_a_trace_whose_positions_are_constants_takes_one_size(seed, name):
    """Of as many patches, or fewer, it added the positions of others: the model takes none but this, or positions of its own."""
    model = POSITIONS[name]().eval()
    qmodel, images = convert(model, Recipe(8)), torch.randn(2, 3, 32, 32)
    calibrate(qmodel, images, Recipe(8))
    accelerate(qmodel)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(qmodel, images, strict=False)
        for found, expected in zip(flattened(traced(images)), flattened(qmodel(images)), strict=True):
            assert torch.equal(found, expected)
        for height, width in ((16, 64), (16, 16)):
            with pytest.raises(
                torch.jit.Error, match=f"images were {height} x {width}; the model was traced for 32 x 32"
            ):
                traced(torch.randn(2, 3, height, width))


@pytest.mark.parametrize("form", FORMS)
def test_torch_fx_is_refused(seed, form):
    """Its tracer ended in "Proxy object cannot be iterated", and torchvision's extractor left dropout on behind it."""
    qmodel, _ = quantized("swin", form)
    said = "a quantized model cannot be traced by torch.fx, .*FeatureGetterNet give its features"
    for trace in (torch.fx.symbolic_trace, lambda model: torch.fx.symbolic_trace(nn.Sequential(model))):
        with pytest.raises(dfqvit.UsageError, match=f"{said}.* a program$"):
            trace(qmodel)
    with pytest.raises(dfqvit.UsageError, match=rf"{said}.*; it is in train mode now, .* call eval\(\)"):
        create_feature_extractor(qmodel, ["norm"])


@pytest.mark.parametrize(("of", "dynamo"), [("vit", False), ("vit", True), ("a network", False)])
def test_torch_s_own_onnx_is_refused(seed, of, dynamo):
    """It ended in "No ONNX function found" or "unrecognized namespace"; `export_onnx` writes these models by it."""
    if of == "vit":
        qmodel, images = quantized("vit", "integer", depth=1)
    else:
        qmodel, images = convert(networks.pair(), Recipe(8)), torch.rand(2, 3, 32, 32)
        calibrate(qmodel, images, Recipe(8))
    kind = torch.onnx.errors.OnnxExporterError if dynamo else dfqvit.UsageError
    with pytest.raises(kind, match=r"cannot be written by torch\.onnx\.export, .*export_onnx\(model, path\) writes it"):
        torch.onnx.export(qmodel, (images,), io.BytesIO(), dynamo=dynamo, verbose=False)
    assert not torch.onnx.is_in_onnx_export()


class Part(nn.Module):
    """A model, or one of its methods as a module."""

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method or "forward"

    def forward(self, x):
        return getattr(self.model, self.method)(x)


@torch.no_grad()
def test_batch_norms_in_train_mode_are_told(seed):
    """They take a batch's own statistics and change those that are kept, as timm's do: LeViT's logits were 65 % off after."""
    images = torch.randn(4, 3, 224, 224)
    qmodel = dfqvit.quantize(
        timm.create_model("levit_128s", num_classes=7), 8, calib=images, rounding="nearest", progress=False
    )
    vit = dfqvit.quantize(MODELS["vit"](), 8, calib="procedural", samples=2, rounding="nearest", progress=False)

    def said_by(model, x):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model(x)
        return [str(each.message) for each in told]

    (said,) = said_by(qmodel.train(), images)
    assert said.startswith("the quantized model is in train mode: 'stem.conv1.bn' and the like normalise by the batch")
    for module in qmodel.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert not said_by(qmodel, images)
    assert not said_by(qmodel.eval(), images)
    assert not said_by(vit.train(), torch.randn(2, 3, 32, 32))


def test_biases_that_timm_keeps_follow_their_tables(seed):
    """After a state_dict that was loaded, LeViT's logits were 61 % off, and 15 % after a `functional_call` with other tables."""
    model, images = timm.create_model("levit_128s", img_size=64, num_classes=7).eval(), torch.randn(3, 3, 64, 64)
    tables = [name for name, _ in model.named_parameters() if name.endswith("attention_biases")]

    def shifted(state):
        return {name: 3 * torch.randn_like(state[name]) for name in tables}

    model.load_state_dict(shifted(model.state_dict()), strict=False)
    options = {"calib": torch.randn(4, 3, 64, 64), "rounding": "nearest", "progress": False}
    qmodel = dfqvit.quantize(model, 8, **options)
    state = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    other = shifted(state)
    fresh = pickle.loads(pickle.dumps(qmodel))
    fresh.load_state_dict(state | other)
    with torch.no_grad():
        before, expected = qmodel(images), fresh(images)  # each called once with these tables alone
        assert (before - expected).norm() > 0.1 * before.norm()
        assert torch.equal(torch.func.functional_call(qmodel, other, (images,)), expected)
        assert torch.equal(qmodel(images), before)
        qmodel.load_state_dict(state | other)
        assert torch.equal(qmodel(images), expected)
    for name in tables:
        qmodel.get_parameter(name).requires_grad_()
    qmodel(images).sum().backward()
    assert all(qmodel.get_parameter(name).grad is not None for name in tables)
