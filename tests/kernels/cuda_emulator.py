"""Compiles a CUDA kernel's own source for the CPU (tests/kernels/cuda_on_cpu) and calls it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


class Emulator:
    """The functions of one file of cuda_on_cpu."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Tensors become pointers, None the null pointer; whole numbers int32, unless they are ctypes' own."""
        kinds = {int: ctypes.c_int, float: ctypes.c_float, torch.Tensor: lambda t: ctypes.c_void_p(t.data_ptr())}
        values = [None if a is None else kinds[type(a)](a) if type(a) in kinds else a for a in arguments]
        return self.library[name](*values)


def compiled(name: str, folder: Path) -> Path:
    """The library of cuda_on_cpu/<name>.cpp; skips where there is no compiler, or no fibers."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("no C++ compiler, or not Linux")
    library, sources = folder / f"{name}.so", Path(__file__).with_name("cuda_on_cpu")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
    folders = [f"-I{sources}", f"-I{ROOT / 'csrc/include'}"]  # in this order
    subprocess.run([COMPILER, *flags, *folders, "-o", str(library), str(sources / f"{name}.cpp")], check=True)
    return library
