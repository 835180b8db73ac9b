"""`patch_similarity_entropy` in plain differentiable torch: the oracle of every other backend, and the fallback.

One layer at a time and one point at a time, so that the largest temporary is a few [B, N, N] matrices.
"""

from __future__ import annotations

import math

import torch

SMOOTHING = 1e-4  # added to the density before the logarithm, as in PSAQ-ViT
NORM_FLOOR = 1e-8  # a vector shorter than this is divided by it: similarities with a zero vector are 0


def patch_similarity_entropy(features: torch.Tensor, points: int, bandwidth: float, windows: int) -> torch.Tensor:
    """The formula of `op.patch_similarity_entropy` for features [L, B * windows, N, D]; gives [L, B]."""
    return torch.stack([_layer(layer, points, bandwidth, windows) for layer in features])


def patch_similarity_entropy_backward(
    grad: torch.Tensor, features: torch.Tensor, points: int, bandwidth: float, windows: int
) -> torch.Tensor:
    """The gradient of the features, by autograd over one layer at a time."""
    result = torch.empty_like(features, memory_format=torch.contiguous_format)
    for grad_layer, layer, result_layer in zip(grad, features, result, strict=True):
        with torch.enable_grad():
            leaf = layer.detach().requires_grad_()
            entropy = _layer(leaf, points, bandwidth, windows)
        result_layer.copy_(torch.autograd.grad(entropy, leaf, grad_layer)[0])
    return result


def _layer(features: torch.Tensor, points: int, bandwidth: float, windows: int) -> torch.Tensor:
    work = features if features.dtype == torch.float64 else features.float()
    if features.shape[0] == 0:
        return work.sum(dim=(1, 2)).to(features.dtype)
    unit = work / torch.linalg.vector_norm(work, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    similarity = (unit @ unit.mT).flatten(1)
    least, greatest = similarity.detach().aminmax()
    fractions = torch.arange(points, dtype=work.dtype, device=work.device) / (points - 1)
    places = least + (greatest - least) * fractions
    peak = 1.0 / (math.sqrt(2.0 * math.pi) * bandwidth)
    density = torch.stack(
        [(((similarity - place) / bandwidth).square() * -0.5).exp().mean(dim=1) * peak for place in places], dim=1
    )
    density = density.view(-1, windows, points).mean(dim=1) + SMOOTHING
    integrand = -density * density.log()
    step = (greatest - least) / (points - 1)
    return ((integrand[:, :-1] + integrand[:, 1:]).sum(dim=1) * (0.5 * step)).to(features.dtype)
