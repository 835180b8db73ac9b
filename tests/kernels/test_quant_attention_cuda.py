"""quant_attention by CUDA: the kernel's own source run on the CPU, and on a GPU, against the other backends' oracle."""

from __future__ import annotations

import pytest
import torch

from dfqvit.kernels import quant_attention, use_backend

from .cuda_emulator import Emulator, compiled
from .test_quant_attention import oracle, sample

# batch, heads, depth, windows, tokens of a window
CASES = [
    (1, 2, 64, 1, 197),
    (2, 3, 32, 4, 49),
    (1, 1, 16, 1, 1),
    (1, 1, 80, 1, 33),
    (1, 2, 128, 2, 20),
    (1, 1, 48, 1, 300),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(compiled("quant_attention", tmp_path_factory.mktemp("cuda")))


def emulated(
    emulator, qkv, heads, in_scale, in_zero, scale, bias=None, mask=None, index=None, out_scale=None, out_zero=None,
    out_bits=8, head_scale=None,
):  # fmt: skip
    batch, image, width = qkv.shape
    windows, tokens = (1, image) if index is None else index.shape
    out = torch.empty(batch, image, width // 3, dtype=torch.float32 if out_scale is None else torch.uint8)
    out.view(torch.uint8).fill_(0xAB)
    outs = [None if t is None else torch.as_tensor(t, dtype=torch.float32) for t in (out_scale, out_zero)]
    emulator(
        "attention", qkv, index, bias, mask, in_scale, in_zero, float(scale), *outs, float((1 << out_bits) - 1), out,
        heads, tokens, width // 3 // heads, windows, batch, head_scale,
    )  # fmt: skip
    return out


def check(attention, qkv, heads, options, depth):
    """The float result against the oracle, and the bytes against the float result."""
    found = attention(qkv, heads, **options)
    expected, margin = oracle(qkv, heads, **options)
    clear = (margin > 1e-2).repeat_interleave(depth, dim=-1).view(expected.shape)
    assert clear.any() or qkv.shape[1] > 100
    assert torch.allclose(found.double()[clear], expected[clear], rtol=1e-5, atol=1e-5)
    assert float((found.double() - expected).abs().max()) <= 3 * float(options["in_scale"][2])
    for bits in (8, 4):
        out_scale, zero = torch.tensor(0.037 * 2 ** (8 - bits)), (1 << bits - 1) - 3
        whole = attention(qkv, heads, **options, out_scale=out_scale, out_zero=float(zero), out_bits=bits)
        rounded = ((found / out_scale).round() + zero).clamp(0, 2**bits - 1)
        sure = clear & (((found / out_scale).frac().abs() - 0.5).abs() > 1e-4)  # an exponential may differ between runs
        assert torch.equal(whole.float()[sure], rounded[sure])
        assert float((whole.float() - rounded).abs().max()) <= 1


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_the_cpu(seed, emulator, case, windowed):
    if not windowed and case[3] > 1:
        pytest.skip("one window without an index")
    qkv, heads, options = sample(case, windowed)
    check(lambda *a, **k: emulated(emulator, *a, **k), qkv, heads, options, case[2])


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65])
def test_keys_that_do_not_exist_count_nothing(seed, emulator, tokens):
    """With scales so small that every score is all but 0, every key that there is has the same weight."""
    qkv, heads, options = sample((1, 1, 16, 1, tokens), windowed=False)
    options["in_scale"] = torch.tensor([1e-7, 1e-7, 1.0])
    found = emulated(emulator, qkv, heads, **options)
    v = qkv[0, :, 32:].double() - float(options["in_zero"][2])
    assert torch.allclose(found[0].double(), v.mean(0).expand(tokens, 16), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zeros", [0.0, 255.0])
def test_sums_at_the_ends_of_their_range(emulator, zeros):
    qkv = torch.full((1, 40, 3 * 128), int(255 - zeros), dtype=torch.uint8)
    options = {"in_scale": torch.full((3,), 0.01), "in_zero": torch.full((3,), zeros), "scale": 128**-0.5}
    found = emulated(emulator, qkv, 1, **options)
    assert torch.allclose(found, torch.full_like(found, 0.01 * (255 - 2 * zeros)), rtol=1e-6)


def test_scales_that_no_inverse_serves(seed, emulator):
    qkv, heads, options = sample((1, 1, 32, 1, 21), windowed=False)
    y = emulated(emulator, qkv, heads, **options)
    for out_scale in (1e-7, 1e-12):
        whole = emulated(emulator, qkv, heads, **options, out_scale=out_scale, out_zero=3.0)
        assert torch.equal(whole.float(), ((y / out_scale).round() + 3).clamp(0, 255))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnTheGpu:
    @pytest.mark.parametrize("windowed", [False, True])
    @pytest.mark.parametrize("case", [*CASES, (3, 12, 64, 1, 577)], ids=str)
    def test_matches_the_oracle(self, seed, case, windowed):
        if not windowed and case[3] > 1:
            pytest.skip("one window without an index")

        def attention(*args, **kwargs):
            args, kwargs = ([_on_gpu(v) for v in args], {k: _on_gpu(v) for k, v in kwargs.items()})
            with use_backend("cuda"):
                return quant_attention(*args, **kwargs).cpu()

        qkv, heads, options = sample(case, windowed)
        check(attention, qkv, heads, options, case[2])

    def test_in_a_cuda_graph(self, seed):
        qkv, heads, options = sample((2, 3, 64, 1, 197), windowed=False)
        qkv, options = qkv.cuda(), {k: _on_gpu(v) for k, v in options.items()}
        with use_backend("cuda"):
            expected = quant_attention(qkv, heads, **options)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = quant_attention(qkv, heads, **options)
        graph.replay()
        assert torch.equal(found, expected)

    def test_what_it_leaves_to_others(self, seed):
        qkv, heads, options = sample((1, 2, 5, 1, 7), windowed=False)
        with use_backend("cuda"), pytest.raises(ValueError, match="a head had 5 channels; the CUDA kernel takes"):
            quant_attention(qkv.cuda(), heads, **{k: _on_gpu(v) for k, v in options.items()})


def _on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value
