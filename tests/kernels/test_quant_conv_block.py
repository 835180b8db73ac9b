"""`quant_conv_block`: torch's convolution in float64 and the operators called one by one are the oracle; and its contract."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm

from dfqvit.kernels import (
    block_weight,
    extension,
    layer_norm_quantize,
    pack_weight,
    quant_conv_block,
    quant_linear,
    use_backend,
)
from dfqvit.kernels.quant_conv_block.op import forward

from ..conftest import ACTIVATIONS, arguments_of, threads

compiled = pytest.mark.skipif(extension.load()[0] is None, reason="dfqvit._C is not built")


def sample(rng, shape, hidden, *, size=7, w_bits=4, a_bits=8, blocked=True, grn=None):
    """Random x [B, H, W, C] of a shape, and the other arguments of `quant_conv_block` by name; `grn`: whether with such a norm."""
    grn = rng.random() < 0.5 if grn is None else grn
    channels = shape[-1]
    weights, scales = [], []
    for outputs, inputs in ((hidden, channels), (channels, hidden)):
        scale = (torch.rand(outputs) + 0.5) * 4 / inputs**0.5 / (1 << w_bits)
        packed = pack_weight(torch.randn(outputs, inputs) / inputs**0.5, scale, w_bits)
        weights.append(block_weight(packed, inputs, w_bits) if blocked else packed)
        scales.append(scale)
    steps = (1 << a_bits) - 1
    named = {
        "conv_weight": torch.randn(channels, 1, size, size) / size,
        "conv_bias": torch.randn(channels) if rng.random() < 0.7 else None,
        "norm_weight": 1 + torch.randn(channels) * 0.2,
        "norm_bias": torch.randn(channels) * 0.2,
        "eps": 1e-6,
        "weights": weights,
        "biases": [torch.randn(len(scale)) * 0.1 if rng.random() < 0.8 else None for scale in scales],
        "weight_scales": scales,
        "w_bits": [w_bits] * 2,
        "scales": [torch.tensor(6.0 / steps * (0.8 + 0.4 * rng.random())) for _ in range(2)],
        "zeros": [torch.tensor(float(steps // 2)), torch.tensor(float(steps // 20))],
        "a_bits": [a_bits] * 2,
        "hidden_scale": 0.02 + torch.rand(hidden) * 0.05 if rng.random() < 0.5 else None,
        "activation": rng.choice([None, *ACTIVATIONS]),
        "grn_weight": torch.randn(hidden) * 0.5 if grn else None,
        "grn_bias": torch.randn(hidden) * 0.2 if grn else None,
        "grn_eps": rng.choice([1e-6, 0.1]),
    }
    return torch.randn(*shape), named


def shape_of(rng):
    return rng.randint(1, 4), rng.randint(1, 17), rng.randint(1, 19), rng.choice([rng.randint(1, 40), 16, 48])


def expected_of(x, named):
    """torch's convolution in float64, and the operators after it on the backends that serve them."""
    weight, bias = named["conv_weight"].double(), named["conv_bias"]
    convolved = F.conv2d(
        x.double().permute(0, 3, 1, 2), weight, None if bias is None else bias.double(),
        padding=weight.shape[-1] // 2, groups=x.shape[-1],
    ).permute(0, 2, 3, 1).float()  # fmt: skip
    centre = torch.zeros(x.shape[-1], 1, 1, 1)
    with use_backend("reference", "quant_conv_block"):
        # a convolution of nothing, whose bias is what there is: one pixel an image
        pixels = convolved.reshape(-1, x.shape[-1])
        rows = [
            quant_conv_block(pixel.view(1, 1, 1, -1), **{**named, "conv_weight": centre, "conv_bias": pixel}) - pixel
            for pixel in pixels
        ]
    return x + torch.cat([row.flatten(0, 2) for row in rows]).view_as(x)


@compiled
@pytest.mark.parametrize("w_bits", [8, 4, 3])
def test_close_to_the_operators_one_by_one(seed, isa, w_bits):
    """The convolution's sums have another order than torch's, so a byte may round to its neighbour, seldom."""
    rng = random.Random(seed)
    for _ in range(8):
        x, named = sample(
            rng, shape_of(rng), rng.randint(1, 100), size=rng.choice([7, 7, 1, 3, 5, 9]), w_bits=w_bits,
            a_bits=rng.randint(6, 8), blocked=rng.random() < 0.7,
        )  # fmt: skip
        found = quant_conv_block(x, **named)
        with use_backend("reference", "quant_conv_block"):  # its operators run on the CPU still
            expected = quant_conv_block(x, **named)
        off = (found - expected).abs()
        pixels = (off > 1e-5 * (1 + expected.abs())).any(dim=-1)  # such a byte is heard by all of its pixel
        assert int(pixels.sum()) <= 2 + 0.02 * pixels.numel()
        spread = float((expected - x).std(correction=0) + 0.1)
        assert float(off.sum()) < (1e-3 * off.numel() + 0.1 * 2 * x.shape[-1]) * spread  # two pixels may, by a tenth


