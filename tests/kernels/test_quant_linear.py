"""quant_linear against the two-step fake-quant formula and against integer arithmetic in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dfqvit.kernels import block_weight, extension, pack_weight, quant_linear, unpack_weight, use_backend
from dfqvit.kernels.quant_linear import reference
from dfqvit.kernels.quant_linear.blocked import stored_bits, unblock_weight

from ..conftest import ACTIVATIONS, mirrored

SHAPES = [((1,), 1), ((3, 5), 7), ((2, 9, 41), 13), ((0, 6), 4), ((2, 3, 4, 17), 5)]


def sample(shape, out_features, a_bits=8, w_bits=4, dtype=torch.float32):
    x = torch.randn(shape, dtype=dtype) * 2
    weight = torch.randn(out_features, shape[-1], dtype=dtype)
    parameters = {
        "x_scale": torch.tensor(4.0 / ((1 << a_bits) - 1)),
        "x_zero": torch.tensor(float(round(((1 << a_bits) - 1) / 2))),
        "w_scale": mirrored(weight.float().abs().amax(1) / (((1 << w_bits) - 1) / 2) * 0.8 + 1e-3),
        "a_bits": a_bits,
        "w_bits": w_bits,
    }
    return x, weight, parameters


def two_step(x, weight, bias, acm, p):
    """Fake-quantize x and weight, multiply in float64."""
    qx = ((x.float() / p["x_scale"]).round() + p["x_zero"]).clamp(0, (1 << p["a_bits"]) - 1)
    half = 1 << (p["w_bits"] - 1)
    qw = (weight.float() / p["w_scale"][:, None]).round().clamp(-half, half - 1)
    fake_x = (qx - p["x_zero"]).double() * p["x_scale"].double()
    fake_w = qw.double() * p["w_scale"].double()[:, None]
    y = fake_x @ fake_w.t()
    if bias is not None:
        y = y + bias.double()
    if acm is not None:
        y = y + acm.double().repeat(y[..., 0].numel() // len(acm), 1).view(y.shape)
    return y


@pytest.mark.parametrize("w_bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "out_features"), SHAPES, ids=str)
def test_equals_the_two_step_formula(seed, shape, out_features, w_bits):
    x, weight, p = sample(shape, out_features, w_bits=w_bits)
    bias = torch.randn(out_features)
    acm = torch.randn(shape[-2], out_features) if len(shape) > 2 else None
    found = quant_linear(x, weight, bias, acm, **p)
    expected = two_step(x, weight, bias, acm, p)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("a_bits", [2, 5, 8])
@pytest.mark.parametrize("w_bits", range(2, 9))
def test_integer_sums_are_exact(seed, a_bits, w_bits):
    x, weight, p = sample((4, 257), 19, a_bits, w_bits)
    qx = np.clip(np.rint(x.numpy() / p["x_scale"].numpy()) + p["x_zero"].numpy(), 0, (1 << a_bits) - 1).astype(np.int64)
    half = 1 << (w_bits - 1)
    qw = np.clip(np.rint(weight.numpy() / p["w_scale"].numpy()[:, None]), -half, half - 1).astype(np.int64)
    total = qx @ qw.T - int(p["x_zero"]) * qw.sum(1)
    expected = (p["x_scale"] * p["w_scale"]).numpy() * total.astype(np.float32)
    assert np.array_equal(quant_linear(x, weight, **p).numpy(), expected)


@pytest.mark.parametrize("zero", ["least", "greatest"])
def test_largest_sums_and_zero_points_at_the_ends(seed, zero):
    """255 * 127 * 5000 is beyond float32's exact integers; the sum must still be exact."""
    x = torch.full((3, 5000), 1e6)
    weight = torch.full((2, 5000), 127.0)
    weight[1] = -200.0
    x_zero = 0.0 if zero == "least" else 255.0
    found = quant_linear(x, weight, x_scale=1.0, x_zero=x_zero, w_scale=torch.ones(2), a_bits=8, w_bits=8)
    steps = 255 - x_zero
    assert found[0].tolist() == [float(np.float32(steps * 127 * 5000)), float(np.float32(steps * -128 * 5000))]


