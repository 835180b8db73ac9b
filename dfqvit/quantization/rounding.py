"""Second-order weight rounding: the integers that keep a layer's outputs, rather than its weights, where they were.

Rounding each weight to the nearest step is best when the inputs are uncorrelated. Theirs are not: an error in one weight can
be taken back by the next. With `H = sum of |g| x x^T` over a layer's calibration inputs x, the outputs' squared error of a
row's rounding error e is `e H e^T`, counted by how much each output token matters: |g| is the length of the gradient that the
logits send back to it (`sensitivity`). The class token of a late block matters, most patches there do not. The error is reduced
one input channel at a time: the integer that is best with all others held, in sweeps over the channels, for all rows at once.
Closed-form steps on stored statistics: no weight is ever tuned by back-propagation.

Sources: the objective of OBQ and GPTQ (arXiv 2208.11580, 2210.17323), weighted by Fisher information as in BRECQ (arXiv
2102.05426), but by its root; coordinate descent as in QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .quantizers import search_weight_scale

DAMPING = (
    0.3  # of H's mean diagonal, added to it: synthetic inputs are not the real ones, so their correlations count less
)
SWEEPS = 8
_BLOCK = 64  # channels whose effect on one another is followed at once; the others hear of them together


class SecondMoment:
    """The running sum of w x x^T over a layer's inputs x of weight w."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def observe(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds the vectors of x [..., in_features], weighted by weights [...]."""
        rows = torch.nn.functional.normalize(x.detach().reshape(-1, x.shape[-1]).float(), dim=1)
        self.sum += (rows * weights.reshape(-1, 1)).T @ rows

    def watch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the vectors of x once gradients reach the layer's outputs y [..., out_features], weighted by their lengths."""
        y.register_hook(lambda grad: self.observe(x, grad.float().norm(dim=-1)))

    def damped(self) -> torch.Tensor:
        """[K, K] float32: the sum scaled to a mean diagonal of 1, plus DAMPING times the identity."""
        mean = self.sum.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        return (self.sum / mean).float() + DAMPING * torch.eye(len(self.sum), device=self.sum.device)


def sensitivity(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A scalar of logits [B, classes] whose gradient g has `E[g g^T]`, over random draws, equal to their Fisher information.

    That is `J^T (diag(p) - p p^T) J`, p the probabilities and J the logits' derivative: what a small change does to the KL.
    """
    p = logits.detach().float().softmax(dim=1)
    draws = p.sqrt() * torch.randn(p.shape, generator=generator).to(p.device)
    return ((draws - p * draws.sum(dim=1, keepdim=True)) * logits).sum()


def feature_sensitivity(features: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """As `sensitivity`, for a model without a classifier: of tensors [B, ...] as wholes, g with `E[g g^T]` = `J^T J`.

    That is what a small change does to the features' squared distance. Of several tensors each counts in units of its own
    standard deviation.
    """
    total = torch.zeros((), device=features[0].device)
    for tensor in features:
        draws = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        unit = tensor.detach().float().std().clamp_min(torch.finfo(torch.float32).tiny) if len(features) > 1 else 1.0
        total = total + (draws * tensor).sum() / unit
    return total


def round_second_order(weight: torch.Tensor, moment: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers int8 [N, K], scale [N]) for weight [N, K] and the damped second moment [K, K] of its inputs.

    The scale of each row is searched as `quantizer="mse"` does, each weight's error counted by its channel's share of H.
    """
    weight = weight.detach().float()
    scale = search_weight_scale(weight, bits, moment.diagonal())
    limits = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    rounded = (weight / scale[:, None]).round().clamp(*limits)
    for _ in range(SWEEPS):
        if not _sweep(weight, rounded, scale, moment, limits):
            break
    return rounded.to(torch.int8), scale


def _sweep(
    weight: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor, limits: tuple[int, int]
) -> bool:
    """Moves every integer of `rounded` in turn to its best place, in place; whether any moved."""
    moved = False
    slope = (weight - rounded * scale[:, None]) @ moment  # minus half the error's derivative by the weight
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        local, changes = moment[block, block], torch.zeros_like(rounded[:, block])
        inner = slope[:, block].clone()
        for k in range(local.shape[0]):
            old = rounded[:, start + k]
            new = (old + inner[:, k] / (local[k, k] * scale)).round().clamp(*limits)
            changes[:, k] = (new - old) * scale
            inner -= changes[:, k, None] * local[k]
            rounded[:, start + k] = new
        if bool(changes.any()):
            moved = True
            slope -= changes @ moment[block]
    return moved
