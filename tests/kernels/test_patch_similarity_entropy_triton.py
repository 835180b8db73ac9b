"""patch_similarity_entropy in Triton, compiled for GPUs that are not here."""

from __future__ import annotations

from .interpreter import compiles_for_gpus, kernels_of, shared_memory


@compiles_for_gpus
def test_triton_compiles_for_gpus(capability: int) -> None:
    """No GPU is needed to compile; that the kernels fit in its shared memory is checked too."""
    module = kernels_of("patch_similarity_entropy")
    kinds = {"n": "i32", "batch": "i32", "windows": "i32", "scale": "fp32", "cutoff": "fp32", "parts": "*fp64"}
    kinds |= {"depth": "i32:16", "points": "i32"}
    constants = {
        "BLOCK": module.BLOCK,
        "DEPTH": module.DEPTH,
        "OUT": module.OUT,
        "POINTS": 16,
    }
    for kernel in (module._range_kernel, module._density_kernel, module._backward_kernel):
        for dtype in ("*fp32", "*bf16"):
            assert shared_memory(kernel, capability, {**kinds, "x": dtype}, constants) <= 160 * 1024
