"""A layer's prepared call: the same bits as the operator, and none where what it was made from has changed, or is watched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_linear_bn_eval

from dfqvit.kernels import extension, quant_linear, use_backend
from dfqvit.quantization.layers import QuantLinear, QuantPatchProjection

pytestmark = pytest.mark.skipif(not extension.supports_cpu()[0], reason="dfqvit._C is not built")


def layer_and_input(bits=8, bias=True, factors=False):
    """A frozen layer of random sizes that has been called, and what it was called with."""
    inputs, outputs = (int(size) for size in torch.randint(3, 70, (2,)))
    layer, x = QuantLinear.from_float(nn.Linear(inputs, outputs, bias=bias), bits, 8, "mse"), torch.randn(2, 5, inputs)
    if factors:
        layer.exponents = torch.randint(-3, 4, (inputs,)).to(torch.int8)
    layer(x)
    layer.freeze()
    with torch.no_grad():
        layer(x)
    assert "_prepared" in vars(layer)
    return layer, x


def by_the_operator(layer, x):
    """What the layer is to compute, by the public operator and the packed weights."""
    x = x if layer.factor is None else x / layer.factor
    grid = {"x_scale": layer.input.scale, "x_zero": layer.input.zero_point, "w_scale": layer.weight_scale}
    return quant_linear(
        x, layer.weight_packed, layer.bias, layer.acm, **grid, a_bits=layer.input.bits, w_bits=layer.w_bits
    )


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factors", [True, False])
@torch.no_grad()
def test_same_bits_as_the_operator(seed, bits, bias, factors):
    layer, _ = layer_and_input(bits, bias, factors)
    for shape in ((2, 5), (1, 1), (0, 5), (7,), (2, 3, 4)):
        x = torch.randn(*shape, layer.in_features)
        assert torch.equal(layer(x), by_the_operator(layer, x))
    assert layer(x.double()).dtype == torch.float64
    assert torch.equal(layer(x.mT.contiguous().mT), by_the_operator(layer, x))


CHANGES = {
    "bias": lambda layer: layer.bias.data.add_(1),
    "weight_scale": lambda layer: layer.weight_scale.mul_(2),
    "scale": lambda layer: layer.input.scale.mul_(2),
    "zero_point": lambda layer: layer.input.zero_point.add_(1).remainder_(256),
    "exponents": lambda layer: layer.exponents.add_(1),
    "another bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(layer.out_features))),
    "acm": lambda layer: setattr(layer, "acm", torch.randn(5, layer.out_features)),
    "packed weights": lambda layer: setattr(layer, "weight_packed", layer.weight_packed.flip(0)),
    "written packed weights": lambda layer: (layer.weight_packed.copy_(layer.weight_packed.flip(0)), layer.prepare()),
    "a state_dict": lambda layer: layer.load_state_dict(
        {name: value.flip(0) if value.dim() else value + 1 - value % 2 for name, value in layer.state_dict().items()}
    ),
    "moved and back": lambda layer: layer.to("meta").to_empty(device="cpu") and layer.load_state_dict(OTHER[0]),
}
OTHER: list[dict[str, torch.Tensor]] = []


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changes_after_a_call_counts(seed, change):
    layer, x = layer_and_input(factors=True)
    before, OTHER[:] = layer(x), [{name: torch.clone(value) for name, value in layer.state_dict().items()}]
    CHANGES[change](layer)
    found = layer(x)
    assert torch.equal(found, by_the_operator(layer, x))
    assert torch.equal(found, layer(x))
    assert torch.equal(found, before) == (change == "moved and back")


@pytest.mark.parametrize("factors", [True, False])
def test_gradients_modes_and_backends_see_the_operator(seed, factors):
    layer, x = layer_and_input(factors=factors)
    watched = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(watched).sum(), watched)
    assert float(gradient.abs().max()) > 0
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 10.0))
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert any("quant_linear" in event.key for event in profile.key_averages())
    with torch.no_grad(), use_backend("cuda"), pytest.raises(Exception, match="cuda"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(torch.vmap(layer)(x[None]), layer(x)[None])
        assert torch.equal(torch.jit.trace(layer, x)(x + 1), layer(x + 1))
        root = nn.Sequential(layer)  # torch cannot export one with buffers that are None
        exported = torch.export.export(root, (x,)).module()
        assert torch.equal(exported(x + 1), layer(x + 1))


@torch.no_grad()
def test_copies_make_their_own_call(seed):
    layer, x = layer_and_input()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_prepared" not in vars(other)
        other.bias.zero_()
        assert torch.equal(other(x), by_the_operator(other, x))
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("channels", [3, 24])
@torch.no_grad()
def test_a_convolution_of_patches(seed, size, channels):
    """Of 1 x 1 and of more, of few channels and of many, in both kinds of memory: as the operator over flattened patches."""
    conv = nn.Conv2d(channels, 20, size, size)
    layer, x = QuantPatchProjection.from_float(conv, 8, 8, "mse"), torch.randn(2, channels, 6, 4)
    layer.exponents = torch.randint(-3, 4, (layer.in_features,)).to(torch.int8)
    layer(x)
    layer.freeze()
    patches = nn.functional.unfold(x, size, stride=size).mT
    expected = by_the_operator(layer, patches).mT.reshape(2, 20, 6 // size, 4 // size)
    for memory in (torch.contiguous_format, torch.channels_last):
        for _ in range(2):
            found = layer(x.contiguous(memory_format=memory))
            assert torch.equal(found, expected)
            assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
        parametrizations.weight_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        lambda layer: fuse_linear_bn_eval(layer.eval(), nn.BatchNorm1d(layer.out_features).eval()),
    ],
)
@torch.no_grad()
def test_what_would_change_a_weight_of_floats_is_refused(seed, bits, change):
    """torch found None there, and said that it is no Tensor or has no shape."""
    layer, x = layer_and_input(bits)
    expected = layer(x)
    with pytest.raises(
        AttributeError, match=r"a quantized layer has no weight of floats, .*: do that to the float model, and"
    ):
        change(layer)
    assert not hasattr(layer, "weight")
    assert torch.equal(layer(x), expected)


class Turned(nn.Module):
    def forward(self, packed):
        return packed.flip(0)


@torch.no_grad()
def test_a_parametrization_of_the_packed_weight_counts(seed):
    layer, x = layer_and_input(8)
    other = copy.deepcopy(layer)
    other.weight_packed.copy_(layer.weight_packed.flip(0))
    parametrize.register_parametrization(layer, "weight_packed", Turned())
    assert torch.equal(layer(x), other(x))
