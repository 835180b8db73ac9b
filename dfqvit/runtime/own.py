"""Whether classes of timm and torch are as they were: what stands in for a block or an attention computes what they defined.

It is asked at a model's entry, and by a block that is called alone. Under torch.compile the same is asked where the program is
traced, and the methods become guards of it: who replaces one has it traced anew, and refused then.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..models.adapters.scalings import SCALED
from ..models.spec import method_replaced, methods_of
from ..quantization.model import QuantizedForward
from ..quantization.prepared import HOOKS, METHODS

_OURS = __name__.partition(".")[0] + "."


class Entered(threading.local):
    """Whether this thread is within a model's entry, which has asked for all its blocks."""

    now = False


ENTERED = Entered()


class _Known:
    """Classes whose methods compiled programs guard, each an attribute: programs and blocks share what they look at."""


_NAMES: dict[type, str] = {}  # of these attributes


def expect_itself(module: Any) -> None:
    """UsageError where a method was replaced on a class that something within is of, or some tensors lie on meta."""
    if torch.compiler.is_dynamo_compiling():
        _expect_traced(module)
        return
    known = module.__dict__.get(METHODS)
    if known is None or list(map(getattr, *known[:2])) != known[2]:
        _look(module)


def expect_alone(block: Any) -> None:
    """As `expect_itself`, of a block: where no model has asked for it. A program asks for each; they guard the same."""
    if torch.compiler.is_dynamo_compiling() or not ENTERED.now:
        expect_itself(block)


def tell_foreign_on_scaled(model: Any) -> None:
    """Warns of what stands, or hooks, where the scaling of channels changed values within blocks, such as the keys of a `qkv`."""
    if torch.compiler.is_compiling() or ENTERED.now or "dfqvit_scalings" not in model.__dict__:
        return
    held = model.__dict__.get(HOOKS)
    if held is None or list(map(dict.get, *held[0])) != held[1]:
        held = model.__dict__[HOOKS] = _around_scaled(model)
    _, _, said, names, tables = held
    if any(tables):
        foreign = [
            name
            for name, hooks in zip(names, tables, strict=True)
            if not all(type(hook).__module__.startswith(_OURS) for hook in hooks.values())
        ]
        said = f"a forward hook on '{foreign[0]}'" if foreign else said
    if said:
        warnings.warn(
            f"{said} may see other values than in the float model: with scaling='channels' they are scaled, shifted and turned "
            "there, which the next layer undoes; quantize with scaling='none', or look at what blocks, attentions or MLPs give",
            stacklevel=2,
        )


def _around_scaled(model: Any) -> tuple[Any, ...]:
    """Of the places where the scaling of channels changed values, as they are now.

    Returns:
        (tables of modules, keys) that lead to them; what these give; what is told of a part that is not what was scaled, or "";
        names of places, and the tables of the hooks that see their values.
    """
    parts, places = dict(model.named_modules()), model.dfqvit_scalings
    results, inputs = places.results(), places.inputs()
    pairs = [pair for pair in (*places.norms, *places.values) if any(name in parts for name in pair)]
    mark = vars(model).get(SCALED)
    others = [name for pair in pairs for name in pair if getattr(parts.get(name), SCALED, None) != mark]
    said = f"what stands in the place of '{others[0]}'" if others else ""
    levels = {".".join(name.split(".")[:end]) for name in (*results, *inputs) for end in range(1, name.count(".") + 2)}
    split = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in sorted(levels)]
    links = [(parts[parent]._modules, key) for parent, key in split if parent in parts]
    tables, keys = [table for table, _ in links], [key for _, key in links]
    hooks = [(name, parts[name]._forward_hooks) for name in results if name in parts]
    hooks += [(name, parts[name]._forward_pre_hooks) for name in inputs if name in parts]
    return (tables, keys), list(map(dict.get, tables, keys)), said, [name for name, _ in hooks], [h for _, h in hooks]


def tell_train_mode(model: nn.Module) -> None:
    """Warns of batch norms that take a batch's own statistics and change those that they keep, as in timm's train mode."""
    if not model.training or torch.compiler.is_compiling() or ENTERED.now:
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None:
            warnings.warn(
                f"the quantized model is in train mode: '{name}' and the like normalise by the batch and change the mean and "
                "variance that they keep, while the ranges of the layers stay those of eval mode; call eval(), or that of these",
                stacklevel=2,
            )
            return


@torch.compiler.disable  # not a part of a program either where that one was given up
def _look(module: Any) -> None:
    within = _stood_in_for([(name, type(each)) for name, each in module.named_modules()])
    _refuse(method_replaced(within))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    without = [name for name, tensor in tensors if tensor.is_meta]
    if without and len(without) < len(tensors):  # torch reads what happens to lie in memory
        raise UsageError(
            f"the quantized model holds '{without[0]}' on meta, without values, beside tensors that have some: "
            "load the whole model, by dfqvit.load"
        )
    places = methods_of(kind for _, kind in within)
    kinds, names = [kind for kind, _ in places], [name for _, name in places]
    if not without and not torch.compiler.is_compiling():
        module.__dict__[METHODS] = kinds, names, list(map(getattr, kinds, names))


def _refuse(said: str) -> None:
    if said:
        raise UsageError(f"the quantized model holds {said}; undo that, or give the module alone a forward of its own")


def _expect_traced(module: nn.Module) -> None:
    # level by level: torch.compile traces `module.named_modules()` in several times as many steps
    named, last = [("", module)], [("", module)]
    while last:
        last = [
            (f"{name}.{key}", child) for name, each in last for key, child in each._modules.items() if child is not None
        ]
        named += last
    said, places = _asked(*[name for name, _ in named], *[type(each) for _, each in named])
    _refuse(said)
    for holder, name in places:
        assert getattr(getattr(_Known, holder), name) is not None  # what is read is guarded


@torch.compiler.assume_constant_result
def _asked(*given: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Of the names of a module's parts, a dot before each, and then their classes.

    Returns:
        Which method was replaced where something stands in for it, or ""; and (attribute of _Known, method) of these classes, and
        of the others each `forward...`, at which torch never looks again.
    """
    half = len(given) // 2
    named = sorted(((name[1:], kind) for name, kind in zip(given[:half], given[half:], strict=True)), key=_place)
    within = _stood_in_for(named)
    places = methods_of(kind for _, kind in named)
    wanted = {*methods_of(kind for _, kind in within), *(place for place in places if place[1].startswith("forward"))}
    found = []
    for kind, method in places:
        if (kind, method) in wanted:
            name = _NAMES.setdefault(kind, f"class_{len(_NAMES)}")
            setattr(_Known, name, kind)
            found.append((name, method))
    return method_replaced(within), tuple(found)


def _place(named: tuple[str, type]) -> list[str]:
    return named[0].split(".")


def _stood_in_for(named: Iterable[tuple[str, type]]) -> list[tuple[str, type]]:
    """Of a module's parts, given as (name, class), each before what is within it, those of a class of dfqvit and all within them:
    others are called, and so are their methods. So is a model itself."""
    found: list[tuple[str, type]] = []
    outer: str | None = None
    for name, kind in named:
        within = outer is not None and name.startswith(outer)
        if not within and kind.__module__.startswith(_OURS) and not issubclass(kind, QuantizedForward):
            within, outer = True, f"{name}." if name else ""
        if within:
            found.append((name, kind))
    return found
