"""One .safetensors file for a quantized model: packed weights, scales, zero points, ACM, and what rebuilds the structure.

The file's metadata has one entry, `dfqvit`: JSON with `format_version`, `record` (see `QuantizationRecord`) and `sha256`
over all tensors and the rest of the JSON. Nothing is pickled. The tensors are the quantized model's state_dict, so their
names are timm's, with `weight_packed` and `weight_scale` in place of the `weight` of a quantized layer; weights of uneven levels
stand there as places among these (see `quantization.levels`). Beside them stand, under
their names too, the tables that a structure computes and no state_dict holds, where they are not as it computes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from ..calibration import freeze
from ..calibration.correction import STORED
from ..errors import DfqvitError, UsageError
from ..models import ModelSpec, Preprocessing
from ..models.adapters import find_adapter, is_network
from ..models.device import expect_device
from ..models.foreign import expect_unwrapped
from ..models.frame import undisturbed
from ..models.network import Build, NetworkSpec, trusted
from ..models.preprocessing import image_size
from ..models.spec import ABSENT_IN_EVAL, dotted, said, settings
from ..quantization.layers import QuantLinear
from ..quantization.levels import levels_of, narrowed, spaced_unevenly, widened
from ..quantization.model import BITS, file_bytes, quantized, state_of
from ..quantization.prepared import Prepares
from ..runtime import check_runtime, set_runtime
from ..runtime.cuda_graph import capture_graphs, check_device
from ..runtime.record import QuantizationRecord, QuantizedModel
from ..synthesis.writing import write_tensors
from ..version import __version__

_PACKAGE = __name__.split(".")[0] + "."
_RUNTIME = _PACKAGE + "runtime."
# What values that make no sense raise, here and in timm.
_UNFIT = (LookupError, RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError, AttributeError)
_PACKED = ".weight_packed"
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


def held(qmodel: nn.Module, taker: str) -> tuple[QuantizationRecord, dict[str, torch.Tensor]]:
    """What `rebuild` makes a quantized model from, as it is now: its record, and its tensors on the CPU.

    UsageError, which names the function `taker`, when nothing could rebuild it; see `as_it_is`.
    """
    expect_unwrapped("qmodel", qmodel)
    record = getattr(qmodel, "dfqvit_record", None)
    if not isinstance(record, QuantizationRecord):
        raise UsageError(
            f"qmodel has no quantization record; {taker} takes what dfqvit.quantize or dfqvit.load returned"
        )
    if isinstance(record.spec, NetworkSpec) and record.spec.function is None:
        raise UsageError(
            "qmodel is a network that was quantized without build; give dfqvit.quantize build='module:function'"
        )
    aliases = _aliases(qmodel)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state_of(qmodel).items() if k not in aliases}
    record, twin = as_it_is(qmodel, record, tensors)
    return record, _narrowed(qmodel, tensors) | changed_tables(qmodel, twin)


def _narrowed(qmodel: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model as a file holds them."""
    found = dict(tensors)
    for key, layer, levels in _uneven(qmodel):
        try:
            found[key] = narrowed(tensors[key], levels, layer.w_bits, layer.in_features)
        except ValueError as error:
            raise UsageError(
                f"qmodel was changed after it was quantized ('{key}': {error}), and no file could hold it"
            ) from error
    return found