@pytest.mark.parametrize("w_bits", range(2, 9))
def test_the_largest_products_do_not_saturate(seed, isa, w_bits):
    """Sums of the greatest bytes times the least and the greatest integers, next to each other in every order."""
    ends = torch.tensor([-(1 << (w_bits - 1)), (1 << (w_bits - 1)) - 1], dtype=torch.float32)
    weight, x = ends[torch.randint(2, (35, 150))], torch.full((9, 150), 255, dtype=torch.uint8)
    weight[:2] = ends[:, None]
    grid = {"x_scale": 1.0, "x_zero": 0.0, "w_scale": torch.ones(35), "a_bits": 8, "w_bits": w_bits}
    packed = pack_weight(weight, torch.ones(35), w_bits)
    for form in (packed, block_weight(packed, 150, w_bits)):
        assert torch.equal(quant_linear(x, form, **grid), (255 * weight.sum(1)).expand(9, 35))


@pytest.mark.parametrize("w_bits", range(2, 9))
def test_packed_weights_give_the_same_bits(seed, w_bits):
    x, weight, p = sample((2, 5, 43), 11, w_bits=w_bits)
    packed = pack_weight(weight, p["w_scale"], w_bits)
    assert torch.equal(quant_linear(x, packed, **p), quant_linear(x, weight, **p))


@pytest.mark.parametrize("w_bits", range(2, 9))
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (16, 64), (37, 65), (5, 0)])
def test_blocked_weights_hold_the_same_integers(seed, w_bits, out_features, in_features):
    packed = pack_weight(torch.randn(out_features, in_features) * 50, 1.0, w_bits)
    q = unpack_weight(packed, w_bits, in_features)
    blocked = block_weight(packed, in_features, w_bits)
    assert blocked.dtype == torch.int32
    assert torch.equal(unblock_weight(blocked, in_features, w_bits)[:out_features], q)
    assert torch.equal(blocked[:, :16].flatten()[:out_features], q.sum(1, dtype=torch.int32))
    if stored_bits(w_bits) == 8 and in_features == 65:  # vector i of a chunk: weights 4i to 4i + 3 of 16 outputs
        chunk = blocked[1, 16:].contiguous().view(torch.int8).view(2, 16, 16, 4)[0]
        assert torch.equal(chunk[7, 3], q[19, 28:32])


def test_integers_as_input_give_the_same_bits(seed):
    x, weight, p = sample((2, 5, 43), 11)
    qx = ((x / p["x_scale"]).round() + p["x_zero"]).clamp(0, 255).to(torch.uint8)
    found = quant_linear(qx, weight, **p)
    assert found.dtype == torch.float32
    assert torch.equal(found, quant_linear(x, weight, **p))
    residual = torch.randn(2, 5, 11).bfloat16()
    assert quant_linear(qx, weight, residual=residual, **p).dtype == torch.bfloat16
    assert quant_linear(qx, weight, residual=residual, out_dtype=torch.float16, **p).dtype == torch.float16


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_residual_is_added_after_the_activation(seed, activation):
    x, weight, p = sample((2, 5, 43), 11)
    residual = torch.randn(2, 5, 11)
    plain = quant_linear(x, weight, activation=activation, **p)
    assert torch.equal(quant_linear(x, weight, activation=activation, residual=residual, **p), plain + residual)


