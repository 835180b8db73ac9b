"""Values and kinds of arguments that no operator may take for others: refused in one sentence, by every backend alike."""

from __future__ import annotations

import random

import pytest
import torch

from dfqvit.kernels import (
    extension,
    fake_quantize,
    gate_quantize,
    layer_norm_quantize,
    pack_weight,
    patch_similarity_entropy,
    quant_attention,
    quant_block,
    quant_linear,
    quantize_heads,
    roll_resize,
    round_second_order,
    unpack_weight,
    use_backend,
)

from .test_quant_block import sample as block_sample

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    if request.param == "cpu" and extension.load()[0] is None:
        pytest.skip("dfqvit._C is not built")
    with use_backend(request.param):
        yield request.param


def call(function, named, **change):
    """The function with some of its arguments changed."""
    return function(**{**named, **change})


def spoilt(tensor, value):
    """A copy with one value replaced."""
    copy = tensor.clone()
    copy.view(-1)[copy.numel() // 2] = value
    return copy


def norm():
    return {
        "x": torch.randn(3, 37),
        "weight": torch.randn(37),
        "bias": torch.randn(37),
        "scale": 0.05,
        "zero_point": 99,
    }


def gate():
    return {"gate": torch.randn(3, 37), "value": torch.randn(3, 37), "scale": 0.05, "zero_point": 99}


def heads():
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    return {"q": q, "k": k, "v": v, "in_scale": torch.full((3,), 0.05), "in_zero": torch.full((3,), 99.0),
            "rope": torch.randn(4, 16)}  # fmt: skip


def linear(**named):
    x, weight = torch.randn(6, 33), torch.randn(19, 33)
    grids = {"x_scale": 0.05, "x_zero": 99, "w_scale": 0.02, "a_bits": 8, "w_bits": 8}
    return {"x": x, "weight": weight, "bias": torch.randn(19), **grids, **named}


def integers():
    return linear(acm=torch.randn(3, 19), residual=torch.randn(6, 19), out_scale=0.1, out_zero=128)


def attention():
    qkv, index = torch.randint(0, 256, (2, 12, 48), dtype=torch.uint8), torch.randperm(12, dtype=torch.int32).view(2, 6)
    grids = {"in_scale": torch.full((3,), 0.05), "in_zero": torch.full((3,), 99.0), "scale": 0.3}
    return {"qkv": qkv, "heads": 2, **grids, "bias": torch.randn(2, 6, 6), "mask": torch.randn(2, 6, 6), "index": index}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("function", "make", "names", "said"),
    [
        (layer_norm_quantize, norm, ["x", "weight", "bias"], "{}"),
        (gate_quantize, gate, ["gate", "value"], "gate or value"),
        (quantize_heads, heads, ["q", "k", "v", "rope"], "q, k, v or rope"),
        (quant_linear, linear, ["x", "weight", "bias"], "{}"),
        (quant_linear, integers, ["x", "weight", "bias", "acm", "residual"], "{}"),
    ],
)
def test_what_is_not_finite_does_not_become_integers(seed, backend, function, make, names, said, value):
    named = make()
    for name in names:
        with pytest.raises(ValueError, match=f"^{said.format(name)} held NaN or Inf; every value must be finite"):
            call(function, named, **{name: spoilt(named[name], value)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_a_number_in_any_row_and_dtype_of_a_norm(seed, isa, dtype):
    named = norm()
    for row in range(3):
        x = named["x"].to(dtype)
        x[row, 36] = NAN
        with use_backend("cpu"), pytest.raises(ValueError, match="x held NaN or Inf"):
            call(layer_norm_quantize, named, x=x)


def test_a_norm_of_large_finite_values_is_no_fault(seed, backend):
    """Their sum is infinite in float32."""
    x = torch.full((2, 37), 3e38)
    assert call(layer_norm_quantize, norm(), x=x).shape == (2, 37)


@pytest.mark.parametrize("wrong", [NAN, 300.0, -1.0, 0.5])
@pytest.mark.parametrize(("function", "make"), [(layer_norm_quantize, norm), (gate_quantize, gate)])
def test_zero_points_are_whole_numbers_of_the_grid(backend, function, make, wrong):
    with pytest.raises(ValueError, match=r"zero_point held .*; it must be a whole number from 0 to 255"):
        call(function, make(), zero_point=wrong)


@pytest.mark.parametrize("wrong", [NAN, 8.0, -9.0, 0.5])
def test_zero_points_of_fake_quantize(backend, wrong):
    zeros = torch.tensor([0.0, wrong, 7.0])
    with pytest.raises(ValueError, match=r"zero_point held .*; it must be a whole number from -8 to 7"):
        fake_quantize(torch.ones(2, 3), torch.ones(3), zeros, quant_min=-8, quant_max=7, axis=1)


def test_infinite_ratios_are_clamped(backend):
    x = torch.tensor([INF, -INF, 3e38, -3e38, 0.2], requires_grad=True)
    found = fake_quantize(x, 0.1, 0, quant_min=-8, quant_max=7)
    assert torch.equal(found.detach(), torch.tensor([7.0, -8.0, 7.0, -8.0, 2.0]) * 0.1)
    found.sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 0, 1]


def test_a_scalar_scale_goes_with_a_zero_point_of_one_value(backend):
    x = torch.linspace(-1, 1, 9)
    expected = fake_quantize(x, 0.1, 5, quant_min=0, quant_max=15)
    for scale in (torch.tensor(0.1), torch.tensor([0.1])):
        for zero in (torch.tensor(5.0), torch.tensor([5.0])):
            assert torch.equal(fake_quantize(x, scale, zero, quant_min=0, quant_max=15), expected)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_what_is_added_to_scores(seed, backend, name):
    named = attention()
    hidden = named[name].clone()
    hidden[1, 2] = -INF
    changes = [
        (spoilt(named[name], NAN), ValueError, "held NaN or Inf; every value must be finite, or -inf to hide a key"),
        (spoilt(named[name], INF), ValueError, "held NaN or Inf"),
        (hidden, ValueError, "was -inf for all keys of a query; every query must see a key"),
        (named[name] > 0, TypeError, "had dtype torch.bool; it may be float32"),
    ]
    for tensor, error, said in changes:
        with pytest.raises(error, match=f"{name} {said}"):
            call(quant_attention, named, **{name: tensor})
    hidden[1, 2, 4] = 0.0
    assert torch.isfinite(call(quant_attention, named, **{name: hidden})).all()


def test_scale_of_an_attention(backend):
    with pytest.raises(ValueError, match="scale was nan; it must be a finite number"):
        call(quant_attention, attention(), scale=NAN)


def test_a_block_checks_what_its_operators_do(seed, backend):
    x, named = block_sample(random.Random(seed), 2, 12, 2, 8, 20, windows=2, acm=True)
    place = random.Random(seed).randrange(7)
    twice = named["index"].clone()
    twice.view(-1)[0] = twice.view(-1)[1]
    position = named["position_bias"]
    changes = [
        ({"x": spoilt(x, NAN)}, "x held NaN or Inf"),
        ({"index": twice}, "index must hold every token from 0 to 11 exactly once"),
        ({"position_bias": position.permute(1, 2, 0)}, r"position_bias had shape \(6, 6, 2\)"),
        ({"position_bias": spoilt(position, NAN)}, "position_bias held NaN or Inf"),
        ({"mask": named["mask"] < 0}, "mask had dtype torch.bool"),
        ({"norms": [spoilt(named["norms"][0], NAN), *named["norms"][1:]]}, "norms held NaN or Inf"),
    ]
    for name, wrong in (("scales", NAN), ("scales", 0.0), ("scales", -1.0), ("zeros", 256.0), ("zeros", 0.5)):
        values = list(named[name])
        values[place] = torch.tensor(wrong)
        changes.append(({name: values}, f"{name} of .* held {wrong:g}"))
    for change, said in changes:
        with pytest.raises((ValueError, TypeError), match=said):
            quant_block(**{"x": x, **named, **change})


def test_moments_that_are_not_symmetric(seed):
    inputs = torch.randn(50, 8)
    moment = inputs.T @ inputs
    with pytest.raises(ValueError, match="inputs was not symmetric; it must be symmetric and positive definite"):
        round_second_order(torch.randn(3, 8), torch.ones(3), moment.tril(), bits=4)


@pytest.mark.parametrize(
    ("function", "make", "names"),
    [
        (layer_norm_quantize, norm, ["x", "weight", "bias"]),
        (gate_quantize, gate, ["gate", "value"]),
        (quantize_heads, heads, ["q", "k", "v"]),
        (quant_linear, linear, ["x", "weight"]),
        (quant_attention, attention, ["qkv"]),
        (pack_weight, lambda: {"w": torch.ones(2, 8), "scale": torch.ones(2), "bits": 4}, ["w"]),
        (unpack_weight, lambda: {"packed": torch.zeros(2, 4, dtype=torch.uint8), "bits": 4, "in_features": 8}, ["packed"]),
        (patch_similarity_entropy, lambda: {"features": torch.randn(2, 5, 4)}, ["features"]),
        (
            roll_resize,
            lambda: {
                "images": torch.ones(1, 1, 4, 4), "rows": torch.zeros(1, 2), "columns": torch.zeros(1, 2),
                "shift": torch.zeros(1, 2, dtype=torch.int64),
            },
            ["images", "rows", "columns", "shift"],
        ),
    ],
)  # fmt: skip
def test_what_is_no_tensor_or_not_dense(seed, function, make, names):
    named = make()
    for name in names:
        with pytest.raises(TypeError, match=f"^{name} was a list; it must be a torch.Tensor"):
            call(function, named, **{name: named[name].tolist()})
        with pytest.raises(TypeError, match=f"^{name} was a NoneType; it must be a torch.Tensor"):
            call(function, named, **{name: None})
        with pytest.raises(TypeError, match=f"^{name} had layout torch.sparse_coo; it must be torch.strided"):
            call(function, named, **{name: named[name].to_sparse()})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "scale was None; it must be a number or a torch.Tensor"),
        ("a", "scale was 'a'; it must be a number or a torch.Tensor"),
        (1j, "scale was 1j; it must be a number or a torch.Tensor"),
        ([[0.1]], r"scale had shape \(1, 1\); it must be a scalar or one-dimensional"),
        (torch.tensor(1j), "scale had dtype torch.complex64; it must be a float or an integer one"),
        (torch.tensor(True), "scale had dtype torch.bool; it must be a float or an integer one"),
    ],
)
def test_what_is_no_scale(value, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call(layer_norm_quantize, norm(), scale=value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_min": 0.0}, "quant_min was 0.0; it must be a whole number"),
        ({"quant_max": True}, "quant_max was True; it must be a whole number"),
        ({"axis": 1.0}, "axis was 1.0; it must be a whole number"),
    ],
)
def test_what_is_no_whole_number(change, said):
    with pytest.raises(TypeError, match=said):
        fake_quantize(torch.ones(2, 3), 0.1, 0, **{"quant_min": 0, "quant_max": 7, **change})


@pytest.mark.skipif(extension.load()[0] is None, reason="dfqvit._C is not built")
def test_backends_say_the_same(seed):
    said = []
    for name in ("cpu", "reference"):
        with use_backend(name), pytest.raises(ValueError, match="x_zero held") as caught:
            call(quant_linear, linear(), x_zero=126.99999)
        said.append(str(caught.value).splitlines()[0])
    assert said[0] == said[1]
