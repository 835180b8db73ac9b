"""`quant_block`: seven operators called one by one are the oracle of the compiled call; and its contract as an operator."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp
from torch import nn

from dfqvit.kernels import block_weight, extension, pack_weight, quant_block, use_backend
from dfqvit.kernels.quant_block.op import forward
from dfqvit.kernels.quant_linear.blocked import unblock_weight

from ..conftest import ACTIVATIONS, arguments_of, threads


def parameter(low, high):
    return torch.tensor(random.uniform(low, high))


def sample(
    rng, batch, tokens, heads, depth, hidden, *, w_bits=4, a_bits=8, windows=0, acm=False, blocked=True, gate=None
):
    """Random arguments of `quant_block` by name, x apart; `windows` divides tokens, or 0 for whole images."""
    both = 2 * hidden if gate else hidden
    inner, channels = heads * depth, heads * depth + rng.choice([0, 5])
    shapes = ((3 * inner, channels), (channels, inner), (both, channels), (channels, hidden))
    weights, scales = [], []
    for outputs, inputs in shapes:
        scale = (torch.rand(outputs) + 0.5) * 4 / inputs**0.5 / (1 << w_bits)
        packed = pack_weight(torch.randn(outputs, inputs) / inputs**0.5, scale, w_bits)
        weights.append(block_weight(packed, inputs, w_bits) if blocked else packed)
        scales.append(scale)
    steps = (1 << a_bits) - 1
    index = mask = bias = None
    if windows:
        index = torch.randperm(tokens).view(windows, -1).int()
        mask = torch.where(torch.rand(windows, tokens // windows, tokens // windows) < 0.2, -100.0, 0.0)
        bias = torch.randn(heads, tokens // windows, tokens // windows)
    named = {
        "norms": [1 + torch.randn(channels) * 0.2, torch.randn(channels) * 0.2] * 2,
        "eps": [1e-6, 1e-5],
        "weights": weights,
        "biases": [torch.randn(len(scale)) * 0.1 if rng.random() < 0.8 else None for scale in scales],
        "weight_scales": scales,
        "w_bits": [w_bits] * 4,
        "scales": [torch.tensor(6.0 / steps * (0.8 + 0.4 * rng.random())) for _ in range(7)],
        "zeros": [torch.tensor(float(steps // 2))] * 6 + [torch.tensor(float(steps // 20))],
        "a_bits": [a_bits] * 7,
        "heads": heads,
        "attention_scale": depth**-0.5,
        "position_bias": bias,
        "mask": mask,
        "index": index,
        "acm": torch.randn(tokens, channels).half() if acm else None,
        "hidden_scale": 0.02 + torch.rand(hidden) * 0.05 if rng.random() < 0.5 else None,
        "activation": rng.choice([None, *ACTIVATIONS]),
        "head_scale": None,
        "post_norm": False,
        "half": False,
        "gate": gate,
        "rope": None,
        "hidden_table": torch.randint(steps + 1, (256,), dtype=torch.uint8) if rng.random() < 0.3 else None,
    }
    return torch.randn(batch, tokens, channels), named


compiled = pytest.mark.skipif(extension.load()[0] is None, reason="dfqvit._C is not built")


@compiled
@pytest.mark.parametrize("w_bits", [8, 4, 3])
def test_one_call_gives_the_bits_of_seven(seed, isa, w_bits):
    rng = random.Random(seed)
    for _ in range(6):
        windows = rng.choice([0, 0, 2, 3])
        tokens = (windows or 1) * rng.randint(1, 30)
        x, named = sample(
            rng, rng.randint(1, 5), tokens, rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 100),
            w_bits=w_bits, a_bits=rng.randint(4, 8), windows=windows, acm=rng.random() < 0.5, blocked=rng.random() < 0.7,
            gate=rng.choice([None, "first", "last"]),
        )  # fmt: skip
        found = quant_block(x, **named)
        with use_backend("reference", "quant_block"):  # its operators run on the CPU still
            expected = quant_block(x, **named)
        assert torch.equal(found, expected)


def rotated(rng, x, named):
    """The same arguments with a rope, of some or all tokens."""
    heads, depth = named["heads"], named["weight_scales"][0].numel() // 3 // named["heads"]
    angles = torch.randn(*rng.choice([(), (heads,)]), rng.randint(0, x.shape[1]), depth)
    return x, {**named, "half": rng.random() < 0.5, "rope": torch.cat((angles.sin(), angles.cos()), -1)}


@compiled
@pytest.mark.parametrize("w_bits", [8, 4])
def test_a_rope_gives_the_bits_of_the_operators_one_by_one(seed, isa, w_bits):
    rng = random.Random(seed)
    for _ in range(8):
        windows = rng.choice([0, 0, 2])
        tokens = (windows or 1) * rng.randint(1, 150 if rng.random() < 0.3 else 30)
        x, named = sample(
            rng, rng.randint(1, 5), tokens, rng.randint(1, 3), 2 * rng.randint(1, 20), rng.randint(1, 100),
            w_bits=w_bits, windows=windows, acm=rng.random() < 0.5, blocked=rng.random() < 0.7,
            gate=rng.choice([None, "first", "last"]),
        )  # fmt: skip
        x, named = rotated(rng, x, named)
        found = quant_block(x, **named)
        with use_backend("reference", "quant_block"):
            assert torch.equal(found, quant_block(x, **named))


def swin_v2(rng, x, named):
    """The same arguments with attention by cosines, or norms that come last, or both."""
    cosine, last = rng.choice([(True, False), (False, True), (True, True)])
    named.update(post_norm=last, acm=None if last else named["acm"])
    if cosine:
        steps = (1 << named["a_bits"][0]) - 1
        for place in (1, 2):
            named["scales"][place] = torch.tensor(2.0 / steps)
        named.update(head_scale=1 + 9 * torch.rand(named["heads"]), attention_scale=1.0)
    return x, named


@compiled
@pytest.mark.parametrize("w_bits", [8, 4])
def test_cosines_and_norms_that_come_last(seed, isa, w_bits):
    """torch's sums of squares have another order, so a byte may round to its neighbour, seldom."""
    rng = random.Random(seed)
    for _ in range(8):
        windows = rng.choice([0, 2, 3])
        tokens = (windows or 1) * rng.randint(1, 200 if rng.random() < 0.3 else 30)
        x, named = sample(
            rng, rng.randint(1, 5), tokens, rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 100),
            w_bits=w_bits, windows=windows, acm=rng.random() < 0.5, blocked=rng.random() < 0.7,
            gate=rng.choice([None, "first", "last"]),
        )  # fmt: skip
        x, named = swin_v2(rng, x, named)
        found = quant_block(x, **named)
        with use_backend("reference", "quant_block"):  # its operators run on the CPU still
            expected = quant_block(x, **named)
        off = (found - expected).abs()
        assert float(off.mean()) < 2e-3 * float((expected - x).std() + 0.1), (named["post_norm"], "head_scale" in named)
        assert float((off > 1e-5 * (1 + expected.abs())).float().mean()) < 0.3


