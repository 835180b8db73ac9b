"""The operator `quant_block`: public function, checks, registration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import blocks, checks
from ..activations import check_activation
from ..dispatch import Operator
from ..quant_attention.op import check_windows
from ..quantize_heads.op import check_rope
from . import reference

LINEARS = ("qkv", "proj", "fc1", "fc2")  # the order of weights, biases, weight_scales, w_bits
GRIDS = ("qkv input", "q", "k", "v", "proj input", "fc1 input", "fc2 input")  # the order of scales, zeros, a_bits
GATES = (None, "first", "last")


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
    head_scale: torch.Tensor | None = None,
    post_norm: bool = False,
    half: bool = False,
    gate: str | None = None,
    rope: torch.Tensor | None = None,
    hidden_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """A transformer block with 8-bit integers between its operators; no gradient.

        h = x + proj(attention(qkv(layer_norm(x))))
        result = h + fc2(activation(fc1(layer_norm(h)))) + acm

    With `post_norm`, as Swin V2 has it:

        h = x + layer_norm(proj(attention(qkv(x))))
        result = h + layer_norm(fc2(activation(fc1(h))))

    With a `gate` (SwiGLU) fc1 has twice the outputs that fc2 takes. Half of them go through the activation and are multiplied
    by the others, which takes the place of `activation(fc1(...))`.

    Seven operators, with the arithmetic of `layer_norm_quantize`, `quant_linear`, `quant_attention` and, with a gate,
    `gate_quantize`; what is their results' precision is this one's. One compiled call on CPUs, the same seven calls elsewhere.

    Args:
        x: float32 [B, T, C].
        norms: weight and bias of the first LayerNorm, then of the second, float32 [C] each.
        eps: of the two.
        weights: of `LINEARS`, in a form that `quant_linear` takes: [3 * D, C], [C, D], [H, C] ([2 * H, C] with a gate), [C, H].
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
        hidden_scale: [H], float32, or None: the scales that what fc2 takes is rounded by, where its channels have scales of
            their own; by default that of fc2's input for all.
        activation: as there is in `quant_linear`.
        head_scale: float32 [heads] or None: attention by cosines. Queries and keys have length 1 when they are quantized, and
            a head's scores are multiplied by its scale too.
        post_norm: whether the norms come last within the residual sums; then there is no acm.
        half: as there is in `quantize_heads`.
        gate: which half of fc1's result goes through the activation, "first" or "last"; None for an ordinary MLP.
        rope: as there: what the queries and keys of the last tokens of each image are turned by; not with head_scale.
        hidden_table: uint8 [256] or None: what each byte that fc2 takes becomes, an integer of its grid, where it may be few of
            them.

    Returns:
        float32 [B, T, C].

    Raises:
        TypeError: x is not float32.
        ValueError: lengths, shapes, devices or values do not fit; or a gradient is wanted.

    Source: DFQ-ViT, arXiv 2507.14481 (ACM); integer arithmetic of arXiv 1712.05877.
    """
    blocks.check_input(x)
    lists: dict[str, tuple[Sequence[Any], int]] = {
        "norms": (norms, 4), "eps": (eps, 2), "weights": (weights, len(LINEARS)), "biases": (biases, len(LINEARS)),
        "weight_scales": (weight_scales, len(LINEARS)), "w_bits": (w_bits, len(LINEARS)), "scales": (scales, len(GRIDS)),
        "zeros": (zeros, len(GRIDS)), "a_bits": (a_bits, len(GRIDS)),
    }  # fmt: skip
    for name, (values, count) in lists.items():
        blocks.check_length(name, values, count)
    blocks.check_tensors(norms=norms, weights=weights, weight_scales=weight_scales, scales=scales, zeros=zeros)
    for name, widths in (("w_bits", w_bits), ("a_bits", a_bits)):
        for bits in widths:
            checks.bits(name, bits)
    checks.integer("heads", heads)
    if len(set(a_bits[1:4])) > 1:
        raise ValueError(f"a_bits was {list(a_bits[1:4])} for q, k and v; they must be the same")
    if not math.isfinite(attention_scale):
        raise ValueError(f"attention_scale was {attention_scale}; it must be a finite number")
    channels = norms[0].numel()
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"x had shape {tuple(x.shape)}; it must be [B, T, {channels}]")
    inner, hidden = weight_scales[0].numel() // 3, weight_scales[2].numel()
    for norm in norms:
        blocks.check_channels("norms", norm, channels)
    if heads < 1 or inner % heads:
        raise ValueError(f"heads was {heads}; the {inner} channels of q must be a multiple of it")
    if gate not in GATES:
        raise ValueError(f"gate was {gate!r}; it may be None, 'first' or 'last'")
    if gate is not None and hidden % 2:
        raise ValueError(f"gate was {gate!r} and fc1 had {hidden} outputs; a gate takes half of them")
    taken = hidden // 2 if gate else hidden
    sizes = ((3 * inner, channels), (channels, inner), (hidden, channels), (channels, taken))
    for layer in zip(LINEARS, [x] * 4, weights, biases, weight_scales, w_bits, sizes, strict=True):
        blocks.check_linear(*layer)
    blocks.check_grids(x, GRIDS, scales, zeros, a_bits)
    checks.same_device(x=x, position_bias=position_bias, mask=mask, index=index, acm=acm, hidden_scale=hidden_scale,
                       head_scale=head_scale, hidden_table=hidden_table)  # fmt: skip
    check_windows("position_bias", heads, x.shape[1], position_bias, mask, index)
    if acm is not None:
        checks.floating("acm", acm)
    if acm is not None and acm.shape != x.shape[1:]:
        raise ValueError(f"acm had shape {tuple(acm.shape)}; it must be {list(x.shape[1:])}, [tokens, channels]")
    if acm is not None and post_norm:
        raise ValueError("acm was given with post_norm, whose norm would change it; it must be None")
    if head_scale is not None and (head_scale.shape != (heads,) or head_scale.dtype != torch.float32):
        raise ValueError(f"head_scale was {head_scale.dtype} {tuple(head_scale.shape)}; it must be float32 [{heads}]")
    if rope is not None:
        if head_scale is not None:
            raise ValueError("rope was given with head_scale; one of them must be None")
        checks.same_device(x=x, rope=rope)
        check_rope(rope, heads, x.shape[1], inner // heads)
    blocks.check_hidden(hidden_scale, taken)
    if hidden_table is not None and (hidden_table.shape != (256,) or hidden_table.dtype != torch.uint8):
        raise ValueError(f"hidden_table was {hidden_table.dtype} {tuple(hidden_table.shape)}; it must be uint8 [256]")
    if hidden_table is not None and (most := int(hidden_table.max())) >= 1 << a_bits[-1]:
        raise ValueError(f"hidden_table held {most}; it must be whole numbers from 0 to {(1 << a_bits[-1]) - 1}")
    check_activation(activation)
    blocks.check_no_gradient("quant_block", (x, *norms, *weights, *biases, *weight_scales, *scales, *zeros, acm, position_bias,
                                             mask, hidden_scale, head_scale, rope))  # fmt: skip
    return forward(
        x, list(norms), list(eps), list(weights), blocks.given(x, biases), list(weight_scales), list(w_bits), list(scales),
        list(zeros), list(a_bits), heads, float(attention_scale), position_bias, mask, index, acm, hidden_scale,
        activation or "none", head_scale, post_norm, half, gate or "none", rope, hidden_table,
    )  # fmt: skip


forward = Operator(
    "quant_block(Tensor x, Tensor[] norms, float[] eps, Tensor[] weights, Tensor[] biases, Tensor[] weight_scales, "
    "int[] w_bits, Tensor[] scales, Tensor[] zeros, int[] a_bits, int heads, float attention_scale, Tensor? position_bias, "
    "Tensor? mask, Tensor? index, Tensor? acm, Tensor? hidden_scale, str activation, Tensor? head_scale=None, "
    "bool post_norm=False, bool half=False, str gate='none', Tensor? rope=None, Tensor? hidden_table=None) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=blocks.backends("quant_block", reference.quant_block),
)
