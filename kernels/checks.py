"""Checks of arguments shared by the operators. Each raises one sentence: the argument, what it was, what it may be."""

from __future__ import annotations

import numbers
import os

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, tensor: torch.Tensor) -> None:
    """TypeError unless `tensor` is a float tensor of a dtype that the operators take."""
    dense(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} had dtype {tensor.dtype}; it may be float32, bfloat16, float16 or float64")


def dense(name: str, value: object) -> None:
    """TypeError unless `value` is a tensor with strides."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} was a {type(value).__name__}; it must be a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name} had layout {value.layout}; it must be torch.strided")


def finite(name: str, tensor: torch.Tensor) -> None:
    """ValueError when `tensor` holds NaN or Inf.

    Costs a pass over the tensor, and on a GPU a synchronisation: so it is on for CPU tensors and off for others.
    DFQVIT_CHECK_FINITE=1 turns it on everywhere, =0 off everywhere. Never runs while torch.compile traces.
    """
    if tracing():
        return
    tensor = _inner(tensor)
    if not _plain(tensor):
        return
    wanted = os.environ.get("DFQVIT_CHECK_FINITE", "1" if tensor.device.type == "cpu" else "0")
    if wanted != "1":
        return
    total = tensor.detach().sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
    if bool(torch.isfinite(total)):  # one pass; NaN and Inf cannot leave a sum finite
        return
    if not bool(torch.isfinite(tensor).all()):  # or the sum itself overflowed
        raise ValueError(f"{name} held NaN or Inf; every value must be finite")


def tracing() -> bool:
    """Whether torch.compile, export or trace is looking on: sizes may then be symbols, and values must not be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._get_dispatch_mode(_PROXY) is not None


_PROXY = torch._C._TorchDispatchModeKey.PROXY  # of torch.fx's make_fx


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    """What torch.func wraps: under vmap all values of the batch, under grad the tensor itself."""
    while torch._C._are_functorch_transforms_active() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _plain(tensor: torch.Tensor) -> bool:
    """Whether torch itself computes with it: fake tensors and their like have no values."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def bits(name: str, value: int) -> None:
    """ValueError unless `value` is a bit width that the arithmetic is defined for."""
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise ValueError(f"{name} was {value!r}; it may be a whole number from 2 to 8")


def integer(name: str, value: int) -> None:
    """TypeError unless `value` is a whole number, or while a program is traced the symbol of one."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} was {value!r}; it must be a whole number")


def same_device(**tensors: torch.Tensor | None) -> None:
    """ValueError unless all the tensors given are on one device, TypeError for what is none."""
    for name, tensor in tensors.items():
        if tensor is not None:
            dense(name, tensor)
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(places.items()))
    for name, device in places.items():
        if device != first:
            raise ValueError(f"{name} was on {device}; it must be on {first}, like {first_name}")


def wide(x: torch.Tensor) -> torch.dtype:
    """In which an operator computes on x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def parameter(name: str, value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A scale or zero point as a contiguous float tensor of at most one dimension on the device of `like`.

    float64 for a float64 `like`, else float32: the arithmetic of the epilogue is float32 whatever the dtype of x.
    """
    dtype = wide(like)
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.tensor(value, dtype=dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} was {value!r}; it must be a number or a torch.Tensor") from None
    dense(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} had dtype {value.dtype}; it must be a float or an integer one")
    if value.dim() > 1:
        raise ValueError(f"{name} had shape {tuple(value.shape)}; it must be a scalar or one-dimensional")
    if value.device != like.device:
        raise ValueError(f"{name} was on {value.device}; it must be on {like.device}")
    return value.to(dtype).contiguous()


def scalar(name: str, value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """As `parameter`, of one value and without dimensions."""
    found = parameter(name, value, like)
    if found.numel() != 1:
        raise ValueError(f"{name} had {found.numel()} values; it must be a scalar")
    return found.reshape(())


def grids_of_heads(
    in_scale: torch.Tensor, in_zero: torch.Tensor, like: torch.Tensor, greatest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`in_scale` and `in_zero`, [3] each, of q, k and v, as `parameter` gives them; zero points are from 0 to `greatest`."""
    found = []
    for name, value in (("in_scale", in_scale), ("in_zero", in_zero)):
        value = parameter(name, value, like)
        if value.shape != (3,):
            raise ValueError(f"{name} had shape {tuple(value.shape)}; it must be [3], for q, k and v")
        found.append(value)
    positive("in_scale", found[0])
    whole("in_zero", found[1], greatest)
    return found[0], found[1]


def no_gradient(operator: str, **tensors: torch.Tensor | None) -> None:
    """ValueError where a gradient is wanted of a tensor for which the operator has none: it would be cut unseen."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient; {operator} has none for it, so it must be detached")


def readable(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device or breaking a trace."""
    return not tracing() and _plain(_inner(tensor)) and tensor.device.type == "cpu"


def positive(name: str, tensor: torch.Tensor) -> None:
    """ValueError when a scale is not positive and finite; the same conditions as `finite` decide whether it is checked."""
    finite(name, tensor)
    if not readable(tensor):
        return
    tensor = _inner(tensor)
    if tensor.numel() and not bool((tensor > 0).all()):
        raise ValueError(f"{name} held {float(tensor.min()):g}; every scale must be greater than 0")


def nonzero(name: str, tensor: torch.Tensor) -> None:
    """ValueError when a weight's scale is 0, NaN or Inf; checked under the same conditions as `positive`."""
    finite(name, tensor)
    if not readable(tensor):
        return
    if not bool(_inner(tensor).all()):
        raise ValueError(f"{name} held 0; no scale of a weight may be 0")


def whole(name: str, tensor: torch.Tensor, greatest: int, least: int = 0) -> None:
    """ValueError unless all values are whole numbers from `least` to `greatest`; checked under the conditions of `positive`."""
    if not readable(tensor):
        return
    tensor = _inner(tensor)
    wrong = (tensor < least) | (tensor > greatest)
    if tensor.is_floating_point():
        wrong |= tensor != tensor.round()
    if bool(wrong.any()):
        held = str(tensor[wrong][0].item()).removesuffix(".0")  # all digits: 126.99999 is not to read 127
        raise ValueError(f"{name} held {held}; it must be a whole number from {least} to {greatest}")


def ascending(name: str, ends: torch.Tensor) -> None:
    """ValueError unless each pair [..., 2] is finite and in order; checked under the same conditions as `positive`."""
    finite(name, ends)
    if not readable(ends):
        return
    ends = _inner(ends)
    if bool((ends[..., 0] > ends[..., 1]).any()):
        raise ValueError(f"{name} held {ends.tolist()}; in each pair the first must not be greater than the second")
