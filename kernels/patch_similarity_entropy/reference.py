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
    """The gradient of the features, written out, so that it also runs where autograd is off (inside dispatch modes)."""
    result = torch.empty_like(features, memory_format=torch.contiguous_format)
    points, n = density.shape[-1], features.shape[2]
    peak = 1.0 / (math.sqrt(2.0 * math.pi) * bandwidth)
    for index, layer in enumerate(features):
        work = _work(layer)
        length = torch.linalg.vector_norm(work, dim=-1, keepdim=True)
        unit = work / length.clamp_min(NORM_FLOOR)
        similarity = unit @ unit.mT
        places, step = _places(value_range[index], points, work.dtype)
        weights = torch.full_like(places, 1.0)
        weights[:: points - 1].fill_(0.5)  # not by assignment: that copies from the host, which no CUDA graph can hold
        # d entropy / d p_j = -weight_j step (log p_j + 1);  d p_j / d s = Gaussian (x_j - s) / h^2 / number of pairs
        per_place = -weights * step * (density[index].log() + 1.0) * grad[index].to(work.dtype).unsqueeze(1)
        per_place = per_place.repeat_interleave(windows, dim=0) * (peak / (bandwidth**2 * n * n * windows))
        slope = torch.zeros_like(similarity)
        for j in range(points):
            away = places[j] - similarity
            slope += per_place[:, j, None, None] * away * ((away / bandwidth).square() * -0.5).exp()
        unit_grad = 2.0 * (slope @ unit)
        along = torch.where(length >= NORM_FLOOR, (unit * unit_grad).sum(dim=-1, keepdim=True), 0.0)
        result[index] = (unit_grad - unit * along) / length.clamp_min(NORM_FLOOR)
    return result


def _work(features: torch.Tensor) -> torch.Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _similarity(work: torch.Tensor) -> torch.Tensor:
    unit = work / torch.linalg.vector_norm(work, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    return unit @ unit.mT


def _places(value_range: torch.Tensor, points: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[points]: where the density is taken, and the distance between two places."""
    least, greatest = value_range.unbind()
    fractions = torch.arange(points, dtype=dtype, device=value_range.device) / (points - 1)
    return least + (greatest - least) * fractions, (greatest - least) / (points - 1)


def _layer(
    features: torch.Tensor, value_range: torch.Tensor, points: int, bandwidth: float, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    work = _work(features)
    similarity = _similarity(work).flatten(1)
    places, step = _places(value_range, points, work.dtype)
    peak = 1.0 / (math.sqrt(2.0 * math.pi) * bandwidth)
    density = torch.stack(
        [(((similarity - place) / bandwidth).square() * -0.5).exp().mean(dim=1) * peak for place in places], dim=1
    )
    density = density.view(features.shape[0] // windows, windows, points).mean(dim=1) + SMOOTHING
    integrand = -density * density.log()
    return ((integrand[:, :-1] + integrand[:, 1:]).sum(dim=1) * (0.5 * step)).to(features.dtype), density
