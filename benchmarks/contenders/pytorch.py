"""The contenders that run in torch: dfqvit's integer runtime, eager, torch.compile, torchao, PT2E."""

from __future__ import annotations

import io
import operator
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import Ready, Setting


def eager(model: nn.Module, setting: Setting, dtype: str) -> Ready:
    model = model.to(setting.device, getattr(torch, dtype))
    return Ready(_calls(lambda _: model, setting, getattr(torch, dtype)), stored_bytes(model))


def compiled(model: nn.Module, setting: Setting, dtype: str) -> Ready:
    model = model.to(setting.device, getattr(torch, dtype))
    return Ready(
        _calls(lambda _: compile_once(model, setting.device), setting, getattr(torch, dtype)), stored_bytes(model)
    )


def torchao_int8(model: nn.Module, setting: Setting) -> Ready:
    """Int8 weights, activations quantized for each token as they come, under torch.compile; the rest in bfloat16."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = model.to(setting.device, torch.bfloat16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    quantized = sum(type(linear.weight) not in (torch.Tensor, nn.Parameter) for linear in linears)
    run = _calls(lambda _: compile_once(model, setting.device), setting, torch.bfloat16)
    return Ready(run, stored_bytes(model), {"quantized": quantized})


def pt2e_int8(model: nn.Module, setting: Setting) -> Ready:
    """Static int8 by torch.export and inductor's x86 quantizer. Exported with `strict=True`: else nothing is quantized."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    facts: dict[str, Any] = {}

    def make(images: torch.Tensor) -> nn.Module:
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (images,), strict=True).module(), quantizer)
        count = len(images)
        with torch.no_grad():
            for batch in setting.images.repeat(-(-count // len(setting.images)), 1, 1, 1).split(count):
                if len(batch) == count:
                    prepared(batch)
        converted = convert_pt2e(prepared)
        nodes = [str(node.target) for node in converted.graph.nodes]
        facts["quantized"] = sum("quantize_per_tensor" in name and "dequantize" not in name for name in nodes)
        facts["weights"] = sum(t.nbytes for t in constants(converted).values())
        if not facts["quantized"]:
            raise RuntimeError("PT2E quantized nothing")
        return compile_once(converted, setting.device)

    return Ready(_calls(make, setting, torch.float32), stored_bytes(model), facts)


def quantized(model: nn.Module, setting: Setting, w_bits: int) -> nn.Module:
    """By dfqvit, simulated. Calibrated by minmax on a few images: time does not depend on it."""
    import dfqvit

    recipe = {"calib": setting.images[:4], "quantizer": "minmax", "rounding": "nearest", "acm": "none"}
    return dfqvit.quantize(model, w_bits, 8, runtime="simulated", **recipe)


def dfqvit(model: nn.Module, setting: Setting, w_bits: int, graph: bool = False) -> Ready:
    """The integer runtime, through a saved file."""
    import dfqvit
    from dfqvit.quantization.layers import QuantLinear

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        dfqvit.save(quantized(model, setting, w_bits), path)
        loaded = dfqvit.load(path, setting.device, runtime="integer", cuda_graph=graph)
        size = path.stat().st_size
    layers = sum(isinstance(module, QuantLinear) for module in loaded.modules())
    blocks = sum(type(module).__name__.startswith("Integer") for module in loaded.modules())
    return Ready(
        _calls(lambda _: loaded, setting, torch.float32), size, {"quantized": layers, "integer_blocks": blocks}
    )


def stored_bytes(model: nn.Module) -> int:
    """Of the state_dict as torch.save writes it, which also knows torchao's tensors."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def constants(graph_module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that the graph reads; its state_dict still has the float weights beside them."""
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    return {name: operator.attrgetter(name)(graph_module) for name in names}


def compile_once(model: nn.Module, device: str) -> Any:
    """torch.compile for one batch size: on CPUs with the weights frozen and packed, on GPUs with CUDA graphs."""
    torch._dynamo.reset()
    torch._inductor.config.freezing = device == "cpu"
    mode = None if device == "cpu" else "reduce-overhead"
    return torch.compile(model, mode=mode, dynamic=False)


def _calls(
    make: Callable[[torch.Tensor], Any], setting: Setting, dtype: torch.dtype
) -> Callable[[torch.Tensor], Callable[[], Any]]:
    """`Ready.at` for what `make` gives; the images are on the device in the contender's own type beforehand."""

    def at(images: torch.Tensor) -> Callable[[], Any]:
        x = images.to(setting.device, dtype)
        function = make(x)

        def call() -> Any:
            with torch.no_grad():
                y = function(x)
            if setting.device == "cuda":
                torch.cuda.synchronize()
            return y

        return call

    return at
