"""Build of dfqvit: pure Python, plus one compiled module `dfqvit._C` when torch and a C++ compiler are there.

Environment:
    DFQVIT_BUILD=0            install without compiling; every operator then runs its reference (or Triton) backend
    DFQVIT_CUDA=0             leave the CUDA sources out even where a CUDA toolkit and a CUDA torch are found
    CUDA_HOME                 the CUDA toolkit; otherwise the one that `nvcc` on the PATH belongs to
    TORCH_CUDA_ARCH_LIST      the GPU architectures; default "8.0+PTX;9.0a". No GPU is needed to build
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "8.0+PTX;9.0a"
CPU_SOURCES = [
    "csrc/module.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/fake_quantize.cpp",
    "csrc/cpu/int8_peak.cpp",
    "csrc/cpu/layer_norm_quantize.cpp",
    "csrc/cpu/patch_similarity_entropy.cpp",
    "csrc/cpu/quant_attention.cpp",
    "csrc/cpu/quant_block.cpp",
    "csrc/cpu/quant_linear.cpp",
    "csrc/cpu/quant_linear_layer.cpp",
    "csrc/cpu/roll_resize.cpp",
    "csrc/cpu/total_variation.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/fake_quantize.cu",
    "csrc/cuda/patch_similarity_entropy.cu",
    "csrc/cuda/quant_linear.cu",
]


def cuda_toolkit() -> Path | None:
    """The toolkit's root, or None. `nvcc` on the PATH may be a wrapper elsewhere, so nvcc itself is asked for its place."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
        candidates += [top.group(1) if top else None, str(Path(nvcc).resolve().parent.parent)]
    candidates.append("/usr/local/cuda")
    for candidate in filter(None, candidates):
        root = Path(candidate).resolve()
        if (root / "include" / "cuda_runtime.h").exists() and (root / "bin" / "nvcc").exists():
            return root
    return None


def extension() -> tuple[list, dict, str]:
    """(ext_modules, cmdclass, one line that says what is built and why)."""
    if os.environ.get("DFQVIT_BUILD", "1") == "0":
        return [], {}, "no compiled module (DFQVIT_BUILD=0)"
    try:
        import torch
    except ImportError:
        return [], {}, "no compiled module (torch is not importable at build time; use --no-build-isolation)"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return [], {}, "no compiled module (no C++ compiler found)"

    toolkit = cuda_toolkit()
    if os.environ.get("DFQVIT_CUDA", "1") == "0":
        why_not_cuda = "DFQVIT_CUDA=0"
    elif torch.version.cuda is None:
        why_not_cuda = "this torch has no CUDA"
    elif toolkit is None:
        why_not_cuda = "no CUDA toolkit found"
    else:
        why_not_cuda = ""
        os.environ["CUDA_HOME"] = str(toolkit)  # read by torch.utils.cpp_extension when it is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    with_cuda = not why_not_cuda
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if with_cuda else ""
    common = {
        "name": "dfqvit._C",
        "sources": CPU_SOURCES + (CUDA_SOURCES if with_cuda else []),
        "include_dirs": [str(ROOT / "csrc" / "include")],
        "define_macros": [
            ("DFQVIT_CUDA", str(int(with_cuda))),
            ("DFQVIT_CUDA_ARCHS", f'"{archs}"'),
            ("DFQVIT_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
    }
    # -ffp-contract=off: the arithmetic is a contract between backends, so no fused multiply-add behind its back.
    cxx_flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-fopenmp"]
    cxx_flags += ["-fvisibility=hidden"]  # pybind11 wants it
    nvcc_flags = ["-O3", "-std=c++17", "--fmad=false", "-lineinfo", "-Xptxas=-v"]
    kind = CUDAExtension if with_cuda else CppExtension
    flags = {"cxx": cxx_flags, "nvcc": nvcc_flags} if with_cuda else {"cxx": cxx_flags}
    module = kind(extra_compile_args=flags, **common)
    summary = f"dfqvit._C for torch {torch.__version__}: C++ (AMX, AVX-512, AVX2, portable), " + (
        f"CUDA {torch.version.cuda} for {archs} from {toolkit}" if with_cuda else f"no CUDA ({why_not_cuda})"
    )
    return [module], {"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)}, summary


ext_modules, cmdclass, summary = extension()
print(f"dfqvit build: {summary}")

setup(
    packages=["dfqvit", "dfqvit.kernels"]
    + [f"dfqvit.{name}" for name in find_packages("dfqvit")]
    + [f"dfqvit.kernels.{name}" for name in find_packages("kernels")],
    package_dir={"dfqvit": "dfqvit", "dfqvit.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
