"""The operator `quant_linear`: public function, checks, registration, autograd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import checks
from ..activations import check_activation
from ..dispatch import Backend, Operator, Verdict, anything, checking, compiled, in_triton
from ..pack_weight import packed_row_bytes
from . import reference
from .blocked import blocked_shape


def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    acm: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | float,
    x_zero: torch.Tensor | float,
    w_scale: torch.Tensor | float,
    a_bits: int,
    w_bits: int,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | float | None = None,
    out_zero: torch.Tensor | float | None = None,
    out_bits: int = 8,
    out_dtype: torch.dtype | None = None,
    w_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer in integer arithmetic, with everything that follows it in one pass.

        qx = clamp(round(x / x_scale) + x_zero, 0, 2^a_bits - 1)
        qw = clamp(round(weight / w_scale[n]), -2^(w_bits-1), 2^(w_bits-1) - 1)
        y[r, n] = x_scale * w_scale[n] * (sum_k qx[r, k] * qw[n, k] - x_zero * sum_k qw[n, k]) + (bias[n] + acm[r mod T, n])
        y = activation(y) + residual
        result = y, or with out_scale: clamp(round(y / out_scale[n]) + out_zero[n], 0, 2^out_bits - 1)

    Rounding is half to even, the integer sums are exact, the rest is float32 in this order. Integer results are the same on
    every backend; only after an activation, which a backend may approximate to 6e-6 (1 + |y|) if the result is rounded,
    may they be one apart, where y / out_scale lies within that difference of a tie. The backward is straight-through: the
    gradient of x and of a float weight is zero where they were clamped; x_scale and w_scale get theirs in the LSQ form
    (arXiv 1902.08153) if they require one, x_zero gets none.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; or uint8, the integers qx themselves (not checked on GPUs). The
            rows of all leading dimensions are counted through for acm.
        weight: [N, K] float; or uint8 [N, ceil(K / 8) * w_bits] from `pack_weight`; or int32 from `block_weight`, the form
            for CPUs.
        bias: [N] or None, float.
        acm: [T, N] or None, float, with T tokens an image; the number of rows of x must be a multiple of T.
        x_scale: scalar, positive.
        x_zero: scalar, a whole number in [0, 2^a_bits - 1].
        w_scale: [N] or scalar, not 0; [N] with a blocked weight. A negative scale mirrors its row's grid, which then reaches
            one step further above 0 than below.
        a_bits: 2 to 8.
        w_bits: 2 to 8.
        activation: None, "gelu", "gelu_tanh", "quick_gelu" (y * sigmoid(1.702 y), of OpenAI's CLIP) or "silu".
        residual: [..., N] or None, float.
        out_scale: [N] or scalar, positive; None (default) for a float result.
        out_zero: [N] or scalar, whole numbers in [0, 2^out_bits - 1]; given if out_scale is.
        out_bits: 2 to 8.
        out_dtype: of a float result; by default that of x, of residual if x is uint8, or else float32.
        w_sums: int32 [N] or None: the sums of the integers of each row of a packed weight, from `weight_sums`, so that GPUs
            need not add them up in every call.

    Returns:
        [..., N] in out_dtype, or uint8 with out_scale.

    Raises:
        TypeError: a tensor has a dtype that it may not have.
        ValueError: shapes, devices, bit widths or values do not fit; or a gradient was wanted of x_zero or of an integer result.

    Source: integer arithmetic of arXiv 1712.05877, section 2.2; ACM of DFQ-ViT, arXiv 2507.14481.
    """
    for name, bits in (("a_bits", a_bits), ("w_bits", w_bits), ("out_bits", out_bits)):
        checks.bits(name, bits)
    if not (isinstance(x, torch.Tensor) and x.dtype == torch.uint8):
        checks.floating("x", x)
    if x.dim() < 1:
        raise ValueError("x had no dimensions; it must be [..., K]")
    checks.dense("weight", weight)
    checks.same_device(x=x, weight=weight, bias=bias, acm=acm, residual=residual, w_sums=w_sums)
    x_scale, x_zero = checks.scalar("x_scale", x_scale, x), checks.scalar("x_zero", x_zero, x)
    w_scale = checks.parameter("w_scale", w_scale, x)
    checks.no_gradient("quant_linear", x_zero=x_zero)
    out_features = _out_features(weight, x.shape[-1], w_bits, w_scale)
    if w_scale.numel() not in (1, out_features):
        raise ValueError(f"w_scale had {w_scale.numel()} values; it must have 1 or {out_features}, one for each row")
    _check_addends(x, bias, acm, residual, out_features)
    check_activation(activation)
    if (out_scale is None) != (out_zero is None):
        raise ValueError(f"out_zero was {out_zero!r}; it must be given if out_scale is, and only then")
    if out_scale is not None and out_zero is not None:
        out_scale = _for_outputs("out_scale", out_scale, x, out_features)
        out_zero = _for_outputs("out_zero", out_zero, x, out_features)
    out_dtype = _result_dtype(out_dtype, x, residual, out_scale is not None)
    scales = (x_scale, x_zero, w_scale.expand(out_features).contiguous())
    arguments = (x, weight, bias, acm, *scales, a_bits, w_bits, activation or "none")
    if w_sums is not None and (w_sums.dtype != torch.int32 or w_sums.shape != (out_features,)):
        raise ValueError(f"w_sums was {w_sums.dtype} {tuple(w_sums.shape)}; it must be int32 [{out_features}]")
    rest = (residual, out_scale, out_zero, out_bits, _name(out_dtype), w_sums)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (*arguments[:7], residual)):
        return forward(*arguments, *rest)
    if out_scale is not None:
        raise ValueError(
            "out_scale was given while a gradient is wanted; an integer result has none: use torch.no_grad()"
        )
    return _QuantLinear.apply(*arguments, *rest)


