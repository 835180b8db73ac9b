"""What rebuilds a model's structure by timm, and the one check that it does: what is recorded can be loaded."""

from __future__ import annotations

import functools
import importlib
import json
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout
from timm.models import model_entrypoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from ..errors import UsageError, first_line
from .preprocessing import FEATURES, config_of, image_size

# Settings that change no output in eval mode.
_INERT = (
    "training",
    "fused_attn",
    "grad_checkpointing",
    "distilled_training",
    "inplace",
    "num_classes",  # the head says it
    "target_shift_size",  # the shift_size made of it counts
)
_INERT_NORM = ("momentum",)  # of batch normalisation, which reads it in train mode alone
# Beginnings of the names of methods that change no output of a model that is there.
_NO_PART = ("__", "init", "_init", "reset", "load", "_load", "extra_repr", "train", "no_weight_decay", "group_matcher")
_NO_FORWARD = ("_forward_unimplemented",)  # what torch.nn's containers have in its place
ABSENT_IN_EVAL = (nn.Dropout, DropPath, PatchDropout, nn.Identity)
_PLACE = ("device", "dtype")  # keywords of create_model that say where, not what
_CALLABLE, _PARTIAL = "callable", "partial"  # how a function or class among the keywords stands in JSON
_HOMES = ("torch.nn.", "timm.layers.", "timm.models.")  # where a file may name one


