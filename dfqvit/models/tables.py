"""Tables: the buffers that a structure computes and no state_dict holds, such as rotary embeddings."""

from __future__ import annotations

import torch
from torch import nn

from ..quantization.layers import QuantLinear
from .spec import dotted


def tables_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tables of a model by name, quantized or not; none of our layers'."""
    return {
        dotted(place, name): tensor
        for place, module in model.named_modules()
        if not isinstance(module, QuantLinear)
        for name, tensor in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }


def changed_tables(model: nn.Module, twin: nn.Module) -> dict[str, torch.Tensor]:
    """The tables with other values than in `twin`, as `load` builds it: a float model in half precision rounds its own. On the CPU.

    One of another shape is not among them: such tables are made anew in a call.
    """
    ours, computed = tables_of(model), tables_of(twin)
    found = {}
    for name in ours.keys() & computed.keys():
        table = ours[name].detach().cpu().contiguous()
        same = table.dtype == computed[name].dtype and torch.equal(table, computed[name])
        if table.shape == computed[name].shape and not same:
            found[name] = table
    return found
