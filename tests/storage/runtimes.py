"""Other runtimes that run what `dfqvit export` wrote."""

from __future__ import annotations

import pytest


def onnx_session(path):
    """Of ONNX Runtime on the CPU, whose sums of int8 products overflow without VNNI unless they are asked not to."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
