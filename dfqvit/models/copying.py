"""Copies of models that hold more than parameters and buffers."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from .adapters import flattened

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """`copy.deepcopy`, also of a model that kept what torch computed in a call, which alone has no copy: its values are copied.

    Features that a hook stored are such, and weights that torch.nn.utils.prune computes.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            for tensor in flattened(value):
                if not tensor.is_leaf:
                    memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)
