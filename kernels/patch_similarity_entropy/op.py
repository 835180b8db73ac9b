"""The operator `patch_similarity_entropy`: public function, checks, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything
from . import reference


def patch_similarity_entropy(
    features: torch.Tensor, points: int = 10, bandwidth: float = 0.01, *, windows: int = 1
) -> torch.Tensor:
    """The differential entropy of the cosine similarities between the patches of each image.

    For each image: S = all N^2 cosine similarities between its N vectors (the diagonal included); their Gaussian kernel
    density p at `points` places evenly spaced from the least to the greatest similarity of the whole batch of that layer;
    the result is `-sum p log p` by the trapezoid rule, with p + 1e-4 in place of p. No gradient flows through the ends of
    the range. The similarity with a zero vector is 0; a range of zero width gives entropy 0 and gradient 0.

    Args:
        features: [B, N, D] or [L, B, N, D] for L layers at once; float32, bfloat16, float16 or float64.
        points: places at which the density is taken, at least 2.
        bandwidth: standard deviation of the Gaussian, in units of similarity.
        windows: how many consecutive entries of the batch dimension are windows of one image (Swin); their densities are
            pooled, and B becomes B / windows in the result.

    Returns:
        [B] or [L, B], nats, in the dtype of features. The synthesis loss is minus its mean over B, summed over L.

    Raises:
        TypeError: features is not a float tensor.
        ValueError: shapes or numbers do not fit; the message names the argument.

    Source: PSAQ-ViT, arXiv 2203.02250, equations 5 to 8.
    """
    checks.floating("features", features)
    if features.dim() not in (3, 4):
        raise ValueError(f"features had shape {tuple(features.shape)}; it must be [B, N, D] or [L, B, N, D]")
    if features.shape[-1] == 0 or features.shape[-2] == 0:
        raise ValueError(f"features had shape {tuple(features.shape)}; N and D must be at least 1")
    if points < 2:
        raise ValueError(f"points was {points}; it must be at least 2")
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth was {bandwidth}; it must be a finite number greater than 0")
    if windows < 1 or features.shape[-3] % windows:
        raise ValueError(f"windows was {windows}; it must divide the batch dimension of features, {features.shape[-3]}")
    checks.finite("features", features)
    layers = features if features.dim() == 4 else features.unsqueeze(0)
    entropy = _PatchSimilarityEntropy.apply(layers, points, float(bandwidth), windows)
    return entropy if features.dim() == 4 else entropy.squeeze(0)


_ARGUMENTS = "Tensor features, int points, float bandwidth, int windows"

forward = Operator(
    f"patch_similarity_entropy({_ARGUMENTS}) -> Tensor",
    fake=lambda features, points, bandwidth, windows: features.new_empty(
        features.shape[0], features.shape[1] // windows
    ),
    backends=[Backend("reference", reference.patch_similarity_entropy, anything)],
)

backward = Operator(
    f"patch_similarity_entropy_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    fake=lambda grad, features, *_: torch.empty_like(features, memory_format=torch.contiguous_format),
    backends=[Backend("reference", reference.patch_similarity_entropy_backward, anything)],
)


class _PatchSimilarityEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, *constants: Any) -> torch.Tensor:
        ctx.save_for_backward(features)
        ctx.constants = constants
        return forward(features, *constants)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        return backward(grad, features, *ctx.constants), None, None, None
