"""Which GPUs a build and Triton can serve, and what every operator does on one that they cannot. No GPU is needed."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch

from dfqvit.kernels import BackendError, BackendFallbackWarning, capability, dispatch, extension, use_backend

from ..capture_lint import Gpu
from ..fresh import python
from .cuda_emulator import ROOT
from .interpreter import compile_for
from .test_quant_linear_cuda import tools

DEFAULT = "8.0;8.6;8.9;9.0a+PTX;10.0;12.0"  # of setup.py
DEVELOPMENT = "8.0+PTX;9.0a"  # of the Makefile
# Capability -> whether a default build, a build of the Makefile, and Triton serve it.
MATRIX = {
    (7, 5): (False, False, False),
    (8, 0): (True, True, True),
    (8, 6): (True, True, True),
    (8, 7): (True, True, True),
    (8, 9): (True, True, True),
    (9, 0): (True, True, True),
    (10, 0): (True, True, True),
    (10, 3): (True, True, True),
    (11, 0): (True, True, False),  # by PTX; the ptxas of Triton 3.6 does not know it
    (12, 0): (True, True, True),
    (12, 1): (True, True, True),
}
CARDS = pytest.mark.parametrize("card", list(MATRIX), ids=lambda card: f"sm_{card[0]}{card[1]}")


@CARDS
def test_who_serves_which_card(card):
    by_default, by_development, by_triton = MATRIX[card]
    for archs, expected in ((DEFAULT, by_default), (DEVELOPMENT, by_development)):
        able, reason = capability.image_for(archs, card)
        assert able == expected
        assert able or f"compute capability {card[0]}.{card[1]}" in reason
    assert capability.triton_image_for("3.6.0", card)[0] == by_triton


@pytest.mark.parametrize(
    ("archs", "card", "able"),
    [
        ("8.0", (8, 9), True),  # code of the same major
        ("8.9", (8, 6), False),  # but not of a later minor
        ("8.9+PTX", (8, 6), False),
        ("8.0", (9, 0), False),  # nor of another major without PTX
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), True),  # whose PTX is of 9.0, see setup.py
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("8.0+PTX", (7, 5), False),
        ("", (8, 0), False),
    ],
)
def test_images(archs, card, able):
    assert capability.image_for(archs, card)[0] == able


def test_a_triton_from_before_blackwell():
    assert capability.triton_image_for("3.2.0", (9, 0))[0]
    able, reason = capability.triton_image_for("3.2.0", (12, 0))
    assert not able
    assert "which Triton serves from 3.3 on; this is Triton 3.2.0" in reason


@pytest.fixture
def card(monkeypatch, request):
    """A process that sees such a GPU, with a build for sm_80 and sm_86 only and Triton."""
    module = SimpleNamespace(build_info=lambda: {"cuda_archs": "8.0;8.6", "cuda": True, "torch": torch.__version__})
    monkeypatch.setattr(extension, "load", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(dispatch, "triton_available", lambda: (True, ""))
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(capability, "_triton", lambda index: capability.triton_image_for("3.6.0", request.param))
    capability._compiled.cache_clear()
    yield request.param
    capability._compiled.cache_clear()


def first_choice(operator):
    """The backend that the automatic choice takes for tensors on a GPU, where every backend's own `supports` agrees."""
    for backend in operator.backends.values():
        able, reason = backend.supports(torch.empty(4, 8, device="meta"))
        if able:
            return backend.name
        operator._warn_once(backend.name, reason)
    return None


def fresh(name, backend):
    """A backend as the operators make theirs, with nothing of its own to decline."""
    make = dispatch.compiled(name, "cuda", dispatch.anything) if backend == "cuda" else None
    return make or dispatch.in_triton(name, f"dfqvit.kernels.{name}", dispatch.anything)