@compiled
def test_the_convolution_is_that_of_float64(seed, isa):
    rng = random.Random(seed)
    for _ in range(3):
        x, named = sample(rng, (1, rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 20)), 8, w_bits=8, grn=False)
        off = (quant_conv_block(x, **named) - expected_of(x, named)).abs()
        assert float((off > 1e-4).float().mean()) < 0.02


@compiled
def test_the_response_norm_is_timms_in_float64(seed, isa):
    """Of what fc1 gives in floats; a value within float rounding of the middle between two integers may go to the other one."""
    rng = random.Random(seed)
    for _ in range(3):
        x, named = sample(rng, shape_of(rng), rng.randint(1, 150), size=1, w_bits=8, grn=True)
        hidden = named["grn_weight"].numel()
        named["conv_bias"] = None  # of one tap, exact whether fused or not
        convolved = x * named["conv_weight"].flatten()
        grid = {"scale": named["scales"][0], "zero_point": named["zeros"][0]}
        q = layer_norm_quantize(convolved, named["norm_weight"], named["norm_bias"], eps=named["eps"], **grid)
        linear = {"x_scale": named["scales"][0], "x_zero": named["zeros"][0], "a_bits": 8, "w_bits": 8}
        h = quant_linear(
            q, named["weights"][0], named["biases"][0], w_scale=named["weight_scales"][0], activation=named["activation"],
            **linear,
        )  # fmt: skip
        norm = GlobalResponseNorm(hidden, eps=named["grn_eps"]).double()
        norm.load_state_dict({"weight": named["grn_weight"], "bias": named["grn_bias"]})
        scale = named["scales"][1] if named["hidden_scale"] is None else named["hidden_scale"]
        codes = norm(h.double()).detach() / scale.double() + named["zeros"][1].double()
        linear = {"x_scale": named["scales"][1], "x_zero": named["zeros"][1], "a_bits": 8, "w_bits": 8}
        expected = x + quant_linear(
            codes.round().clamp(0, 255).to(torch.uint8), named["weights"][1], named["biases"][1],
            w_scale=named["weight_scales"][1], **linear,
        )  # fmt: skip
        off = ((quant_conv_block(x, **named) - expected).abs() > 1e-4).any(dim=-1)
        near = ((codes - codes.floor() - 0.5).abs() < 1e-3).any(dim=-1)
        assert not (off & ~near).any()
        assert int(off.sum()) <= 1 + 0.05 * off.numel()


@compiled
def test_bits_depend_on_nothing_but_the_image(seed, isa):
    """Neither on the number of threads, nor on what else is in the batch."""
    rng = random.Random(seed)
    x, named = sample(rng, (5, 12, 13, 24), 40)
    whole = quant_conv_block(x, **named)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(quant_conv_block(x, **named), whole)
            assert torch.equal(quant_conv_block(x[2:3], **named), whole[2:3])


@compiled
def test_layouts_and_empty_batches(seed):
    rng = random.Random(seed)
    x, named = sample(rng, (3, 5, 6, 9), 20)
    expected = quant_conv_block(x, **named)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(quant_conv_block(channels_first, **named), expected)
    named["conv_weight"] = named["conv_weight"].repeat_interleave(2, -1)[..., ::2]
    assert not named["conv_weight"].is_contiguous()
    assert torch.equal(quant_conv_block(x, **named), expected)
    assert quant_conv_block(x[:0], **named).shape == x[:0].shape


