"""Operators with their constants given once, and the watch over what these were made from.

An operator that is called from Python finds its backend, checks and converts its arguments anew each time: tens of microseconds,
which at one image is as much as the product of a small layer. So layers and blocks bind operators to their constants (`Bind`):
through torch's dispatcher, where a trace, a mode or a transform sees them, or, where nothing watches, as compiled calls. Compiled
calls are kept only together with a `Watch` (csrc/module.cpp), which is asked before every use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..kernels import extension
from ..kernels.dispatch import Operator, asked_table

Call = Callable[..., torch.Tensor]
SOURCES = ("weight_packed", "acm")  # buffers of a frozen layer from which it makes others for its kernels
PREPARED = ("weight_blocked", "weight_sums", "acm_float")  # these
METHODS = "_methods"  # the attribute in which a module keeps what its classes' methods were
HOOKS = "_hooks_on_scaled"  # in which a model keeps what stands where values are scaled, and hooks there
_KEPT = ("_prepared", METHODS)  # of no copy
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
# Plain attributes that a block computes by.
_SETTINGS = (
    "eps", "num_heads", "head_dim", "scale", "approximate", "training", "bits", "packed_bits", "frozen", "steps", "rotate_half",
    "gate_last", "dilation", "padding", "padding_mode", "stride", "kernel_size", "groups", "shift_size", "window_size",
    "input_resolution", "dynamic_mask",
)  # fmt: skip
# Parts that a block may lack, and be given.
_ADDED = ("gate", "norm", "q_norm", "k_norm", "ls1", "ls2", "gamma_1", "gamma_2")
_ASKED = asked_table()
_PACKED = ("weight_packed", *PREPARED)  # the layer that owns these remakes them when they change


class Prepares(nn.Module):
    """Mixed in before a class that keeps prepared calls as `_prepared`: a copy makes its own, and so does the module itself where
    torch is about to move or load its tensors, which nothing else may hold then (torch.utils.swap_tensors)."""

    def _forget(self) -> None:
        for name in _KEPT:
            self.__dict__.pop(name, None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepared calls."""
        return {name: value for name, value in self.__dict__.items() if name not in _KEPT}


class Bind(Protocol):
    """Makes a function of the arguments at `places` from an operator and all its arguments."""

    def __call__(self, operator: Operator, arguments: tuple[Any, ...], places: tuple[int, ...]) -> Call: ...


def through_torch(operator: Operator, arguments: tuple[Any, ...], places: tuple[int, ...]) -> Call:
    """Binds by torch's dispatcher."""

    def call(*given: Any) -> torch.Tensor:
        return operator(*_filled(arguments, places, given))

    return call


def _filled(arguments: tuple[Any, ...], places: tuple[int, ...], given: tuple[Any, ...]) -> list[Any]:
    """All arguments of a call, those at `places` given."""
    filled = list(arguments)
    for place, value in zip(places, given, strict=True):
        filled[place] = value
    return filled


def compiled(operator: Operator, arguments: tuple[Any, ...], places: tuple[int, ...]) -> Call:
    """Binds the compiled backend of the CPU, which must be known to serve."""
    module, _ = extension.load()
    assert module is not None
    return module.PreparedCall(f"dfqvit_cpu::{operator.name}", arguments, list(places))


class Trying:
    """Binds by torch's dispatcher, and notes whether every call would have been the compiled backend's of the CPU."""

    def __init__(self) -> None:
        self.on_cpu = True

    def __call__(self, operator: Operator, arguments: tuple[Any, ...], places: tuple[int, ...]) -> Call:
        def call(*given: Any) -> torch.Tensor:
            filled = _filled(arguments, places, given)
            self.on_cpu &= operator.resolve(*filled).name == "cpu"
            return operator(*filled)

        return call


def watch(module: nn.Module, values: list[torch.Tensor], channels: int, dims: int = 3) -> Any:
    """The watch over a module whose constants were made from `values`, for inputs [..., channels] of `dims` dimensions."""
    compiled_module, _ = extension.load()
    assert compiled_module is not None
    places: list[tuple[dict[str, Any], str, Any]] = []
    empty: list[Any] = list(_GLOBAL_HOOKS)
    absent: list[tuple[dict[str, Any], str]] = []
    for child in module.modules():
        tables = (child._modules, child._parameters, child._buffers)
        places += [(table, name, value) for table in tables for name, value in table.items()]
        places += [(child.__dict__, name, child.__dict__[name]) for name in _SETTINGS if name in child.__dict__]
        places += [(child.__dict__, name, None) for name, value in child.__dict__.items() if value is None]
        if child is not module:
            empty += [getattr(child, name) for name in _HOOKS]
            absent.append((child.__dict__, "forward"))
    for child in (module, *module.children()):
        absent += [
            (table, name) for table in (child._modules, child._parameters) for name in _ADDED if name not in table
        ]
    packed = [child._buffers.get(SOURCES[0]) for child in module.modules()]
    counted = [tensor for tensor in packed if tensor is not None and not tensor.is_inference()]
    return compiled_module.Watch(values, counted, places, empty, absent, channels, dims)


def small_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module, without the packed weights."""
    return [
        tensor
        for child in module.modules()
        for table in (child._parameters, child._buffers)
        for name, tensor in table.items()
        if tensor is not None and name not in _PACKED
    ]


def preparing() -> bool:
    """Whether modules make and use prepared calls now: no backend is asked for by name, and torch.compile does not look on."""
    return not _ASKED and not torch.compiler.is_compiling()


def may_prepare(owner: nn.Module, x: torch.Tensor) -> bool:
    """Whether a module's calls could be compiled here and now.

    That takes a CPU, the compiled module, nobody who watches, and tensors that are what they are: a parametrization computes them
    anew at each look, of what no watch knows.
    """
    module, _ = extension.load()
    if module is None or x.device.type != "cpu" or module.watched():
        return False
    return not any("parametrizations" in child._modules for child in owner.modules())