@pytest.mark.parametrize("out_bits", [2, 5, 8])
@pytest.mark.parametrize("per_output", [False, True])
def test_requantized_result(seed, out_bits, per_output):
    x, weight, p = sample((2, 5, 43), 11)
    y = quant_linear(x, weight, **p).numpy()
    steps = (1 << out_bits) - 1
    scale = np.full(11, np.abs(y).max() * 1.5 / steps, dtype=np.float32)
    if per_output:
        scale *= np.random.default_rng(seed).uniform(0.5, 2, 11).astype(np.float32)
    expected = np.clip(np.rint(y / scale) + steps // 2, 0, steps).astype(np.uint8)
    given = torch.from_numpy(scale) if per_output else float(scale[0])
    found = quant_linear(x, weight, out_scale=given, out_zero=steps // 2, out_bits=out_bits, **p)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(seed, activation, dtype):
    """Against the two-step formula in float64, of both dtypes that the oracle has."""
    x, weight, p = sample((4, 9), 6, dtype=dtype)
    if dtype == torch.float64:
        p |= {name: p[name].double() for name in ("x_scale", "x_zero", "w_scale")}
    found = quant_linear(x, weight, activation=activation, **p)
    assert found.dtype == dtype
    expected = ACTIVATIONS[activation](two_step(x, weight, None, None, p))
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_dtypes(seed, dtype):
    x, weight, p = sample((4, 33), 6, dtype=dtype)
    found = quant_linear(x, weight, torch.randn(6).to(dtype), **p)
    assert found.dtype == dtype
    assert torch.equal(found - found, torch.zeros_like(found))
    close = two_step(x, weight, None, None, p)
    assert torch.allclose(quant_linear(x, weight, **p).double(), close, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("w_bits", [3, 4, 8])
def test_compiled_backends_give_the_bits_of_the_reference(seed, backend, w_bits):
    able, reason = {"cpu": extension.supports_cpu, "cuda": extension.supports_cuda}[backend]()
    if not able:
        pytest.skip(reason)
    x, weight, p = sample((2, 5, 43), 11, w_bits=w_bits)
    weight = pack_weight(weight, p["w_scale"], w_bits)
    p |= {"bias": torch.randn(11), "acm": torch.randn(5, 11), "residual": torch.randn(2, 5, 11)}
    x, weight = x.to(backend), weight.to(backend)
    p = {name: value.to(backend) if isinstance(value, torch.Tensor) else value for name, value in p.items()}
    for out in ({}, {"out_scale": 0.1, "out_zero": 100}):
        with use_backend("reference"):
            expected = quant_linear(x, weight, **p, **out)
        with use_backend(backend):
            assert torch.equal(quant_linear(x, weight, **p, **out), expected)


def test_acm_row_is_the_token(seed):
    x, weight, p = sample((4, 3, 8), 5)
    acm = torch.randn(3, 5)
    difference = quant_linear(x, weight, None, acm, **p) - quant_linear(x, weight, **p)
    assert torch.allclose(difference, acm.expand(4, 3, 5), atol=1e-5)


def test_gradients_are_straight_through(seed):
    x, weight, p = sample((2, 3, 9), 5, w_bits=3)
    bias, acm, grad = torch.randn(5), torch.randn(3, 5), torch.randn(2, 3, 5)
    leaves = [t.requires_grad_() for t in (x, weight, bias, acm)]
    quant_linear(*leaves, **p).backward(grad)
    qx = (x.detach() / p["x_scale"]).round() + p["x_zero"]
    qw = (weight.detach() / p["w_scale"][:, None]).round()
    x_inside, w_inside = (qx >= 0) & (qx <= 255), (qw >= -4) & (qw <= 3)
    fake_x = (qx.clamp(0, 255) - p["x_zero"]) * p["x_scale"]
    fake_w = qw.clamp(-4, 3) * p["w_scale"][:, None]
    flat = grad.reshape(-1, 5)
    assert torch.allclose(x.grad, (grad @ fake_w) * x_inside, atol=1e-4)
    assert torch.allclose(weight.grad, (flat.t() @ fake_x.reshape(-1, 9)) * w_inside, atol=1e-4)
    assert torch.allclose(bias.grad, flat.sum(0), atol=1e-5)
    assert torch.allclose(acm.grad, grad.sum(0), atol=1e-5)


@pytest.mark.parametrize("form", ["float", "packed", "blocked", "integers"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradients_equal_autograd_through_the_reference(seed, activation, form):
    """Of everything that has one, the scales in the LSQ form among them."""
    x, weight, p = sample((2, 3, 9), 5, w_bits=3)
    tensors = [x, weight, torch.randn(5), torch.randn(3, 5), torch.randn(2, 3, 5), p["x_scale"], p["w_scale"]]
    if form in ("packed", "blocked"):
        tensors[1] = pack_weight(weight, p["w_scale"], 3)
    if form == "blocked":
        tensors[1] = block_weight(tensors[1], 9, 3)
    if form == "integers":
        tensors[0] = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    x, weight, bias, acm, residual, p["x_scale"], p["w_scale"] = tensors
    grad = torch.randn(2, 3, 5)
    y = quant_linear(x, weight, bias, acm, activation=activation, residual=residual, **p)
    found = torch.autograd.grad(y, leaves, grad)
    y = reference.quant_linear(
        x, weight, bias, acm, *p.values(), activation or "none", residual, out_dtype=torch.float32
    )
    for ours, theirs in zip(found, torch.autograd.grad(y, leaves, grad), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_gradient_of_integers():
    x, weight, p = sample((2, 9), 5)
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"out_scale was given while a gradient is wanted"):
        quant_linear(x, weight, out_scale=1.0, out_zero=0, **p)
    with torch.no_grad():
        assert quant_linear(x, weight, out_scale=1.0, out_zero=0, **p).dtype == torch.uint8


def test_gradient_of_x_with_packed_weights_and_no_bias(seed):
    x, weight, p = sample((4, 16), 5)
    grads = []
    for w in (weight, pack_weight(weight, p["w_scale"], 4)):
        leaf = x.clone().requires_grad_()
        quant_linear(leaf, w, activation="gelu", **p).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_non_contiguous_input(seed):
    x, weight, p = sample((6, 4, 8), 5)
    assert torch.equal(
        quant_linear(x.transpose(0, 1), weight.t().contiguous().t(), **p),
        quant_linear(x, weight, **p).transpose(0, 1),
    )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu"])
def test_opcheck(seed, device, activation):
    x, weight, p = sample((2, 3, 8), 5)
    tensors = [t.to(device) for t in (x, weight, torch.randn(5), torch.randn(3, 5))]
    scales = [t.to(device) for t in (p["x_scale"], p["x_zero"], p["w_scale"])]
    arguments = (*tensors, *scales, 8, 4, activation)
    residual = torch.randn(2, 3, 5, device=device)
    for rest in (
        (None, None, None, 8, "float32"),
        (residual, scales[2].abs(), torch.full((5,), 3.0, device=device), 6, "uint8"),
    ):
        torch.library.opcheck(torch.ops.dfqvit.quant_linear, (*arguments, *rest))
    backward = (torch.randn(2, 3, 5, device=device), *arguments, [True, False, True, True, True, True])
    torch.library.opcheck(torch.ops.dfqvit.quant_linear_backward, backward)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu"])
def test_compiles_without_graph_breaks(seed, activation):
    x, weight, p = sample((2, 8), 5)
    x.requires_grad_()

    def step(x):
        return quant_linear(x, weight, activation=activation, **p).square().sum()

    (expected,) = torch.autograd.grad(step(x), x)
    (found,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.allclose(found, expected)


BASE = {
    "x": torch.zeros(4, 8),
    "weight": torch.zeros(5, 8),
    "bias": None,
    "acm": None,
    "x_scale": 1.0,
    "x_zero": 0,
    "w_scale": torch.ones(5),
    "a_bits": 8,
    "w_bits": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_bits": 9}, "a_bits was 9; it may be a whole number from 2 to 8"),
        ({"w_bits": 1}, "w_bits was 1"),
        ({"x": torch.full((4, 8), math.nan)}, "x held NaN or Inf"),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x had dtype torch.int64"),
        ({"x": torch.tensor(1.0)}, "x had no dimensions"),
        ({"weight": torch.zeros(5, 9)}, r"weight had shape \(5, 9\); for this x, float, it must be \[N, 8\]"),
        ({"weight": torch.zeros(5, 8, dtype=torch.uint8)}, r"packed to 4 bits, it must be \[N, 4\]"),
        ({"weight": torch.zeros(5, 8, dtype=torch.int16)}, "weight had dtype torch.int16"),
        (
            {"weight": torch.zeros(1, 8, dtype=torch.int32)},
            r"5 values of w_scale, blocked in 4 bits, it must be \[1, 144\]",
        ),
        ({"x_zero": 3.5}, "x_zero held 3.5; it must be a whole number from 0 to 255"),
        ({"x_zero": 16, "a_bits": 4}, "x_zero held 16; it must be a whole number from 0 to 15"),
        (
            {"x": torch.full((4, 8), 16, dtype=torch.uint8), "a_bits": 4},
            "x held 16; it must be a whole number from 0 to 15",
        ),
        ({"residual": torch.zeros(4, 8)}, r"residual had shape \(4, 8\); it must be \[4, 5\]"),
        ({"residual": torch.zeros(4, 5, dtype=torch.int32)}, "residual had dtype torch.int32"),
        ({"bias": torch.zeros(5, dtype=torch.int32)}, "bias had dtype torch.int32"),
        ({"out_scale": 1.0}, "out_zero was None; it must be given if out_scale is, and only then"),
        ({"out_scale": torch.ones(4), "out_zero": 0}, "out_scale had 4 values; it must have 1 or 5"),
        ({"out_scale": -1.0, "out_zero": 0}, "out_scale held -1"),
        ({"out_scale": 1.0, "out_zero": 256}, "out_zero held 256; it must be a whole number from 0 to 255"),
        ({"out_scale": 1.0, "out_zero": 0, "out_bits": 1}, "out_bits was 1"),
        ({"out_scale": 1.0, "out_zero": 0, "out_dtype": torch.float32}, "with out_scale the result is uint8"),
        ({"out_dtype": torch.int32}, "out_dtype was torch.int32; it may be float32"),
        ({"bias": torch.zeros(4)}, r"bias had shape \(4,\); it must be \[5\]"),
        ({"acm": torch.zeros(4, 4)}, r"acm had shape \(4, 4\); it must be \[tokens, 5\]"),
        ({"acm": torch.zeros(3, 5)}, "acm was for 3 tokens; the 4 rows of x are not a multiple"),
        ({"x_scale": 0.0}, "x_scale held 0"),
        ({"x_scale": torch.ones(2)}, "x_scale had 2 values; it must be a scalar"),
        ({"w_scale": torch.ones(4)}, "w_scale had 4 values; it must have 1 or 5"),
        (
            {"activation": "relu6"},
            "activation was 'relu6'; it may be None, 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'",
        ),
        ({"weight": torch.zeros(5, 8, device="meta")}, "weight was on meta; it must be on cpu, like x"),
    ],
)
def test_bad_input(change, message):
    arguments = BASE | change
    with pytest.raises((ValueError, TypeError), match=message):
        quant_linear(**arguments)


def test_reference_knows_every_activation_that_the_checks_accept():
    assert set(reference.ACTIVATIONS) == {"none", *ACTIVATIONS}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_in_float64(seed, activation):
    """Of what enters smoothly, in its oracle's dtype."""
    x, weight, p = sample((2, 3, 9), 5, dtype=torch.float64)
    p["w_scale"] = p["w_scale"].double()
    addends = [torch.randn(5), torch.randn(3, 5), torch.randn(2, 3, 5)]
    addends = [t.double().requires_grad_() for t in addends]

    def run(bias, acm, residual):
        return quant_linear(x, weight, bias, acm, residual=residual, activation=activation, **p)

    assert torch.autograd.gradcheck(run, addends)
