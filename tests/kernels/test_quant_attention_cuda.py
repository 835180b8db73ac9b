"""quant_attention by CUDA: the kernel's own source run on the CPU, and on a GPU, against the other backends' oracle."""

from __future__ import annotations

import ctypes

import pytest
import torch

from dfqvit.kernels import quant_attention, use_backend
from dfqvit.kernels.quant_attention import op

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
    (1, 1, 64, 1, 209),
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


@pytest.mark.parametrize("zeros", [0, 255, 128])
@pytest.mark.parametrize("depth", [64, 128])
def test_scores_of_extreme_bytes(seed, emulator, depth, zeros):
    """Sums as far from each other as bytes allow: with 64 channels they are bits of floats, and must not leave their range."""
    qkv, heads, options = sample((1, 1, depth, 1, 70), windowed=False)
    qkv = qkv.clone()
    qkv[..., : 2 * depth] = 255 * (torch.rand(1, 70, 2 * depth) < torch.rand(1, 70, 1)).to(torch.uint8)
    qkv[:, :3, : 2 * depth], qkv[:, 3:6, : 2 * depth] = 255, 0
    options["in_zero"] = torch.tensor([float(zeros), 255.0 - zeros, float(zeros)])
    options["in_scale"] = torch.tensor([0.001, 0.001, 0.02])
    found = emulated(emulator, qkv, heads, **options)
    expected, margin = oracle(qkv, heads, **options)
    clear = (margin > 1e-2).repeat_interleave(depth, dim=-1).view(expected.shape)
    assert clear.any()
    assert torch.allclose(found.double()[clear], expected[clear], rtol=1e-5, atol=1e-5)


def test_bytes_are_the_floats_rounded_half_to_even(seed, emulator):
    """With every step 255 nothing is approximate: each byte is that of the formula, also in the middle of two integers."""
    qkv, heads, options = sample((1, 1, 64, 1, 37), windowed=False)
    options["in_scale"] = torch.tensor([1e-7, 1e-7, 0.03])
    y = emulated(emulator, qkv, heads, **options)
    ties = (y.flatten()[:8] / (torch.arange(8) + 0.5)).abs()  # of which one result is a tie, or next to one
    scales = [*(0.001 * 300 ** torch.rand(8)), *ties[ties > 0]]
    for out_scale, bits in zip(scales, [8, 8, 8, 4, 2] * 4, strict=False):
        zero, most = float(torch.randint(0, 2**bits, ())), 2**bits - 1
        whole = emulated(emulator, qkv, heads, **options, out_scale=out_scale, out_zero=zero, out_bits=bits)
        assert torch.equal(whole.float(), ((y / out_scale).round() + zero).clamp(0, most)), (out_scale, zero, bits)


def layout(emulator, tokens, depth, kilobytes):
    """Warps of a block, blocks of a multiprocessor, bytes of a block."""
    found = [ctypes.c_int() for _ in range(3)]
    emulator("layout", tokens, depth, kilobytes << 10, *map(ctypes.byref, found))
    return tuple(value.value for value in found)


def test_warps_and_blocks_fill_a_multiprocessor(emulator):
    """Hopper has 228 KB for a multiprocessor, Ampere's smaller cards and Ada 100; registers are for 16 warps."""
    assert layout(emulator, 197, 64, 228)[:2] == (3, 5)
    assert layout(emulator, 49, 64, 228)[:2] == (4, 4)
    assert layout(emulator, 1, 64, 228)[:2] == (1, 16)
    assert layout(emulator, 577, 64, 228)[:2] == (7, 2)
    for tokens in range(1, 600, 7):
        for kilobytes in (100, 164, 228):
            warps, blocks, _ = layout(emulator, tokens, 64, kilobytes)
            assert 1 <= warps <= 7
            assert warps * blocks <= 16


@pytest.mark.parametrize("kilobytes", [100, 164, 228])
def test_what_is_served_fits_in_shared_memory(emulator, monkeypatch, kilobytes):
    """A multiprocessor keeps 1 KB of a block's shared memory for itself."""
    most = (kilobytes - 1) << 10
    monkeypatch.setattr(op, "_shared_memory", lambda device: most)
    for depth in range(16, 129, 16):
        served = []
        for tokens in range(1, 3700, 17):
            qkv = torch.empty(1, tokens, 3 * depth, dtype=torch.uint8, device="meta")
            able, _ = op._supports_cuda(qkv, 1, torch.ones(3), torch.zeros(3), 1.0, None, None, None)
            served.append(able)
            assert able == (layout(emulator, tokens, depth, kilobytes)[2] <= most), (depth, tokens)
        assert served[0]
        assert not served[-1]


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
