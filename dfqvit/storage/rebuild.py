"""A quantized model as its record and its tensors, which a file or an export holds; and the model that is made of them again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..calibration.correction import STORED
from ..calibration.levels import is_table
from ..errors import UsageError, first_line
from ..models import ModelSpec, Preprocessing
from ..models.adapters import find_adapter, is_network
from ..models.foreign import expect_unwrapped
from ..models.frame import undisturbed
from ..models.network import NetworkSpec
from ..models.preprocessing import image_size
from ..models.spec import absent_in_eval, buffer_names, dotted, only_in, other_settings, said
from ..models.tables import changed_tables, tables_of
from ..quantization.layers import QuantLinear, allocate, quantized_layers
from ..quantization.levels import levels_of, narrowed, spaced_unevenly, widened
from ..quantization.model import BITS, quantized, state_of
from ..quantization.prepared import Prepares
from ..runtime.record import QuantizationRecord

# What values that make no sense raise, here and in timm.
UNFIT = (LookupError, RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError, AttributeError)
_PACKAGE = __name__.split(".")[0] + "."
_RUNTIME = _PACKAGE + "runtime."
_PACKED = ".weight_packed"


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


def rebuild(record: QuantizationRecord, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A quantized model from its record, its state_dict and its `changed_tables`; simulated, in eval mode, on the CPU."""
    model = _structure(record, tensors)
    tensors = _widened(model, tensors)
    tables = tensors.keys() & tables_of(model).keys()
    for name in tables:
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, tensors[name])
    state = {key: value for key, value in tensors.items() if key not in tables}
    aliases = {alias: tensors[key] for alias, key in _aliases(model).items() if key in tensors}
    model.load_state_dict(state | aliases)
    _expect_levels(model)
    if isinstance(record.spec, ModelSpec):
        model.dfqvit_spec = record.spec  # type: ignore[assignment]
        record.preprocessing.write_to(model)
    model.dfqvit_record = replace(record, spec=model.dfqvit_spec)  # type: ignore[assignment,arg-type]
    return model.eval().requires_grad_(False)


def _narrowed(qmodel: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model as a file holds them."""
    found = dict(tensors)
    key = ""
    try:
        _expect_levels(qmodel)
        for key, layer, levels in _uneven(qmodel):
            found[key] = narrowed(tensors[key], levels, layer.w_bits, layer.in_features)
    except ValueError as error:
        where = f"'{key}': {error}" if key else str(error)
        raise UsageError(f"qmodel was changed after it was quantized ({where}), and no file could hold it") from error
    return found


def _expect_levels(model: nn.Module) -> None:
    """ValueError where a table of what a layer takes is none."""
    for name, layer in quantized_layers(model).items():
        if layer.input.table is not None and not is_table(layer.input.table, layer.input.bits):
            raise ValueError(f"'{name}.input.table' has no levels of {layer.input.bits} bits")


def _widened(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `_narrowed`."""
    wide = {
        key: widened(tensors[key], levels, layer.w_bits, layer.in_features) for key, layer, levels in _uneven(model)
    }
    return {**tensors, **wide}


def _uneven(model: nn.Module) -> Iterator[tuple[str, QuantLinear, torch.Tensor]]:
    """(key, layer, levels) of each packed weight that a file holds in fewer bits."""
    for name, layer in quantized_layers(model).items():
        if spaced_unevenly(layer.levels, layer.w_bits):
            yield name + _PACKED, layer, levels_of(layer.levels, layer.w_bits)


def _aliases(model: nn.Module) -> dict[str, str]:
    """{name of a tensor: its first name} where a network holds a module, such as its backbone, at more than one place."""
    first: dict[nn.Module, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False) if is_network(model) else ():
        if first.setdefault(module, name) != name:
            found |= {f"{name}.{key}": f"{first[module]}.{key}" for key in module.state_dict()}
    return found


def _structure(
    record: QuantizationRecord, tensors: Mapping[str, torch.Tensor], device: torch.device | str | None = None
) -> nn.Module:
    """What `rebuild` loads the tensors into."""
    model = record.spec.build(device)
    adapter = find_adapter(model)
    adapter.convert(record.recipe, [key.removesuffix(_PACKED) for key in tensors if key.endswith(_PACKED)])
    allocate(model)
    for index in record.acm_blocks:
        adapter.set_acm(index, torch.zeros((), dtype=STORED))
    for name, module in model.named_modules():
        if isinstance(module._buffers.get("acm"), torch.Tensor):
            module.acm = torch.zeros_like(tensors[f"{name}.acm"])
        if isinstance(module, QuantLinear) and f"{name}.exponents" in tensors:
            module.exponents = torch.zeros_like(tensors[f"{name}.exponents"])
        if isinstance(module, QuantLinear) and f"{name}.input.table" in tensors:
            module.input.table = torch.zeros_like(tensors[f"{name}.input.table"])
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
    first, device = "", None if tables_of(qmodel) else "meta"
    for found in specs:
        candidate = replace(record, spec=found[0], preprocessing=found[1])
        try:
            with undisturbed():
                twin = _structure(candidate, tensors, device)
                difference = _difference(qmodel, tensors, twin)
        except UNFIT as error:
            difference = first_line(error)
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
    modules, built = (dict(each.named_modules(remove_duplicate=False)) for each in (qmodel, twin))
    for name, module in built.items():
        ours = modules.get(name)
        if ours is None:
            if not absent_in_eval(module, None):
                return f"'{name}' is not there; load would build a {_kind(module).__name__}"
            continue
        absent = absent_in_eval(ours, module)
        if name and not absent and _kind(ours) is not _kind(module):
            return f"'{name}' is a {_kind(ours).__name__}; load would build a {_kind(module).__name__}"
        for key in sorted(vars(ours).keys() - vars(module).keys()):
            if callable(getattr(type(ours), key, None)):
                return f"{said(name)} has a {key} of its own; load would build none"
        for key, found, value in () if absent else other_settings(ours, module):
            return f"'{dotted(name, key)}' is {found!r}; load would build {value!r}"
    for name, ours in only_in(modules, built):
        return f"'{name}' is a {_kind(ours).__name__}; load would build none"
    for name in sorted(buffer_names(twin) - buffer_names(qmodel)):
        return f"'{name}' is not there; load would build a buffer"
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