def _out_features(weight: torch.Tensor, in_features: int, w_bits: int, w_scale: torch.Tensor) -> int:
    """N, once the shape of the weight is seen to fit."""
    if weight.dtype == torch.int32:
        blocks, row = blocked_shape(w_scale.numel(), in_features, w_bits)
        if weight.shape != (blocks, row):
            raise ValueError(
                f"weight had shape {tuple(weight.shape)}; for this x and {w_scale.numel()} values of w_scale, "
                f"blocked in {w_bits} bits, it must be [{blocks}, {row}]"
            )
        return w_scale.numel()
    packed = weight.dtype == torch.uint8
    if not packed:
        checks.floating("weight", weight)
    columns = packed_row_bytes(in_features, w_bits) if packed else in_features
    if weight.dim() != 2 or weight.shape[1] != columns:
        kind = f"packed to {w_bits} bits" if packed else "float"
        raise ValueError(f"weight had shape {tuple(weight.shape)}; for this x, {kind}, it must be [N, {columns}]")
    return weight.shape[0]


def _check_addends(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
) -> None:
    """Dtypes and shapes of what the epilogue adds."""
    for name, tensor in (("bias", bias), ("acm", acm), ("residual", residual)):
        if tensor is not None:
            checks.floating(name, tensor)
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias had shape {tuple(bias.shape)}; it must be [{out_features}]")
    if acm is not None:
        if acm.dim() != 2 or acm.shape[1] != out_features or acm.shape[0] == 0:
            raise ValueError(f"acm had shape {tuple(acm.shape)}; it must be [tokens, {out_features}]")
        rows = math.prod(x.shape[:-1])
        # While a program is traced the batch may be a symbol: then only what is known for every batch is asked.
        if rows % acm.shape[0] if not checks.tracing() else x.dim() > 2 and x.shape[-2] % acm.shape[0]:
            raise ValueError(f"acm was for {acm.shape[0]} tokens; the {rows} rows of x are not a multiple of that")
    if residual is not None and residual.shape != (*x.shape[:-1], out_features):
        wanted = [*x.shape[:-1], out_features]
        raise ValueError(f"residual had shape {tuple(residual.shape)}; it must be {wanted}, like the result")


def _for_outputs(name: str, value: torch.Tensor | float, x: torch.Tensor, out_features: int) -> torch.Tensor:
    """A parameter of the requantization as [N]."""
    value = checks.parameter(name, value, x)
    if value.numel() not in (1, out_features):
        raise ValueError(f"{name} had {value.numel()} values; it must have 1 or {out_features}, one for each output")
    return value.expand(out_features).contiguous()


def _result_dtype(
    asked: torch.dtype | None, x: torch.Tensor, residual: torch.Tensor | None, requantized: bool
) -> torch.dtype:
    if requantized:
        if asked not in (None, torch.uint8):
            raise ValueError(f"out_dtype was {asked}; with out_scale the result is uint8")
        return torch.uint8
    if asked is None:
        return x.dtype if x.is_floating_point() else torch.float32 if residual is None else residual.dtype
    if asked not in checks.FLOATS:
        raise TypeError(f"out_dtype was {asked}; it may be float32, bfloat16, float16 or float64")
    return asked


