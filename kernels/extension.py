"""The compiled module `dfqvit._C`, loaded on first use, and the reason when it cannot be; the processor that it runs on.

A build for the Hugging Face Hub (scripts/hub_kernels.py) has a module `_ops` in its place. That loads the library of operators,
and names them as no other build does, so that several can be loaded in one process, and `dfqvit` too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

Verdict = tuple[bool, str]  # (True, "") or (False, the reason)
ON_HUB = importlib.util.find_spec("._ops", __package__) is not None
# Operators are `torch.ops.<NAMESPACE>.<name>`, their compiled backends `torch.ops.<NAMESPACE>_cpu.<name>` and `..._cuda.<name>`.
NAMESPACE: str = importlib.import_module("._ops", __package__).ops.name if ON_HUB else "dfqvit"


class HubBuild:
    """Of a build for the Hub, which has no `dfqvit._C`: what this package asks of that module."""

    __file__ = str(Path(__file__).with_name("metadata.json"))

    def __init__(self) -> None:
        backend = json.loads(Path(self.__file__).read_text())["backend"]
        self._info = {"cuda": backend["type"] == "cuda", "cuda_archs": ";".join(backend.get("archs", ()))}

    def build_info(self) -> dict[str, Any]:
        """Whether it is compiled for CUDA, and for which GPUs. The package `kernels` has seen to the version of torch."""
        return self._info

    def active_isa(self) -> str:
        """The CPU path in use is not told."""
        return "unknown"

    def watched(self) -> bool:
        """Copies are torch's: see `gathered`."""
        return True


@functools.cache
def load() -> tuple[Any, str]:
    """`(module, "")`, or `(None, reason)` when the module is not built or does not load. Never raises."""
    if ON_HUB:
        return HubBuild(), ""
    try:
        module = importlib.import_module("dfqvit._C")  # and libdfqvit_ops, which it is linked to
    except ModuleNotFoundError:
        if sys.platform == "win32":
            return None, "the compiled module dfqvit._C is not built (there is none for Windows: it needs GCC or Clang)"
        return None, "the compiled module dfqvit._C is not built (install with a C++ compiler and DFQVIT_BUILD unset)"
    except ImportError as error:  # built, but for another torch or Python: the loader's own words say which symbol
        return None, f"the compiled module dfqvit._C does not load: {str(error).splitlines()[0]}"
    built_with = module.build_info()["torch"]
    if built_with.split("+")[0] != torch.__version__.split("+")[0]:
        return (
            None,
            f"the compiled module was built for torch {built_with}, this is torch {torch.__version__}: reinstall",
        )
    return module, ""


def supports_cpu() -> Verdict:
    """Whether the compiled C++ kernels are there."""
    module, reason = load()
    return module is not None, reason


def supports_cuda() -> Verdict:
    """Whether the compiled CUDA kernels are there and this machine has a GPU to run them on."""
    module, reason = load()
    if module is None:
        return False, reason
    if not module.build_info()["cuda"]:
        return False, "the compiled module dfqvit._C was built without CUDA"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    return True, ""


@functools.cache
def cpu_name() -> str:
    """The processor's name, as well as this platform tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module's name has to do
    return platform.processor() or platform.machine() or sys.platform


def gathered(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: where nothing watches, in memory that the operators keep for their results (csrc/cpu/results.cpp).

    Args:
        x: of any dtype and strides, such as patches of an image.

    Returns:
        The same values, contiguous; also where x is.
    """
    module = None if torch.compiler.is_compiling() or x.device.type != "cpu" else load()[0]
    if module is None or module.watched() or (torch.is_grad_enabled() and x.requires_grad):
        return x.clone(memory_format=torch.contiguous_format)
    return module.gathered(x)
