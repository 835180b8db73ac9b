"""The operators under what torch puts around a call: autocast, second and forward derivatives, torch.func, traces, modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from dfqvit.kernels import (
    extension,
    fake_quantize,
    layer_norm_quantize,
    patch_similarity_entropy,
    quant_attention,
    quant_linear,
    roll_resize,
    round_second_order,
    total_variation,
    use_backend,
)

from .test_quant_block import compiled


def linear(x, bias=None, **named):
    weight = torch.linspace(-1, 1, 7 * x.shape[-1]).sin().view(7, -1).to(x.dtype)
    return quant_linear(x, weight, bias, x_scale=0.05, x_zero=100.0, w_scale=0.01, a_bits=8, w_bits=8, **named)


def resize(images):
    places = torch.linspace(0.3, 4.4, 6, dtype=torch.float64 if images.dtype == torch.float64 else torch.float32)
    places = places.expand(len(images), 6)
    return roll_resize(images, places, places, torch.ones(len(images), 2, dtype=torch.int64))


def fake(x):
    return fake_quantize(x, 0.1, 3.0, quant_min=0, quant_max=40)


DIFFERENTIABLE = {
    "fake_quantize": (fake, (2, 5)),
    "quant_linear": (linear, (3, 9)),
    "patch_similarity_entropy": (patch_similarity_entropy, (2, 5, 4)),
    "roll_resize": (resize, (1, 2, 5, 5)),
    "total_variation": (total_variation, (2, 3, 5, 4)),
}


@pytest.fixture(params=DIFFERENTIABLE)
def differentiable(request, seed):
    function, shape = DIFFERENTIABLE[request.param]
    return request.param, function, torch.randn(shape)


def gradient(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).square().sum(), leaf)[0]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_changes_no_bit(differentiable, backend):
    """Forward and backward: the sums of a reference's matrix products were those of bfloat16."""
    _, function, x = differentiable
    with use_backend(backend):
        plain, plain_gradient = function(x), gradient(function, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(x), plain)
            assert torch.equal(gradient(function, x), plain_gradient)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rounding_under_autocast(seed, backend):
    if backend == "cpu" and extension.load()[0] is None:
        pytest.skip("dfqvit._C is not built")
    weight, inputs, outputs = torch.randn(9, 70), torch.randn(200, 70), torch.randn(40, 9)
    moments = inputs.T @ inputs, outputs.T @ outputs
    with use_backend(backend):
        plain = round_second_order(weight, torch.full((9,), 0.2), *moments, bits=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(round_second_order(weight, torch.full((9,), 0.2), *moments, bits=4), plain)


def test_a_second_derivative_is_refused(differentiable):
    """Torch took it for 0. A graph that is made and not used again is no fault."""
    name, function, x = differentiable
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    assert torch.equal(first.detach(), gradient(function, x))
    with pytest.raises(ValueError, match=f"a second derivative is wanted of {name}, which has only a first one"):
        first.square().sum().backward()


def test_derivatives_of_torch_func(differentiable):
    name, function, x = differentiable
    loss = torch.func.grad(lambda x: function(x).square().sum())
    assert torch.equal(loss(x), gradient(function, x))
    with pytest.raises(ValueError, match=f"a second derivative is wanted of {name}"):
        torch.func.grad(lambda x: loss(x).square().sum())(x)


def test_a_forward_mode_derivative_is_refused(differentiable):
    """It was 0 where nothing else wanted a gradient."""
    _, function, x = differentiable
    with pytest.raises((ValueError, NotImplementedError), match=r"forward-mode derivative is wanted|forward mode AD"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(
            (ValueError, NotImplementedError), match=r"forward-mode derivative is wanted|forward mode AD"
        ):
            function(dual)


def test_a_gradient_that_an_operator_does_not_have_is_not_cut(seed):
    x, scale = torch.randn(2, 5, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="scale requires a gradient; fake_quantize has none for it"):
        fake_quantize(x, scale, 0, quant_min=-8, quant_max=7)
    zero = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(ValueError, match="x_zero requires a gradient; quant_linear has none for it"):
        quant_linear(x, torch.ones(2, 5), x_scale=0.1, x_zero=zero, w_scale=1.0, a_bits=8, w_bits=8)
    rows = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="rows requires a gradient; roll_resize has none for it"):
        roll_resize(torch.ones(1, 1, 2, 2), rows, rows, torch.zeros(1, 2, dtype=torch.int64))
    qkv, learnt = torch.zeros(1, 4, 12, dtype=torch.uint8), torch.zeros(2, 4, 4, requires_grad=True)
    grids = {"in_scale": torch.ones(3), "in_zero": torch.zeros(3), "scale": 1.0, "bias": learnt}
    with pytest.raises(ValueError, match="bias requires a gradient; quant_attention has none for it"):
        quant_attention(qkv, 2, **grids)
    assert quant_attention(qkv, 2, **grids, out_scale=1.0, out_zero=0.0).dtype == torch.uint8
    with torch.no_grad():
        quant_attention(qkv, 2, **grids)


@compiled
def test_compiled_code_refuses_what_eager_code_does(seed):
    """The compiled backend is named by the trace, and cut the gradient of a scale."""
    grids = {"in_scale": torch.ones(3, requires_grad=True), "in_zero": torch.zeros(3), "scale": 1.0}
    call = torch.compile(quant_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="a gradient is wanted of the operator quant_attention"):
        call(torch.zeros(1, 4, 12, dtype=torch.uint8), 2, **grids)


def test_a_tensor_that_fx_traces_with_is_not_read(seed):
    """`make_fx` with real tensors: what is traced may not be looked at."""
    x = torch.randn(3, 8)
    traced = make_fx(lambda x, scale: fake_quantize(x, scale, 0, quant_min=-8, quant_max=7), tracing_mode="real")
    assert torch.equal(
        traced(x, torch.tensor(0.1))(x, torch.tensor(0.2)), fake_quantize(x, 0.2, 0, quant_min=-8, quant_max=7)
    )


def test_vmap_over_parameters_checks_the_whole_batch(seed):
    x, scales = torch.randn(3, 8), torch.tensor([0.1, 0.2])

    def call(scale):
        return fake_quantize(x, scale, 0, quant_min=-8, quant_max=7)

    assert torch.equal(torch.func.vmap(call)(scales), torch.stack([call(scale) for scale in scales]))
    with pytest.raises(ValueError, match="scale held -1; every scale must be greater than 0"):
        torch.func.vmap(call)(torch.tensor([0.1, -1.0]))


def test_parameters_and_other_kinds_of_tensors_are_checked_too(seed):
    class Image(torch.Tensor):
        pass

    x = torch.randn(3, 8)
    for kind in (nn.Parameter, lambda value, **_: value.as_subclass(Image)):
        with pytest.raises(ValueError, match="scale held -1; every scale must be greater than 0"):
            fake_quantize(x, kind(torch.tensor(-1.0), requires_grad=False), 0, quant_min=-8, quant_max=7)
        broken = kind(torch.full((2, 8), float("nan")), requires_grad=False)
        with use_backend("reference"), pytest.raises(ValueError, match="weight held NaN or Inf"):
            quant_linear(x, broken, x_scale=0.1, x_zero=3.0, w_scale=1.0, a_bits=8, w_bits=8)


def test_default_devices_change_nothing(seed):
    qkv, index = torch.randint(0, 256, (1, 6, 12), dtype=torch.uint8), torch.randperm(6, dtype=torch.int32).view(2, 3)
    grids = {"in_scale": torch.ones(3), "in_zero": torch.zeros(3), "scale": 0.01, "index": index}
    plain = (
        quant_attention(qkv, 2, **grids),
        layer_norm_quantize(torch.ones(2, 3), *torch.ones(2, 3), scale=0.1, zero_point=3),
    )
    x, one = torch.ones(2, 3), torch.ones(3)
    with torch.device("meta"):
        assert torch.equal(quant_attention(qkv, 2, **grids), plain[0])
        assert torch.equal(layer_norm_quantize(x, one, one, scale=0.1, zero_point=3), plain[1])
