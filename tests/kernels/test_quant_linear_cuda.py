"""quant_linear's CUDA backend: on a GPU against the reference; without one, its index arithmetic on the CPU."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfqvit.kernels import pack_weight, quant_linear, unpack_weight, use_backend
from dfqvit.kernels.pack_weight import pack_integers
from dfqvit.kernels.quant_linear import op

from .test_quant_linear_cpu import IDENTITY, around_ties, random_call

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def tile(tmp_path_factory):
    """The kernel's arithmetic, compiled for the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("tile") / "quant_linear_tile.so"
    source = Path(__file__).with_name("quant_linear_tile.cpp")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc/include'}", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def emulate(tile, a, q, bits, large):
    """The product of a [rows, K] uint8 and q [outputs, K] int8 in tiles, and how often each sum was written."""
    (rows, depth), outputs = a.shape, q.shape[0]
    padded = F.pad(a, (0, -depth % 16))
    packed = pack_integers(q, bits)
    packed = F.pad(packed, (0, -packed.shape[1] % (2 * bits)), value=0xAB)  # weights beyond K may be anything
    out, written = torch.full((rows, outputs), -12345, dtype=torch.int32), torch.zeros(rows, outputs, dtype=torch.int32)
    sizes = [ctypes.c_int(v) for v in (rows, outputs, depth, bits, large)]
    strides = [ctypes.c_int64(t.shape[1]) for t in (padded, packed)]
    tile.tile_product(pointer(padded), strides[0], pointer(packed), strides[1], *sizes, pointer(out), pointer(written))
    return out, written


def integers(rows, outputs, depth, bits):
    half = 1 << (bits - 1)
    a = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
    return a, torch.randint(-half, half, (outputs, depth), dtype=torch.int8)


@pytest.mark.parametrize("large", [0, 1], ids=["small", "large"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_tiles_give_the_integer_product(seed, tile, bits, large):
    rng = random.Random(seed)
    side = 128 if large else 64
    depths = (1, 15, 16, 24, 63, 64, 65, 200)
    for depth in (*depths, rng.randint(1, 300)):
        rows, outputs = rng.randint(1, side + 9), rng.randint(1, side + 9)
        a, q = integers(rows, outputs, depth, bits)
        out, written = emulate(tile, a, q, bits, large)
        expected = a.numpy().astype(np.int64) @ q.numpy().astype(np.int64).T
        assert np.array_equal(out.numpy(), expected), (rows, outputs, depth)
        assert bool((written == 1).all()), "a sum was written twice, or never"


@pytest.mark.parametrize("large", [0, 1], ids=["small", "large"])
def test_extreme_integers(tile, large):
    for bits in range(2, 9):
        for value in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
            a, q = torch.full((5, 100), 255, dtype=torch.uint8), torch.full((3, 100), value, dtype=torch.int8)
            assert bool((emulate(tile, a, q, bits, large)[0] == 255 * 100 * value).all())


def test_every_field_is_unpacked_in_its_place(tile):
    """One weight of each value at each place, read through a unit matrix of activations."""
    a = torch.eye(48, dtype=torch.uint8)
    for bits in range(2, 9):
        half = 1 << (bits - 1)
        q = torch.arange(-half, half, dtype=torch.int8).repeat(3 * 48 * 2)[: 48 * (2 * half + 1)].view(-1, 48)
        out, _ = emulate(tile, a, q, bits, 0)
        assert torch.equal(out, q.t().to(torch.int32))


def test_rows_of_shared_memory_lie_in_different_banks(tile):
    assert tile.tile_bank_conflicts() == 1
    assert tile.tile_panel_conflicts() == 1


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 49, 197])
def test_rows_find_their_tokens(tile, tokens):
    out = torch.empty(100, dtype=torch.int32)
    for row in range(2 * tokens + 1):
        tile.tile_tokens(row, tokens, 100, pointer(out))
        assert torch.equal(out, (row + 4 * torch.arange(100, dtype=torch.int32)) % tokens)