@compiled
@pytest.mark.parametrize("kind", ["plain", "Swin V2"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(seed, kind):
    rng = random.Random(seed)
    x, named = sample(rng, 5, 450, 2, 32, 64, windows=9)
    if kind == "Swin V2":
        x, named = swin_v2(rng, x, named)
    whole = quant_block(x, **named)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(quant_block(x, **named), whole)
            assert torch.equal(quant_block(x[2:3], **named), whole[2:3])


@compiled
@pytest.mark.parametrize("gate", ["first", "last"])
def test_a_gate_is_timms(seed, gate):
    """Of the whole block, with grids so fine that the MLP is timm's in float, and against its halves the wrong way round."""
    x, named = sample(random.Random(seed), 2, 20, 2, 16, 48, w_bits=8, gate=gate)
    named.update(activation="silu", hidden_scale=None, hidden_table=None)
    widths = (named["norms"][0].numel(), 32, named["norms"][0].numel(), 48)
    floats = [
        unblock_weight(weight, inputs, 8)[: len(scale)].float() * scale[:, None]
        for weight, scale, inputs in zip(named["weights"], named["weight_scales"], widths, strict=True)
    ]
    mlp = GluMlp(widths[0], 96, act_layer=nn.SiLU, gate_last=gate == "last").eval()
    with torch.no_grad():
        for layer, place in ((mlp.fc1, 2), (mlp.fc2, 3)):
            layer.weight.copy_(floats[place])
            layer.bias.copy_(torch.zeros(len(layer.bias)) if named["biases"][place] is None else named["biases"][place])
        silent = {
            **named,
            "weight_scales": [
                *named["weight_scales"][:1],
                torch.full((widths[0],), 1e-20),
                *named["weight_scales"][2:],
            ],
        }
        silent["biases"] = [named["biases"][0], None, *named["biases"][2:]]  # attention adds nothing
        normed = F.layer_norm(x, x.shape[2:], *named["norms"][2:], named["eps"][1])
        hidden = mlp.fc1(normed).chunk(2, -1)
        steps = float((hidden[0] * hidden[1]).abs().max()) / 100
        silent["scales"], silent["zeros"] = (
            [*named["scales"][:5], torch.tensor(10 / 255), torch.tensor(steps)],
            [*named["zeros"][:6], torch.tensor(128.0)],
        )
        expected = x + mlp(normed)
    off, wrong = (
        float((quant_block(x, **{**silent, "gate": kind}) - expected).abs().mean())
        for kind in (gate, {"first": "last", "last": "first"}[gate])
    )
    assert off < 0.08 * float((expected - x).std())
    assert wrong > 5 * off


@compiled
def test_a_gate_of_what_is_not_finite(seed):
    """Weights as large as float32 has make fc1's result infinite."""
    x, named = sample(random.Random(seed), 2, 12, 2, 8, 20, gate="first")
    named["weight_scales"][2] = torch.full((40,), 3e38)
    with pytest.raises(ValueError, match="what fc1 gives became NaN or Inf; it must be finite"):
        quant_block(x, **named)


@compiled
def test_values_that_are_not_finite_are_refused(seed):
    rng = random.Random(seed)
    x, named = sample(rng, 2, 12, 2, 8, 20)
    x[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="x held NaN or Inf"):
        quant_block(x, **{**named, "acm": None, "post_norm": True})


@compiled
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_close_to_the_float_reference(seed, activation):
    rng = random.Random(seed)
    x, named = sample(rng, 3, 24, 2, 16, 64, w_bits=8, windows=2, acm=True)
    named["activation"] = activation
    with use_backend("reference"):
        expected = quant_block(x, **named)
    assert float((quant_block(x, **named) - expected).abs().mean()) < 0.01 * float(expected.std())


@pytest.mark.parametrize("gate", [None, "first"])
def test_opcheck(seed, gate):
    x, named = sample(random.Random(seed), 2, 12, 2, 8, 20, windows=2, acm=True, blocked=False, gate=gate)
    arguments = arguments_of(torch.ops.dfqvit.quant_block.default, lambda: quant_block(x, **named))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dfqvit.quant_block, arguments, test_utils=tests)


def test_empty_batch_and_strided_input(seed):
    x, named = sample(random.Random(seed), 4, 10, 2, 8, 20)
    assert quant_block(x[:0], **named).shape == x[:0].shape
    assert torch.equal(quant_block(x[::2], **named), quant_block(x[::2].clone(), **named))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 8, dtype=torch.float64)}, "x was torch.float64; it must be float32"),
        ({"x": torch.zeros(2, 6, 7)}, r"x had shape \(2, 6, 7\); it must be \[B, T, 8\]"),
        ({"norms": []}, "norms had 0 entries; a block has 4"),
        ({"a_bits": [8, 8, 7, 8, 8, 8, 8]}, r"a_bits was \[8, 7, 8\] for q, k and v; they must be the same"),
        ({"w_bits": [4, 4, 4, 9]}, "bits was 9; it may be a whole number from 2 to 8"),
        ({"heads": 3}, "heads was 3; the 8 channels of q must be a multiple of it"),
        ({"acm": torch.zeros(5, 8)}, r"acm had shape \(5, 8\); it must be \[6, 8\]"),
        ({"rope": torch.zeros(6, 6)}, r"rope had shape \(6, 6\); it must be \[R, 8\] or \[2, R, 8\], R up to 6"),
        ({"rope": torch.zeros(7, 8)}, r"rope had shape \(7, 8\)"),
        ({"rope": torch.zeros(6, 8), "head_scale": torch.ones(2)}, "rope was given with head_scale"),
        ({"acm": torch.zeros(6, 8), "post_norm": True}, "acm was given with post_norm"),
        ({"head_scale": torch.ones(3)}, r"head_scale was torch.float32 \(3,\); it must be float32 \[2\]"),
        ({"hidden_table": torch.zeros(256)}, r"hidden_table was torch.float32 \(256,\); it must be uint8 \[256\]"),
        (
            {"hidden_table": torch.full((256,), 99).byte(), "a_bits": [8] * 6 + [6]},
            "hidden_table held 99; .* from 0 to 63",
        ),
        ({"hidden_table": torch.zeros(16).byte()}, r"hidden_table was torch.uint8 \(16,\); it must be uint8 \[256\]"),
        ({"activation": "relu"}, "activation was 'relu'; it may be None, 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'"),
        ({"gate": "second"}, "gate was 'second'; it may be None, 'first' or 'last'"),
        ({"biases": [torch.zeros(7), None, None, None]}, r"bias of qkv had shape \(7,\); it must be \[24\]"),
        ({"scales": [torch.ones(2)] * 7}, "scales of qkv input was"),
        ({"x": torch.zeros(2, 6, 8, requires_grad=True)}, "a gradient is wanted of quant_block"),
    ],
)
def test_bad_input(change, message):
    rng = random.Random(0)
    while True:
        x, named = sample(rng, 2, 6, 2, 4, 12)
        if x.shape[-1] == 8:
            break
    with pytest.raises((TypeError, ValueError), match=message):
        quant_block(**{"x": x, **named, **change})


