"""`patch_similarity_entropy` in plain differentiable torch: the oracle of every other backend, and the fallback.

One layer at a time and one point at a time, so that the largest temporary is a few [B, N, N] matrices.
"""

from __future__ import annotations

import math

import torch

SMOOTHING = 1e-4  # added to the density before the logarithm, as in PSAQ-ViT
NORM_FLOOR = 1e-8  # a vector shorter than this is divided by it: similarities with a zero vector are 0
FLAT_ULPS = 16  # a range narrower than this many units of rounding is rounding noise, and its width is taken as 0


def similarity_range(features: torch.Tensor) -> torch.Tensor:
    """[L, 2]: the least and the greatest similarity of each layer of features [L, B, N, D]; zeros for an empty batch."""
    work = _work(features.detach())
    ends = work.new_zeros(features.shape[0], 2)
    if features.shape[1]:
        for layer, layer_ends in zip(work, ends, strict=True):
            least, greatest = _similarity(layer).aminmax()
            least, greatest = least.clamp(-1, 1), greatest.clamp(-1, 1)
            flat = greatest - least <= FLAT_ULPS * torch.finfo(work.dtype).eps
            layer_ends.copy_(torch.stack([torch.where(flat, greatest, least), greatest]))
    return ends


def patch_similarity_entropy(
    features: torch.Tensor, value_range: torch.Tensor, points: int, bandwidth: float, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of `op.patch_similarity_entropy` for features [L, B * windows, N, D].

    Gives the entropy [L, B], in the dtype of features, and the smoothed density [L, B, points], in that of value_range.
    """
    entropy = features.new_empty(features.shape[0], features.shape[1] // windows)
    density = value_range.new_empty(*entropy.shape, points)
    for index, layer in enumerate(features):
        entropy[index], density[index] = _layer(layer, value_range[index], points, bandwidth, windows)
    return entropy, density


def patch_similarity_entropy_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    value_range: torch.Tensor,
    density: torch.Tensor,
    bandwidth: float,
    windows: int,
) -> torch.Tensor:
    """The gradient of the features, by autograd over one layer at a time; of `density` only the shape is used."""
    result = torch.empty_like(features, memory_format=torch.contiguous_format)
    for grad_layer, layer, ends, result_layer in zip(grad, features, value_range, result, strict=True):
        with torch.enable_grad():
            leaf = layer.detach().requires_grad_()
            entropy, _ = _layer(leaf, ends, density.shape[-1], bandwidth, windows)
        result_layer.copy_(torch.autograd.grad(entropy, leaf, grad_layer)[0])
    return result


def _work(features: torch.Tensor) -> torch.Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _similarity(work: torch.Tensor) -> torch.Tensor:
    unit = work / torch.linalg.vector_norm(work, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    return unit @ unit.mT


def _layer(
    features: torch.Tensor, value_range: torch.Tensor, points: int, bandwidth: float, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    work = _work(features)
    similarity = _similarity(work).flatten(1)
    least, greatest = value_range.unbind()
    fractions = torch.arange(points, dtype=work.dtype, device=work.device) / (points - 1)
    places = least + (greatest - least) * fractions
    peak = 1.0 / (math.sqrt(2.0 * math.pi) * bandwidth)
    density = torch.stack(
        [(((similarity - place) / bandwidth).square() * -0.5).exp().mean(dim=1) * peak for place in places], dim=1
    )
    density = density.view(features.shape[0] // windows, windows, points).mean(dim=1) + SMOOTHING
    integrand = -density * density.log()
    step = (greatest - least) / (points - 1)
    return ((integrand[:, :-1] + integrand[:, 1:]).sum(dim=1) * (0.5 * step)).to(features.dtype), density
