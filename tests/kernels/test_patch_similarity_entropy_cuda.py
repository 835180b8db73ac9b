"""The CUDA kernels of patch_similarity_entropy: their own source run on the CPU, against the same oracles as every backend."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from dfqvit import kernels
from dfqvit.kernels.dispatch import Backend, anything
from dfqvit.kernels.patch_similarity_entropy import op

from . import test_patch_similarity_entropy as every
from .cuda_emulator import TYPES, Emulator, compiled
from .test_patch_similarity_entropy import Case, Live, check, normal, random_case


class Kernels(Emulator):
    """What csrc/cuda/patch_similarity_entropy.cpp does, for tensors on the CPU."""

    def sizes(self, features):
        return [ctypes.c_int64(size) for size in features.shape]

    def range(self, features):
        result = torch.full((features.shape[0], 2), torch.nan)
        if not features.shape[0] * features.shape[1]:
            return result.zero_()
        features = features.contiguous()
        self("similarity_range", TYPES[features.dtype], features, *self.sizes(features), result)
        return result

    def forward(self, features, value_range, points, bandwidth, windows):
        images = features.shape[0], features.shape[1] // windows
        entropy, density = torch.full(images, torch.nan, dtype=features.dtype), torch.full((*images, points), torch.nan)
        if entropy.numel():
            features, value_range = features.contiguous(), value_range.contiguous()
            constants = points, float(bandwidth), ctypes.c_int64(windows)
            head = TYPES[features.dtype], features, value_range
            self("entropy", *head, *self.sizes(features), *constants, density, entropy)
        return entropy, density

    def backward(self, grad, features, value_range, density, bandwidth, windows):
        out = torch.full(features.shape, torch.nan, dtype=features.dtype)
        if out.numel():
            features, grad = features.contiguous(), grad.float().contiguous()
            head = TYPES[features.dtype], features, value_range.contiguous(), density.contiguous(), grad
            constants = density.shape[2], float(bandwidth), ctypes.c_int64(windows)
            self("entropy_backward", *head, *self.sizes(features), *constants, out)
        return out


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Kernels(compiled("patch_similarity_entropy", tmp_path_factory.mktemp("cuda")))


@pytest.fixture
def backend(emulator, monkeypatch) -> Iterator[Live]:
    """The operators' backend "cuda", run by the emulator on tensors of the CPU."""
    runs = {op.range_operator: emulator.range, op.forward: emulator.forward, op.backward: emulator.backward}
    for operator, run in runs.items():
        monkeypatch.setitem(operator.backends, "cuda", Backend("cuda", run, anything))
    with kernels.use_backend("cuda"):
        yield Live("cuda", "cpu")


@pytest.mark.parametrize("seed", every.SEEDS[:3])
def test_random_cases_on_the_cpu(backend, seed):
    check(random_case(seed, 70), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(backend, dtype):
    check(Case(normal(1, 2, 70, 33) + 2 * normal(1, 2, 1, 33), 10, 0.01, 1), backend, dtype)


@pytest.mark.parametrize(
    ("shape", "points", "bandwidth", "windows"),
    [
        ((1, 1, 64, 64), 10, 0.01, 1),  # whole tiles
        ((2, 2, 65, 17), 10, 0.01, 1),  # one row over
        ((1, 1, 129, 130), 10, 0.01, 1),  # deeper than the gradient in shared memory
        ((1, 4, 49, 32), 10, 0.01, 4),  # Swin
        ((1, 1, 40, 3), 300, 0.01, 1),  # many places
        ((1, 1, 17, 1), 10, 0.01, 1),  # similarities are 1 and -1
    ],
)
def test_shapes_on_the_cpu(backend, shape, points, bandwidth, windows):
    check(Case(normal(*shape) + 0.5, points, bandwidth, windows), backend)


test_zero_vectors = every.test_zero_vectors_have_similarity_0
test_short_vectors = every.test_vectors_shorter_than_the_floor
test_equal_patches = every.test_equal_patches_have_entropy_0_and_gradient_0
test_explicit_range = every.test_explicit_range
test_empty_batches = every.test_empty_batches
test_strides = every.test_non_contiguous_inputs
