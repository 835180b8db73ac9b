"""The contenders that take the model out of torch: ONNX Runtime and OpenVINO, on CPUs, at their best settings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import Ready, Setting


def onnxruntime(model: nn.Module, setting: Setting, int8: bool) -> Ready:
    """Exported anew for each batch size. int8: dynamic, of the MatMul and Gemm nodes."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    ready = Ready(lambda _: lambda: None, 0)

    def at(images: torch.Tensor) -> Callable[[], Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with torch.no_grad():
                torch.onnx.export(model, (images,), path, dynamo=True, external_data=False, verbose=False)
            if int8:
                given, path = path, Path(folder) / "int8.onnx"
                quantize_dynamic(
                    given, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
                )
                nodes = [node.op_type for node in onnx.load(path).graph.node]
                ready.facts["quantized"] = nodes.count("MatMulInteger")
            ready.facts["weights"] = path.stat().st_size
            return _session(path.read_bytes(), images, setting)

    ready.at = at
    return ready


def _session(graph: bytes, images: torch.Tensor, setting: Setting) -> Callable[[], Any]:
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, images.numpy()
    return lambda: session.run(None, {name: array})[0]


def openvino(model: nn.Module, setting: Setting, precision: str | None = None, int8: bool = False) -> Ready:
    """int8: NNCF's post-training quantization for transformers; what stays float is of the default precision."""
    import openvino as ov

    converted = ov.convert_model(model, example_input=setting.images[:1])
    converted.reshape([-1, *setting.images.shape[1:]])
    facts: dict[str, Any] = {}
    if int8:
        import nncf

        samples = [image[None].numpy() for image in setting.images]
        kind = nncf.ModelType.TRANSFORMER
        converted = nncf.quantize(converted, nncf.Dataset(samples), model_type=kind, subset_size=len(samples))
        facts["quantized"] = sum(node.get_type_name() == "FakeQuantize" for node in converted.get_ops())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(converted, path, compress_to_fp16=False)
        weights = os.path.getsize(path.with_suffix(".bin"))
    return Ready(_compiled(converted, setting, facts, precision), weights, facts)


def _compiled(
    graph: Any, setting: Setting, facts: dict[str, Any], precision: str | None = None
) -> Callable[[torch.Tensor], Callable[[], Any]]:
    import openvino as ov

    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": setting.threads}
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = precision

    def at(images: torch.Tensor) -> Callable[[], Any]:
        fixed = graph.clone()
        fixed.reshape(list(images.shape))
        compiled = ov.Core().compile_model(fixed, "CPU", config)
        facts["precision"] = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        request, array = compiled.create_infer_request(), images.numpy()
        return lambda: request.infer([array], share_inputs=True)[0]

    return at


def exported(model: nn.Module, setting: Setting, runtime: str, w_bits: int) -> Ready:
    """What `dfqvit export --onnx` writes, in another runtime."""
    from dfqvit.storage.export import export_onnx

    from .pytorch import quantized

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        facts: dict[str, Any] = {
            "quantized": export_onnx(quantized(model, setting, w_bits), path)["nodes"]["QuantizeLinear"]
        }
        graph = path.read_bytes()
    if runtime == "onnxruntime":
        return Ready(lambda images: _session(graph, images, setting), len(graph), facts)
    import openvino as ov

    return Ready(_compiled(ov.Core().read_model(graph), setting, facts), len(graph), facts)
