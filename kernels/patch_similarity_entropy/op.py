"""The operators `patch_similarity_entropy` and `similarity_range`: public functions, checks, registration, autograd."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, Verdict, anything, compiled, in_triton, not_float64
from . import reference


def patch_similarity_entropy(
    features: torch.Tensor,
    points: int = 10,
    bandwidth: float = 0.01,
    *,
    windows: int = 1,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """The differential entropy of the cosine similarities between the patches of each image.

    For each image: S = all N^2 cosine similarities between its N vectors (the diagonal included); their Gaussian kernel
    density p at `points` places evenly spaced from the least to the greatest similarity of the whole batch of that layer;
    the result is `-sum p log p` by the trapezoid rule, with p + 1e-4 in place of p. No gradient flows through the ends of
    the range. The similarity with a zero vector is 0; a range of zero width gives entropy 0 and gradient 0.

    Only the range couples the images of a batch. To split a batch, take `similarity_range` of each part, reduce to the
    least and the greatest, and pass that to each part: the results are those of the whole batch.

    Args:
        features: [B, N, D] or [L, B, N, D] for L layers at once; float32, bfloat16, float16 or float64.
        points: places at which the density is taken, at least 2.
        bandwidth: standard deviation of the Gaussian, in units of similarity.
        windows: how many consecutive entries of the batch dimension are windows of one image (Swin); their densities are
            pooled, and B becomes B / windows in the result.
        value_range: [2], or [L, 2] for [L, B, N, D]: where the first and the last place stand. None (default) means the
            least and the greatest similarity of the batch of each layer: `similarity_range(features)`.

    Returns:
        [B] or [L, B], nats, in the dtype of features. The synthesis loss is minus its mean over B, summed over L.

    Raises:
        TypeError: features or value_range is not a float tensor.
        ValueError: shapes, devices or numbers do not fit; the message names the argument.

    Source: PSAQ-ViT, arXiv 2203.02250, equations 5 to 8.
    """
    _check_features(features)
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points was {points!r}; it must be a whole number of at least 2")
    if not isinstance(bandwidth, numbers.Real) or not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth was {bandwidth!r}; it must be a finite number greater than 0")
    checks.integer("windows", windows)
    if windows < 1 or features.shape[-3] % windows:
        raise ValueError(f"windows was {windows}; it must divide the batch dimension of features, {features.shape[-3]}")
    layers = features if features.dim() == 4 else features.unsqueeze(0)
    ends = range_operator(layers.detach()) if value_range is None else _checked_range(value_range, features)
    entropy, _ = _PatchSimilarityEntropy.apply(layers, ends, points, float(bandwidth), windows)
    return entropy if features.dim() == 4 else entropy.squeeze(0)


def similarity_range(features: torch.Tensor) -> torch.Tensor:
    """The least and the greatest cosine similarity between two patches of one image, over the batch of each layer.

    Args:
        features: [B, N, D] or [L, B, N, D], as for `patch_similarity_entropy`; no gradient flows back.

    Returns:
        [2] or [L, 2]: least, greatest; float32, or float64 for float64 features. Zeros for an empty batch. Values that
        differ by no more than rounding (16 units of the last place of 1) count as equal.

    Raises:
        TypeError: features is not a float tensor.
        ValueError: its shape does not fit, or it holds NaN or Inf.
    """
    _check_features(features)
    ends = range_operator((features if features.dim() == 4 else features.unsqueeze(0)).detach())
    return ends if features.dim() == 4 else ends.squeeze(0)


def _check_features(features: torch.Tensor) -> None:
    checks.floating("features", features)
    if features.dim() not in (3, 4):
        raise ValueError(f"features had shape {tuple(features.shape)}; it must be [B, N, D] or [L, B, N, D]")
    if features.shape[-1] == 0 or features.shape[-2] == 0:
        raise ValueError(f"features had shape {tuple(features.shape)}; N and D must be at least 1")
    checks.finite("features", features)


def _checked_range(value_range: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`value_range` as [L, 2] in the dtype that the operator computes in."""
    checks.floating("value_range", value_range)
    wanted = (2,) if features.dim() == 3 else (features.shape[0], 2)
    if tuple(value_range.shape) != wanted:
        raise ValueError(f"value_range had shape {tuple(value_range.shape)}; it must be {wanted} for these features")
    checks.same_device(features=features, value_range=value_range)
    checks.ascending("value_range", value_range)
    ends = value_range.detach().to(checks.wide(features))
    return ends if features.dim() == 4 else ends.unsqueeze(0)


def _fake_forward(
    features: torch.Tensor, value_range: torch.Tensor, points: int, bandwidth: float, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    images = features.shape[0], features.shape[1] // windows
    return features.new_empty(images), value_range.new_empty(*images, points)


def _supports(features: torch.Tensor, value_range: torch.Tensor, points: int, bandwidth: float, *_: Any) -> Verdict:
    if not 1e-6 <= bandwidth <= 1e6:
        return False, f"bandwidth was {bandwidth}; float32 arithmetic serves 1e-6 to 1e6"
    return not_float64(features)


def _supports_cuda(features: torch.Tensor, value_range: torch.Tensor, points: int, *constants: Any) -> Verdict:
    if points > 512:
        return False, f"points was {points}; the CUDA kernel has room for 512"
    return _supports(features, value_range, points, *constants)


def _backward(supports: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """What `supports` says of the forward, asked with the arguments of the backward."""
    return lambda grad, features, value_range, density, *constants: supports(
        features, value_range, density.shape[-1], *constants
    )


range_operator = Operator(
    "similarity_range(Tensor features) -> Tensor",
    fake=lambda features: features.new_empty(features.shape[0], 2, dtype=checks.wide(features)),
    backends=[
        compiled("similarity_range", "cuda", not_float64),
        in_triton("similarity_range", __package__, not_float64),
        compiled("similarity_range", "cpu", not_float64),
        Backend("reference", reference.similarity_range, anything),
    ],
)

forward = Operator(
    "patch_similarity_entropy(Tensor features, Tensor value_range, int points, float bandwidth, int windows)"
    " -> (Tensor entropy, Tensor density)",
    fake=_fake_forward,
    backends=[
        compiled("patch_similarity_entropy", "cuda", _supports_cuda),
        in_triton("patch_similarity_entropy", __package__, _supports),
        compiled("patch_similarity_entropy", "cpu", _supports),
        Backend("reference", reference.patch_similarity_entropy, anything),
    ],
)

backward = Operator(
    "patch_similarity_entropy_backward(Tensor grad, Tensor features, Tensor value_range, Tensor density,"
    " float bandwidth, int windows) -> Tensor",
    fake=lambda grad, features, *_: torch.empty_like(features, memory_format=torch.contiguous_format),
    backends=[
        compiled("patch_similarity_entropy_backward", "cuda", _backward(_supports_cuda)),
        in_triton("patch_similarity_entropy_backward", __package__, _backward(_supports)),
        compiled("patch_similarity_entropy_backward", "cpu", _backward(_supports)),
        Backend("reference", reference.patch_similarity_entropy_backward, anything),
    ],
)


class _PatchSimilarityEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.constants = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        return backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None
