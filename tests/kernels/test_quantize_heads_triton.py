"""quantize_heads in Triton: on a GPU where there is one, in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dfqvit.kernels import quantize_heads, use_backend
from dfqvit.kernels.quantize_heads.op import forward

from .interpreter import INTERPRETED, compile_for, compiles_for_gpus, few_on_gpu, kernels_of, live_triton, resources
from .test_quantize_heads import CASES, check, sample

DEVICE = "cpu" if INTERPRETED else "cuda"


@live_triton
@pytest.mark.parametrize(("case", "half", "packed"), few_on_gpu(product(CASES[:-1], [False, True], [True, False]), 7))
def test_triton_matches_timm_and_numpy_but_for_ties(seed, case, half, packed):
    q, k, v, options = sample(case, torch.bfloat16 if packed and half else torch.float32, packed)
    with use_backend("triton"):
        call = [part.to(DEVICE) for part in (q, k, v)]
        found = quantize_heads(*call, **{n: t.to(DEVICE) for n, t in options.items()}, half=half).cpu()
    check(found, q, k, v, options, half, 8)


@live_triton
def test_triton_on_wide_heads(seed):
    """More channels than a program has cells."""
    q, k, v, options = sample((1, 18, 3, 64, 2, 18))
    with use_backend("triton"):
        call = [part.to(DEVICE) for part in (q, k, v)]
        found = quantize_heads(*call, **{n: t.to(DEVICE) for n, t in options.items()}).cpu()
    check(found, q, k, v, options, False, 8)


@live_triton
def test_triton_with_parameters_of_any_stride(seed):
    """Called as an exported program does, without the public function, which makes them contiguous too."""
    q, k, v, options = sample((1, 2, 5, 8, 2, 5))
    with use_backend("triton"):
        call = [part.to(DEVICE) for part in (q, k, v)]
        options = {name: tensor.to(DEVICE) for name, tensor in options.items()}
        expected = quantize_heads(*call, **options)
        apart = [
            torch.stack([options[name], torch.full_like(options[name], 77)], 1)[:, 0]
            for name in ("in_scale", "in_zero")
        ]
        found = forward(*call, *apart, 8, options.get("rope"), False)
        named = {**options, "in_scale": apart[0], "in_zero": apart[1]}
        assert torch.equal(found, expected)
        assert torch.equal(quantize_heads(*call, **named), expected)


@live_triton
def test_triton_declines_float64():
    part, three = torch.ones(1, 1, 1, 2, device=DEVICE).double(), torch.ones(3, device=DEVICE)
    verdict = forward.backends["triton"].supports(part, part, part, three, three, 8, None, False)
    assert verdict == (False, "float64 runs on the reference")


@compiles_for_gpus
def test_compiles_for_gpus(capability) -> None:
    module = kernels_of("quantize_heads")
    whole = ["heads", "depth", "tokens", "turned", "rope_head"]
    whole += [f"{part}_{along}" for part in "qkv" for along in ("batch", "head", "token", "channel")]
    kinds = {**dict.fromkeys(whole, "i32"), "out": "*u8"}
    constants = {"greatest": 255.0, "HALF": False, "CELLS": module.CELLS}
    made = compile_for(module._heads_kernel, capability, kinds, constants, num_warps=4, enable_fp_fusion=False)
    registers, spilled = resources(made, capability)
    assert registers <= 128
    assert spilled == 0
