"""What a GPU can run, asked before anything is launched: its compute capability, and the code that was compiled for it.

A launch without code for the card ends in "no kernel image is available"; Triton, asked for a card that it does not serve, in an
error of its compiler. Here the same is a verdict, with the reason, from which dispatch falls to the next backend.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from . import extension
from .extension import Verdict

LEAST = (8, 0)  # asynchronous copies, and products of bytes on the tensor cores
BLACKWELL = (10, 0)
TRITON_FOR_BLACKWELL = (3, 3)
THOR, TRITON_FOR_THOR = (11, 0), (3, 7)  # the ptxas of Triton 3.6 does not know it
Capability = tuple[int, int]


def compiled_for(*args: Any) -> Verdict:
    """Whether the CUDA kernels of dfqvit._C hold code for the GPU that the first tensor among `args` is on."""
    return _on_device_of(args, _compiled)


def triton_for(*args: Any) -> Verdict:
    """Whether Triton compiles for the GPU that the first tensor among `args` is on; its interpreter serves every CPU."""
    return _on_device_of(args, _triton)


def of_machine(backend: str) -> Verdict:
    """The same for the current GPU, of "cuda" or "triton"; a machine without one is not judged here."""
    if not torch.cuda.is_available():
        return True, ""
    return (_compiled if backend == "cuda" else _triton)(torch.cuda.current_device())


def image_for(archs: str, capability: Capability) -> Verdict:
    """Whether a build for `archs` can run on a GPU of `capability`.

    Code for X.Y runs on X.Z with Z >= Y; code for an X.Ya only on X.Y; PTX of X.Y is compiled by the driver for all from X.Y on.

    Args:
        archs: as `build_info()["cuda_archs"]` has them: "8.0;9.0a;12.0+PTX".
        capability: of the GPU.
    """
    if capability < LEAST:
        return False, f"the GPU has compute capability {_text(capability)}; the kernels need {_text(LEAST)}"
    for arch in filter(None, re.split(r"[;,\s]+", archs)):
        number = re.match(r"(\d+)\.(\d+)([af]?)", arch)
        if number is None:
            continue
        major, minor, variant = int(number[1]), int(number[2]), number[3]
        exact = (major, minor) == capability
        if exact or (variant != "a" and major == capability[0] and minor <= capability[1]):
            return True, ""
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return True, ""
    return False, (
        f"the GPU has compute capability {_text(capability)}; dfqvit._C was built for {archs or 'none'}: "
        f"build it with TORCH_CUDA_ARCH_LIST={_text(capability)}"
    )


def triton_image_for(version: str, capability: Capability) -> Verdict:
    """Whether Triton of `version` compiles our kernels for a GPU of `capability`."""
    if capability < LEAST:
        return (
            False,
            f"the GPU has compute capability {_text(capability)}; Triton compiles these kernels from {_text(LEAST)} on",
        )
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    least = TRITON_FOR_THOR if capability == THOR else TRITON_FOR_BLACKWELL if capability >= BLACKWELL else (0, 0)
    if found < least:
        return False, (
            f"the GPU has compute capability {_text(capability)}, which Triton serves from {_text(least)} on; "
            f"this is Triton {version}"
        )
    return True, ""


def _on_device_of(args: Any, verdict: Any) -> Verdict:
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type != "cuda":
        return True, ""
    return verdict(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _compiled(index: int) -> Verdict:
    module, reason = extension.load()
    if module is None:
        return False, reason
    return image_for(module.build_info()["cuda_archs"], torch.cuda.get_device_capability(index))


@functools.cache
def _triton(index: int) -> Verdict:
    import triton

    return triton_image_for(triton.__version__, torch.cuda.get_device_capability(index))


def _text(pair: Capability) -> str:
    return f"{pair[0]}.{pair[1]}"
