"""ONNX with quantize/dequantize (QDQ) nodes, the form that ONNX Runtime and OpenVINO take quantized models in.

The simulated model is rebuilt with layers that say the same arithmetic in ONNX's own operators, then goes through
`torch.onnx.export`: activations as `QuantizeLinear`/`DequantizeLinear` to uint8, weights as int8 initialisers with a
`DequantizeLinear` of one scale a column, INT4 for those of 4 bits or fewer, the ACM as an `Add`. No float weight is stored.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import DfqvitError, UsageError, first_line, is_whole
from ..kernels.pack_weight import unpack_weight
from ..models.adapters import flattened
from ..models.network import NetworkSpec
from ..quantization.attention import AttentionOperands
from ..quantization.layers import QuantLinear, QuantPatchProjection, check_tokens, quantized_layers
from ..quantization.quantizers import ActivationQuantizer
from ..runtime.record import QuantizationRecord
from ..version import __version__
from .atomic import atomic
from .file import as_path
from .rebuild import held, rebuild

OPSET = 21  # the default, and the first that has INT4
LEAST_OPSET, GREATEST_OPSET = 18, 23  # of what was tried; torch's exporter writes 18 and converts from there
NEEDED = ("onnx", "onnxscript")  # the packages of the extra `export`
EXACT = "session.x64quantprecision"  # ONNX Runtime's option: no product overflows on x86 processors without VNNI
_INT4 = 4
_ZERO_POINT = ".zero_point"


def export_onnx(qmodel: nn.Module, path: str | Path, *, int4: bool = True, opset: int = OPSET) -> dict[str, Any]:
    """Writes a quantized model as ONNX with QDQ nodes, atomically; images [batch, C, H, W] to logits, any batch size where torch
    can export that; a warning tells where not.

    Forward hooks are not kept; a warning names them. A network's outputs are named as its dict names them, or "output_0" and so
    on. Its shapes may not depend on values: what selects boxes (NMS) must stay outside.

    ONNX Runtime adds pairs of int8 products in 16 bits on x86 processors without VNNI, where they overflow (logits were 6 % off):
    there give its session the option `session.x64quantprecision=1`.

    Args:
        qmodel: from `dfqvit.quantize` or `dfqvit.load`; left as it was.
        path: the .onnx file; replaced if it exists.
        int4: weights of 4 bits or fewer become INT4 (two in a byte); False stores them as int8, for runtimes that know no INT4.
        opset: version of ONNX's operators, 18 to 23; INT4 needs 21.

    Returns:
        What was written: `bytes`, `opset`, `nodes` (count by operator), `weights` (count by data type).

    Raises:
        UsageError: no quantized model, or one that was changed since so that `load` could not rebuild it; an opset that does not
            fit; or a package of the extra `export` is missing.
        DfqvitError: torch could not export the model.
    """
    path = as_path(path)
    record, tensors = held(qmodel, "export_onnx")
    if not is_whole(opset) or not LEAST_OPSET <= opset <= GREATEST_OPSET:
        raise UsageError(f"opset was {opset!r}; it may be {LEAST_OPSET} to {GREATEST_OPSET}")
    narrow = any(layer.packed_bits <= _INT4 for layer in quantized_layers(qmodel).values())
    if int4 and narrow and opset < OPSET:
        raise UsageError(
            f"opset was {opset}; weights of {_INT4} bits or fewer need {OPSET} as INT4, so give int8 for them (int4=False)"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or not hasattr(torch.onnx, "ops"):
        wanted = missing[0] if missing else "torch 2.8 or newer"
        raise UsageError(f"export to ONNX needs {wanted}; install dfqvit[export]")
    import onnx

    proto = _to_onnx(qdq_model(record, tensors, opset), record, int4, opset)
    onnx.checker.check_model(proto, full_check=True)
    count = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not count.dim_param:
        warnings.warn(
            f"torch could export this {type(qmodel).__name__} for {count.dim_value} images at a time alone, not for any number: "
            "the file takes as many",
            stacklevel=2,
        )
    with atomic(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    nodes = [node.op_type for node in proto.graph.node]
    kinds = {onnx.TensorProto.INT8: "INT8", onnx.TensorProto.INT4: "INT4"}
    of_weights = (each for each in proto.graph.initializer if not each.name.endswith(_ZERO_POINT))
    weights = [kinds[each.data_type] for each in of_weights if each.data_type in kinds]
    return {
        "bytes": path.stat().st_size,
        "opset": opset,
        "nodes": {name: nodes.count(name) for name in sorted(set(nodes))},
        "weights": {name: weights.count(name) for name in sorted(set(weights))},
    }


def qdq_model(record: QuantizationRecord, tensors: Mapping[str, torch.Tensor], opset: int) -> nn.Module:
    """The model that `rebuild` gives, with quantizers that are ONNX's; it can be exported, not called."""
    model = rebuild(record, tensors)
    for module in list(model.modules()):
        if isinstance(module, ActivationQuantizer):
            module.register_buffer("zero", module.zero_point.to(torch.uint8))
            module.bounds = module.ends()  # type: ignore[assignment]
            module.opset = opset  # type: ignore[assignment]
            module.__class__ = _QdqActivation
        elif isinstance(module, QuantLinear):
            integers = unpack_weight(module.weight_packed, module.packed_bits, module.in_features)
            module.register_buffer("weight_integers", integers.T.contiguous())
            module.register_buffer("factors", module.factor)
            module.opset = opset
            module.__class__ = _QdqPatchProjection if isinstance(module, QuantPatchProjection) else _QdqLinear
        elif isinstance(module, AttentionOperands):
            module.opset = opset  # type: ignore[assignment]
            module.register_buffer("one", torch.ones(()))
            module.register_buffer("none", torch.zeros((), dtype=torch.uint8))
            module.__class__ = _QdqAttentionOperands
        if getattr(module, "fused_attn", False):  # in one function, of which the exporter has no form for 5 dimensions
            module.fused_attn = False  # type: ignore[assignment]
        if isinstance(module._buffers.get("acm"), torch.Tensor):
            module.acm = module.acm.float()
    return model


