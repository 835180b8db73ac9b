"""What the operators of whole blocks have in common: the checks of their lists of arguments, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import checks
from .dispatch import Backend, Verdict, anything, compiled, on_device, triton_available
from .pack_weight import packed_row_bytes
from .quant_linear.blocked import blocked_shape


def check_input(x: torch.Tensor) -> None:
    """TypeError unless x is float32."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x was {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}; it must be float32")


def check_length(name: str, values: Sequence[Any], count: int) -> None:
    """ValueError unless there are so many values."""
    if len(values) != count:
        raise ValueError(f"{name} had {len(values)} entries; a block has {count}")


def check_tensors(**lists: Sequence[Any]) -> None:
    """TypeError unless each list holds tensors."""
    for name, values in lists.items():
        for value in values:
            checks.dense(name, value)


def check_channels(name: str, tensor: torch.Tensor | None, channels: int) -> None:
    """ValueError unless a norm's or a convolution's tensor, if there is one, has a float32 value for each channel."""
    if tensor is None:
        return
    if tensor.shape != (channels,) or tensor.dtype != torch.float32:
        raise ValueError(f"{name} held {tensor.dtype} {tuple(tensor.shape)}; they must be float32 [{channels}]")
    checks.finite(name, tensor)


def check_linear(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bits: int,
    size: tuple[int, int],
) -> None:
    """ValueError unless the tensors of a linear layer of `size` (outputs, inputs) fit each other."""
    outputs, inputs = size
    checks.dense(f"weight of {name}", weight)
    checks.same_device(x=x, weight=weight, bias=bias, weight_scale=weight_scale)
    forms = {torch.int32: blocked_shape(outputs, inputs, bits), torch.uint8: (outputs, packed_row_bytes(inputs, bits))}
    wanted = forms.get(weight.dtype, (outputs, inputs))
    if weight.shape != wanted:
        raise ValueError(f"weight of {name} was {weight.dtype} {tuple(weight.shape)}; it must be {list(wanted)}")
    checks.floating(f"weight_scales of {name}", weight_scale)
    if bias is not None:
        checks.floating(f"bias of {name}", bias)
    if weight_scale.shape != (outputs,):
        raise ValueError(f"weight_scales of {name} was {tuple(weight_scale.shape)}; it must be [{outputs}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias of {name} had shape {tuple(bias.shape)}; it must be [{outputs}]")


def check_grids(
    x: torch.Tensor,
    names: Sequence[str],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    bits: Sequence[int],
) -> None:
    """ValueError unless every quantizer has one positive float32 scale and a zero point of its bits, where x is."""
    for kind, values in (("scales", scales), ("zeros", zeros)):
        for place, value in zip(names, values, strict=True):
            if value.numel() != 1 or value.dtype != torch.float32 or value.device != x.device:
                raise ValueError(f"{kind} of {place} was {value.dtype} {tuple(value.shape)} on {value.device}; "
                                 f"it must be one float32 value on {x.device}")  # fmt: skip
    if not all(checks.readable(value) for value in (*scales, *zeros)):
        return
    for place, scale, zero, wide in zip(names, scales, zeros, bits, strict=True):
        step, start = scale.item(), zero.item()
        if not 0 < step < float("inf"):
            raise ValueError(f"scales of {place} held {step:g}; it must be finite and greater than 0")
        if start not in range(1 << wide):
            held = str(start).removesuffix(".0")
            raise ValueError(f"zeros of {place} held {held}; it must be a whole number from 0 to {(1 << wide) - 1}")


def check_hidden(hidden_scale: torch.Tensor | None, channels: int) -> None:
    """ValueError unless there is a scale for each hidden channel, where they are given."""
    if hidden_scale is None:
        return
    checks.floating("hidden_scale", hidden_scale)
    if hidden_scale.shape != (channels,):
        raise ValueError(f"hidden_scale had shape {tuple(hidden_scale.shape)}; it must be [{channels}]")


def check_no_gradient(name: str, tensors: Sequence[torch.Tensor | None]) -> None:
    """ValueError where a gradient is wanted of a block, which has none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(f"a gradient is wanted of {name}, which has none: use torch.no_grad()")


def given(x: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The biases as the operators take them: one of no values is none."""
    return [x.new_empty(0) if bias is None else bias for bias in biases]


def backends(name: str, reference: Callable[..., Any]) -> list[Backend]:
    """Of a block: one compiled call on CPUs; elsewhere the reference, whose operators find their own backends."""
    return [
        Backend("triton", reference, _supports_triton),
        compiled(name, "cpu", _supports),
        Backend("reference", reference, anything),
    ]


def _supports(x: torch.Tensor, *_: Any) -> Verdict:
    return (x.dtype == torch.float32, f"x is {x.dtype}, not float32")


def _supports_triton(*args: Any) -> Verdict:
    able, reason = triton_available()
    return on_device("cuda")(*args) if able and args[0].device.type != "cpu" else (able, reason)