@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_of_weights(seed, tile, bits):
    for depth in (1, 8, 13, 77):
        packed = pack_weight(torch.randn(5, depth) * (1 << bits), 1.0, bits)
        out = torch.empty(5, dtype=torch.int32)
        sizes = [ctypes.c_int(v) for v in (5, depth, bits)]
        tile.tile_column_sums(pointer(packed), ctypes.c_int64(packed.shape[1]), *sizes, pointer(out))
        assert torch.equal(out, unpack_weight(packed, bits, depth).sum(1, dtype=torch.int32))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.1, 7.0, 1e20])
def test_quantization_rounds_as_the_reference(seed, tile, size):
    scale = float(((torch.rand(()) + 0.5) * size).float())
    x = torch.cat([around_ties(scale), torch.randn(1000) * 90 * scale, torch.tensor([3e38, -3e38, 1e-45, -0.0])])
    out = torch.empty_like(x)
    values = [ctypes.c_float(v) for v in (scale, 100.0, 0.0, 255.0)]
    tile.tile_quantize(pointer(x), ctypes.c_int64(len(x)), *values, pointer(out))
    assert torch.equal(out, ((x / scale).round() + 100).clamp(0, 255))


def test_dequantization_as_the_reference(seed, tile):
    total = torch.randint(-(2**30), 2**30, (4096,), dtype=torch.int32)
    out, offset, scale = torch.empty(4096), random.Random(seed).randint(-(2**30), 2**30), torch.rand(()) * 1e-3
    tile.tile_dequantize(
        pointer(total), ctypes.c_int64(4096), ctypes.c_int32(offset), ctypes.c_float(float(scale)), pointer(out)
    )
    assert torch.equal(out, scale * (total.double() - offset).float())


@pytest.mark.parametrize(("index", "approximate"), [(1, "none"), (2, "tanh")])
def test_activations_of_the_epilogue(seed, tile, index, approximate):
    y = torch.cat([torch.linspace(-12, 12, 20001), torch.randn(5000) * 3, torch.tensor([-1e30, 1e30, -0.0])])
    out = torch.empty_like(y)
    tile.tile_activate(pointer(y), ctypes.c_int64(len(y)), index, pointer(out))
    expected = F.gelu(y.double(), approximate=approximate)
    assert float(((out.double() - expected).abs() / (1 + expected.abs())).max()) < 2e-6