class _Arguments(NamedTuple):
    """The operator's own, in its schema's order."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    acm: torch.Tensor | None
    x_scale: torch.Tensor
    x_zero: torch.Tensor
    w_scale: torch.Tensor
    a_bits: int
    w_bits: int
    activation: str
    residual: torch.Tensor | None
    out_scale: torch.Tensor | None
    out_zero: torch.Tensor | None
    out_bits: int
    out_dtype: str
    w_sums: torch.Tensor | None = None


def _check_values(*args: Any) -> None:
    """ValueError for values that the formula is not defined for; on GPUs only if asked for, see `checks.finite`."""
    given = _Arguments(*args)
    checks.positive("x_scale", given.x_scale)
    checks.whole("x_zero", given.x_zero, (1 << given.a_bits) - 1)
    checks.nonzero("w_scale", given.w_scale)
    finite = {"bias": given.bias}
    if given.out_scale is not None and given.out_zero is not None:
        checks.positive("out_scale", given.out_scale)
        checks.whole("out_zero", given.out_zero, (1 << given.out_bits) - 1)
        # NaN shows in a float result; of integers it makes some that look right.
        finite |= {"acm": given.acm, "residual": given.residual}
    for name, tensor in finite.items():
        if tensor is not None:
            checks.finite(name, tensor)
    if given.weight.is_floating_point():
        checks.finite("weight", given.weight)
    if given.x.is_floating_point():
        checks.finite("x", given.x)
    else:
        checks.whole("x", given.x, (1 << given.a_bits) - 1)


def _name(dtype: torch.dtype) -> str:
    """The operator takes a dtype by its name, "float32": AOTInductor 2.11 hands ScalarType arguments over as another type."""
    return str(dtype).removeprefix("torch.")


def _with_dtype(backend: Backend) -> Backend:
    """`backend` in Python, which takes the dtype itself."""

    def run(*args: Any) -> torch.Tensor:
        given = _Arguments(*args)
        return backend.run(*given._replace(out_dtype=getattr(torch, given.out_dtype)))

    return dataclasses.replace(backend, run=run)


def _supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_scale: torch.Tensor,
    a_bits: int,
    w_bits: int,
    activation: str,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_zero: torch.Tensor | None,
    out_bits: int,
    out_dtype: str,
    *_: Any,
) -> Verdict:
    for tensor in (x, weight, bias, acm, residual):
        if tensor is not None and tensor.dtype == torch.float64:
            return False, "float64 runs on the reference"
    if out_dtype == "float64":
        return False, "float64 runs on the reference"
    if x.shape[-1] * ((1 << a_bits) - 1) << (w_bits - 1) >= 1 << 31:
        return False, f"sums of {x.shape[-1]} products of {a_bits} and {w_bits} bits do not fit in int32"
    return True, ""


def _supports_cuda(*args: Any) -> Verdict:
    given = _Arguments(*args)
    if given.weight.dtype == torch.int32:
        return False, "weight was blocked for CPUs; the CUDA kernel takes it packed or float"
    rows, outputs = given.x.shape[:-1].numel(), given.w_scale.shape[0]
    if max(rows, outputs) > _MOST_ROWS:
        return False, f"the result was [{rows}, {outputs}]; the CUDA kernel counts rows and columns up to {_MOST_ROWS}"
    return _supports(*args)


_MOST_ROWS = (1 << 31) - 256  # in int32, with room for the last tile


def _supports_triton(*args: Any) -> Verdict:
    if _Arguments(*args).weight.dtype == torch.int32:
        return False, "the weight is blocked, which is the form for CPUs"
    return _supports(*args)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? acm, Tensor x_scale, Tensor x_zero, Tensor w_scale, "
    "int a_bits, int w_bits, str activation"
)


def _fake_forward(*args: Any) -> torch.Tensor:
    given = _Arguments(*args)
    return given.x.new_empty((*given.x.shape[:-1], given.w_scale.shape[0]), dtype=getattr(torch, given.out_dtype))


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    acm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_scale: torch.Tensor,
    a_bits: int,
    w_bits: int,
    activation: str,
    needed: Sequence[bool],
) -> list[torch.Tensor]:
    inputs = (x, weight, bias, acm, x_scale, w_scale)
    return [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if wanted and value is not None
        else x_scale.new_empty(0)
        for value, wanted in zip(inputs, needed, strict=True)
    ]


forward = Operator(
    f"quant_linear({_ARGUMENTS}, Tensor? residual, Tensor? out_scale, Tensor? out_zero, int out_bits, "
    "str out_dtype, Tensor? w_sums=None) -> Tensor",
    fake=_fake_forward,
    backends=[
        checking(compiled("quant_linear", "cuda", _supports_cuda), _check_values),
        checking(_with_dtype(in_triton("quant_linear", __package__, _supports_triton)), _check_values),
        compiled("quant_linear", "cpu", _supports),
        checking(_with_dtype(Backend("reference", reference.quant_linear, anything)), _check_values),
    ],
)

backward = Operator(
    f"quant_linear_backward(Tensor grad, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
    fake=_fake_backward,
    backends=[Backend("reference", reference.quant_linear_backward, anything)],
)


class _QuantLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.constants = inputs[7:10]
        ctx.residual_dtype = None if inputs[10] is None else inputs[10].dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad
        needed = [*needs[:5], needs[6]]  # all tensors but x_zero
        results: list[torch.Tensor | None] = [None] * 6
        if any(needed):
            grads = backward(grad, *ctx.saved_tensors, *ctx.constants, needed)
            results = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        residual = grad.to(ctx.residual_dtype) if needs[10] else None
        return (*results[:5], None, results[5], *(None,) * 3, residual, *(None,) * 5)
