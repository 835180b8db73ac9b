"""gate_quantize on every backend and CPU path: the activations in float64, and numpy's rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfqvit.kernels import extension, gate_quantize, use_backend

from ..conftest import ACTIVATIONS, DTYPES, FUSING, each_path, threads

# leading dimensions, channels
CASES = [((2, 17), 64), ((5,), 1), ((3, 2, 7), 33), ((), 130), ((4,), 512), ((0, 3), 8), ((1, 9), 100)]
ALL = {None: lambda y: y, **ACTIVATIONS}


def sample(case, dtype=torch.float32, kind="packed", each=True):
    """(gate, value, options): the halves of one tensor, as a layer gives them, or apart, or of strides of their own."""
    shape, channels = case
    if kind == "packed":
        gate, value = (3 * torch.randn(*shape, 2 * channels)).to(dtype).chunk(2, dim=-1)
    elif kind == "apart":
        gate, value = (3 * torch.randn(2, *shape, channels)).to(dtype).unbind(0)
    else:
        gate, value = (3 * torch.randn(channels, *shape, 2)).to(dtype).movedim(0, -2).unbind(-1)
    scale = 0.02 + 0.05 * torch.rand(channels if each else ())
    return gate, value, {"scale": scale, "zero_point": torch.tensor(100.0)}


def check(found, gate, value, scale, zero_point, activation, bits=8):
    exact = ALL[activation](gate.double()) * value.double()
    ratio = (exact / scale.double()).numpy()
    expected = np.clip(np.rint(ratio) + float(zero_point), 0, 2**bits - 1)
    margin = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
    assert found.dtype == torch.uint8
    assert found.shape == gate.shape
    off = found.double().numpy() != expected
    assert bool((margin[off] < 1e-3).all())
    assert bool((np.abs(found.double().numpy() - expected) <= 1).all())


@pytest.mark.parametrize("activation", ALL)
@pytest.mark.parametrize("kind", ["packed", "apart", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_float64_but_for_ties(seed, isa, backend, case, kind, activation):
    gate, value, options = sample(case, kind=kind, each=kind != "apart")
    bits = 5 if kind == "strided" else 8
    options["zero_point"] = options["zero_point"] % 2**bits
    with use_backend(backend):
        found = gate_quantize(gate, value, **options, bits=bits, activation=activation)
    check(found, gate, value, **options, activation=activation, bits=bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_takes_every_float_and_computes_in_float32(seed, isa, backend, dtype):
    gate, value, options = sample(CASES[0], dtype)
    with use_backend(backend):
        found = gate_quantize(gate, value, **options)
    check(found, gate.float(), value.float(), **options, activation="silu")


def test_silu_by_default_and_float64_as_it_is(seed):
    gate, value, options = sample(CASES[2], torch.float64)
    options = {name: tensor.double() for name, tensor in options.items()}
    found = gate_quantize(gate, value, **options)
    expected = (F.silu(gate) * value / options["scale"]).round() + options["zero_point"]
    assert torch.equal(found, expected.clamp(0, 255).byte())


@pytest.mark.skipif(extension.load()[0] is None, reason="dfqvit._C is not built")
@pytest.mark.parametrize("activation", ALL)
def test_paths_that_fuse_give_the_same_bytes(seed, activation):
    """Models on different processors agree to the bit; `portable` rounds multiply-adds twice."""
    gate, value, options = sample(((40,), 200))
    found = []
    for _ in each_path(FUSING):
        with use_backend("cpu"):
            found.append(gate_quantize(gate, value, **options, activation=activation))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("activation", ALL)
def test_a_scale_that_no_reciprocal_serves(seed, isa, activation):
    gate, value, options = sample(((40,), 200))
    options["scale"][7], gate[:, 7] = 1e-30, gate[:, 7].abs() + 1
    with use_backend("cpu"):
        found = gate_quantize(gate, value, **options, activation=activation)
    check(found, gate, value, **options, activation=activation)


def test_bits_do_not_depend_on_threads_or_neighbours(seed):
    gate, value, options = sample(((900,), 96))
    whole = gate_quantize(gate, value, **options)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(gate_quantize(gate, value, **options), whole)
            assert torch.equal(gate_quantize(gate[37:40], value[37:40], **options), whole[37:40])


@pytest.mark.parametrize("activation", ALL)
def test_far_values(isa, activation):
    """Activations of large numbers are theirs or 0, and a product beyond the grid is its end."""
    gate = torch.tensor([-1e30, -1e4, -100.0, 100.0, 1e4, 1e30]).repeat(3, 7)
    value = torch.full_like(gate, 0.5)
    with use_backend("cpu"):
        found = gate_quantize(gate, value, scale=1.0, zero_point=100.0, activation=activation)
    low = 0 if activation is None else 100
    expected = torch.tensor([low, low, 50 if activation is None else 100, 150, 255, 255], dtype=torch.uint8)
    assert torch.equal(found, expected.repeat(3, 7))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(seed, isa, wrong):
    gate, value, options = sample(((3,), 37), kind="apart")
    for part, at in ((gate, 2), (value, 36)):
        before = part[1, at].clone()
        part[1, at] = wrong
        for activation in ("silu", "gelu", "gelu_tanh", None):
            with use_backend("cpu"), pytest.raises(ValueError, match="gate or value held NaN or Inf"):
                gate_quantize(gate, value, **options, activation=activation)
        part[1, at] = before


def test_operator_contract(seed):
    gate, value, options = sample(((2, 5), 8))
    arguments = (gate, value, options["scale"], options["zero_point"], 8, "silu")
    torch.library.opcheck(torch.ops.dfqvit.gate_quantize.default, arguments)
    torch.library.opcheck(torch.ops.dfqvit.gate_quantize.default, (*arguments[:2], torch.tensor([0.1]), *arguments[3:]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.zeros(2, 8, dtype=torch.uint8)}, TypeError, "gate had dtype torch.uint8; it may be float32"),
        ({"value": torch.zeros(2, 7)}, ValueError, r"value had shape \(2, 7\); it must be that of gate, \[2, 8\]"),
        ({"value": torch.zeros(2, 8).half()}, TypeError, "value had dtype torch.float16; it must be that of gate"),
        ({"gate": torch.zeros(())}, ValueError, r"gate had shape \(\); it must be \[..., H\]"),
        ({"scale": torch.ones(7)}, ValueError, "scale had 7 values; it must have 1 or 8, one for each channel"),
        ({"scale": 0.0}, ValueError, "scale held 0; every scale must be greater than 0"),
        ({"zero_point": torch.zeros(8)}, ValueError, "zero_point had 8 values; it must be a scalar"),
        ({"zero_point": 16.0, "bits": 4}, ValueError, "zero_point held 16; it must be a whole number"),
        ({"bits": 9}, ValueError, "bits was 9"),
        (
            {"activation": "relu"},
            ValueError,
            "activation was 'relu'; it may be None, 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"gate": torch.zeros(2, 8), "value": torch.zeros(2, 8), "scale": 0.1, "zero_point": 3.0, **change}
    with pytest.raises(error, match=message):
        gate_quantize(arguments.pop("gate"), arguments.pop("value"), **arguments)


@pytest.mark.skipif(extension.load()[0] is None, reason="dfqvit._C is not built")
@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        ([0.1, 0.0, 0.1], 0.0, "scale held 0; every scale must be greater than 0"),
        ([float("nan")], 0.0, "scale held NaN or Inf"),
        ([0.1], 0.5, "zero_point held 0.5; it must be a whole number from 0 to 15"),
        ([0.1], 16.0, "zero_point held 16; it must be a whole number from 0 to 15"),
    ],
)
def test_the_operator_itself_checks_its_grid(scale, zero, message):
    """As a C++ program calls it, without the checks in Python."""
    part = torch.randn(2, 3)
    with pytest.raises(ValueError, match=message):
        torch.ops.dfqvit_cpu.gate_quantize(part, part, torch.tensor(scale), torch.tensor(zero), 4, "none")
