"""quant_linear's CUDA backend: on a GPU against the reference, and its kernels' own source run on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dfqvit.kernels import pack_weight, quant_linear, use_backend, weight_sums
from dfqvit.kernels.quant_linear import op

from ..conftest import ACTIVATIONS
from .cuda_emulator import TYPES, Emulator, compiled
from .test_quant_linear_cpu import IDENTITY, around_ties, random_call

ROOT = Path(__file__).parents[2]
SHAPES = ["small", "large", "group", "tiles"]  # of csrc/include/dfqvit/quant_linear_tile.h


class Kernels(Emulator):
    """The kernels of csrc/include/dfqvit/quant_linear.cuh, called as csrc/cuda/quant_linear.cpp does."""

    def rows(self, x, scale, zero, least, greatest):
        rows, columns = x.shape
        stride = -(-columns // 16) * 16
        out = torch.full((rows, stride), 0xAB, dtype=torch.uint8)
        step = int(scale.numel() > 1)
        sizes = (rows, columns, scale, step, zero, float(least), float(greatest), out, ctypes.c_int64(stride))
        self("quantize_rows", 2, TYPES[x.dtype], x.contiguous(), *sizes)
        return out

    def linear(
        self, x, weight, bias=None, acm=None, *, x_scale, x_zero, w_scale, a_bits, w_bits, activation=None,
        residual=None, out_scale=None, out_zero=None, out_bits=8, out_dtype=None, w_sums=None, shape="large", blocks=3,
        unpacked=False,
    ):  # fmt: skip
        """quant_linear of x [rows, K] and a float or packed weight; with `unpacked` as for many rows."""
        rows, depth = x.shape
        outputs = weight.shape[0]
        x_scale, x_zero = torch.tensor([float(x_scale)]), torch.tensor([float(x_zero)])
        w_scale = torch.as_tensor(w_scale).expand(outputs).contiguous()
        if x.dtype == torch.uint8:
            a = F.pad(x, (0, -depth % 16)).contiguous()
        else:
            a = self.rows(x, x_scale, x_zero, 0, (1 << a_bits) - 1)
        if weight.dtype == torch.uint8:
            bits = w_bits
            b = F.pad(weight, (0, -weight.shape[1] % (2 * bits)), value=0xAB)  # weights beyond K may be anything
            if unpacked and bits < 8:
                packed, b = (
                    b.contiguous(),
                    torch.full((outputs, b.shape[1] // (2 * bits) * 16), 0xAB, dtype=torch.uint8),
                )
                self("unpack", bits, packed, ctypes.c_int64(packed.shape[1]), ctypes.c_int64(outputs), b)
                bits = 8
        else:
            bits, half = 8, 1 << (w_bits - 1)
            b = self.rows(weight, w_scale, None, -half, half - 1)
        if w_sums is None:
            w_sums = torch.full((outputs,), -12345, dtype=torch.int32)
            self("sums", b, ctypes.c_int64(b.shape[1]), bits, outputs, depth, w_sums)
        bias, acm = (None if t is None else t.float().contiguous() for t in (bias, acm))
        requantized = out_scale is not None
        if requantized:
            out_scale = torch.as_tensor(out_scale).float().expand(outputs).contiguous()
            out_zero = torch.as_tensor(out_zero).float().expand(outputs).contiguous()
        out_dtype = torch.uint8 if requantized else out_dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
        out = torch.empty(rows, outputs, dtype=out_dtype)
        out.view(torch.uint8).fill_(0xAB)
        residual = None if residual is None else residual.contiguous()
        epilogue = (x_scale, x_zero, w_scale, w_sums, bias, acm, 1 if acm is None else len(acm))
        kinds = {None: 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "silu": 4}[activation], residual
        kinds = (*kinds, 0 if residual is None else TYPES[residual.dtype])
        results = (out_scale, out_zero, float((1 << out_bits) - 1), out, TYPES[out_dtype], int(outputs % 4 == 0))
        sizes = (a, a.shape[1], b, b.shape[1], rows, outputs, depth)
        self("product", SHAPES.index(shape), blocks, bits, *sizes, *epilogue, *kinds, *results)
        return out


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Kernels(compiled("quant_linear", tmp_path_factory.mktemp("cuda")))


def emulated(emulator, *args, shape="large", blocks=3, **kwargs):
    """The results of the CUDA kernels on the CPU, and of the reference."""
    with use_backend("reference"):
        expected = quant_linear(*args, **kwargs)
    return emulator.linear(*args, **kwargs, shape=shape, blocks=blocks), expected


def random_packed_call(rng, rows, outputs, depth):
    """`random_call` without the blocked weights, which are for CPUs."""
    (x, weight, bias, acm), p = random_call(rng, rows, outputs, depth)
    if weight.dtype == torch.int32:
        weight = pack_weight(torch.randn(outputs, depth), p["w_scale"], p["w_bits"])
    if weight.dtype == torch.uint8 and rng.random() < 0.5:
        p["w_sums"] = weight_sums(weight, depth, p["w_bits"])
    return (x, weight, bias, acm), p


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [(140, 140, 70), (9, 9, 600), (20, 300, 40), (300, 20, 40)])
def test_kernels_on_the_cpu_give_the_bits_of_the_reference(seed, emulator, most, shape):
    rng = random.Random(seed)
    for _ in range(6):
        rows, outputs, depth = (rng.randint(1, n) for n in most)
        arguments, p = random_packed_call(rng, rows, outputs, depth)
        found, expected = emulated(emulator, *arguments, shape=shape, blocks=rng.randint(1, 4), **p)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), (rows, outputs, depth, arguments[0].dtype, arguments[1].dtype, p)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("w_bits", range(2, 9))
def test_depths_on_the_cpu(seed, emulator, w_bits, shape):
    """Fewer steps than stages, as many, more; odd groups of weights; no part of K that an instruction divides."""
    for depth in (1, 8, 16, 24, 63, 64, 65, 128, 129, 256, 300, 513):
        x = torch.randint(0, 256, (17, depth), dtype=torch.uint8)
        weight = pack_weight(torch.randn(12, depth) * (1 << w_bits) / 3, 1.0, w_bits)
        p = {**IDENTITY, "w_bits": w_bits, "x_zero": 255, "w_scale": torch.rand(12) + 0.1}
        found, expected = emulated(emulator, x, weight, shape=shape, **p)
        assert torch.equal(found, expected), depth


@pytest.mark.parametrize("shape", ["large", "group", "tiles"])
def test_many_tiles_of_many_steps_on_the_cpu(seed, emulator, shape):
    """Every stage is used again and again, within a tile and by the next; more steps than stages, as many, fewer."""
    for depth in (640, 384, 144):
        x = torch.randint(0, 256, (260, depth), dtype=torch.uint8)
        weight = pack_weight(torch.randn(130, depth) * 50, 1.0, 8)
        p = {**IDENTITY, "x_zero": 128, "w_scale": torch.rand(130) + 0.1}
        found, expected = emulated(emulator, x, weight, shape=shape, blocks=2, **p)
        assert torch.equal(found, expected), depth


@pytest.mark.parametrize("w_bits", range(2, 8))
def test_weights_unpacked_once_on_the_cpu(seed, emulator, w_bits):
    """As for many rows: the product then reads bytes."""
    for outputs, depth in ((1, 1), (40, 300), (9, 64)):
        x = torch.randint(0, 256, (17, depth), dtype=torch.uint8)
        weight = pack_weight(torch.randn(outputs, depth) * (1 << w_bits) / 3, 1.0, w_bits)
        p = {**IDENTITY, "w_bits": w_bits, "x_zero": 255, "w_scale": torch.rand(outputs) + 0.1}
        with use_backend("reference"):
            expected = quant_linear(x, weight, **p)
        assert torch.equal(emulator.linear(x, weight, shape="group", unpacked=True, **p), expected)


@pytest.mark.parametrize("w_bits", range(2, 9))
def test_every_weight_is_unpacked_in_its_place(emulator, w_bits):
    """Each value at each place, read through a unit matrix of activations."""
    half = 1 << (w_bits - 1)
    q = torch.arange(-half, half).repeat(48)[: 48 * (2 * half - 1)].view(-1, 48).float()
    x = torch.eye(48, dtype=torch.uint8)
    p = {**IDENTITY, "w_bits": w_bits, "w_scale": torch.ones(len(q))}
    assert torch.equal(emulator.linear(x, pack_weight(q, 1.0, w_bits), shape="small", **p), q.t())


@pytest.mark.parametrize("w_bits", [2, 7, 8])
def test_largest_integers_on_the_cpu(emulator, w_bits):
    depth, half = 520, 1 << (w_bits - 1)
    x, weight = torch.full((3, depth), 255, dtype=torch.uint8), torch.full((2, depth), float(half - 1))
    weight[1] = -half
    p = {**IDENTITY, "w_bits": w_bits, "w_scale": torch.ones(2)}
    for x_zero in (0, 255):
        found, expected = emulated(emulator, x, pack_weight(weight, 1.0, w_bits), **{**p, "x_zero": x_zero})
        assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 49, 148])
def test_rows_find_their_tokens(seed, emulator, tokens):
    x, rows = torch.zeros(148 // tokens * tokens, 1, dtype=torch.uint8), 148 // tokens * tokens
    acm = torch.randn(tokens, 8)
    for shape in SHAPES:
        found = emulator.linear(x, torch.ones(8, 1), None, acm, shape=shape, **{**IDENTITY, "w_scale": torch.ones(8)})
        assert torch.equal(found, acm.repeat(rows // tokens, 1))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.1, 7.0, 1e20])
def test_quotients_near_ties_on_the_cpu(seed, emulator, size):
    scale = float((torch.rand(()) + 0.5) * size)
    values = torch.cat([around_ties(scale), torch.tensor([3e38, -3e38, 1e-45, -0.0]).repeat(5)]).view(-1, 20)
    p = {**IDENTITY, "w_scale": torch.ones(20)}
    found, expected = emulated(emulator, values, torch.eye(20), **{**p, "x_scale": scale, "x_zero": 100})
    assert torch.equal(found, expected)
    zeros = torch.zeros_like(values, dtype=torch.uint8)
    found, expected = emulated(emulator, zeros, torch.eye(20), None, values, **p, out_scale=scale, out_zero=100)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_the_cpu(seed, emulator, activation):
    y = torch.cat([torch.linspace(-12, 12, 3001), torch.randn(500) * 3, torch.tensor([-1e30, 1e30, -0.0])]).view(-1, 8)
    arguments = (torch.zeros(len(y), 1, dtype=torch.uint8), torch.ones(8, 1), None, y)
    found = emulator.linear(*arguments, activation=activation, **IDENTITY).double()
    expected = ACTIVATIONS[activation](y.double())
    assert float(((found - expected).abs() / (1 + expected.abs())).max()) < 2e-6


@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.03, 7.0, 1e20])
@pytest.mark.parametrize("zero", [0, 100, 255])
def test_bytes_near_ties_on_the_cpu(seed, emulator, size, zero):
    """The loop for bytes, whose inverse stands for a division: values within a few units of the last place of each tie."""
    scale = float((torch.rand(()) + 0.5) * size)
    values = torch.cat([around_ties(scale), torch.tensor([3e38, -3e38, 1e-45, -0.0])])
    values = F.pad(values, (0, -len(values) % 4))
    x = torch.zeros(1, 4, dtype=torch.uint8)
    p = {**IDENTITY, "w_scale": torch.ones(len(values))}
    for shape in ("small", "group"):
        weight, requantized = torch.zeros(len(values), 4), {"out_scale": scale, "out_zero": zero}
        found, expected = emulated(emulator, x, weight, values, shape=shape, **p, **requantized)
        assert torch.equal(found, expected), (scale, zero)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-9, 0.004, 0.031, 3.0])
def test_activations_to_bytes_on_the_cpu(seed, emulator, activation, scale):
    """One apart at most, and only where y / scale lies within 6e-6 (1 + |y|) of a tie, as the operator's docstring has it."""
    values = torch.cat([torch.linspace(-12, 12, 801), torch.randn(399) * 3, torch.tensor([-1e30, 1e30, -0.0, 0.0])])
    values = F.pad(values, (0, -len(values) % 4))
    x, p = torch.zeros(1, 4, dtype=torch.uint8), {**IDENTITY, "w_scale": torch.ones(len(values))}
    arguments = (x, torch.zeros(len(values), 4), values)
    found = emulator.linear(*arguments, activation=activation, **p, out_scale=scale, out_zero=17, shape="small")[
        0
    ].double()
    y = ACTIVATIONS[activation](values.double())
    off = 6e-6 * (1 + y.abs()) / scale
    least, greatest = (((y / scale + side * off).round() + 17).clamp(0, 255) for side in (-1, 1))
    assert bool(((least <= found) & (found <= greatest)).all())
    assert len(found.unique()) > 5 or scale == 1e-9


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("acm", [True, False])
def test_floats_on_the_cpu(seed, emulator, residual, acm):
    """The loop for float32, with every set of addends; the same where columns are no multiple of 4, by the general one."""
    for rows, outputs in ((30, 36), (30, 35)):
        x = torch.randint(0, 256, (rows, 40), dtype=torch.uint8)
        weight, p = (
            pack_weight(torch.randn(outputs, 40), 0.1, 4),
            {**IDENTITY, "w_bits": 4, "w_scale": torch.rand(outputs)},
        )
        addends = {
            "acm": torch.randn(10, outputs) if acm else None,
            "residual": torch.randn(rows, outputs) if residual else None,
        }
        for shape in SHAPES:
            found, expected = emulated(emulator, x, weight, torch.randn(outputs), shape=shape, **p, **addends)
            assert torch.equal(found, expected)