def arguments_on_meta(**change):
    """The operator's arguments as `supports` sees them."""
    named = {
        "x": torch.empty(4, 8, device="meta"),
        "weight": torch.empty(5, 8, device="meta"),
        "bias": None,
        "acm": None,
        "x_scale": torch.ones(()),
        "x_zero": torch.zeros(()),
        "w_scale": torch.ones(5),
        "a_bits": 8,
        "w_bits": 8,
        "activation": "none",
        "residual": None,
        "out_scale": None,
        "out_zero": None,
        "out_bits": 8,
        "out_dtype": torch.float32,
    }
    return list((named | change).values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"weight": torch.empty(1, 144, dtype=torch.int32, device="meta")}, "weight was blocked for CPUs"),
        ({"x": torch.empty(1 << 31, 8, device="meta")}, "the CUDA kernel counts rows and columns up to 2147483392"),
        ({"x": torch.empty(4, 8, dtype=torch.float64, device="meta")}, "float64 runs on the reference"),
        ({"out_dtype": torch.float64}, "float64 runs on the reference"),
        ({"x": torch.empty(1, 65794, device="meta")}, "sums of 65794 products of 8 and 8 bits do not fit in int32"),
    ],
)
def test_what_the_kernel_declines(change, reason):
    able, found = op._supports_cuda(*arguments_on_meta(**change))
    assert able == (reason == "")
    assert reason in found


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def to_cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def both(*args, **kwargs):
    """The results of backends cuda, over poisoned memory, and reference, on the GPU."""
    args, kwargs = [to_cuda(a) for a in args], {name: to_cuda(v) for name, v in kwargs.items()}
    with use_backend("reference"):
        expected = quant_linear(*args, **kwargs)
    for _ in range(2):  # memory freed here is likely to be the result's
        torch.empty_like(expected).view(torch.uint8).fill_(0xAB)
    with use_backend("cuda"):
        return quant_linear(*args, **kwargs), expected


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(
        "most", [(1, 1, 5000), (9, 9, 5000), (70, 90, 300), (300, 140, 70), (20, 3000, 20), (5000, 900, 90)]
    )
    def test_same_bits_as_the_reference(self, seed, most):
        rng = random.Random(seed)
        for _ in range(20):
            rows, outputs, depth = (rng.randint(1, n) for n in most)
            (x, weight, bias, acm), p = random_call(rng, rows, outputs, depth)
            if weight.dtype == torch.int32:
                weight = pack_weight(torch.randn(outputs, depth), p["w_scale"], p["w_bits"])
            found, expected = both(x, weight, bias, acm, **p)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), (rows, outputs, depth, x.dtype, weight.dtype, p)

    @pytest.mark.parametrize("w_bits", range(2, 9))
    @pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 129, 6000])
    def test_edges_of_the_tiles(self, seed, rows, w_bits):
        for outputs, depth in ((1, 1), (63, 63), (64, 64), (65, 72), (129, 200), (384, 48)):
            x = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
            weight = pack_weight(torch.randn(outputs, depth) * (1 << w_bits) / 3, 1.0, w_bits)
            p = {**IDENTITY, "w_bits": w_bits, "x_zero": 255, "w_scale": torch.rand(outputs) + 0.1}
            found, expected = both(x, weight, **p)
            assert torch.equal(found, expected), (outputs, depth)

    def test_strided_and_unaligned_arguments(self, seed):
        x = torch.randint(0, 256, (33 * 32 + 1,), dtype=torch.uint8).cuda()[1:].view(33, 32)
        weight = pack_weight(torch.randn(19, 32) * 50, 1.0, 8).flatten()
        weight = torch.cat([weight[:1], weight]).cuda()[1:].view(19, 32)
        residual = torch.randn(18, 33).cuda().t()
        p = {**IDENTITY, "x_zero": 7, "w_scale": torch.rand(38)[::2] + 0.1}
        found, expected = both(x, weight, torch.randn(38)[::2], torch.randn(19, 11).t(), **p)
        assert torch.equal(found, expected)
        found, expected = both(x, weight[:18], residual=residual, **(p | {"w_scale": torch.ones(18)}))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("x_zero", [0, 255])
    def test_sums_up_to_the_limit_of_int32(self, x_zero):
        x = torch.full((2, 65793), 0 if x_zero else 255, dtype=torch.uint8)
        weight = torch.full((2, 65793), -128.0)
        found, expected = both(x, weight, **{**IDENTITY, "w_scale": torch.ones(2), "x_zero": x_zero})
        assert torch.equal(found, expected)
        assert abs(float(found[0, 0])) > 0.99 * 2**31

    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
    def test_activations(self, seed, activation):
        y = torch.cat([torch.linspace(-12, 12, 20001), torch.randn(5000) * 3]).view(-1, 1)
        arguments = (torch.zeros(len(y), 1), torch.ones(1, 1), None, y)
        found, expected = both(*arguments, activation=activation, **IDENTITY)
        assert torch.allclose(found, expected, rtol=2e-6, atol=2e-6)
        found, expected = both(*arguments, activation=activation, **IDENTITY, out_scale=0.04, out_zero=10)
        assert int((found.int() - expected.int()).abs().max()) <= 1

    @pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (3, 0), (7,)])
    def test_empty_and_single_shapes(self, shape):
        p = IDENTITY | {"w_scale": torch.ones(3)}
        found, expected = both(torch.ones(shape), torch.ones(3, shape[-1]), torch.ones(3), **p)
        assert found.shape == (*shape[:-1], 3)
        assert torch.equal(found, expected)

    def test_in_a_cuda_graph(self, seed):
        x, weight = torch.randn(70, 40).cuda(), pack_weight(torch.randn(30, 40), 0.1, 4).cuda()
        p = {k: to_cuda(torch.as_tensor(v)) for k, v in {"x_scale": 0.03, "x_zero": 128.0, "w_scale": 0.1}.items()}
        with use_backend("cuda"):
            quant_linear(x, weight, a_bits=8, w_bits=4, **p)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = quant_linear(x, weight, a_bits=8, w_bits=4, **p)
        x.copy_(torch.randn(70, 40))
        graph.replay()
        with use_backend("reference"):
            assert torch.equal(found, quant_linear(x, weight, a_bits=8, w_bits=4, **p))
