"""Blocks that run part by part with norms and residual sums in the operators: EVA, BEiT, relative positions, unusual ViTs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU
from torch import nn
from torch.func import functional_call

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.correction import add_corrections
from dfqvit.kernels import extension, use_backend
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate
from dfqvit.runtime.parts import parts_of
from dfqvit.runtime.residual import IntegerResidual

from ..conftest import SMALL, made_once, small_vit
from .test_blocks import Operators, close, quantized


def small(name, **options):
    return timm.create_model(name, pretrained=False, **{**SMALL["distilled"], **options})


MAKE = {
    "eva": lambda: small("eva02_tiny_patch14_224", qk_norm=True),
    "eva, norms inside": lambda: small("eva02_base_patch16_clip_224"),
    "dinov3, norms of q and k": lambda: small("vit_small_patch16_dinov3", init_values=0.4, qk_norm=True),
    "dinov3, gated": lambda: small("vit_small_plus_patch16_dinov3", init_values=0.4),
    "rope": lambda: small("vit_base_patch16_rope_mixed_224", init_values=0.4, swiglu_mlp=True, qk_norm=True),
    "beit": lambda: small("beit_base_patch16_224", init_values=0.3),
    "relative": lambda: small("vit_relpos_small_patch16_224", init_values=0.4),
    "norms of q and k": lambda: small_vit(qk_norm=True, init_values=0.4),
    "gated": lambda: small_vit(mlp_layer=SwiGLU, norm_layer=RmsNorm, act_layer="silu"),
    "packed gate": lambda: small_vit(mlp_layer=GluMlp, act_layer="silu", qk_norm=True, mlp_ratio=4),
}


@pytest.fixture(params=list(MAKE))
def unusual(request, seed):
    """A model whose every part matters."""
    model = MAKE[request.param]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "gamma" not in name and "ls" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "bias_table" in name:
                parameter.normal_()
            elif name == "head.weight":  # some families begin with one near 0: the logits would be its bias
                parameter.normal_(std=0.1)
    return model


def residual(qmodel):
    return [module for module in qmodel.modules() if isinstance(module, IntegerResidual)]


@pytest.mark.parametrize("w_bits", [8, 3])
def test_as_simulated_and_near_float(unusual, isa, w_bits):
    qmodel, images = quantized(unusual, w_bits)
    expected, state = qmodel(images), {name: value.clone() for name, value in qmodel.state_dict().items()}
    assert accelerate(qmodel) == {}
    assert residual(qmodel) == list(qmodel.blocks)
    with Operators() as operators:
        found = qmodel(images)
    assert {"dfqvit::quantize_heads", "dfqvit::quant_attention"} <= operators.called
    assert close(found, expected)
    if w_bits == 8:
        wanted = unusual(images)
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
    after = qmodel.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_copies_and_reports(unusual):
    qmodel, images = quantized(unusual, 4)
    accelerate(qmodel)
    expected = qmodel(images)
    for found in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(found(images), expected)
    assert set(dfqvit.integer_report(qmodel).values()) == {""}


def test_a_gradient_is_the_simulated_ones(unusual):
    qmodel, images = quantized(unusual, 4)
    theirs, ours = images.clone().requires_grad_(), images.clone().requires_grad_()
    qmodel(theirs).square().sum().backward()
    accelerate(qmodel)
    qmodel(ours).square().sum().backward()
    assert float(theirs.grad.abs().sum()) > 0
    assert torch.equal(ours.grad, theirs.grad)


def test_hooks_inside_see_what_they_would_see(unusual):
    qmodel, images = quantized(unusual, 4)
    accelerate(qmodel)
    block, seen = residual(qmodel)[0], []
    plain = qmodel(images)
    handles = [getattr(block, name).register_forward_hook(lambda *a: seen.append(a[2])) for name in ("norm1", "mlp")]
    watched = qmodel(images)
    assert [value.dtype for value in seen] == [torch.float32] * 2
    assert close(watched, plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(qmodel(images), plain)


def test_a_change_of_its_parts_counts(unusual):
    qmodel, images = quantized(unusual, 8)
    accelerate(qmodel)
    before = qmodel(images)
    block = residual(qmodel)[1]
    with torch.no_grad():
        block.norm2.weight.mul_(1.5)
    changed = qmodel(images)
    assert not torch.equal(changed, before)
    fresh = copy.deepcopy(qmodel)
    assert torch.equal(fresh(images), changed)
    block.mlp = nn.Identity()
    assert not torch.equal(qmodel(images), changed)


def test_compiled_and_exported(unusual):
    unusual.blocks = unusual.blocks[:1]  # each is traced for itself
    qmodel, images = quantized(unusual, 4)
    accelerate(qmodel)
    expected = qmodel(images)
    torch._dynamo.reset()  # which counts the models of all tests together
    with torch.no_grad():
        compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images), expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(qmodel, (images,), dynamic_shapes=({0: batch},))
        assert torch.equal(program.module()(images[:3]), qmodel(images[:3]))


def test_prepared_calls_give_what_the_operators_give(unusual):
    qmodel, images = quantized(unusual, 4)
    accelerate(qmodel)
    with torch.no_grad():
        first, second = qmodel(images), qmodel(images)
        assert all("_prepared" in block.__dict__ for block in residual(qmodel))
        with Operators() as operators:
            watched = qmodel(images)
        with dfqvit.kernels.use_backend("cpu"):
            asked = qmodel(images)
        assert "dfqvit::quant_linear" in operators.called
        for found in (second, watched, asked):
            assert torch.equal(found, first)
        fewer = images[:1]
        assert torch.equal(qmodel(fewer), copy.deepcopy(qmodel)(fewer))


def make_change(qmodel, change):
    """Changes the second block of the model in place."""
    block = residual(qmodel)[1]
    layer = block.mlp.fc2
    if change == "forward":
        layer.forward = lambda x: torch.zeros(*x.shape[:-1], layer.out_features)
    elif change == "hook":
        layer.register_forward_hook(lambda *a: a[2] * 0)
    elif change == "scale":
        layer.weight_scale.mul_(2)
    elif change == "setting":
        block.norm2.eps = 10.0
    elif change == "positions":  # what is computed from them is kept between calls
        table = positions(block)[0]
        table.add_(torch.randn_like(table))
    else:
        state = {name: value.clone() for name, value in qmodel.state_dict().items()}
        name = next(name for name in state if name.endswith("blocks.1.mlp.fc2.weight_packed"))
        state[name] = 255 - state[name]
        qmodel.load_state_dict(state)


def positions(block):
    """The tables of positions that its attention has."""
    return [each for name, each in block.attn.named_parameters() if "rel" in name]


@torch.no_grad()
def test_what_is_changed_after_a_call_counts(unusual):
    made, images = quantized(unusual, 8)
    changes = ["forward", "hook", "scale", "setting", "state"]
    if positions(made.blocks[1]):
        changes.append("positions")
    for change in changes:
        qmodel = copy.deepcopy(made)
        accelerate(qmodel)
        before = qmodel(images)
        assert torch.equal(qmodel(images), before)
        make_change(qmodel, change)
        found = qmodel(images)
        assert not torch.equal(found, before), change
        if change in ("scale", "state", "positions"):
            assert torch.equal(found, copy.deepcopy(qmodel)(images)), change


def test_a_gradient_after_a_call_is_the_simulated_ones(unusual):
    qmodel, images = quantized(unusual, 4)
    theirs, ours = images.clone().requires_grad_(), images.clone().requires_grad_()
    qmodel(theirs).square().sum().backward()
    accelerate(qmodel)
    with torch.no_grad():
        qmodel(images)
        qmodel(images)
    qmodel(ours).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


# With two first layers in the MLP. Of 100 outputs, no block of a weight's ends where the second layer begins.
SWIGLU = {
    "dinov3": lambda: small("vit_small_plus_patch16_dinov3", init_values=0.4, depth=2),
    "100 hidden": lambda: small(
        "vit_small_plus_patch16_dinov3", init_values=0.4, depth=2, swiglu_align_to=4, mlp_ratio=2.1
    ),
    "vit": lambda: small_vit(mlp_layer=SwiGLU, act_layer="gelu", depth=2),
}


@made_once
def gated(name, w_bits=8, second_bits=None):
    """(quantized, images); `second_bits`: of fc1_x of the last block."""
    model = SWIGLU[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "gamma" not in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() > 1:  # those of timm are so small that hardly a byte of the head's input would change
                parameter.normal_().mul_(parameter[0].numel() ** -0.5)
    images = torch.randn(24, 3, *model.patch_embed.img_size)
    recipe = Recipe(w_bits, layer_bits=None if second_bits is None else {"blocks.1.mlp.fc1_x": second_bits})
    qmodel = convert(model, recipe)
    calibrate(qmodel, images[:8], recipe)
    add_corrections(model, qmodel, images[:8], "sequential")
    return qmodel, images[8:]


def whole(qmodel):
    """Of every block, whether it is prepared as one operator; all of them have been called."""
    if extension.load()[0] is None:
        pytest.skip("dfqvit._C is not built")
    return [block.__dict__["_prepared"][2] is not None for block in residual(qmodel)]


def part_by_part(qmodel, images):
    with use_backend("cpu"):  # one that is asked for by name: nothing is prepared
        return qmodel(images)


@torch.no_grad()
@pytest.mark.parametrize("w_bits", [8, 4, 3])
@pytest.mark.parametrize("name", list(SWIGLU))
def test_two_first_layers_run_as_one_operator(seed, isa, name, w_bits):
    qmodel, images = gated(name, w_bits)
    simulated = qmodel(images)
    assert accelerate(qmodel) == {}
    found = [qmodel(images) for _ in range(2)]
    assert whole(qmodel) == [True, True]
    expected = part_by_part(qmodel, images)
    assert all(torch.equal(each, expected) for each in found)
    assert close(expected, simulated)
    for batch in (1, 3):
        assert torch.equal(qmodel(images[:batch]), part_by_part(qmodel, images[:batch]))
    assert set(dfqvit.integer_report(qmodel).values()) == {""}


def replace_first_layer(qmodel):
    qmodel.blocks[1].mlp.fc1_x = copy.deepcopy(qmodel.blocks[0].mlp.fc1_x)
    qmodel.blocks[1].mlp.fc1_x.input.load_state_dict(qmodel.blocks[1].mlp.fc1_g.input.state_dict())


def load_one_half(qmodel):
    layer = qmodel.blocks[1].mlp.fc1_x
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state | {"weight_packed": 255 - state["weight_packed"]})


GATED_CHANGES = {
    "a state of the second": load_one_half,
    "a layer for the second": replace_first_layer,
    "packed weights in place": lambda q: q.blocks[1].mlp.fc1_g.weight_packed.bitwise_not_(),
    "scales in place": lambda q: q.blocks[1].mlp.fc1_x.weight_scale.mul_(-0.5),
    "a bias in place": lambda q: q.blocks[1].mlp.fc1_g.bias.add_(1),
    "a bias for none": lambda q: setattr(q.blocks[1].mlp.fc1_x, "bias", None),
    "the activation": lambda q: setattr(q.blocks[1].mlp, "act", nn.GELU("tanh")),
    "a norm inside": lambda q: setattr(q.blocks[1].mlp, "norm", nn.LayerNorm(192).eval()),
    "grids that differ": lambda q: q.blocks[1].mlp.fc1_x.input.scale.mul_(1.5),
    "zero points that differ": lambda q: q.blocks[1].mlp.fc1_x.input.zero_point.add_(60),
    "both grids": lambda q: [each.input.scale.mul_(1.5) for each in (q.blocks[1].mlp.fc1_g, q.blocks[1].mlp.fc1_x)],
}


@torch.no_grad()
@pytest.mark.parametrize("change", list(GATED_CHANGES))
def test_joined_layers_follow_what_changes(seed, change):
    qmodel, images = gated("dinov3")
    accelerate(qmodel)
    before = [qmodel(images) for _ in range(2)][-1]
    assert whole(qmodel) == [True, True]
    GATED_CHANGES[change](qmodel)
    found = [qmodel(images) for _ in range(2)]
    assert whole(qmodel) == [True, change not in ("a norm inside", "grids that differ", "zero points that differ")]
    assert not torch.equal(found[0], before)
    for expected in (found[1], part_by_part(qmodel, images), copy.deepcopy(qmodel)(images)):
        assert torch.equal(found[0], expected)
    simulated = copy.deepcopy(qmodel)
    for block in simulated.blocks:
        block.__class__ = type(block).family
    assert close(found[0], simulated(images))


@torch.no_grad()
def test_functional_call_with_other_weights_of_one_half(seed):
    qmodel, images = gated("dinov3")
    accelerate(qmodel)
    before = [qmodel(images) for _ in range(2)][-1]
    name = "blocks.1.mlp.fc1_x.weight_packed"
    other = ~qmodel.get_buffer(name)
    found = functional_call(qmodel, {name: other}, images)
    assert torch.equal(qmodel(images), before)
    changed = copy.deepcopy(qmodel)
    changed.blocks[1].mlp.fc1_x.weight_packed = other
    assert not torch.equal(found, before)
    assert torch.equal(found, part_by_part(changed, images))


@torch.no_grad()
def test_halves_that_differ_stay_two_layers(seed):
    qmodel, images = gated("dinov3", 8, 4)
    expected = qmodel(images)
    accelerate(qmodel)
    found = [qmodel(images) for _ in range(2)][-1]
    assert whole(qmodel) == [True, False]
    assert torch.equal(found, part_by_part(qmodel, images))
    assert close(found, expected)
    assert parts_of(qmodel.blocks[1], join=True) == "the weights of its MLP's first layers differ in bits"
    mlp = qmodel.blocks[0].mlp
    mlp.fc1_g.input.zero_point.add_(1)
    said = "the inputs of its MLP's first layers are rounded differently"
    assert parts_of(qmodel.blocks[0], join=True) == said
    mlp.fc1_x.input.zero_point.add_(1)
    assert not isinstance(parts_of(qmodel.blocks[0], join=True), str)
    assert parts_of(qmodel.blocks[0]) == "its MLP is a SwiGLU"


@torch.no_grad()
def test_a_joined_block_with_masks_and_ropes(seed):
    """A prepared one answers for no call that it was not made for."""
    qmodel, images = gated("dinov3")
    accelerate(qmodel)
    qmodel(images)
    assert whole(qmodel) == [True, True]
    block, x, angles = qmodel.blocks[0], torch.randn(2, 21, 48), torch.randn(2, 1, 16, 16)
    each = torch.cat((angles.sin(), angles.cos()), -1)  # one for each image
    mask = torch.ones(21, 21, dtype=torch.bool).tril()
    calls = [
        {"rope": each[0, 0]},
        {},
        {"rope": each[0, 0], "attn_mask": mask},
        {"rope": each[1, 0], "is_causal": True},
        {"rope": each},
    ]
    found = [block(x, **call) for call in calls]
    with use_backend("cpu"):
        expected = [block(x, **call) for call in calls]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert all(not torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(block(x, each[0, 0]), found[0])  # not by name
    with pytest.raises(ValueError, match="rope had shape"):
        block(x, rope=each[0, 0, :, :-2])


def test_joined_layers_are_copied_saved_and_differentiated(seed, tmp_path):
    model = SWIGLU["dinov3"]().eval()
    images = torch.randn(8, 3, *model.patch_embed.img_size)
    qmodel = dfqvit.quantize(model, 4, calib=images, rounding="nearest")
    names = set(qmodel.state_dict())
    with torch.no_grad():
        expected = qmodel(images)
        assert whole(qmodel) == [True, True]
        loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "gated.safetensors"))
        for found in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), loaded):
            assert torch.equal(found(images), expected)
            assert set(found.state_dict()) == names
    ours = images.clone().requires_grad_()
    qmodel(ours).square().sum().backward()
    for block in loaded.blocks:
        block.__class__ = type(block).family
    theirs = images.clone().requires_grad_()
    loaded(theirs).square().sum().backward()
    assert float(ours.grad.abs().sum()) > 0
    assert torch.equal(ours.grad, theirs.grad)
