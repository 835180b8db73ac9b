"""quant_linear in Triton: on a GPU where there is one, in the interpreter, and compiled for GPUs that are not here.

The integers must be the reference's bit for bit. An activation's last bits may differ, and then one step of a requantized result.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from dfqvit.kernels import pack_weight, quant_linear, use_backend
from dfqvit.kernels.quant_linear.op import forward

from ..conftest import ACTIVATIONS, mirrored
from .interpreter import INTERPRETED, compile_for, compiles_for_gpus, few_on_gpu, kernels_of, live_triton, resources

DEVICE = "cpu" if INTERPRETED else "cuda"


def pick(*choices):
    return choices[int(torch.randint(len(choices), ()))]


def draw(rows, outputs, depth, a_bits, w_bits, x_dtype):
    """A call's arguments with every addend, on DEVICE."""
    greatest = (1 << a_bits) - 1
    x = torch.randn(2, rows, depth) * 2
    x = torch.randint(0, greatest + 1, x.shape, dtype=torch.uint8) if x_dtype == torch.uint8 else x.to(x_dtype)
    w_scale = mirrored(torch.rand(outputs) * 0.1 + 0.01)
    tensors = {
        "x": x,
        "weight": pack_weight(torch.randn(outputs, depth), w_scale, w_bits),
        "bias": torch.randn(outputs).to(pick(torch.float32, torch.bfloat16)),
        "acm": torch.randn(rows, outputs).half(),
        "residual": torch.randn(2, rows, outputs).to(pick(torch.float32, torch.bfloat16)),
        "x_scale": torch.tensor(4.0 / greatest),
        "x_zero": torch.tensor(float(pick(0, greatest, greatest // 2))),
        "w_scale": w_scale,
    }
    return {name: t.to(DEVICE) for name, t in tensors.items()} | {"a_bits": a_bits, "w_bits": w_bits}


def both(**arguments):
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend, "quant_linear"):
            results.append(quant_linear(**arguments))
    assert results[0].dtype == results[1].dtype
    return results


@live_triton
@pytest.mark.parametrize(
    ("x_dtype", "w_bits"),
    few_on_gpu([*product([torch.float32, torch.uint8], range(2, 9)), (torch.bfloat16, 4), (torch.float16, 8)], 3),
    ids=str,
)
def test_triton_equals_the_reference_bit_for_bit(seed, x_dtype, w_bits):
    rows, outputs, depth = (int(torch.randint(1, 100, ())) for _ in range(3))  # tiles have 16 to 64 rows here
    if not INTERPRETED:  # a constant of the kernel, as which addends there are: each would be compiled for
        depth = 129 if w_bits % 2 else 40
    arguments = draw(rows, outputs, depth, pick(2, 5, 8), w_bits, x_dtype)
    for name in ("bias", "acm", "residual"):
        if pick(True, False) if INTERPRETED else w_bits > 5:
            arguments.pop(name)
    if pick(True, False) if INTERPRETED else w_bits % 2:
        steps = torch.rand(outputs, device=DEVICE) * 0.1 + 0.02
        arguments |= {"out_scale": steps, "out_zero": pick(0, 3, 7), "out_bits": pick(3, 8)}
    found, expected = both(**arguments)
    if INTERPRETED and found.dtype == torch.bfloat16:  # which the interpreter truncates to, where GPUs round
        arguments["out_dtype"] = torch.float32
        found, expected = both(**arguments)
    assert torch.equal(found, expected)


@live_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_activations(seed, activation):
    arguments = draw(37, 45, 70, 8, 4, torch.float32)
    found, expected = both(activation=activation, **arguments)
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6)
    addend, y = arguments["residual"], both(**arguments | {"residual": None, "out_dtype": torch.float32})[1]
    exact = ACTIVATIONS[activation](y.double()) + addend
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=2e-6)
    found, expected = both(activation=activation, out_scale=0.05, out_zero=9, **arguments)
    assert (found.int() - expected.int()).abs().max() <= 1


@live_triton
def test_triton_takes_float_weights_and_strided_input(seed):
    arguments = draw(20, 33, 40, 8, 3, torch.float32)
    arguments["weight"] = torch.randn(40, 33, device=DEVICE).t()
    arguments["x"] = torch.randn(20, 2, 40, device=DEVICE).transpose(0, 1)
    found, expected = both(**arguments)
    assert torch.equal(found, expected)


@live_triton
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 4, 6), (3, 5, 0)])
def test_triton_edges(seed, shape):
    rows, outputs, depth = shape
    arguments = draw(max(rows, 1), outputs, depth, 8, 4, torch.float32)
    if rows == 0:
        arguments = {k: v for k, v in arguments.items() if k not in ("acm", "residual")} | {"x": arguments["x"][:, :0]}
    found, expected = both(**arguments)
    assert torch.equal(found, expected)


@live_triton
def test_triton_sums_reach_the_ends_of_int32(seed, monkeypatch):
    """255 * -128 * 65,000 is just within; nothing may saturate or round on the way. Interpreted in few steps, which take long."""
    depth = 65_000
    if INTERPRETED:
        module = importlib.import_module("dfqvit.kernels.quant_linear.triton")
        deep = replace(module.tile_of(1), depth=4096)
        monkeypatch.setattr(module, "tile_of", lambda rows: deep)
    x = torch.full((1, depth), 255, dtype=torch.uint8, device=DEVICE)
    weight = pack_weight(torch.full((1, depth), -128.0), torch.ones(1), 8).to(DEVICE)
    for zero in (0.0, 255.0):
        found, expected = both(x=x, weight=weight, x_scale=1.0, x_zero=zero, w_scale=1.0, a_bits=8, w_bits=8)
        assert torch.equal(found, expected)
        assert found.item() == (255 - zero) * -128 * depth


@live_triton
def test_triton_declines_what_it_cannot_do():
    arguments = draw(4, 5, 8, 8, 4, torch.float32)
    with use_backend("triton", "quant_linear"), pytest.raises(ValueError, match="float64 runs on the reference"):
        quant_linear(**{**arguments, "x": arguments["x"].double()})
    able, reason = forward.backends["triton"].supports(
        arguments["x"], torch.zeros(1, 8, dtype=torch.int32, device=DEVICE), *[None] * 13
    )
    assert not able
    assert "blocked" in reason


@compiles_for_gpus
@pytest.mark.parametrize("bits", [3, 8])
def test_compiles_for_gpus(capability, bits) -> None:
    """For GPUs that need not be there: integer tensor cores (Hopper's own from 64 rows on), nothing spilled at 8 bits."""
    module = kernels_of("quant_linear")
    kinds = {"x": "*u8", "weight": "*u8", "sums": "*i32", "out": "*u8", "rows": "i32", "count": "i32:16"}
    kinds |= {"row_bytes": "i32:16", "acm": "*fp16", "tokens": "i32"}
    for tile in module.TILES.values():
        constants = {"depth": 768, "BITS": bits, "ACTIVATION": "gelu", "greatest": 255.0, "residual": None}
        constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "DEPTH": tile.depth}
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
        made = compile_for(module._product_kernel, capability, kinds, constants, **options)
        assert made.metadata.shared <= 160 * 1024
        on_hopper = capability == 90 and tile.rows >= 64
        product = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if on_hopper else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
        assert re.search(product, made.asm["ptx"])
        if bits == 8:
            assert "cp.async.cg" in made.asm["ptx"]  # 16 bytes at a time, past the first cache
            assert resources(made, capability)[1] == 0
