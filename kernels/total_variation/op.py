"""The operator `total_variation`: public function, checks, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything, compiled, not_float64
from . import reference


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """The total variation of each image: the sum of the Euclidean norms of its differences in four directions.

    The directions are across, down and both diagonals; a norm is over all pixels and channels of an image. Where a norm
    is 0 (a constant image) its gradient is 0.

    Args:
        images: [B, C, H, W], float32, bfloat16, float16 or float64; computed in float32 (float64 for float64).

    Returns:
        [B], float32 (float64 for float64).

    Raises:
        TypeError: images is not a float tensor.
        ValueError: images does not have four dimensions.

    Source: the image prior of DeepInversion, arXiv 1912.08795, as PSAQ-ViT (arXiv 2203.02250) uses it.
    """
    checks.floating("images", images)
    if images.dim() != 4:
        raise ValueError(f"images had shape {tuple(images.shape)}; it must be [B, C, H, W]")
    return _TotalVariation.apply(images)[0]


forward = Operator(
    "total_variation(Tensor images) -> Tensor",
    fake=lambda images: images.new_empty(images.shape[0], 4, dtype=checks.wide(images)),
    backends=[
        compiled("total_variation", "cpu", not_float64),
        Backend("reference", reference.total_variation, anything),
    ],
)

backward = Operator(
    "total_variation_backward(Tensor weights, Tensor images) -> Tensor",
    fake=lambda weights, images: torch.empty_like(images, memory_format=torch.contiguous_format),
    backends=[
        compiled("total_variation_backward", "cpu", lambda _, images: not_float64(images)),
        Backend("reference", reference.total_variation_backward, anything),
    ],
)


class _TotalVariation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norms = forward(images)
        return norms.sum(dim=1), norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        images, norms = ctx.saved_tensors
        weights = torch.where(norms > 0, grad[:, None] / norms, 0.0)
        return backward(weights, images)
