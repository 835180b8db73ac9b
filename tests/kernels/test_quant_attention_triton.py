"""quant_attention in Triton: on a GPU where there is one, in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch

from dfqvit.kernels import quant_attention, use_backend
from dfqvit.kernels.quant_attention.op import forward

from .interpreter import INTERPRETED, compile_for, compiles_for_gpus, few_on_gpu, kernels_of, live_triton, resources
from .test_quant_attention import oracle, sample

DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [  # batch, heads, depth, windows, tokens of a window
    (1, 2, 64, 1, 197),
    (1, 2, 32, 4, 49),
    (3, 1, 5, 1, 7),
    (2, 2, 70, 2, 33),
    (1, 3, 16, 1, 1),
    (1, 1, 3, 1, 300),
    (1, 1, 130, 2, 70),
    (0, 2, 8, 1, 4),
]


def on_device(options):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


@live_triton
@pytest.mark.parametrize(
    ("case", "addends"),
    few_on_gpu([*zip(CASES, cycle(["none", "both"])), *product(CASES[1:2], ["none", "bias", "mask"])], 2),
)
def test_triton_float_result_matches_the_oracle(seed, case, addends):
    qkv, heads, options = sample(case, windowed=case[3] > 1 or addends != "none")
    for name in {"none": ("bias", "mask"), "bias": ("mask",), "mask": ("bias",), "both": ()}[addends]:
        options.pop(name, None)
    with use_backend("triton"):
        found = quant_attention(qkv.to(DEVICE), heads, **on_device(options)).cpu()
    expected, margin = oracle(qkv, heads, **options)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    clear = (margin > 1e-2).repeat_interleave(case[2], dim=-1).view(expected.shape)
    assert torch.allclose(found.double()[clear], expected[clear], rtol=1e-5, atol=1e-5)
    steps = float(options["in_scale"][2])  # what one step of one p can move, their sum being at least 255
    assert not found.numel() or float((found.double() - expected).abs().max()) <= 3 * steps


@live_triton
@pytest.mark.parametrize("bits", [8, 4])
def test_triton_integer_result_is_the_float_result_rounded(seed, bits):
    qkv, heads, options = sample((2, 3, 24, 2, 21))
    qkv, options = qkv.to(DEVICE), on_device(options)
    step, zero = torch.tensor(0.037 * 2 ** (8 - bits), device=DEVICE), (1 << bits - 1) - 3
    with use_backend("triton"):
        y = quant_attention(qkv, heads, **options)
        found = quant_attention(qkv, heads, **options, out_scale=step, out_zero=zero, out_bits=bits)
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), ((y / step).round() + zero).clamp(0, 2**bits - 1))


@live_triton
@pytest.mark.parametrize("zero", [0.0, 255.0])
def test_triton_sums_are_exact_at_their_ends(zero):
    """All keys alike: every p is 255, and y is the mean of the values, whatever the corrections by the zero points."""
    qkv = torch.full((1, 330, 3 * 64), 255, dtype=torch.uint8, device=DEVICE)
    qkv[:, :, 128:] = torch.randint(0, 256, (330, 64), dtype=torch.uint8)
    scales = torch.tensor([1.0, 1.0, 1.0], device=DEVICE)
    with use_backend("triton"):
        found = quant_attention(qkv, 1, in_scale=scales, in_zero=torch.full_like(scales, zero), scale=1.0)
    expected = (qkv[0, :, 128:].double() - zero).mean(0).float()
    assert torch.allclose(found, expected.expand_as(found), rtol=1e-6, atol=1e-6)


@live_triton
def test_triton_declines_what_it_cannot_do():
    supports = forward.backends["triton"].supports
    scales = torch.ones(3, device=DEVICE)
    for shape, reason in (
        ((1, 40_000, 3), "a window had 40000 tokens; their sums fit in int32 up to 33025"),
        ((1, 4, 3 * 300), "a head had 300 channels; a Triton program holds up to 256"),
    ):
        qkv = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        assert supports(qkv, 1, scales, scales, 1.0, None, None, None, None, None, 8) == (False, reason)


@compiles_for_gpus
def test_compiles_for_gpus(capability) -> None:
    """Both products run on the tensor cores; one block of keys is multiplied once, not twice."""
    module = kernels_of("quant_attention")
    kinds = {"qkv": "*u8", "out": "*u8", "index": "*i32", "scale": "fp32", "windows": "i32"}
    for heads, tokens, depth, left_out in (
        (3, 197, 64, ("index", "bias", "mask")),
        (3, 49, 32, ()),
        (2, 577, 64, ("index",)),
    ):
        tile = module.tile_of(tokens, depth, "bias" not in left_out)
        constants = {"heads": heads, "tokens": tokens, "depth": depth, "greatest": 255.0, **dict.fromkeys(left_out)}
        if "index" in left_out:
            constants["windows"] = 1  # which Triton makes a constant of
        constants |= {"QUERIES": tile.queries, "KEYS": tile.keys, "DEPTH": tile.depth}
        made = compile_for(
            module._attention_kernel,
            capability,
            kinds,
            constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
        assert made.metadata.shared <= 48 * 1024
        assert {80: "mma.sync", 90: "wgmma.mma_async"}[capability] in made.asm["ptx"]
        dots = made.asm["ttgir"].count(" = tt.dot ") + made.asm["ttgir"].count(" = ttng.warp_group_dot ")
        assert resources(made, capability)[1] == 0
        assert dots == (2 if tokens <= tile.keys else 3)
