"""Second-order weight rounding: the integers that keep a layer's outputs, rather than its weights, where they were.

Rounding each weight to the nearest step is best when errors are independent. They are not: an error in one weight can be taken
back by another, of the same row (their inputs are correlated) or of another row (what follows hears their outputs together).
How much a layer's rounding error E [N, K] costs is taken to be `trace(O E I E^T)`, two second moments over calibration tokens:

    I = sum of |g| x x^T / |x|^2   of the inputs x
    O = sum of g g^T               of the gradients g at the outputs, whose E[g g^T] is the logits' Fisher information

|g| counts tokens by how much they matter: the class token of a late block does, most patches there do not. Both are damped,
since synthetic inputs are not the real ones. The integers are found by `kernels.round_second_order`. Closed-form steps on
stored statistics: no weight is ever tuned by back-propagation.

Sources: the objective of OBQ and GPTQ (arXiv 2208.11580, 2210.17323), weighted by Fisher information as in BRECQ (arXiv
2102.05426), but by its root; a moment of each side as in K-FAC (arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import round_second_order
from .quantizers import search_weight_scale

INPUT_DAMPING = 0.3  # of the mean diagonal of I, added to it
OUTPUT_DAMPING = 2.0  # of O's: a few images tell less of gradients than of inputs
MOST_OUTPUTS = 8192  # of a layer whose O is kept; with more, rows are independent
_TINY = torch.finfo(torch.float32).tiny


class SecondMoments:
    """Running sums over a layer's tokens: of its inputs, and of the gradients at its outputs.

    Attributes:
        inputs: float32 [in_features, in_features].
        outputs: float32 [out_features, out_features]; None where rows are to be independent.
    """

    def __init__(self, in_features: int, out_features: int | None, device: torch.device) -> None:
        self.inputs = torch.zeros(in_features, in_features, device=device)
        self.outputs = None
        if out_features is not None and out_features <= MOST_OUTPUTS:
            self.outputs = torch.zeros(out_features, out_features, device=device)

    def observe(self, x: torch.Tensor, gradients: torch.Tensor) -> None:
        """Adds tokens x [..., in_features] with the gradients [..., out_features] at their outputs."""
        g = gradients.detach().reshape(-1, gradients.shape[-1]).float()
        units = torch.nn.functional.normalize(x.detach().reshape(-1, x.shape[-1]).float(), dim=1)
        self.inputs += (units * g.norm(dim=1, keepdim=True)).T @ units
        if self.outputs is not None:
            self.outputs += g.T @ g

    def watch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the tokens of x once gradients reach the layer's outputs y."""
        y.register_hook(lambda grad: self.observe(x, grad))

    def damped(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both sums, each damped by its own share."""
        outputs = None if self.outputs is None else damped(self.outputs, OUTPUT_DAMPING)
        return damped(self.inputs, INPUT_DAMPING), outputs


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    """A moment [n, n] scaled to a mean diagonal of 1, plus `share` times the identity."""
    mean = moment.diagonal().mean().clamp_min(_TINY)
    return moment / mean + share * torch.eye(len(moment), device=moment.device)


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
        unit = tensor.detach().float().std().clamp_min(_TINY) if len(features) > 1 else 1.0
        total = total + (draws * tensor).sum() / unit
    return total


def round_together(
    weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor | None, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers int8 [N, K], scale [N]) for weight [N, K] and its damped moments [K, K] and [N, N].

    The integers are among `levels`, int8, ascending.

    The scale of each row is searched as `quantizer="mse"` does, each weight's error counted by its channel's share of the
    inputs. The integers follow one another, so a CPU finds them, wherever the weight is.
    """
    weight = weight.detach().float()
    scale = search_weight_scale(weight, levels, inputs.diagonal())
    outputs = None if outputs is None else outputs.cpu()
    integers = round_second_order(weight.cpu(), scale.cpu(), inputs.cpu(), outputs, levels=levels)
    return integers.to(weight.device), scale