def _quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, opset: int) -> torch.Tensor:
    """A node: x rounded half to even, clamped to 0..255."""
    symbolic = torch.onnx.ops.symbolic
    return symbolic("QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape, version=opset)


def _dequantize(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, opset: int) -> torch.Tensor:
    """A node: the way back."""
    symbolic = torch.onnx.ops.symbolic
    return symbolic("DequantizeLinear", (q, scale, zero), dtype=torch.float32, shape=q.shape, version=opset)


class _QdqActivation(ActivationQuantizer):
    zero: torch.Tensor
    bounds: tuple[float, float]  # of the grid
    opset: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grid_bits < 8:  # ONNX clamps to the whole of uint8, so x is clamped to a narrower grid before
            x = x.clamp(*self.bounds)
        q = _quantize(x, self.scale, self.zero, self.opset)
        if self.table is not None:
            q = self.table[q.long()]
        return _dequantize(q, self.scale, self.zero, self.opset)


class _QdqLinear(QuantLinear):
    weight_integers: torch.Tensor  # int8 [in_features, out_features]
    factors: torch.Tensor | None  # float32 [in_features]
    opset: int

    def product(self, x: torch.Tensor) -> torch.Tensor:
        check_tokens(self.acm, x)
        if self.factors is not None:
            x = x / self.factors
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight_integers, self.weight_scale),
            {"axis": 1},
            dtype=torch.float32,
            shape=self.weight_integers.shape,
            version=self.opset,
        )
        y = self.input(x) @ weight
        if self.bias is not None:
            y = y + self.bias
        return y if self.acm is None else y + self.acm


class _QdqPatchProjection(QuantPatchProjection, _QdqLinear):
    """Cuts patches as the former does, and multiplies them as the latter."""

    by_pixels = False  # `weight_integers` has the order of the packed weight


class _QdqAttentionOperands(AttentionOperands):
    one: torch.Tensor
    none: torch.Tensor
    opset: int

    def quantized_keys(self, k: torch.Tensor) -> torch.Tensor:
        return self.k(k.mT)  # runtimes fuse a product whose operands come from QDQ nodes directly

    def rounded(self, shares: torch.Tensor) -> torch.Tensor:
        return _dequantize(_quantize(shares, self.one, self.none, self.opset), self.one, self.none, self.opset)


def _to_onnx(model: nn.Module, record: QuantizationRecord, int4: bool, opset: int) -> Any:
    """The checked-in-memory ModelProto."""
    image = torch.zeros(2, *record.preprocessing.input_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter, about torch's own internals
        try:
            program = torch.onnx.export(
                model,
                (image,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=_names(model, image) if isinstance(record.spec, NetworkSpec) else ["logits"],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            said = _first_cause(error)
            if isinstance(record.spec, NetworkSpec):
                said += "; a network must give tensors whose shapes do not depend on values (no NMS inside)"
            raise DfqvitError(f"torch could not export the model: {said}") from error
    assert program is not None
    proto = program.model_proto
    if int4:
        _narrow(proto, {name: layer.packed_bits for name, layer in quantized_layers(model).items()})
    _add_zero_points(proto)
    for item in (*proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]  # torch's stack traces, which name files of this machine
    for key, value in {"dfqvit_version": __version__, "dfqvit_record": json.dumps(record.to_dict())}.items():
        proto.metadata_props.add(key=key, value=value)
    return proto


def _first_cause(error: BaseException) -> str:
    """The first line of the error that others came of."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _names(network: nn.Module, images: torch.Tensor) -> list[str]:
    """Of a network's outputs, as the float structure gives them."""
    found = network.dfqvit_spec.build()(images)  # type: ignore[operator,union-attr]
    if isinstance(found, dict) and all(isinstance(value, torch.Tensor) for value in found.values()):
        return [str(name) for name in found]
    return [f"output_{index}" for index in range(len(flattened(found)))]


def _add_zero_points(proto: Any) -> None:
    """Writes out the zero points of int8 weights, in place: each a tensor of its own.

    ONNX takes none for zero. But ONNX Runtime with the option `EXACT` writes a scalar in its place, which it then refuses, and it
    cannot do with one that weights share.
    """
    import onnx

    weights = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2 and node.input[0] in weights:
            count, name = weights[node.input[0]].dims[-1], node.input[0] + _ZERO_POINT
            node.input.append(name)
            proto.graph.initializer.append(
                onnx.helper.make_tensor(name, onnx.TensorProto.INT8, [count], bytes(count), raw=True)
            )


def _narrow(proto: Any, bits: dict[str, int]) -> None:
    """Turns the int8 initialisers of layers of 4 bits or fewer into INT4, in place."""
    import onnx

    narrow = {f"{name}.weight_integers" for name, width in bits.items() if width <= _INT4}
    for tensor in proto.graph.initializer:
        if tensor.name in narrow:
            nibbles = onnx.numpy_helper.to_array(tensor).flatten().view("uint8") & 15
            if len(nibbles) % 2:
                nibbles = np.append(nibbles, np.uint8(0))
            packed = nibbles[0::2] | nibbles[1::2] << 4
            tensor.CopyFrom(
                onnx.helper.make_tensor(tensor.name, onnx.TensorProto.INT4, tensor.dims, packed.tobytes(), raw=True)
            )
    for info in proto.graph.value_info:
        if info.name in narrow:
            info.type.tensor_type.elem_type = onnx.TensorProto.INT4
