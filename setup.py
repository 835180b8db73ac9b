"""Build of dfqvit: pure Python, and when torch and a C++ compiler are there two compiled files in dfqvit/:

    libdfqvit_ops.so    the operators, without Python: any process with libtorch can load it
    _C.*.so             the pybind11 module that Python uses, linked to it

Environment:
    DFQVIT_BUILD=0            install without compiling; every operator then runs its reference (or Triton) backend. On Windows
                              nothing is compiled either way
    DFQVIT_CUDA=0             leave the CUDA sources out even where a CUDA toolkit and a CUDA torch are found
    CUDA_HOME                 the CUDA toolkit; otherwise the one that `nvcc` on the PATH belongs to
    TORCH_CUDA_ARCH_LIST      the GPU architectures, as torch takes them; default "8.0;8.6;8.9;9.0a+PTX;10.0;12.0". What the kernels
                              cannot be built for is left out, and 9.0 is built as 9.0a; the summary line says so. No GPU is needed
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a+PTX;10.0;12.0"  # the PTX serves whatever is newer and not here
NAMED_ARCHS = {  # torch's names
    "Volta": "7.0",
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;12.0",
}
CPU_SOURCES = [
    "csrc/library.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/fake_quantize.cpp",
    "csrc/cpu/gate_quantize.cpp",
    "csrc/cpu/gate_quantize_kernels.cpp",
    "csrc/cpu/gather.cpp",
    "csrc/cpu/int8_peak.cpp",
    "csrc/cpu/layer_norm_quantize.cpp",
    "csrc/cpu/layer_norm_quantize_kernels.cpp",
    "csrc/cpu/parallel.cpp",
    "csrc/cpu/patch_similarity_entropy.cpp",
    "csrc/cpu/quant_attention.cpp",
    "csrc/cpu/quant_attention_kernels.cpp",
    "csrc/cpu/quant_block.cpp",
    "csrc/cpu/quant_conv_block.cpp",
    "csrc/cpu/quant_conv_block_kernels.cpp",
    "csrc/cpu/quant_linear.cpp",
    "csrc/cpu/quant_linear_kernels.cpp",
    "csrc/cpu/quant_linear_layer.cpp",
    "csrc/cpu/quantize_heads.cpp",
    "csrc/cpu/quantize_heads_kernels.cpp",
    "csrc/cpu/remembered_block.cpp",
    "csrc/cpu/results.cpp",
    "csrc/cpu/roll_resize.cpp",
    "csrc/cpu/round_second_order.cpp",
    "csrc/cpu/total_variation.cpp",
]
OPERATORS = "dfqvit_ops"  # the shared library's name to a linker
CUDA_SOURCES = [
    "csrc/cuda/fake_quantize.cpp",
    "csrc/cuda/fake_quantize_kernels.cu",
    "csrc/cuda/patch_similarity_entropy.cpp",
    "csrc/cuda/patch_similarity_entropy_kernels.cu",
    "csrc/cuda/quant_attention.cpp",
    "csrc/cuda/quant_attention_kernels.cu",
    "csrc/cuda/quant_linear.cpp",
    "csrc/cuda/quant_linear_kernels.cu",
]
# -ffp-contract=off: the arithmetic is a contract between backends, so no fused multiply-add behind its back. -fopenmp-simd: loops
# marked as vectors, no OpenMP is linked. -g0: Python asks for -g, ten times the size.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-fopenmp-simd", "-g0"]
NVCC_FLAGS = ["-O3", "--fmad=false"]


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


def cuda_archs(asked: str, known: set[str], release: tuple[int, int]) -> tuple[list[str], list[str]]:
    """The architectures to build for, as "8.0", "9.0a" or "12.0+PTX", in order; and what was changed of what was asked, in words.

    The kernels need 8.0 (asynchronous copies, mma.sync of bytes), and have a path by wgmma that only 9.0a can hold.

    Args:
        asked: TORCH_CUDA_ARCH_LIST.
        known: the codes that nvcc knows, as "sm_80"; see `nvcc_facts`.
        release: of nvcc.
    """
    for name, archs in NAMED_ARCHS.items():
        asked = re.sub(rf"\b{name}\b", archs, asked, flags=re.IGNORECASE)
    # architecture -> its variant ("", "a", "f"), and whether with PTX
    found: dict[tuple[int, int], tuple[str, bool]] = {}
    said, lost_ptx = [], False
    for word in filter(None, re.split(r"[;,\s]+", asked)):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if parts is None:
            names = ", ".join(NAMED_ARCHS)
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST held '{word}'; it may be numbers as 8.0, 9.0a or 12.0+PTX, or {names}"
            )
        arch, variant, ptx = (int(parts[1]), int(parts[2])), parts[3], bool(parts[4])
        number = f"{arch[0]}.{arch[1]}"
        if arch < (8, 0):
            said.append(f"{number} left out, the kernels need 8.0")
        elif f"sm_{arch[0]}{arch[1]}" not in known:
            said.append(f"{number} left out, nvcc {release[0]}.{release[1]} does not know it")
            lost_ptx |= ptx
        else:
            if arch == (9, 0) and not variant and release >= (12, 0):
                variant = "a"
                said.append("9.0 built as 9.0a, for wgmma")
            before = found.get(arch, ("", False))
            found[arch] = (variant or before[0], ptx or before[1])
    if lost_ptx and found and not any(ptx for _, ptx in found.values()):
        newest = max(found)
        found[newest] = (found[newest][0], True)
        said.append(f"PTX of {newest[0]}.{newest[1]} in its place")
    archs = [f"{a}.{b}{variant}" + "+PTX" * ptx for (a, b), (variant, ptx) in sorted(found.items())]
    return archs, list(dict.fromkeys(said))


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags. PTX goes without the variant, whose code no newer GPU takes."""
    flags = []
    for arch in archs:
        code = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if arch.endswith("+PTX"):
            plain = code.rstrip("af")
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def nvcc_facts(toolkit: Path) -> tuple[set[str], tuple[int, int]]:
    """The codes that nvcc knows, and its release."""
    nvcc = str(toolkit / "bin" / "nvcc")
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    return set(codes.split()), (int(release[1]), int(release[2])) if release else (0, 0)


