"""Blocks that run part by part with norms and residual sums in the operators: EVA, BEiT, relative positions, unusual ViTs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU
from torch import nn

import dfqvit
from dfqvit.runtime import accelerate
from dfqvit.runtime.residual import IntegerResidual

from ..conftest import SMALL, small_vit
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
