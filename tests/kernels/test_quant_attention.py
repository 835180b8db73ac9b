"""quant_attention on every backend and CPU path against a loop over images, windows and heads in numpy's float64."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from dfqvit.kernels import quant_attention, use_backend

from ..conftest import PATHS, on_path, threads

CASES = [  # batch, heads, depth, windows, tokens of a window
    (2, 3, 64, 1, 197),
    (1, 2, 32, 4, 49),
    (3, 1, 5, 1, 7),
    (2, 2, 70, 2, 33),
    (1, 3, 16, 1, 1),
    (1, 1, 3, 1, 130),
    (0, 2, 8, 1, 4),
]


@pytest.fixture(params=[*PATHS, "reference"])
def path(request):
    """Every CPU path that this processor can run, and the reference."""
    compiled = request.param != "reference"
    with on_path(request.param) if compiled else nullcontext(), use_backend("cpu" if compiled else "reference"):
        yield request.param


def sample(case, windowed=True):
    batch, heads, depth, windows, tokens = case
    total = windows * tokens
    options = {
        "in_scale": torch.rand(3) * 0.03 + 0.01,
        "in_zero": torch.randint(0, 256, (3,)).float(),
        "scale": depth**-0.5,
    }
    if windowed:
        options["index"] = torch.randperm(total).to(torch.int32).view(windows, tokens)
        options["bias"] = torch.randn(heads, tokens, tokens)
        hidden = (torch.rand(windows, tokens, tokens) < 0.3) & ~torch.eye(tokens, dtype=torch.bool)
        options["mask"] = torch.zeros(windows, tokens, tokens).masked_fill(hidden, -float("inf"))
        options["head_scale"] = torch.rand(heads) * 2 + 0.2
    return torch.randint(0, 256, (batch, total, 3 * heads * depth), dtype=torch.uint8), heads, options


def oracle(qkv, heads, in_scale, in_zero, scale, bias=None, mask=None, index=None, head_scale=None):
    """(y, how near the nearest 255 e of each query lies to the middle between two integers)."""
    batch, total, width = qkv.shape
    depth = width // 3 // heads
    values = qkv.numpy().astype(np.float64).reshape(batch, total, 3, heads, depth)
    values = values - in_zero.numpy().reshape(3, 1, 1)
    places = np.arange(total)[None] if index is None else index.numpy()
    y, margin = np.zeros((batch, total, heads, depth)), np.ones((batch, total, heads))
    factor = np.float32(scale) * in_scale[0].item() * in_scale[1].item()
    for b in range(batch):
        for w, where in enumerate(places):
            for h in range(heads):
                q, k, v = (values[b, where, i, h] for i in range(3))
                s = factor * (1.0 if head_scale is None else head_scale[h].item()) * (q @ k.T)
                s = s if bias is None else s + bias[h].double().numpy()
                s = s if mask is None else s + mask[w].double().numpy()
                e = 255 * np.exp(s - s.max(-1, keepdims=True))
                p = np.rint(e)
                y[b, where, h] = in_scale[2].item() * (p @ v) / p.sum(-1, keepdims=True)
                margin[b, where, h] = np.abs(np.abs(e - np.floor(e)) - 0.5).min(-1)
    return torch.from_numpy(y.reshape(batch, total, width // 3)), torch.from_numpy(margin)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float_result_matches_the_oracle(seed, path, case, windowed):
    if not windowed and case[3] > 1:
        pytest.skip("one window without an index")
    qkv, heads, options = sample(case, windowed)
    found = quant_attention(qkv, heads, **options)
    expected, margin = oracle(qkv, heads, **options)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    clear = (margin > 1e-2).repeat_interleave(case[2], dim=-1).view(expected.shape)
    assert torch.allclose(found.double()[clear], expected[clear], rtol=1e-5, atol=1e-5)
    steps = 255 * float(options["in_scale"][2]) / 255  # what one step of one p can move, its sum being at least 255
    assert not found.numel() or float((found.double() - expected).abs().max()) <= 3 * steps


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_result_is_the_float_result_rounded(seed, path, bits):
    qkv, heads, options = sample((2, 3, 24, 2, 21))
    y = quant_attention(qkv, heads, **options)
    out_scale, zero = torch.tensor(0.037 * 2 ** (8 - bits)), (1 << bits - 1) - 3
    found = quant_attention(qkv, heads, **options, out_scale=out_scale, out_zero=zero, out_bits=bits)
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), ((y / out_scale).round() + zero).clamp(0, 2**bits - 1))


def test_threads_share_an_image_without_seams(seed):
    qkv, heads, options = sample((1, 1, 32, 1, 300))
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(quant_attention(qkv, heads, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_agrees_with_float_attention(seed):
    """On fine grids it is scaled_dot_product_attention within the rounding of the operands."""
    q, k, v = torch.randn(3, 2, 3, 50, 32).unbind(0)
    scale = torch.stack([t.abs().amax() / 127 for t in (q, k, v)])
    parts = [((t / s).round() + 128).clamp(0, 255) for t, s in zip((q, k, v), scale, strict=True)]
    qkv = torch.stack(parts, 2).permute(0, 3, 2, 1, 4).reshape(2, 50, -1).to(torch.uint8)
    found = quant_attention(qkv, 3, in_scale=scale, in_zero=torch.full((3,), 128.0), scale=32**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert float((found - expected).abs().mean()) < 0.02


def test_operator_contract(seed):
    qkv, heads, o = sample((2, 2, 8, 2, 5))
    fixed = (qkv, heads, o["in_scale"], o["in_zero"], o["scale"], o["bias"], o["mask"], o["index"])
    torch.library.opcheck(torch.ops.dfqvit.quant_attention.default, (*fixed, None, None, 8))
    torch.library.opcheck(torch.ops.dfqvit.quant_attention.default, (*fixed, torch.tensor(0.1), torch.tensor(3.0), 8))


def test_bad_input():
    qkv, heads, options = sample((1, 2, 4, 2, 3))
    for change, error, message in (
        ({"qkv": qkv.float()}, TypeError, r"qkv had dtype torch.float32; it must be uint8"),
        ({"heads": 5}, ValueError, r"qkv had shape \(1, 6, 24\); with 5 heads it must be \[B, T, 3 \* 5 \* D\]"),
        ({"index": options["index"].long()}, TypeError, r"index had dtype torch.int64; it must be int32"),
        ({"index": options["index"] * 0}, ValueError, r"index must hold every token from 0 to 5 exactly once"),
        ({"bias": options["bias"][:1]}, ValueError, r"bias had shape \(1, 3, 3\); it must be \[2, 3, 3\]"),
        ({"mask": options["mask"][..., :2]}, ValueError, r"mask had shape \(2, 3, 2\)"),
        ({"head_scale": torch.ones(7)}, ValueError, r"head_scale had shape \(7,\); it must be \["),
        ({"head_scale": -torch.ones(2)}, ValueError, r"head_scale held -1; every scale must be greater than 0"),
        ({"in_scale": torch.ones(2)}, ValueError, r"in_scale had shape \(2,\); it must be \[3\], for q, k and v"),
        ({"in_scale": -torch.ones(3)}, ValueError, r"in_scale held -1; every scale must be greater than 0"),
        ({"out_scale": 0.1}, ValueError, r"out_zero was None; it must be given if out_scale is"),
        ({"out_bits": 9}, ValueError, r"out_bits was 9"),
    ):
        arguments = {"qkv": qkv, "heads": heads, **options, **change}
        with pytest.raises(error, match=message):
            quant_attention(arguments.pop("qkv"), arguments.pop("heads"), **arguments)