@pytest.mark.parametrize(
    ("card", "chosen", "reasons"),
    [
        ((7, 5), "reference", ["the kernels need 8.0", "Triton compiles these kernels from 8.0 on"]),
        ((8, 6), "cuda", []),
        ((9, 0), "triton", ["dfqvit._C was built for 8.0;8.6: build it with TORCH_CUDA_ARCH_LIST=9.0"]),
    ],
    indirect=["card"],
)
@pytest.mark.parametrize("name", sorted(dispatch._OPERATORS))
def test_every_operator_falls_to_the_next_with_one_warning(card, chosen, reasons, name):
    operator = dispatch._OPERATORS[name]
    names = [backend for backend in ("cuda", "triton") if backend in operator.backends]
    backends = {backend: fresh(name, backend) for backend in names} | {"reference": operator.backends["reference"]}
    stand_in = SimpleNamespace(backends=backends, name=name, _warn_once=lambda *a: operator._warn_once(*a))
    with Gpu("cuda:1").pretend(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {first_choice(stand_in) for _ in range(3)}
    if chosen == "triton" and "triton" not in names:
        chosen = "reference"
    if chosen == "cuda" and "cuda" not in names:
        chosen = "triton" if "triton" in names else "reference"
    assert found == {chosen}
    said = [str(warning.message) for warning in caught if warning.category is BackendFallbackWarning]
    expected = [reason for reason, backend in zip(reasons, ("cuda", "triton"), strict=False) if backend in names]
    assert len(said) == len(expected)
    assert all(reason in line for reason, line in zip(expected, said, strict=True))


@pytest.mark.parametrize("card", [(7, 5)], indirect=True)
def test_by_name_and_in_lists_the_card_is_named(card):
    operator = dispatch._OPERATORS["fake_quantize"]
    arguments = (torch.empty(4, device="meta"), torch.ones(1), torch.zeros(1), 0, 7, 0)
    with Gpu("cuda:1").pretend(), use_backend("cuda"), pytest.raises(BackendError, match=r"compute capability 7\.5"):
        operator.resolve(*arguments)
    assert not dispatch._OPERATORS["quant_linear"].fused_on("cuda")  # so that "auto" keeps to the simulated model
    table = dispatch.backends()
    assert "7.5" in table["quant_linear"]["cuda"]
    assert "7.5" in table["quant_linear"]["triton"]
    assert table["quant_linear"]["reference"] == "live"


SOURCE = """
#include "dfqvit/fake_quantize.cuh"
#include "dfqvit/quant_linear_ptx.cuh"
using namespace dfqvit;
using namespace dfqvit::quant::tile;
template __global__ void dfqvit::fake_quantize_kernel<__half, false>(
    const __half*, const __half*, __half*, const float*, const float*, int64_t, int64_t, int64_t, float, float);
__global__ void every_instruction(const uint8_t* from, int* to) {
  extern __shared__ uint8_t memory[];
  const uint32_t place = shared_address(memory) + 16 * threadIdx.x;
  copy_async(place, from + 16 * threadIdx.x, true);
  commit_copies();
  wait_for_copies<0>();
  uint32_t a[4];
  load_matrices(a, place);
  int32_t sum[4] = {};
  multiply_add(sum, a, a[0], a[1]);
  store_chunk(place, a);
  to[threadIdx.x] = sum[0] + sum[3] + memory[threadIdx.x];
}
"""


@pytest.mark.slow
@CARDS
def test_nvcc_compiles_or_cannot(card, tmp_path):
    """What the kernels are made of, in little. What is declined by name is what would not compile."""
    nvcc, _ = tools()
    if nvcc is None:
        pytest.skip("no nvcc")
    code = f"{card[0]}{card[1]}"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{code}" not in known:
        pytest.skip(f"this nvcc does not know sm_{code}")
    (tmp_path / "kernels.cu").write_text(SOURCE)
    flags = ["-std=c++17", "--fmad=false", f"-gencode=arch=compute_{code},code=sm_{code}", "-cubin"]
    command = [nvcc, *flags, f"-I{ROOT / 'csrc/include'}", "-o", tmp_path / "kernels.cubin", tmp_path / "kernels.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == capability.image_for(f"{card[0]}.{card[1]}", card)[0], done.stderr


@pytest.mark.slow
@CARDS
def test_triton_compiles_or_is_declined(card):
    """quant_linear's product, in a process of its own where it must fail: Triton's compiler may end the process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    if capability.triton_image_for(importlib.import_module("triton").__version__, card)[0]:
        compile_product(card)
        return
    done = python("-c", f"from tests.kernels.test_capability import compile_product; compile_product({card})", cwd=ROOT)
    assert done.returncode != 0
    assert "Import" not in done.stderr


def compile_product(card):
    """quant_linear's product, in small tiles, for this card."""
    linear = importlib.import_module("dfqvit.kernels.quant_linear.triton")
    kinds = {"x": "*u8", "weight": "*u8", "sums": "*i32", "out": "*u8", "rows": "i32", "count": "i32:16", "tokens": "i32",
             "row_bytes": "i32:16"}  # fmt: skip
    constants = {"depth": 64, "BITS": 4, "ACTIVATION": "gelu", "greatest": 255.0, "BLOCK_M": 32, "BLOCK_N": 32, "DEPTH": 32,
                 "residual": None}  # fmt: skip
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    compile_for(linear._product_kernel, 10 * card[0] + card[1], kinds, constants, **options)