class _Unfilled(TorchFunctionMode):
    """Nothing is written into tensors on meta, which hold no values: a model is built in a third of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


_FILLS = {getattr(torch.Tensor, name) for name in ("add_", "clamp_", "erfinv_", "mul_", "normal_", "uniform_")}


@dataclass(frozen=True)
class ModelSpec:
    """What `timm.create_model` needs to build a model's structure again.

    `kwargs` are plain values, as JSON keeps them: a layer class of torch.nn or timm, or a `functools.partial` of one, stands
    as {"callable": name} or {"partial": name, "args": [...], "kwargs": {...}}.
    """

    architecture: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, device: torch.device | str | None = None) -> nn.Module:
        """The structure with fresh weights, in eval mode. `device="meta"` allocates nothing.

        ValueError for a negative number of heads, of which timm makes a model with scales that are not real.
        """
        place = torch.device(device or "cpu")
        with place, _Unfilled() if place.type == "meta" else nullcontext():
            model = timm.create_model(self.architecture, pretrained=False, **self.keywords()).eval()
        for name, module in model.named_modules():
            heads = getattr(module, "num_heads", 1)
            if isinstance(heads, int) and heads < 1:
                raise ValueError(f"'{name}' has {heads} heads; it must have 1 at least")
        return model

    def keywords(self) -> dict[str, Any]:
        """`kwargs` as `timm.create_model` takes them."""
        return {key: _decode(value) for key, value in self.kwargs.items()}

    def resized(self, **changes: Any) -> ModelSpec:
        """The same architecture with some keywords replaced."""
        return ModelSpec(self.architecture, {**self.kwargs, **plain(changes)})

    @classmethod
    def of(cls, model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> ModelSpec:
        """The spec of a timm model in memory, found by building it (on the meta device) and comparing structures.

        What `timm.create_model` or `load_model` was called with is taken from the model where they left it there; the number
        of classes is the head's, and the sizes are those the model has now.

        Args:
            model: any supported timm model.
            kwargs: what was given to `timm.create_model` beyond the name, where neither the model nor its structure tells.

        Raises:
            UsageError: the name is not known, a keyword cannot be written to a file, the structure built differs, or a method
                was replaced on a class of timm or torch.nn.
        """
        expect_own_methods(model)
        first = ""
        for spec in _candidates(cls, model, kwargs):
            try:
                difference = structural_difference(model, spec.build("meta"))
            except Exception as error:  # an entrypoint may refuse keywords by any exception
                difference = f"timm could not build it: {first_line(error)}"
            if not difference:
                return spec
            first = first or f"model differs from timm's '{spec.architecture}' with {spec.kwargs} ({difference})"
        if not first:
            raise UsageError(
                "model has no timm architecture name in its pretrained_cfg; build it by timm.create_model, a class of your own "
                "by an entrypoint that timm.models.register_model registers"
            )
        raise UsageError(
            f"{first}; {_permanent(model)}give model_kwargs={{...}}, the keyword arguments that it was created with; a model that "
            "was changed otherwise needs an entrypoint of its own (timm.models.register_model)"
        )


def _permanent(model: nn.Module) -> str:
    """What makes weights plain that are computed anew in every call, for a message; "" where there are none."""
    for name, module in model.named_modules():
        if is_parametrized(module):
            return f"make the parametrization of '{name}' permanent (torch.nn.utils.parametrize.remove_parametrizations), or "
        if {"weight_orig", "weight_g"} & module._parameters.keys():
            return f"make the weight of '{name}' permanent (torch.nn.utils.prune.remove, remove_weight_norm), or "
    return ""


def _candidates(cls: type[ModelSpec], model: nn.Module, kwargs: Mapping[str, Any] | None) -> Iterator[ModelSpec]:
    known = getattr(model, "dfqvit_spec", None)
    known = known if isinstance(known, ModelSpec) else None
    config = config_of(model) or {}
    own = str(config.get("architecture") or "")
    tagged = f"{own}.{config.get('tag')}" if own and config.get("tag") else ""  # some structures are a tag's
    names = [name for name in (known.architecture if known else "", own, tagged) if name and timm.is_model(name)]
    names += [name for name in _registered_elsewhere() if name not in names]
    recorded = getattr(model, "_model_args", None)  # timm's create_model leaves it
    if kwargs is not None:
        if not isinstance(kwargs, Mapping):
            raise UsageError(f"model_kwargs was {kwargs!r}; it may be a dict of keywords of timm.create_model")
        bases = [plain(kwargs)]
    else:
        bases = [known.kwargs] if known else []
        bases += [_quietly_plain(recorded)] if recorded else []
        bases += [{}]
    if type(model).__module__ == FEATURES:
        info: Any = model.feature_info
        bases = [{**base, "features_only": True, "out_indices": list(info.out_indices)} for base in bases]
    tried: list[ModelSpec] = []
    for name in dict.fromkeys(names):
        for base in bases:
            for actual in _actual(model):
                spec = cls(name, {**base, **actual})
                if spec not in tried:
                    tried.append(spec)
                    yield spec


def _actual(model: Any) -> Iterator[dict[str, Any]]:
    """Nothing, then more and more of what the model itself says."""
    yield {}
    found: dict[str, Any] = {}
    classes = class_count(model)
    if classes is not None:
        yield (found := {"num_classes": classes})
    pooling = _pooling(model)
    if pooling is not None:  # `reset_classifier` may set it
        yield {**found, "global_pool": pooling}
    try:
        sizes = {"in_chans": int(model.in_chans), "img_size": list(image_size(model))}
    except (AttributeError, TypeError, ValueError):  # no such thing on this model
        return
    yield {**found, "img_size": sizes["img_size"]}
    yield {**found, **sizes}


def _pooling(model: Any) -> str | None:
    """timm's name of how the model pools, by the module that does; None where it does not say it."""
    head = getattr(model, "head", None)
    for holder, name in ((head, "global_pool"), (head, "pool_type"), (model, "global_pool")):
        found = getattr(holder, name, None)
        found = getattr(found, "pool_type", found)
        if isinstance(found, str):
            return found
    return None


def classifier(model: Any) -> Any:
    """What timm's `get_classifier` gives: a layer, or several; None where the model has no such method, or no classifier."""
    get = getattr(model, "get_classifier", None)
    try:
        return get() if callable(get) else None
    except AttributeError:  # of some families it reads a part that a model without a classifier has not
        return None


def class_count(model: Any) -> int | None:
    """Outputs of the model's classifier, by its layer where it is one; None where neither that nor the model says it.

    None of a network around timm models: what it gives may be anything.
    """
    if not hasattr(model, "get_classifier") and config_of(model) is None:
        return None
    head = classifier(model)
    head = head[0] if isinstance(head, tuple) else head
    found = getattr(head, "out_features", None)
    if found is None and isinstance(head, nn.Identity):
        found = 0
    found = getattr(model, "num_classes", None) if found is None else found
    return None if found is None else int(found)


def _registered_elsewhere() -> list[str]:
    """Names that others than timm registered: the user's own entrypoints, whose models may carry another's name."""
    ours = ("timm.", __name__.split(".")[0] + ".")
    return [name for name in timm.list_models() if not model_entrypoint(name).__module__.startswith(ours)]


