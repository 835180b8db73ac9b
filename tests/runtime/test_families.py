"""Swin V2's, ConvNeXt's, rotary and gated blocks as one operator each: as simulated, near float, never of what they were."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import GluMlp

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.kernels import extension, use_backend
from dfqvit.models.adapters import find_adapter
from dfqvit.models.preprocessing import Preprocessing
from dfqvit.quantization.layers import QuantLinear, QuantPatchProjection
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate
from dfqvit.runtime.block import IntegerBlock
from dfqvit.runtime.convnext import IntegerConvNeXtBlock, IntegerDownsample
from dfqvit.runtime.rotary import IntegerRotaryBlock
from dfqvit.runtime.swin import MERGINGS, IntegerSwinV2Block, take_mergings
from dfqvit.runtime.vit import IntegerVitBlock

from ..conftest import made_once
from .test_blocks import Operators, check_paths, close

SWIN_V2 = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 7}
CONVNEXT = {"dims": (16, 24, 32, 40), "depths": (1, 2, 2, 1), "num_classes": 7}
ROTARY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
MAKE = {
    "dinov3": ("vit_small_patch16_dinov3", {**ROTARY, "init_values": 0.5}),
    "rope of each head": ("vit_small_patch16_rope_mixed_224", ROTARY),
    "eva02": ("eva02_tiny_patch14_224", ROTARY),
    "rope and gate": ("vit_base_patch16_rope_mixed_224", {**ROTARY, "init_values": 0.4, "swiglu_mlp": True}),
    "gated vit": ("vit_tiny_patch16_224", {**ROTARY, "mlp_layer": GluMlp, "act_layer": "silu"}),
    "gated by gelu": ("vit_tiny_patch16_224", {**ROTARY, "mlp_layer": GluMlp, "init_values": 0.5}),
    "swinv2": ("swinv2_tiny_window8_256", SWIN_V2),
    "convnext": ("convnext_tiny", CONVNEXT),
    "convnext of 1x1 convolutions": ("convnext_atto", CONVNEXT),
    "convnextv2": ("convnextv2_tiny", CONVNEXT),
    "convnextv2 of 1x1 convolutions": ("convnextv2_atto", CONVNEXT),
}


def make(name):
    """A small model whose every part matters."""
    architecture, sizes = MAKE[name]
    model = timm.create_model(architecture, **sizes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.normal_().mul_(0.2)
            elif "logit_scale" in key:
                parameter.uniform_(0.5, 5)  # some beyond the bound
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_().mul_(parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(params=list(MAKE))
def family(request, seed):
    return request.param


@made_once
def quantized(name, w_bits=8):
    """(float model, quantized and simulated, images)."""
    model = make(name)
    _, *size = (3, 64, 64) if "convnext" in name else Preprocessing.of(model).input_size
    images = torch.randn(24, 3, *size)  # as many to compare on as in test_blocks.py, and for its reason
    qmodel = convert(model, Recipe(w_bits))
    calibrate(qmodel, images[:8], Recipe(w_bits))
    return model, qmodel, images[8:]


def integer(qmodel):
    return [module for module in qmodel.modules() if isinstance(module, IntegerBlock)]


@pytest.mark.parametrize("w_bits", [8, 4, 3])
def test_as_simulated_and_near_float(family, isa, w_bits):
    model, qmodel, images = quantized(family, w_bits)
    expected, state = qmodel(images), {name: value.clone() for name, value in qmodel.state_dict().items()}
    assert accelerate(qmodel) == {}
    blocks = find_adapter(qmodel).blocks()
    assert integer(qmodel) == list(blocks)
    kinds = {IntegerSwinV2Block, IntegerConvNeXtBlock, IntegerRotaryBlock, IntegerVitBlock}
    assert {type(block) for block in blocks} <= kinds
    with Operators() as operators:
        found = qmodel(images)
    assert ("dfqvit::quant_conv_block" if "convnext" in family else "dfqvit::quant_block") in operators.called
    assert "aten::softmax" not in operators.called
    assert close(found, expected)
    assert torch.equal(qmodel(images), found)  # prepared by now
    if w_bits == 8:
        wanted = model(images).detach()
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
    after = qmodel.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_paths_of_the_processor_give_the_same_bits(family):
    _, qmodel, images = quantized(family, 4)
    accelerate(qmodel)
    check_paths(qmodel, images)


def test_copied_pickled_saved_and_exported(family, tmp_path):
    model = make(family)
    images = torch.randn(3, *Preprocessing.of(model).input_size)
    qmodel = dfqvit.quantize(model, 4, calib=images, rounding="nearest")
    assert set(dfqvit.integer_report(qmodel).values()) == {""}
    expected = qmodel(images)
    for found in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(found(images), expected)
    assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "model.safetensors"))(images), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(qmodel, (images,), dynamic_shapes=({0: batch},))
    assert close(program.module()(images[:3]), expected[:3])


CHANGES = {
    "swinv2": ["attn.logit_scale", "attn.cpb_mlp.0.weight", "norm1.weight", "norm2.bias", "mlp.fc1.bias"],
    "dinov3": ["gamma_1", "attn.qkv.weight_scale", "norm2.weight"],
    "eva02": ["mlp.fc1.bias", "mlp.fc2.input.scale", "mlp.fc1.weight_scale"],
    "convnext": ["conv_dw.weight", "conv_dw.bias", "norm.weight", "gamma", "mlp.fc2.weight_scale"],
    "convnextv2": ["mlp.grn.weight", "mlp.grn.bias"],
}


@pytest.mark.parametrize("place", [(kind, name) for kind, names in CHANGES.items() for name in names])
def test_a_change_in_place_is_taken_up(seed, place):
    kind, name = place
    _, qmodel, images = quantized(kind)
    accelerate(qmodel)
    with torch.no_grad():
        before = [qmodel(images) for _ in range(2)][-1]
        block = integer(qmodel)[-1]
        tensors = dict(block.named_parameters()) | dict(block.named_buffers())
        tensors[name].mul_(0.5)
        found = qmodel(images)
        assert not torch.equal(found, before)
        with use_backend("reference" if extension.load()[0] is None else "cpu"):  # the operators, with nothing prepared
            assert torch.equal(found, qmodel(images))


def test_gradients_hooks_and_training_are_simulated(family):
    _, qmodel, images = quantized(family)
    expected = qmodel(images)
    accelerate(qmodel)
    found = qmodel(images)
    wanted = images.clone().requires_grad_()
    qmodel(wanted).square().mean().backward()
    assert float(wanted.grad.abs().sum()) > 0
    seen = []
    block = integer(qmodel)[0]
    handle = block.mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    assert close(qmodel(images), expected)
    assert seen == [1]
    handle.remove()
    assert torch.equal(qmodel(images), found)
    block.forward = lambda x, **_: x * 2  # a user's own
    assert not torch.equal(qmodel(images), found)


@pytest.mark.parametrize("change", ["gate_last", "act"])
def test_a_gate_that_changes_counts(seed, change):
    """Which half is the gate, and by which activation: an attribute and a module that were other ones before."""
    _, qmodel, images = quantized("eva02")
    simulated = copy.deepcopy(qmodel)
    accelerate(qmodel)
    before = [qmodel(images) for _ in range(2)][-1]
    for each in (*qmodel.blocks, *simulated.blocks):
        setattr(each.mlp, change, torch.nn.GELU() if change == "act" else not each.mlp.gate_last)
    found = qmodel(images)
    assert not torch.equal(found, before)
    assert close(found, simulated(images))


def test_a_gated_mlp_of_the_users_own_is_not_taken_for_timms(seed):
    class Doubled(GluMlp):
        def forward(self, x):
            return 2 * super().forward(x)

    _, qmodel, images = quantized("gated vit")
    qmodel.blocks[1].mlp.__class__ = Doubled
    expected = qmodel(images)
    accelerate(qmodel)
    assert [type(block) for block in integer(qmodel)] == [IntegerVitBlock]
    assert close(qmodel(images), expected)
    assert "Doubled" in IntegerVitBlock.why_not(qmodel.blocks[1])


def test_a_rope_counts_in_every_call(seed):
    """It is no constant: of other positions, of half the tokens, for each head or for all; with a gradient, simulated."""
    _, qmodel, _ = quantized("dinov3")
    accelerate(qmodel)
    block, x = qmodel.blocks[0], torch.randn(2, 21, 48)
    for shape in ((16, 32), (21, 32), (3, 16, 32), (9, 32)):
        angles = torch.randn(*shape[:-1], 16)
        rope = torch.cat((angles.sin(), angles.cos()), -1)
        with torch.no_grad():
            found = [block(x, rope=rope) for _ in range(2)]
            with use_backend("reference"):
                expected = block(x, rope=rope)
        assert torch.equal(*found)
        assert close(found[0], expected)
        assert not torch.equal(block(x, rope=rope.roll(1, -2)), found[0])
        assert not torch.equal(block(x), found[0])
    leaf = rope.clone().requires_grad_()
    block(x, rope=leaf).square().sum().backward()
    assert float(leaf.grad.abs().sum()) > 0
    with torch.no_grad(), pytest.raises(ValueError, match="rope had shape"):
        block(x, rope=rope[:, :-2])
    mask = torch.ones(21, 21, dtype=torch.bool).tril()
    assert not torch.equal(block(x, rope=rope, attn_mask=mask), found[0])


def test_other_sizes_of_image(seed):
    """A ConvNeXt takes any; Swin V2 those that its windows were made for."""
    _, qmodel, _ = quantized("convnext")
    images = torch.randn(2, 3, 96, 64)
    expected = qmodel(images)
    accelerate(qmodel)
    assert close(qmodel(images), expected)
    _, qmodel, images = quantized("swinv2")
    accelerate(qmodel)
    qmodel(images)
    qmodel.set_input_size((48, 48))
    images = torch.randn(2, 3, 48, 48)
    found = qmodel(images)
    assert next(type(block).why_not(block) for block in integer(qmodel)) == ""
    for block in integer(qmodel):
        block.__class__ = type(block).family
    assert close(found, qmodel(images))


def test_a_block_with_another_convolution_stays_simulated(seed):
    _, qmodel, images = quantized("convnext")
    block = qmodel.stages[1].blocks[0]
    block.conv_dw.dilation, block.conv_dw.padding = (2, 2), (6, 6)
    expected = qmodel(images)
    assert "dilates" in IntegerConvNeXtBlock.why_not(block)
    accelerate(qmodel)
    assert type(block) is IntegerConvNeXtBlock.family
    assert close(qmodel(images), expected)


def test_layers_between_stages_give_bytes(seed):
    _, qmodel, _images = quantized("convnext")
    accelerate(qmodel)
    downsample = qmodel.stages[1].downsample
    assert type(downsample) is IntegerDownsample
    x = torch.randn(2, 16, 9, 12).to(memory_format=torch.channels_last)
    found = downsample(x)
    downsample.__class__ = torch.nn.Sequential
    assert close(found, downsample(x))


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("channels", [3, 24])
def test_patches_with_their_pixels_channels_together(seed, channels, exponents):
    """The kernels' weight has another order of the inputs than the file's; the result does not."""
    conv = torch.nn.Conv2d(channels, 20, 2, stride=2)
    layer = QuantPatchProjection.from_float(conv, 4, 8, "minmax")
    x = torch.randn(3, channels, 8, 10)
    layer(x)
    layer.freeze()
    if exponents:
        layer.exponents = torch.randint(-1, 2, (4 * channels,), dtype=torch.int8)
    assert layer.by_pixels == (channels == 24 and layer.weight_blocked is not None)
    found = [layer(x), layer(x.to(memory_format=torch.channels_last))]
    layer.weight_blocked = None  # as on another device
    assert not layer.by_pixels
    expected = layer(x)
    assert all(torch.allclose(each, expected, rtol=1e-5, atol=1e-5) for each in found)


@pytest.mark.parametrize("kind", MERGINGS, ids=["Swin", "Swin V2"])
def test_patches_are_merged_as_simulated(seed, kind):
    merging = kind(12, device=None).eval()
    merging.reduction = QuantLinear.from_float(merging.reduction, 8, 8, "minmax")
    x = torch.randn(2, 6, 8, 12)
    merging(x)
    merging.reduction.freeze()
    expected, odd = merging(x), merging(x[:, :5])
    take_mergings(merging)
    assert type(merging) is MERGINGS[kind]
    assert close(merging(x), expected)
    assert torch.equal(merging(x[:, :5]), odd)
    wanted = x.clone().requires_grad_()
    merging(wanted).sum().backward()
    assert wanted.grad is not None


def test_what_results_leave_serves_again(seed):
    """Tensors of operators are torch's own: they outlive others, grow, and move to shared memory."""
    gathered = extension.gathered
    x = torch.randn(300, 1000)
    first = gathered(x.T)
    assert torch.equal(first, x.T)
    assert first.is_contiguous()
    kept, place = first[5:7], first.data_ptr()
    del first
    second = gathered(x)
    assert second.data_ptr() != place  # a view of the first is alive
    assert torch.equal(kept, x.T[5:7])
    del kept
    third = gathered(x * 2)
    if extension.load()[0] is not None:
        assert third.data_ptr() == place
    assert torch.equal(second, x)
    third.resize_(700, 1000)
    assert torch.equal(third[:300], x * 2)
    shared = second.share_memory_()
    assert torch.equal(shared, x)
    assert torch.equal(torch.utils.data.default_collate([second]), x[None])