def test_shared_memory_is_read_and_written_without_bank_conflicts(emulator):
    for shape in range(len(SHAPES)):
        assert emulator("conflicts", shape) == 1


def swizzled(rows, start):
    """[n, 32] bytes where wgmma reads them, byte `start` on of n rows: Swizzle<3, 4, 3> of the PTX ISA's K-major layouts."""
    place = torch.arange(len(rows))[:, None] * 128 + start + torch.arange(32)
    array = torch.randint(0, 256, (128 * len(rows),), dtype=torch.uint8)
    array[place ^ (place >> 7 & 7) << 4] = rows.view(torch.uint8)
    return array


@pytest.mark.parametrize("start", [0, 32, 64, 96])
def test_one_wgmma_on_the_cpu(seed, emulator, start):
    """The emulated instruction itself: its result, and rubbish wherever the manual promises nothing."""
    a = torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    b = torch.randint(-128, 128, (128, 32), dtype=torch.int8)
    arrays = torch.cat([swizzled(a, start), swizzled(b, start)])
    row, column = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    register = column // 8 * 4 + row % 16 // 8 * 2 + column % 2
    expected = 1 + a.int() @ b.int().t()
    for shown, fenced, early in [(1, 1, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)]:
        sums = torch.zeros(128, 64, dtype=torch.int32)
        emulator("one_product", arrays, start, shown, fenced, early, sums)
        right = sums[thread, register] == expected
        assert right.all() if (shown, fenced, early) == (1, 1, 0) else right.float().mean() < 0.01


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
        "out_dtype": "float32",
    }
    return list((named | change).values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"weight": torch.empty(1, 144, dtype=torch.int32, device="meta")}, "weight was blocked for CPUs"),
        ({"x": torch.empty(1 << 31, 8, device="meta")}, "the CUDA kernel counts rows and columns up to 2147483392"),
        ({"x": torch.empty(4, 8, dtype=torch.float64, device="meta")}, "float64 runs on the reference"),
        ({"out_dtype": "float64"}, "float64 runs on the reference"),
        ({"x": torch.empty(1, 65794, device="meta")}, "sums of 65794 products of 8 and 8 bits do not fit in int32"),
    ],
)
def test_what_the_kernel_declines(change, reason):
    able, found = op._supports_cuda(*arguments_on_meta(**change))
    assert able == (reason == "")
    assert reason in found


