"""gate_quantize in Triton: on a GPU where there is one, in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dfqvit.kernels import gate_quantize, use_backend
from dfqvit.kernels.gate_quantize.op import forward

from .interpreter import INTERPRETED, compile_for, compiles_for_gpus, few_on_gpu, kernels_of, live_triton, resources
from .test_gate_quantize import ALL, CASES, check, sample

DEVICE = "cpu" if INTERPRETED else "cuda"


@live_triton
@pytest.mark.parametrize(("case", "activation", "kind"), few_on_gpu(product(CASES, ALL, ["packed", "strided"]), 9))
def test_triton_matches_float64_but_for_ties(seed, case, activation, kind):
    dtype = torch.bfloat16 if kind == "packed" and activation == "silu" else torch.float32
    gate, value, options = sample(case, dtype, kind, each=activation != "gelu")
    with use_backend("triton"):
        moved = {name: tensor.to(DEVICE) for name, tensor in options.items()}
        found = gate_quantize(gate.to(DEVICE), value.to(DEVICE), **moved, activation=activation).cpu()
    check(found, gate.float(), value.float(), **options, activation=activation)


@live_triton
def test_triton_on_more_channels_than_a_program_has_cells(seed):
    gate, value, options = sample(((3,), 2500))
    with use_backend("triton"):
        moved = {name: tensor.to(DEVICE) for name, tensor in options.items()}
        found = gate_quantize(gate.to(DEVICE), value.to(DEVICE), **moved).cpu()
    check(found, gate, value, **options, activation="silu")


@live_triton
def test_triton_declines_float64():
    one = torch.ones(1, 2, device=DEVICE).double()
    verdict = forward.backends["triton"].supports(one, one, one[0], one[0, 0], 8, "silu")
    assert verdict == (False, "float64 runs on the reference")


@compiles_for_gpus
def test_compiles_for_gpus(capability) -> None:
    module = kernels_of("gate_quantize")
    kinds = {**dict.fromkeys(["channels", "gate_row", "value_row", "scale_step"], "i32"), "out": "*u8"}
    constants = {"greatest": 255.0, "ACTIVATION": "silu", "CELLS": module.CELLS}
    made = compile_for(module._gate_kernel, capability, kinds, constants, num_warps=4, enable_fp_fusion=False)
    registers, spilled = resources(made, capability)
    assert registers <= 128
    assert spilled == 0