def test_a_gate_takes_half_of_an_even_number(seed):
    x, named = sample(random.Random(seed), 2, 6, 2, 4, 13)
    with pytest.raises(ValueError, match="gate was 'last' and fc1 had 13 outputs; a gate takes half of them"):
        quant_block(x, **{**named, "gate": "last"})


@compiled
@pytest.mark.parametrize(
    "name",
    [
        "weights",
        "weight_scales",
        "norms",
        "zeros",
        "index",
        "mask",
        "position_bias",
        "head_scale",
        "rope",
        "hidden_table",
    ],
)
def test_the_operator_itself_checks_what_it_reads(seed, name):
    """As a C++ program calls it, without the checks in Python: too little memory is refused, not read beyond."""
    x, named = sample(random.Random(seed), 2, 12, 2, 8, 20, windows=2)
    named["biases"] = [torch.zeros(len(scale)) for scale in named["weight_scales"]]
    named["activation"] = named["gate"] = "none"
    named["head_scale" if name == "head_scale" else "rope"] = (
        torch.ones(2) if name == "head_scale" else torch.zeros(12, 16)
    )
    short = [value[:1] if value.dim() else value for value in named[name]] if isinstance(named[name], list) else None
    others = {"zeros": named["zeros"][:6], "index": named["index"] + 1, "rope": torch.zeros(13, 16),
              "hidden_table": torch.zeros(255, dtype=torch.uint8)}  # fmt: skip
    change = others[name] if name in others else short or named[name][:1]
    names = [argument.name for argument in torch.ops.dfqvit.quant_block.default._schema.arguments[1:]]
    with use_backend("cpu"), pytest.raises((ValueError, TypeError, RuntimeError)):
        forward(x, *({**named, name: change}[key] for key in names))