def test_opcheck(seed):
    x, named = sample(random.Random(seed), (2, 4, 5, 8), 20, blocked=False)
    arguments = arguments_of(torch.ops.dfqvit.quant_conv_block.default, lambda: quant_conv_block(x, **named))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dfqvit.quant_conv_block, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 4, 8, dtype=torch.float64)}, "x was torch.float64; it must be float32"),
        ({"x": torch.zeros(2, 4, 8)}, r"x had shape \(2, 4, 8\); it must be \[B, H, W, 8\]"),
        ({"weights": []}, "weights had 0 entries; a block has 2"),
        ({"a_bits": [8, 9]}, "bits was 9; it may be a whole number from 2 to 8"),
        ({"conv_weight": torch.zeros(8, 1, 4, 4)}, r"conv_weight was torch.float32 \(8, 1, 4, 4\)"),
        ({"conv_weight": torch.zeros(8, 2, 3, 3)}, r"it must be float32 \[8, 1, S, S\] of an odd S"),
        ({"conv_bias": torch.zeros(7)}, r"conv_bias held torch.float32 \(7,\); they must be float32 \[8\]"),
        ({"norm_bias": torch.zeros(8).half()}, "norm_bias held torch.float16"),
        ({"biases": [torch.zeros(7), None]}, r"bias of fc1 had shape \(7,\); it must be \[12\]"),
        ({"scales": [torch.ones(2)] * 2}, "scales of fc1 input was"),
        ({"hidden_scale": torch.ones(3)}, r"hidden_scale had shape \(3,\); it must be \[12\]"),
        ({"grn_weight": torch.ones(12)}, "grn_bias was None; it must be given if the other is"),
        ({"grn_bias": torch.ones(12)}, "grn_weight was None; it must be given if the other is"),
        ({"grn_weight": torch.ones(3), "grn_bias": torch.ones(12)}, r"grn_weight held torch.float32 \(3,\)"),
        ({"grn_weight": torch.ones(12), "grn_bias": torch.full((12,), torch.inf)}, "grn_bias held NaN or Inf"),
        ({"activation": "relu"}, "activation was 'relu'; it may be None, 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'"),
        ({"x": torch.zeros(2, 4, 4, 8, requires_grad=True)}, "a gradient is wanted of quant_conv_block"),
    ],
)
def test_bad_input(change, message):
    x, named = sample(random.Random(0), (2, 4, 4, 8), 12, grn=False)
    with pytest.raises((TypeError, ValueError), match=message):
        quant_conv_block(**{"x": x, **named, **change})


@compiled
@pytest.mark.parametrize(
    "name", ["conv_weight", "conv_bias", "weights", "weight_scales", "norm_weight", "zeros", "grn_weight", "grn_bias"]
)
def test_the_operator_itself_checks_what_it_reads(seed, name):
    """As a C++ program calls it, without the checks in Python: too little memory is refused, not read beyond."""
    x, named = sample(random.Random(seed), (2, 4, 4, 8), 20, grn=name.startswith("grn") or None)
    named["biases"] = [torch.zeros(len(scale)) for scale in named["weight_scales"]]
    named["conv_bias"], named["activation"] = torch.zeros(8), "none"
    value = named[name]
    short = value[:1] if isinstance(value, torch.Tensor) else [each[:1] if each.dim() else each for each in value]
    change = named["zeros"][:1] if name == "zeros" else short
    names = [argument.name for argument in torch.ops.dfqvit.quant_conv_block.default._schema.arguments[1:]]
    with use_backend("cpu"), pytest.raises((ValueError, TypeError, RuntimeError)):
        forward(x, *({**named, name: change}[key] for key in names))


@compiled
@pytest.mark.parametrize("name", ["weights", "biases", "weight_scales", "w_bits", "scales", "zeros", "a_bits"])
def test_the_operator_itself_counts_its_lists(seed, name):
    """Before it reads of them: an empty one ended the process."""
    x, named = sample(random.Random(seed), (1, 2, 2, 8), 20)
    named["biases"] = [torch.zeros(len(scale)) for scale in named["weight_scales"]]
    named["activation"] = "none"
    names = [argument.name for argument in torch.ops.dfqvit.quant_conv_block.default._schema.arguments[1:]]
    with pytest.raises(ValueError, match=f"{name} had 0 entries; a block has 2"):
        torch.ops.dfqvit_cpu.quant_conv_block(x, *({**named, name: []}[key] for key in names))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_response_norm_of_nothing_by_nothing_is_refused(seed, backend):
    if backend == "cpu" and extension.load()[0] is None:
        pytest.skip("dfqvit._C is not built")
    x, named = sample(random.Random(seed), (2, 3, 4, 8), 20, grn=True)
    named |= {"biases": [None, None], "activation": None}
    named["weights"][0] = torch.zeros(20, 8)
    with use_backend(backend, "quant_conv_block"):
        assert quant_conv_block(x, **{**named, "grn_eps": 1e-6}).isfinite().all()
        with pytest.raises(ValueError, match=r"(held|gave) NaN or Inf"):
            quant_conv_block(x, **{**named, "grn_eps": 0.0})
