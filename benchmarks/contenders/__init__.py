"""What inference.py times: one model made ready by dfqvit, by torch, or by a peer. Each builder imports its library itself.

To add one: a function (model, Setting) -> Ready in one of the modules, and a line in CONTENDERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Setting:
    """What a builder has to know beside the model."""

    device: str
    threads: int
    images: torch.Tensor  # a few, [n, C, H, W] on the CPU, for static calibration


@dataclass
class Ready:
    """A model ready to be called."""

    at: Callable[[torch.Tensor], Callable[[], Any]]  # images of one batch size -> a call that gives their logits
    weights: int  # bytes, as stored
    facts: dict[str, Any] = field(default_factory=dict)  # such as how many nodes really are quantized


@dataclass(frozen=True)
class Contender:
    """Where a builder is, and what it needs."""

    where: str  # module:function
    options: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_not(self, device: str) -> str:
        """Why it cannot take part, or ""."""
        if device not in self.devices:
            return f"not on {device}"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed" if missing else ""

    def build(self, model: nn.Module, setting: Setting) -> Ready:
        """The model made ready; whatever the library raises comes through."""
        module, function = self.where.split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(model, setting, **self.options)


CPU = ("cpu",)
CONTENDERS = {
    "eager-float32": Contender("pytorch:eager", {"dtype": "float32"}),
    "eager-bf16": Contender("pytorch:eager", {"dtype": "bfloat16"}),
    "compile-float32": Contender("pytorch:compiled", {"dtype": "float32"}),
    "compile-bf16": Contender("pytorch:compiled", {"dtype": "bfloat16"}),
    "torchao-int8": Contender("pytorch:torchao_int8", packages=("torchao",)),
    "pt2e-int8": Contender("pytorch:pt2e_int8", packages=("torchao",), devices=CPU),
    "onnxruntime-float32": Contender("graphs:onnxruntime", {"int8": False}, ("onnx", "onnxruntime", "onnxscript"), CPU),
    "onnxruntime-int8": Contender("graphs:onnxruntime", {"int8": True}, ("onnx", "onnxruntime", "onnxscript"), CPU),
    "openvino-float32": Contender("graphs:openvino", {"precision": "f32"}, ("openvino",), CPU),
    "openvino": Contender("graphs:openvino", {}, ("openvino",), CPU),  # its default: bf16 where the processor has it
    "openvino-int8": Contender("graphs:openvino", {"int8": True}, ("openvino", "nncf"), CPU),
    **{
        f"export-w{bits}a8-{runtime}": Contender(
            "graphs:exported", {"runtime": runtime, "w_bits": bits}, ("onnx", "onnxscript", runtime), CPU
        )
        for runtime in ("onnxruntime", "openvino")
        for bits in (8, 4)
    },
    "dfqvit-w8a8": Contender("pytorch:dfqvit", {"w_bits": 8}),
    "dfqvit-w4a8": Contender("pytorch:dfqvit", {"w_bits": 4}),
    "dfqvit-w8a8-graph": Contender("pytorch:dfqvit", {"w_bits": 8, "graph": True}, devices=("cuda",)),
    "dfqvit-w4a8-graph": Contender("pytorch:dfqvit", {"w_bits": 4, "graph": True}, devices=("cuda",)),
}