def structural_difference(model: nn.Module, other: nn.Module) -> str:
    """What first differs between two models: shapes, module classes, a module's plain settings, a replaced method; or ""."""
    ours, theirs, shared = _shapes(model), _shapes(other), _shared(model)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            if key in shared:
                return f"'{key}' is shared with '{shared[key]}' here, and not there: give each place a copy of its own"
            return f"'{key}' is {ours.get(key)} here and {theirs.get(key)} there"
    modules, held = (dict(each.named_modules(remove_duplicate=False)) for each in (other, model))
    for name, module in held.items():
        twin = modules.get(name)
        if absent_in_eval(module, twin):
            continue
        if twin is None or type(module) is not type(twin):
            anew = type(module).__name__ == type(twin).__name__ and "<locals>" in type(module).__qualname__
            hint = ": its class is made anew in each call of a function, define it outside of that" if anew else ""
            return f"{said(name)} is a {type(module).__name__} here and a {type(twin).__name__} there{hint}"
        replaced = [key for key, value in vars(module).items() if callable(value) and hasattr(type(module), key)]
        for key in replaced:
            if key not in vars(twin):
                return f"{said(name)} has a {key} of its own here"
        for key, found, value in other_settings(module, twin):
            return f"'{dotted(name, key)}' is {found!r} here and {value!r} there"
    for name, twin in only_in(modules, held):
        return f"'{name}' is not there here and a {type(twin).__name__} there"
    for name in sorted(buffer_names(other) - buffer_names(model)):
        return f"'{name}' is not there here, and a buffer there"
    return ""


def absent_in_eval(module: nn.Module, twin: nn.Module | None) -> bool:
    """Whether two modules at one place, of which one may lack, change nothing in eval mode."""
    return isinstance(module, ABSENT_IN_EVAL) and (twin is None or isinstance(twin, ABSENT_IN_EVAL))