def _widened(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `_narrowed`."""
    wide = {
        key: widened(tensors[key], levels, layer.w_bits, layer.in_features) for key, layer, levels in _uneven(model)
    }
    return {**tensors, **wide}


def _uneven(model: nn.Module) -> Iterator[tuple[str, QuantLinear, torch.Tensor]]:
    """(key, layer, levels) of each packed weight that a file holds in fewer bits."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and spaced_unevenly(layer.levels, layer.w_bits):
            yield name + _PACKED, layer, levels_of(layer.levels, layer.w_bits)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, each with memory of its own, which safetensors asks for: some models hold one parameter at two places."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _aliases(model: nn.Module) -> dict[str, str]:
    """{name of a tensor: its first name} where a network holds a module, such as its backbone, at more than one place."""
    first: dict[nn.Module, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False) if is_network(model) else ():
        if first.setdefault(module, name) != name:
            found |= {f"{name}.{key}": f"{first[module]}.{key}" for key in module.state_dict()}
    return found


def _tables(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a structure computes and no state_dict holds, such as rotary embeddings, by name; none of our layers'."""
    return {
        dotted(place, name): tensor
        for place, module in model.named_modules()
        if not isinstance(module, QuantLinear)
        for name, tensor in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }


def changed_tables(qmodel: nn.Module, twin: nn.Module) -> dict[str, torch.Tensor]:
    """The tables with other values than in `twin`, as `load` builds it: a float model in half precision rounds its own. On the CPU.

    One of another shape is not among them: such tables are made anew in a call.
    """
    ours, computed = _tables(qmodel), _tables(twin)
    found = {}
    for name in ours.keys() & computed.keys():
        table = ours[name].detach().cpu().contiguous()
        same = table.dtype == computed[name].dtype and torch.equal(table, computed[name])
        if table.shape == computed[name].shape and not same:
            found[name] = table
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
    except _UNFIT as error:
        raise DfqvitError(
            f"'{path}' does not fit the model it names: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    model = model.to(device)
    set_runtime(model, runtime)
    quantized(model, QuantizedModel)
    if cuda_graph:
        capture_graphs(model)
    return cast(QuantizedModel, model)


def rebuild(record: QuantizationRecord, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A quantized model from its record, its state_dict and its `changed_tables`; simulated, in eval mode, on the CPU."""
    model = _structure(record, tensors)
    tensors = _widened(model, tensors)
    tables = tensors.keys() & _tables(model).keys()
    for name in tables:
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, tensors[name])
    state = {key: value for key, value in tensors.items() if key not in tables}
    aliases = {alias: tensors[key] for alias, key in _aliases(model).items() if key in tensors}
    model.load_state_dict(state | aliases)
    if isinstance(record.spec, ModelSpec):
        model.dfqvit_spec = record.spec  # type: ignore[assignment]
        record.preprocessing.write_to(model)
    model.dfqvit_record = replace(record, spec=model.dfqvit_spec)  # type: ignore[assignment,arg-type]
    return model.eval().requires_grad_(False)


def _structure(
    record: QuantizationRecord, tensors: Mapping[str, torch.Tensor], device: torch.device | str | None = None
) -> nn.Module:
    """What `rebuild` loads the tensors into."""
    model = record.spec.build(device)
    adapter = find_adapter(model)
    adapter.convert(record.recipe, [key.removesuffix(_PACKED) for key in tensors if key.endswith(_PACKED)])
    freeze(model, allocate_only=True)
    for index in record.acm_blocks:
        adapter.set_acm(index, torch.zeros((), dtype=STORED))
    for name, module in model.named_modules():
        if isinstance(module._buffers.get("acm"), torch.Tensor):
            module.acm = torch.zeros_like(tensors[f"{name}.acm"])
        if isinstance(module, QuantLinear) and f"{name}.exponents" in tensors:
            module.exponents = torch.zeros_like(tensors[f"{name}.exponents"])
        if isinstance(module, QuantLinear) and module.bias is None and f"{name}.bias" in tensors:
            like = tensors[f"{name}.bias"]  # a layer without one takes what is shifted out of the norm before it
            module.bias = nn.Parameter(torch.zeros_like(like, device=device or "cpu"), requires_grad=False)
    return quantized(model, *adapter.mixins)


def as_it_is(
    qmodel: nn.Module, record: QuantizationRecord, tensors: Mapping[str, torch.Tensor]
) -> tuple[QuantizationRecord, nn.Module]:
    """The record of a model as it is now, of another input size where that was set since, and what `load` would build of it.

    The latter is without values, but where there are tables, which its building computes.

    UsageError when nothing that `load` builds takes the tensors; a warning names modules with hooks, which no file holds.
    """
    spec, preprocessing, size = record.spec, record.preprocessing, image_size(qmodel)
    specs: list[tuple[Any, Preprocessing]] = [(spec, preprocessing)]
    if isinstance(spec, ModelSpec):
        specs += _resized(qmodel, spec, preprocessing, size)
    first, device = "", None if _tables(qmodel) else "meta"
    for found in specs:
        candidate = replace(record, spec=found[0], preprocessing=found[1])
        try:
            with undisturbed():
                twin = _structure(candidate, tensors, device)
                difference = _difference(qmodel, tensors, twin)
        except _UNFIT as error:
            difference = (str(error) or repr(error)).splitlines()[0]
        if not difference:
            record.expect_grid(*candidate.preprocessing.input_size[1:])
            if hooked := _hooked(qmodel, twin):
                warnings.warn(
                    f"qmodel has forward hooks on {', '.join(hooked)}, which the file does not hold: what they change, a loaded "
                    "model computes without",
                    stacklevel=4,
                )
            return candidate, twin
        first = first or difference
    raise UsageError(
        f"qmodel was changed after it was quantized ({first}), and load could not rebuild it; change the float model, and "
        "quantize that"
    )


def _resized(
    qmodel: Any, spec: ModelSpec, preprocessing: Preprocessing, size: tuple[int, int]
) -> list[tuple[Any, Preprocessing]]:
    """Of the input size that the model has now."""
    sized = replace(preprocessing, input_size=(preprocessing.input_size[0], *size))
    specs: list[tuple[Any, Preprocessing]] = [(spec.resized(img_size=size), sized)]
    noted = getattr(qmodel, "_model_args", {})  # timm's set_input_size writes there what it set
    changes = {key: noted[key] for key in ("window_size", "always_partition") if key in noted}
    if changes:
        specs.append((spec.resized(img_size=size, **changes), sized))
    return specs


def _difference(qmodel: nn.Module, tensors: Mapping[str, torch.Tensor], twin: nn.Module) -> str:
    aliases = _aliases(twin)
    wanted = {key: value for key, value in state_of(twin).items() if key not in aliases}
    for key in sorted((wanted.keys() | tensors.keys()) - {BITS}):
        have, need = (
            None if each is None else (tuple(each.shape), each.dtype) for each in (tensors.get(key), wanted.get(key))
        )
        if have != need:
            return f"'{key}' is {have or 'not there'}; load would build {need or 'none'}"
    modules = dict(qmodel.named_modules())
    for name, module in twin.named_modules():
        ours = modules.get(name)
        if ours is not None:
            absent = all(isinstance(each, ABSENT_IN_EVAL) for each in (ours, module))
            if name and not absent and _kind(ours) is not _kind(module):
                return f"'{name}' is a {_kind(ours).__name__}; load would build a {_kind(module).__name__}"
            for key in sorted(vars(ours).keys() - vars(module).keys()):
                if callable(getattr(type(ours), key, None)):
                    return f"{said(name)} has a {key} of its own; load would build none"
        for key, value in settings(module).items():
            found = settings(modules[name]).get(key, value) if name in modules else value
            if found != value:
                return f"'{dotted(name, key)}' is {found!r}; load would build {value!r}"
    return ""


def _hooked(qmodel: nn.Module, twin: nn.Module) -> list[str]:
    """The modules, by name, with forward hooks that are neither dfqvit's nor those of what `load` would build."""
    built, none = dict(twin.named_modules()), nn.Identity()
    return [said(name) for name, ours in qmodel.named_modules() if _hooks(ours) - _hooks(built.get(name, none))]


def _hooks(module: nn.Module) -> Counter[tuple[str, str]]:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    makers = [hook if hasattr(hook, "__qualname__") else type(hook) for hook in hooks]
    found = ((str(maker.__module__), maker.__qualname__) for maker in makers)
    return Counter(each for each in found if not each[0].startswith(_PACKAGE))


def _kind(module: nn.Module) -> type:
    """The class of a module as it was before the integer runtime took it."""
    kinds = type(module).__mro__
    return next(kind for kind in kinds if kind is not Prepares and not kind.__module__.startswith(_RUNTIME))


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
    except _UNFIT as error:
        raise DfqvitError(
            f"'{path}' has a damaged dfqvit header: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    if isinstance(record.spec, NetworkSpec):
        return record
    name = record.spec.architecture
    if not isinstance(name, str) or not timm.is_model(name):
        raise DfqvitError(
            f"'{path}' names the model '{name}', which this timm ({timm.__version__}) does not have; where it is a model of "
            "your own, import the module that registers it first"
        )
    return record


def sizes(qmodel: nn.Module) -> dict[str, int]:
    """Bytes of the saved tensors by what they are."""
    kinds = {"packed weights": 0, "ACM": 0, "everything else": 0}
    for key, size in file_bytes(qmodel).items():
        kind = (
            "packed weights" if key.endswith("weight_packed") else "ACM" if key.endswith(".acm") else "everything else"
        )
        kinds[kind] += size
    return kinds


def checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hexadecimal, of a file's tensors and of its JSON without `sha256`."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
