"""layer_norm_quantize in Triton: on a GPU where there is one, in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dfqvit.kernels import layer_norm_quantize, use_backend
from dfqvit.kernels.layer_norm_quantize.op import forward

from ..conftest import DTYPES
from .interpreter import INTERPRETED, compile_for, compiles_for_gpus, few_on_gpu, kernels_of, live_triton, resources
from .test_layer_norm_quantize import oracle, sample

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(3, 5, 192), (7, 1), (2, 17), (1, 13, 33), (0, 8), (3, 5000)]


@live_triton
@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "zero_point"),
    few_on_gpu(((*case, *grid) for case in product(SHAPES, DTYPES) for grid in [(8, 131), (4, 15)]), 5),
    ids=str,
)
def test_triton_matches_numpy_but_for_ties(seed, shape, dtype, bits, zero_point):
    x, weight, bias = sample(shape, dtype)
    scale = 0.031 if bits == 8 else 0.5
    with use_backend("triton"):
        call = (t.to(DEVICE) for t in (x, weight, bias))
        found = layer_norm_quantize(*call, eps=1e-6, scale=scale, zero_point=zero_point, bits=bits).cpu()
    expected, margin = oracle(x, weight, bias, 1e-6, np.float32(scale), zero_point, bits)
    assert found.dtype == torch.uint8
    assert found.shape == x.shape
    assert bool((margin[found.double() != expected] < 2e-3).all())
    assert bool(((found.double() - expected).abs() <= 1).all())


@live_triton
def test_triton_far_from_zero_strided_and_with_half_weights(seed):
    """A mean a thousand deviations off, rows that do not lie together.

    A cell goes through a dozen additions at most (eight sums of 64 / 8 cells, and their tree) and each rounds by 2^-24, so
    the mean in float32 is within 12 * 2^-24 of its size.
    """
    x, weight, bias = (torch.randn(6, 4, 40) + 1000).transpose(0, 1), torch.randn(40).half(), torch.randn(40).half()
    with use_backend("triton"):
        found = layer_norm_quantize(*(t.to(DEVICE) for t in (x, weight, bias)), scale=0.05, zero_point=9).cpu()
    expected, margin = oracle(x, weight, bias, 1e-6, np.float32(0.05), 9, 8)
    allowed = 2e-3 + weight.double().abs() * 12 * 2**-24 * 1000 / 0.05
    different = found.double() != expected
    assert bool((margin < allowed)[different].all())
    assert bool(((found.double() - expected).abs() <= 1).all())
    assert len(found.unique()) > 10


@live_triton
def test_triton_clamps_extreme_values():
    weight, bias = torch.tensor([1e20, -1e20, 0.0]), torch.zeros(3)
    with use_backend("triton"):
        call = (t.to(DEVICE) for t in (torch.tensor([[1.0, -1.0, 0.0]]), weight, bias))
        assert layer_norm_quantize(*call, scale=1e-3, zero_point=7).tolist() == [[255, 255, 7]]


@live_triton
def test_triton_declines_what_it_cannot_do():
    scalar = torch.ones((), device=DEVICE)
    for x, reason in (
        (torch.ones(1, 40_000), "x had 40000 channels; a Triton program holds rows of up to 32768"),
        (torch.ones(1, 4).double(), "float64 runs on the reference"),
    ):
        x = x.to(DEVICE)
        assert forward.backends["triton"].supports(x, x[0], x[0], 1e-6, scalar, scalar, 8) == (False, reason)


@compiles_for_gpus
def test_compiles_for_gpus(capability) -> None:
    module = kernels_of("layer_norm_quantize")
    kinds = {"out": "*u8", "eps": "fp32", "rows": "i32", "channels": "i32:16"}
    for channels in (192, 768, 4096):
        launch = module.launch_of(channels)
        constants = {"greatest": 255.0, "ROWS": launch.rows, "WIDTH": launch.width}
        options = {"num_warps": launch.warps, "enable_fp_fusion": False}
        made = compile_for(module._layer_norm_kernel, capability, kinds, constants, **options)
        assert made.metadata.shared <= 48 * 1024
        assert resources(made, capability)[1] == 0