def only_in(modules: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Of the modules by name those whose places the others have not, but for what changes nothing in eval mode."""
    return ((name, each) for name, each in modules.items() if name not in others and not absent_in_eval(each, None))


def other_settings(module: nn.Module, twin: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, value in `twin`) of each setting that differs."""
    for key, value in settings(twin).items():
        found = getattr(module, key, None)
        if found != value:
            yield key, found, value


def buffer_names(model: nn.Module) -> set[str]:
    """Of those that hold a tensor, at every place."""
    return {name for name, _ in model.named_buffers(remove_duplicate=False)}


def said(name: str) -> str:
    """A module by its name within the model, for a message."""
    return f"'{name}'" if name else "the model"


def dotted(place: str, name: str) -> str:
    """The full name of what a module at `place` has under `name`; the model's own place is ""."""
    return f"{place}.{name}" if place else name


def expect_own_methods(model: nn.Module) -> None:
    """UsageError where a method was replaced on a class of timm or torch.nn: what is computed here is what they define."""
    if said := method_replaced((name, type(module)) for name, module in model.named_modules()):
        raise UsageError(f"model holds {said}; undo that before quantizing, or put it into a class of your own")


def method_replaced(named: Iterable[tuple[str, type]]) -> str:
    """Which of a model's modules, given as (name, class), is of a class of timm or torch.nn on which a method was replaced, for a
    message; or ""."""
    seen: set[type] = set()
    for name, its_class in named:
        for kind in its_class.__mro__:
            said = "" if kind in seen else _replaced_method(kind)
            seen.add(kind)
            if said:
                return f"'{name or its_class.__name__}', of {kind.__module__}.{kind.__name__}, on which class {said}"
    return ""


def methods_of(classes: Iterable[type]) -> list[tuple[type, str]]:
    """(class, name) of every method that computes on the classes of timm and torch.nn of which modules of these classes are."""
    kinds = dict.fromkeys(kind for each in classes for kind in each.__mro__ if _is_known(kind))
    return [
        (kind, name)
        for kind in kinds
        for name, value in vars(kind).items()
        if isinstance(value, types.FunctionType) and not name.startswith(_NO_PART)
        if name == "forward" or kind.__module__.startswith("timm.")
    ]


def _is_known(kind: type) -> bool:
    return kind.__module__.startswith(("timm.", "torch.nn.modules.")) and kind is not nn.Module


def _replaced_method(kind: type) -> str:
    """Which method of a class was replaced, for a message; "" where none was or the class is neither timm's nor torch.nn's."""
    if not _is_known(kind):
        return ""
    for key, value in vars(kind).items():
        if key.startswith(_NO_PART):
            continue
        method = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        method = method.fget if isinstance(method, property) else method
        while isinstance(method, types.FunctionType):
            home = str(method.__globals__.get("__name__"))  # a wrapper may have the __module__ of what it wraps
            if not home.startswith(("timm.", "torch.")):
                return f"{key} was replaced by a function of {home}"
            method = getattr(method, "__wrapped__", None)
    forward = vars(kind).get("forward")
    if forward is not None and getattr(forward, "__qualname__", "") not in (
        f"{kind.__qualname__}.forward",
        *_NO_FORWARD,
    ):
        return f"forward was replaced by {getattr(forward, '__qualname__', repr(forward))}"
    return ""


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain values among a module's attributes that may matter to its output in eval mode."""
    inert = _INERT + _INERT_NORM if isinstance(module, _BatchNorm) else _INERT
    return {
        key: value
        for key, value in vars(module).items()
        if key not in inert and not key.startswith("_") and "drop" not in key and _is_plain(value)
    }


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of parameters, and of the buffers that a state_dict holds: others are computed, some only when the model is called."""
    found = {key: tuple(value.shape) for key, value in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                found[dotted(prefix, name)] = tuple(value.shape)
    return found


def _shared(model: nn.Module) -> dict[str, str]:
    """{name: first name} of the parameters and buffers that stand at a further place."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(named)}
    return {name: first[id(tensor)] for name, tensor in named if first[id(tensor)] != name}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return isinstance(value, (bool, int, float, str))


def plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `timm.create_model` as JSON keeps them; UsageError names one that a file cannot hold."""
    found = {
        key: _encode(f"model_kwargs['{key}']", v) for key, v in kwargs.items() if v is not None and key not in _PLACE
    }
    return json.loads(json.dumps(found))


def _quietly_plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`plain`, without the keywords that no file can hold: the comparison of structures tells whether they matter."""
    found: dict[str, Any] = {}
    for key, value in kwargs.items():
        try:
            found |= plain({key: value})
        except UsageError:
            continue
    return found


def _encode(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(f"{name}['{key}']", each) for key, each in value.items()}
    elif isinstance(value, functools.partial):
        args = [_encode(name, each) for each in value.args]
        keywords = {key: _encode(f"{name}, {key}", each) for key, each in value.keywords.items()}
        return {_PARTIAL: _name_of(name, value.func), "args": args, "kwargs": keywords}
    elif callable(value):
        return {_CALLABLE: _name_of(name, value)}
    elif isinstance(value, Sequence):
        return [_encode(name, each) for each in value]
    raise UsageError(
        f"{name} was {value!r}, which a file cannot hold; it may be numbers, texts, lists and layers of {_NAMED}"
    )


_NAMED = "torch.nn or timm, also in a functools.partial"


def _name_of(name: str, value: Any) -> str:
    """The full name by which `_find` finds the callable again."""
    full = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    try:
        if _find(full) is value:
            return full
    except (UsageError, ImportError, AttributeError):
        pass  # the sentence below says it
    raise UsageError(
        f"{name} was {value!r}, which a file cannot name; it may be a layer of {_NAMED}, or timm's name of one"
    )


def _find(full: str) -> Callable[..., Any]:
    """The layer class or function of that name: only torch.nn's and timm's, so that a file names no other code."""
    home, _, attribute = full.rpartition(".")
    if not full.startswith(_HOMES):
        raise UsageError(f"the file names the layer '{full}'; it may be one of torch.nn or timm")
    found = getattr(importlib.import_module(home), attribute)
    is_layer = isinstance(found, type) and issubclass(found, nn.Module)
    is_function = (
        callable(found) and not isinstance(found, type) and home.startswith(("torch.nn.functional", "timm.layers."))
    )
    if not (is_layer or is_function):
        raise UsageError(f"the file names '{full}', which is no layer")
    return found


def _decode(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_decode(each) for each in value)
    if isinstance(value, Mapping):
        if value.keys() == {_CALLABLE}:
            return _find(value[_CALLABLE])
        if value.keys() == {_PARTIAL, "args", "kwargs"}:
            keywords = {key: _decode(each) for key, each in value["kwargs"].items()}
            return functools.partial(_find(value[_PARTIAL]), *map(_decode, value["args"]), **keywords)
        return {key: _decode(each) for key, each in value.items()}
    return value
