"""What the operators count as in `torch.utils.flop_counter.FlopCounterMode`, which knows none of them and would count nothing.

To import this module is enough, before the counter is made; quantized models do. Two for each multiply-add, of floats or of
integers: products of matrices and convolutions and nothing else, as torch counts. `import dfqvit.kernels` leaves it out, since
torch's counter imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from .dispatch import places_of

Shape = Sequence[int]


def _counts(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a formula, of shapes in the place of tensors, for the operator `name` wherever it stands."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        register_flop_formula(places_of(name))(formula)
        return formula

    return register


@_counts("quant_linear")
def linear(
    x: Shape, weight: Shape, bias: Any, acm: Any, x_scale: Shape, x_zero: Shape, w_scale: Shape, *_: Any, **__: Any
) -> int:
    """[..., K] times [N, K]."""
    return 2 * math.prod(x) * w_scale[0]


@_counts("quant_linear_backward")
def linear_backward(grad: Shape, x: Shape, *arguments: Any, **_: Any) -> int:
    """A product for the gradients of x and its scale, one for those of the weight, and the product again for an activation's."""
    activation, needed = arguments[-2:]
    products = (needed[0] or needed[4]) + (needed[1] or needed[5]) + (activation != "none")
    return 2 * math.prod(x) * grad[-1] * products


@_counts("quant_attention")
def attention(
    qkv: Shape, heads: int, in_scale: Shape, in_zero: Shape, scale: float, bias: Any, mask: Any, index: Shape | None, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Queries times keys and probabilities times values, within each image or window."""
    return _attention(qkv[:2], qkv[2] // 3, index)


def _attention(image: Shape, channels: int, index: Shape | None) -> int:
    together = image[1] if index is None else index[1]
    return 4 * math.prod(image) * together * channels


@_counts("quant_block")
def block(
    x: Shape, norms: Any, eps: Any, weights: Any, biases: Any, weight_scales: Sequence[Shape], w_bits: Any, scales: Any,
    zeros: Any, a_bits: Any, heads: int, attention_scale: float, position_bias: Any, mask: Any, index: Shape | None, acm: Any,
    hidden_scale: Any, activation: str, head_scale: Any = None, post_norm: bool = False, half: bool = False,
    gate: str = "none", *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Its four linear layers and its attention."""
    outputs = [scale[0] for scale in weight_scales]
    inner, hidden = outputs[0] // 3, outputs[2] // (1 if gate == "none" else 2)
    products = sum(k * n for k, n in zip((x[2], inner, x[2], hidden), outputs, strict=True))
    return 2 * x[0] * x[1] * products + _attention(x[:2], inner, index)


@_counts("quant_conv_block")
def conv_block(
    x: Shape, conv_weight: Shape, conv_bias: Any, norm_weight: Any, norm_bias: Any, eps: float, weights: Any, biases: Any,
    weight_scales: Sequence[Shape], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Its depthwise convolution and its two linear layers."""
    (hidden,), (channels,) = weight_scales
    return 2 * math.prod(x) * conv_weight[-1] * conv_weight[-2] + 4 * math.prod(x[:-1]) * channels * hidden


@_counts("similarity_range")
def similarities(features: Shape, *_: Any, **__: Any) -> int:
    """Every patch of an image times every other, [L, B, N, D]."""
    return 2 * math.prod(features) * features[-2]


@_counts("patch_similarity_entropy")
def entropy(features: Shape, *_: Any, **__: Any) -> int:
    """The similarities; its densities are no products."""
    return similarities(features)


@_counts("patch_similarity_entropy_backward")
def entropy_backward(grad: Shape, features: Shape, *_: Any, **__: Any) -> int:
    """The similarities again, and their gradients times the features."""
    return 2 * similarities(features)
