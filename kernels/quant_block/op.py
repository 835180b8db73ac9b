"""The operator `quant_block`: public function, checks, registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, Verdict, anything, compiled, on_device, triton_available
from ..pack_weight import packed_row_bytes
from ..quant_linear.blocked import blocked_shape
from . import reference

LINEARS = ("qkv", "proj", "fc1", "fc2")  # the order of weights, biases, weight_scales, w_bits
GRIDS = ("qkv input", "q", "k", "v", "proj input", "fc1 input", "fc2 input")  # the order of scales, zeros, a_bits


def quant_block(
    x: torch.Tensor,
    *,
    norms: Sequence[torch.Tensor],
    eps: Sequence[float],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    weight_scales: Sequence[torch.Tensor],
    w_bits: Sequence[int],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    a_bits: Sequence[int],
    heads: int,
    attention_scale: float,
    position_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    acm: torch.Tensor | None = None,
    hidden_scale: torch.Tensor | None = None,
    activation: str | None = "gelu",
) -> torch.Tensor:
    """A pre-norm transformer block with 8-bit integers between its operators; no gradient.

        h = x + proj(attention(qkv(layer_norm(x))))
        result = h + fc2(activation(fc1(layer_norm(h)))) + acm

    Seven operators, with the arithmetic of `layer_norm_quantize`, `quant_linear` and `quant_attention`; what is their
    results' precision is this one's. One compiled call on CPUs, the same seven calls elsewhere.

    Args:
        x: float32 [B, T, C].
        norms: weight and bias of the first LayerNorm, then of the second, float32 [C] each.
        eps: of the two.
        weights: of `LINEARS`, in a form that `quant_linear` takes: [3 * D, C], [C, D], [H, C], [C, H].
        biases: of `LINEARS`, float32 or None.
        weight_scales: of `LINEARS`, one for each output, not 0.
        w_bits: of `LINEARS`, 2 to 8.
        scales: of `GRIDS`, scalars, positive: the quantizers of what the layers and the attention take.
        zeros: of `GRIDS`, scalars, whole numbers.
        a_bits: of `GRIDS`, 2 to 8; the same for q, k and v.
        heads: of the attention; D is a multiple of it.
        attention_scale: of the softmax, usually (D / heads)^-0.5.
        position_bias: as `bias` of `quant_attention`.
        mask: as there.
        index: as there.
        acm: [T, C] or None, float: the correction of fc2's result.
        hidden_scale: [H], float32, or None: the scales that fc1's result is rounded by, where its channels have scales of their
            own; by default that of fc2's input for all.
        activation: None, "gelu", "gelu_tanh" or "quick_gelu" (y * sigmoid(1.702 y), of OpenAI's CLIP).

    Returns:
        float32 [B, T, C].

    Raises:
        TypeError: x is not float32.
        ValueError: lengths, shapes, devices or values do not fit; or a gradient is wanted.

    Source: DFQ-ViT, arXiv 2507.14481 (ACM); integer arithmetic of arXiv 1712.05877.
    """
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x was {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}; it must be float32")
    lengths = {"norms": norms, "eps": eps, "weights": weights, "biases": biases, "weight_scales": weight_scales}
    wanted = {"norms": 4, "eps": 2, "scales": len(GRIDS), "zeros": len(GRIDS), "a_bits": len(GRIDS)}
    for name, values in {**lengths, "w_bits": w_bits, "scales": scales, "zeros": zeros, "a_bits": a_bits}.items():
        count = wanted.get(name, len(LINEARS))
        if len(values) != count:
            raise ValueError(f"{name} had {len(values)} entries; a block has {count}")
    for bits in (*w_bits, *a_bits):
        checks.bits("bits", bits)
    if len(set(a_bits[1:4])) > 1:
        raise ValueError(f"a_bits was {list(a_bits[1:4])} for q, k and v; they must be the same")
    channels = norms[0].numel()
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"x had shape {tuple(x.shape)}; it must be [B, T, {channels}]")
    _check_tensors(x, norms, weights, biases, weight_scales, w_bits, heads)
    for name, values in (("scales", scales), ("zeros", zeros)):
        for place, value in zip(GRIDS, values, strict=True):
            if value.numel() != 1 or value.dtype != torch.float32 or value.device != x.device:
                raise ValueError(f"{name} of {place} was {value.dtype} {tuple(value.shape)} on {value.device}; "
                                 f"it must be one float32 value on {x.device}")  # fmt: skip
    if acm is not None and acm.shape != x.shape[1:]:
        raise ValueError(f"acm had shape {tuple(acm.shape)}; it must be {list(x.shape[1:])}, [tokens, channels]")
    if hidden_scale is not None and hidden_scale.shape != weight_scales[2].shape:
        raise ValueError(
            f"hidden_scale had shape {tuple(hidden_scale.shape)}; it must be {list(weight_scales[2].shape)}"
        )
    if activation not in (None, "gelu", "gelu_tanh", "quick_gelu"):
        raise ValueError(f"activation was {activation!r}; it may be None, 'gelu', 'gelu_tanh' or 'quick_gelu'")
    given = [x.new_empty(0) if bias is None else bias for bias in biases]  # the operator's form
    tensors = (x, *norms, *biases, acm, position_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("a gradient is wanted of quant_block, which has none: use torch.no_grad()")
    return forward(
        x, list(norms), list(eps), list(weights), given, list(weight_scales), list(w_bits), list(scales), list(zeros),
        list(a_bits), heads, float(attention_scale), position_bias, mask, index, acm, hidden_scale, activation or "none",
    )  # fmt: skip


def _check_tensors(
    x: torch.Tensor,
    norms: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    weight_scales: Sequence[torch.Tensor],
    w_bits: Sequence[int],
    heads: int,
) -> None:
    """ValueError unless the tensors of norms and linear layers fit each other."""
    channels, inner, hidden = norms[0].numel(), weight_scales[0].numel() // 3, weight_scales[2].numel()
    for norm in norms:
        if norm.shape != (channels,) or norm.dtype != torch.float32:
            raise ValueError(f"norms held {norm.dtype} {tuple(norm.shape)}; they must be float32 [{channels}]")
    if heads < 1 or inner % heads:
        raise ValueError(f"heads was {heads}; the {inner} channels of q must be a multiple of it")
    sizes = ((3 * inner, channels), (channels, inner), (hidden, channels), (channels, hidden))
    for place, name in enumerate(LINEARS):
        weight, bias, (outputs, inputs) = weights[place], biases[place], sizes[place]
        checks.same_device(x=x, weight=weight, bias=bias, weight_scale=weight_scales[place])
        forms = {
            torch.int32: blocked_shape(outputs, inputs, w_bits[place]),
            torch.uint8: (outputs, packed_row_bytes(inputs, w_bits[place])),
        }
        wanted = forms.get(weight.dtype, (outputs, inputs))
        if weight.shape != wanted:
            raise ValueError(f"weight of {name} was {weight.dtype} {tuple(weight.shape)}; it must be {list(wanted)}")
        if weight_scales[place].shape != (outputs,):
            raise ValueError(f"weight_scales of {name} was {tuple(weight_scales[place].shape)}; it must be [{outputs}]")
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"bias of {name} had shape {tuple(bias.shape)}; it must be [{outputs}]")


def _supports(x: torch.Tensor, *_: Any) -> Verdict:
    return (x.dtype == torch.float32, f"x is {x.dtype}, not float32")


def _supports_triton(*args: Any) -> Verdict:
    able, reason = triton_available()
    return on_device("cuda")(*args) if able and args[0].device.type != "cpu" else (able, reason)


forward = Operator(
    "quant_block(Tensor x, Tensor[] norms, float[] eps, Tensor[] weights, Tensor[] biases, Tensor[] weight_scales, "
    "int[] w_bits, Tensor[] scales, Tensor[] zeros, int[] a_bits, int heads, float attention_scale, Tensor? position_bias, "
    "Tensor? mask, Tensor? index, Tensor? acm, Tensor? hidden_scale, str activation) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=[
        Backend("triton", reference.quant_block, _supports_triton),
        compiled("quant_block", "cpu", _supports),
        Backend("reference", reference.quant_block, anything),
    ],
)