def cpu_paths(machine: str) -> str:
    """The paths of the CPU kernels for a machine, as `platform.machine()` names it, the best first."""
    if machine.lower() in ("x86_64", "amd64"):
        return "AMX, AVX-512, AVX2, portable"
    if machine.lower() in ("aarch64", "arm64"):
        return "i8mm, dotprod, NEON, portable"
    return "portable"


def extension() -> tuple[list, dict, str]:
    """(ext_modules, cmdclass, one line that says what is built and why)."""
    if os.environ.get("DFQVIT_BUILD", "1") == "0":
        return [], {}, "no compiled module (DFQVIT_BUILD=0)"
    if sys.platform == "win32":
        return [], {}, "no compiled module (the kernels need GCC or Clang on Linux or macOS; MSVC does not take them)"
    try:
        import torch
    except ImportError:
        return [], {}, "no compiled module (torch is not importable at build time; use --no-build-isolation)"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return [], {}, "no compiled module (no C++ compiler found)"

    toolkit, wanted, changes = cuda_toolkit(), [], []
    if os.environ.get("DFQVIT_CUDA", "1") == "0":
        why_not_cuda = "DFQVIT_CUDA=0"
    elif torch.version.cuda is None:
        why_not_cuda = "this torch has no CUDA"
    elif toolkit is None:
        why_not_cuda = "no CUDA toolkit found"
    else:
        os.environ["CUDA_HOME"] = str(toolkit)  # read by torch.utils.cpp_extension when it is imported
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        wanted, changes = cuda_archs(asked, *nvcc_facts(toolkit))
        why_not_cuda = "" if wanted else f"TORCH_CUDA_ARCH_LIST was '{asked}': {'; '.join(changes) or 'it is empty'}"

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    with_cuda = not why_not_cuda
    archs = ";".join(wanted) if with_cuda else ""
    common = {
        "include_dirs": [str(ROOT / "csrc" / "include")],
        "define_macros": [
            ("DFQVIT_CUDA", str(int(with_cuda))),
            ("DFQVIT_CUDA_ARCHS", f'"{archs}"'),
            ("DFQVIT_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
    }
    cxx_flags = ["-std=c++17", *CXX_FLAGS]
    cxx_flags += ["-fno-semantic-interposition"] if sys.platform != "darwin" else []
    # With flags of architectures among these, torch adds none of its own.
    nvcc_flags = ["-std=c++17", *NVCC_FLAGS, "-lineinfo", "-Xptxas=-v", "--threads=2", *gencode(wanted)]
    kind = CUDAExtension if with_cuda else CppExtension
    operators = kind(
        name=f"dfqvit.lib{OPERATORS}",
        sources=CPU_SOURCES + (CUDA_SOURCES if with_cuda else []),
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags} if with_cuda else {"cxx": cxx_flags},
        # its threads sleep in its code until the process ends: dlclose must not take that away
        extra_link_args=["-Wl,-z,nodelete"] if sys.platform.startswith("linux") else [],
        **common,
    )
    operators.libraries.remove("torch_python")
    on_mac = sys.platform == "darwin"
    if on_mac:
        operators.extra_link_args.append(f"-Wl,-install_name,@rpath/lib{OPERATORS}.so")
    origin = "@loader_path" if on_mac else "$ORIGIN"
    module = CppExtension(
        name="dfqvit._C",
        sources=["csrc/module.cpp"],
        extra_compile_args={"cxx": [*cxx_flags, "-fvisibility=hidden"]},  # pybind11 wants it
        libraries=[] if on_mac else [OPERATORS],  # macOS looks for no .so by that name; it is given as a file below
        extra_link_args=[f"-Wl,-rpath,{origin}"],
        **common,
    )

    class Build(BuildExtension):
        """Builds the operators first, and lets the module find them to link to."""

        def get_ext_filename(self, name: str) -> str:
            found = super().get_ext_filename(name)  # of Python's modules, with its version in the name
            return re.sub(r"\.[^/\\]*$", ".so", found) if OPERATORS in found else found

        def build_extensions(self) -> None:
            module.library_dirs.append(str(Path(self.get_ext_fullpath(operators.name)).parent))
            module.library_dirs.append(str(Path(self.build_lib) / "dfqvit"))
            super().build_extensions()

        def build_extension(self, ext: Any) -> None:
            if not on_mac:
                return super().build_extension(ext)
            if ext is module:
                folders = map(Path, module.library_dirs)
                found = (str(folder / f"lib{OPERATORS}.so") for folder in folders)
                module.extra_objects.append(next(file for file in found if Path(file).exists()))
                return super().build_extension(ext)
            # setuptools makes bundles, as Python's modules are; what others are linked to is a library
            linkers = {name: getattr(self.compiler, name, None) for name in ("linker_so", "linker_so_cxx")}
            for name, words in linkers.items():
                if words is not None:
                    setattr(self.compiler, name, ["-dynamiclib" if word == "-bundle" else word for word in words])
            super().build_extension(ext)
            for name, words in linkers.items():
                setattr(self.compiler, name, words)
            return None

    paths = cpu_paths(platform.machine())
    summary = f"libdfqvit_ops and dfqvit._C for torch {torch.__version__}: C++ ({paths}), " + (
        f"CUDA {torch.version.cuda} for {archs} from {toolkit}" + "".join(f" ({change})" for change in changes)
        if with_cuda
        else f"no CUDA ({why_not_cuda})"
    )
    return [operators, module], {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}, summary


if __name__ == "__main__":  # scripts/hub_kernels.py and the tests read what stands above
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