@compiled
@pytest.mark.parametrize("windows", [0, 2])
def test_constants_that_change_between_calls_count(seed, windows):
    """The compiled operator keeps what it made of them, and must see every change in place."""
    rng = random.Random(seed)
    x, named = sample(rng, 2, 24, 2, 12, 30, windows=windows, acm=True, gate="last" if windows else None)
    named["hidden_scale"] = 0.02 + torch.rand(30) * 0.05
    named["hidden_table"] = torch.randint(256, (256,), dtype=torch.uint8)
    named["biases"] = [torch.randn(len(scale)) * 0.1 for scale in named["weight_scales"]]
    changes = [
        (name, i) for name in ("norms", "weight_scales", "biases", "scales", "zeros") for i in range(len(named[name]))
    ]
    changes += [
        (name, None)
        for name in ("acm", "hidden_scale", "hidden_table", *(("position_bias", "mask") if windows else ()))
    ]
    quant_block(x, **named)
    for name, place in [*changes, *((name, place) for name, place in changes if rng.random() < 0.3)]:
        tensor = named[name] if place is None else named[name][place]
        if name in ("zeros", "hidden_table"):
            tensor += 1
        else:
            tensor *= 1.25
        found = quant_block(x, **named)
        with use_backend("reference", "quant_block"):
            assert torch.equal(found, quant_block(x, **named)), (name, place)


@compiled
def test_other_weights_in_the_same_memory_count(seed):
    """Integers of other values, with the same sums and with others; and other constants that are no tensors."""
    x, named = sample(random.Random(seed), 1, 9, 2, 16, 40, w_bits=8)

    def exact(**changed):
        found = quant_block(x, **{**named, **changed})
        with use_backend("reference", "quant_block"):
            assert torch.equal(found, quant_block(x, **{**named, **changed}))

    channels = named["norms"][0].numel()
    for weight, scale, inputs in zip(
        named["weights"], named["weight_scales"], (channels, 32, channels, 40), strict=True
    ):
        integers = unblock_weight(weight, inputs, 8)[: len(scale)].float()
        for values in (integers[:, torch.randperm(inputs)], integers.flip(0)):  # the sums stay; they do not
            exact()
            weight.copy_(block_weight(pack_weight(values, torch.ones(len(scale)), 8), inputs, 8))
            exact()
    for changed in ({"eps": [1e-3, 1e-5]}, {"heads": 4}, {"attention_scale": 0.5}, {"activation": "gelu_tanh"}):
        exact(**changed)
