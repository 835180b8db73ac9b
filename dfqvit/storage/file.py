"""One .safetensors file for a quantized model: packed weights, scales, zero points, ACM, and what rebuilds the structure.

The file's metadata has one entry, `dfqvit`: JSON with `format_version`, `record` (see `QuantizationRecord`) and `sha256`
over all tensors and the rest of the JSON. Nothing is pickled. The tensors are the quantized model's state_dict, so their
names are timm's, with `weight_packed` and `weight_scale` in place of the `weight` of a quantized layer; weights of uneven levels
stand there as places among these (see `quantization.levels`). Beside them stand, under their names too, the tables that a
structure computes and no state_dict holds, where they are not as it computes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from ..errors import DfqvitError, UsageError, first_line
from ..models.device import expect_device
from ..models.frame import undisturbed
from ..models.network import Build, NetworkSpec, trusted
from ..quantization.model import quantized
from ..runtime import check_runtime, set_runtime
from ..runtime.cuda_graph import capture_graphs, check_device
from ..runtime.record import QuantizationRecord, QuantizedModel
from ..synthesis.writing import checksum, write_tensors
from ..version import __version__
from .rebuild import UNFIT, held, rebuild

FORMAT_VERSION = 3
_READ = (2, 3)  # 2: no uneven levels; 1: a checksum over the tensors alone


def save(qmodel: nn.Module, path: str | Path, *, overwrite: bool = True) -> Path:
    """Writes a model from `quantize` (or `load`) to `path`, atomically. Forward hooks are not kept; a warning names them.

    Args:
        qmodel: the quantized model, on any device.
        path: the .safetensors file to write.
        overwrite: replaces a file that is there; False refuses to.

    Returns:
        The path.

    Raises:
        UsageError: the model was not quantized by dfqvit, or was changed since so that `load` could not rebuild it; or there
            is a file and `overwrite` is False.
        OSError: the file cannot be written; one that was there is as it was.
    """
    path = as_path(path)
    if not overwrite and path.exists():
        raise UsageError(f"path was '{path}', which exists already; give overwrite=True to replace it")
    if path.is_dir():
        raise UsageError(f"path was '{path}', which is a folder; give the file, such as '{path / 'model.safetensors'}'")
    record, tensors = held(qmodel, "save")
    header = {
        "format_version": FORMAT_VERSION,
        "dfqvit_version": __version__,
        "record": record.to_dict(),
    }
    header["sha256"] = checksum(header, tensors)
    write_tensors(path, _apart(tensors), {"dfqvit": json.dumps(header, sort_keys=True)})
    return path


def as_path(path: Any) -> Path:
    """The argument `path`; UsageError unless it names a file as text or a Path does."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"path was {path!r}; it may be a str or a Path")
    return Path(path)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, each with memory of its own, which safetensors asks for: some models hold one parameter at two places."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    runtime: str = "auto",
    *,
    cuda_graph: bool = False,
    build: Build | None = None,
) -> QuantizedModel:
    """The quantized model in `path`, in eval mode, giving the same logits bit for bit as the one that was saved.

    Args:
        path: a file that `save` wrote.
        device: where the model goes.
        runtime: "integer" runs the blocks as chains of integer operators (see `runtime`), "simulated" in float with rounded
            operands, layer by layer, so that hooks see every layer; "auto" is "integer" where there are kernels: on CPUs
            with dfqvit._C, on GPUs with Triton.
        cuda_graph: on a GPU, the first call with a batch size captures a CUDA graph, which later calls replay: fewer
            launches, so less latency; each size keeps its memory. See docs/inference.md.
        build: of a network that is not timm's: the function, or "module:function", that makes its structure. What a file names
            is not imported without it, but where dfqvit itself has it.

    Returns:
        The model: float images [B, C, H, W], normalised, to float32 logits [B, classes], or to what a network gives.

    Raises:
        UsageError: there is no such file or device; cuda_graph on a CPU; or a network without `build`.
        DfqvitError: the file is not dfqvit's, is of a newer format, is truncated or was altered.
    """
    check_runtime(runtime)
    device = expect_device("device", device)
    if cuda_graph:
        check_device(device)
    record, tensors = read(path)
    with undisturbed():
        spec = trusted(record.spec, str(path), build)
    try:
        with undisturbed():
            model = rebuild(replace(record, spec=spec), tensors)
    except UNFIT as error:
        raise DfqvitError(f"'{path}' does not fit the model it names: {first_line(error)}") from error
    model = model.to(device)
    set_runtime(model, runtime)
    quantized(model, QuantizedModel)
    if cuda_graph:
        capture_graphs(model)
    return cast(QuantizedModel, model)


def read(path: str | Path) -> tuple[QuantizationRecord, dict[str, torch.Tensor]]:
    """The record and the tensors of a file, checked against its checksum; see `load` for the errors."""
    path = as_path(path)
    if path.is_dir():
        raise UsageError(
            f"file was '{path}', which is a folder; give the file in it, such as '{path / 'model.safetensors'}'"
        )
    if not path.is_file():
        raise UsageError(f"file was '{path}'; there is no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "dfqvit" not in metadata:
                raise DfqvitError(f"'{path}' is a safetensors file, but not of a model that dfqvit quantized")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, DfqvitError):
            raise
        raise DfqvitError(
            f"'{path}' is no whole safetensors file (truncated, damaged or of another kind): {error}"
        ) from error
    try:
        header = json.loads(metadata["dfqvit"])
        version = header["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise DfqvitError(f"'{path}' has a damaged dfqvit header") from error
    if version not in _READ:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "upgrade dfqvit" if newer else "quantize again"
        raise DfqvitError(
            f"'{path}' has format version {version}; dfqvit {__version__} reads versions {_READ[0]} and {_READ[1]}: {advice}"
        )
    if header.pop("sha256", None) != checksum(header, tensors):
        raise DfqvitError(f"'{path}' was altered or damaged: it does not match its checksum")
    return _record(path, header), tensors


def _record(path: Path, header: Mapping[str, Any]) -> QuantizationRecord:
    try:
        record = QuantizationRecord.from_dict(header["record"])
    except UNFIT as error:
        raise DfqvitError(f"'{path}' has a damaged dfqvit header: {first_line(error)}") from error
    if isinstance(record.spec, NetworkSpec):
        return record
    name = record.spec.architecture
    if not isinstance(name, str) or not timm.is_model(name):
        raise DfqvitError(
            f"'{path}' names the model '{name}', which this timm ({timm.__version__}) does not have; where it is a model of "
            "your own, import the module that registers it first"
        )
    return record


def sizes(path: str | Path) -> dict[str, int]:
    """Bytes of a saved file by what they are, its header among the rest; OSError where there is none."""
    with open(path, "rb") as file:  # eight bytes say how long the JSON is that says where each tensor lies
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kinds = {"packed weights": 0, "ACM": 0}
    for key, told in header.items():
        if kind := {"weight_packed": "packed weights", "acm": "ACM"}.get(key.rpartition(".")[2]):
            begin, end = told["data_offsets"]
            kinds[kind] += end - begin
    return kinds | {"everything else": Path(path).stat().st_size - sum(kinds.values())}
