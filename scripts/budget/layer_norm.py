"""layer_norm_quantize: the Triton kernel, compiled by Triton for sm_90. It has no loops."""

from __future__ import annotations

import importlib

from . import sass
from .kernel import Launch, Prediction, found
from .machine import Gpu

REGISTERS = 65536  # of a multiprocessor


def predict(rows: int, channels: int, gpu: Gpu) -> Prediction:
    """float32 rows to bytes."""
    module = importlib.import_module("dfqvit.kernels.layer_norm_quantize.triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    triton = importlib.import_module("triton")
    launch, kernel = module.launch_of(channels), module._layer_norm_kernel
    constants = {"greatest": 255.0, "ROWS": launch.rows, "WIDTH": launch.width}
    kinds = {"out": "*u8", "eps": "fp32", "rows": "i32", "channels": "i32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    whole = [place for place, name in enumerate(signature) if signature[name].startswith("*") or name == "channels"]
    attributes = {(place,): [["tt.divisibility", 16]] for place in whole}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=target, options={"num_warps": launch.warps, "enable_fp_fusion": False})
    code = next(iter(sass.disassembled(made.asm["cubin"]).values()))
    one = found(f"LayerNorm, {channels} channels", code, ["STG", "LDG", "BAR", "SHFL", "MUFU"], [])
    blocks = -(-rows // launch.rows)
    resident = min(32, 64 // launch.warps, REGISTERS // (sass.registers(made.asm["cubin"]) * 32 * launch.warps))
    return one.predict(launch.warps, lambda *_: 1, Launch(blocks, resident, rows * channels * 5), gpu)