def tools():
    """nvcc and cuobjdump (the toolkit's, or the one that Triton brings along), or None."""
    nvcc = shutil.which("nvcc")
    if nvcc:  # on the PATH it may be a wrapper, so it is asked for its place
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
        nvcc = str(Path(top.group(1)).resolve() / "bin/nvcc") if top else nvcc
    triton = importlib.util.find_spec("triton")
    bundled = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    found = [path / "cuobjdump" for path in ([Path(nvcc).parent] if nvcc else []) + bundled]
    return nvcc, next((str(path) for path in found if path.exists()), None)


def test_sm_90a_multiplies_by_wgmma(tmp_path):
    """Compiled, not run: integer warpgroup instructions, one after the other, no spills, two blocks a multiprocessor."""
    nvcc, cuobjdump = tools()
    if nvcc is None or cuobjdump is None:
        pytest.skip("no nvcc, or no cuobjdump")
    kernels = "".join(
        f"template __global__ void multiply_kernel<Group, {bits}>(const Operands, const Epilogue, int64_t);"
        for bits in (3, 4, 8)
    )
    maps = 2 * "const __grid_constant__ TensorMap, "
    tiles = f"multiply_tiles_kernel<GroupOfTiles>({maps}const Operands, const Epilogue, int64_t);"
    kernels += f"template __global__ void {tiles}"
    source, code = tmp_path / "group.cu", tmp_path / "group.cubin"
    opened = "namespace dfqvit::quant::tile {"
    included = '#include "dfqvit/quant_linear.cuh"\n#include "dfqvit/quant_linear_tiles.cuh"\n'
    source.write_text(f"{included}{opened} {kernels} }}\n")
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    command = [nvcc, *flags, f"-I{ROOT / 'csrc/include'}", "-o", code, source]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "serialized" not in report  # what ptxas says where it had to wait for each product by itself
    kernels = re.findall(
        r"multiply_(?:tiles_)?kernel.*?spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", report, re.S
    )
    assert len(kernels) == 4
    assert all(int(spills) == 0 and int(registers) <= 128 for spills, registers in kernels)
    sass = subprocess.run([cuobjdump, "-sass", code], check=True, capture_output=True, text=True).stdout
    products = re.findall(r"IGMMA\.64x128x32\.U8\.S8 R\d+, gdesc", sass)
    assert len(products) == 4 * 4  # a step of 128 in four, both operands in shared memory
    assert "IMMA.16832" not in sass
    assert "UTMALDG.2D" in sass


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

    @pytest.fixture(autouse=True, params=["0", "1", "tiles"], ids=["mma.sync", "wgmma", "wgmma of tiles"])
    def product(self, request, monkeypatch):
        if request.param != "0":
            archs = importlib.import_module("dfqvit._C").build_info()["cuda_archs"]
            if torch.cuda.get_device_capability() != (9, 0) or "9.0a" not in archs:
                pytest.skip("wgmma needs compute capability 9.0 and a build for 9.0a")
        monkeypatch.setenv("DFQVIT_WGMMA", request.param)

    @pytest.mark.parametrize(
        "most", [(1, 1, 5000), (9, 9, 5000), (70, 90, 300), (300, 140, 70), (20, 3000, 20), (5000, 900, 90)]
    )
    def test_same_bits_as_the_reference(self, seed, most):
        rng = random.Random(seed)
        for _ in range(20):
            rows, outputs, depth = (rng.randint(1, n) for n in most)
            arguments, p = random_packed_call(rng, rows, outputs, depth)
            found, expected = both(*arguments, **p)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), (rows, outputs, depth, arguments[0].dtype, arguments[1].dtype, p)

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

    @pytest.mark.parametrize("activation", ACTIVATIONS)
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
