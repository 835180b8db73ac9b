"""What rounding costs: layers' inputs, outputs and weights, each with the Fisher information that the logits hold about it.

The cost of a small error e in a value is `e^2 g^2`, g the derivative of the log-likelihood by it, summed over what is rounded: how
much the KL divergence of the logits grows, if errors do not conspire (`rounding.sensitivity` draws g).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.adapters import find_adapter, flattened, is_network
from ..progress import tracked
from ..quantization.layers import QuantLinear
from ..quantization.quantizers import ActivationQuantizer
from ..quantization.ranges import FixedRange, affine_parameters
from ..quantization.rounding import feature_sensitivity, sensitivity
from .levels import fit_levels

BATCH = 16  # images in one forward pass of calibration; ranges do not depend on it
TOKENS = 768  # of a layer that are kept, at random
ROUNDING_SHARE = 0.5  # of the squared error of nearest rounding that second-order rounding leaves, about
MOST_CLIPPED = 6  # bits of activations whose ranges are searched; with more, the ends are the least and greatest seen
SHARED = 0.1  # of a channel's mean cost that every token is given beside its own, where ranges are searched
_CLIPS = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1)  # shares of both ends that are tried where only the loss is asked for
_FINE_CLIPS = tuple(0.87**k for k in range(26))  # of either end, where the range is


class Statistics:
    """What a layer's inputs and outputs were, on all tokens or on those kept, and what errors in them cost.

    Attributes:
        x: float32 [n, K], inputs of the tokens kept; `cost` [n, K] is the squared derivative of the log-likelihood by each.
        least: [K], with `greatest`: of the inputs, all tokens.
        y: [n, N], outputs of the same tokens; `y_cost` likewise.
        y_least: [N], with `y_greatest`.
        fisher: [N, K], of the weights, summed over images.
        share: of all tokens that were kept.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.parts: dict[str, list[torch.Tensor]] = {"x": [], "cost": [], "y": [], "y_cost": []}
        self.least, self.greatest = _unseen(layer.in_features, layer), -_unseen(layer.in_features, layer)
        self.y_least, self.y_greatest = _unseen(layer.out_features, layer), -_unseen(layer.out_features, layer)
        self.fisher = torch.zeros_like(float_weight(layer))
        self.seen = 0

    def watch(self, x: torch.Tensor, y: torch.Tensor, rows: int, generator: torch.Generator) -> None:
        """Takes in x [B, ..., K] and y [B, ..., N]; the rest when gradients reach y."""
        images = x.shape[0]
        x, flat = x.detach().reshape(images, -1, x.shape[-1]), y.detach().reshape(images, -1, y.shape[-1])
        tokens = x.shape[0] * x.shape[1]
        chosen = torch.randperm(tokens, generator=generator)[:rows].to(x.device)
        self.seen += tokens
        self.least = torch.minimum(self.least, x.amin((0, 1)))
        self.greatest = torch.maximum(self.greatest, x.amax((0, 1)))
        self.y_least = torch.minimum(self.y_least, flat.amin((0, 1)))
        self.y_greatest = torch.maximum(self.y_greatest, flat.amax((0, 1)))
        if y.requires_grad:
            y.register_hook(lambda grad: self._weigh(x, flat, grad.detach().reshape(flat.shape), chosen))

    def _weigh(self, x: torch.Tensor, y: torch.Tensor, grad: torch.Tensor, chosen: torch.Tensor) -> None:
        """All parts at once, so that those of a layer that is called twice keep together."""
        self.parts["x"].append(x.flatten(0, 1)[chosen])
        self.parts["y"].append(y.flatten(0, 1)[chosen])
        kept = grad.flatten(0, 1)[chosen]
        self.parts["y_cost"].append(kept.square())
        self.parts["cost"].append((kept @ float_weight(self.layer)).square())
        for image in range(len(x)):
            self.fisher += (grad[image].T @ x[image]).square()

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("parts", {})
        if name not in parts:
            raise AttributeError(name)
        parts[name] = [torch.cat(parts[name])]
        return parts[name][0]

    @property
    def share(self) -> float:
        return len(self.x) / self.seen

    def inputs(self) -> Side:
        """[n, K], as the layer's quantizer rounds them."""
        return self._side(self.x, self.cost, self.least, self.greatest, self.layer.input.bits)

    def outputs(self, rows: slice, bits: int) -> Side:
        """[n, rows], as a quantizer of so many bits rounds them."""
        least, greatest = self.y_least[rows], self.y_greatest[rows]
        return self._side(self.y[:, rows], self.y_cost[:, rows], least, greatest, bits)

    def _side(
        self, values: torch.Tensor, cost: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor, bits: int
    ) -> Side:
        """A cost holds for small errors. Where clipping makes large ones, of massive tokens above all, none is taken to be free."""
        side = Side(values, cost, least, greatest, bits, self.share)
        return replace(side, cost=cost + SHARED * cost.mean(dim=0)) if side.clips else side

    def weight_loss(self, factor: torch.Tensor) -> float:
        """Of the layer's weight with its columns times `factor` [K], rounded to nearest at the best of a few scales a row.

        To evenly spaced integers, whatever the recipe's levels: it is compared with itself alone, at other factors.
        """
        bits = self.layer.w_bits
        weight, fisher = float_weight(self.layer) * factor, self.fisher / factor.square()
        half = 1 << (bits - 1)
        widest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / (half - 0.5)
        errors = []
        for share in (1.0,) if bits > 5 else (1.0, 0.85, 0.7, 0.6):
            scale = widest * share
            error = (weight / scale).round_().clamp_(-half, half - 1).mul_(scale).sub_(weight)
            errors.append(error.square_().mul_(fisher).sum(dim=1))
        return float(torch.stack(errors).amin(dim=0).sum()) * (ROUNDING_SHARE if bits < 8 else 1.0)


def gather(qmodel: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, Statistics]:
    """{name of a QuantLinear: its statistics} of a converted model that still computes in float."""
    layers: dict[str, Any] = {name: qmodel.get_submodule(name) for name in names}
    found = {name: Statistics(layer) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)
    passes = -(-len(images) // BATCH)
    draws = torch.Generator().manual_seed(1)
    with contextlib.ExitStack() as hooks:
        for statistics in found.values():

            def keep(_: nn.Module, inputs: Any, y: torch.Tensor, statistics: Statistics = statistics) -> None:
                statistics.watch(inputs[0], y, max(TOKENS // passes, 1), generator)

            hooks.enter_context(statistics.layer.register_forward_hook(keep))
        for batch in tracked(images.split(BATCH), "weigh errors"):
            with torch.enable_grad():
                what_matters(qmodel, batch, draws).backward()
    return {name: statistics for name, statistics in found.items() if statistics.parts["cost"]}


def what_matters(
    qmodel: nn.Module, images: torch.Tensor, generator: torch.Generator, classes: bool = True
) -> torch.Tensor:
    """A scalar whose gradients say how much each value of a converted model matters on images [n, C, H, W].

    With a classifier (`classes`) by the logits' Fisher information, else by the features; of a network around timm models by
    all that it gives, where that is tensors with a row for each image, and else by the outputs of the blocks.
    """
    images = images.detach().requires_grad_()
    if not is_network(qmodel):
        outputs = qmodel(images)
        if not isinstance(outputs, torch.Tensor):
            return feature_sensitivity(flattened(outputs), generator)
        return sensitivity(outputs, generator) if classes else feature_sensitivity([outputs], generator)
    kept: list[torch.Tensor] = []
    with contextlib.ExitStack() as hooks:
        for block in find_adapter(qmodel).blocks():
            hooks.enter_context(block.register_forward_hook(lambda _, __, output: kept.append(output)))
        outputs = [each for each in flattened(qmodel(images)) if each.is_floating_point()]
    dense = bool(outputs) and all(len(each) == len(images) and each.requires_grad for each in outputs if each.dim())
    return feature_sensitivity(outputs if dense else kept, generator)


@dataclass
class Side:
    """One quantized tensor whose channels are scaled: values [n, K], their cost [n, K], ends [K] each, bits, weight in the sum."""

    values: torch.Tensor
    cost: torch.Tensor
    least: torch.Tensor
    greatest: torch.Tensor
    bits: int
    share: float

    @property
    def clips(self) -> bool:
        """Whether bits are so few that its range is searched."""
        return self.bits <= MOST_CLIPPED

    def scaled(self, factor: torch.Tensor, shift: torch.Tensor | float = 0.0) -> Side:
        """Of `(values - shift) / factor`."""
        values, least, greatest = ((each - shift) / factor for each in (self.values, self.least, self.greatest))
        return Side(values, self.cost * factor.square(), least, greatest, self.bits, self.share)

    def loss(self) -> float:
        """On one grid for all channels, with the best of a few clippings where bits are few."""
        low, high = self._ends()
        return min(self._error(low * a, high * a) for a in (_CLIPS if self.clips else (1.0,))) / self.share

    def fit(self, site: ActivationQuantizer) -> None:
        """Lets `site` have the range of least loss, where bits are few; else it observes its own."""
        if not self.clips:
            return
        low, high = self._ends()
        best = min((self._error(low * a, high * a), a, a) for a in _FINE_CLIPS)
        for _ in range(2):
            best = min((self._error(low * a, high * best[2]), a, best[2]) for a in _FINE_CLIPS)
            best = min((self._error(low * best[1], high * b), best[1], b) for b in _FINE_CLIPS)
        site.range = FixedRange(self.bits, low * best[1], high * best[2])

    def fit_levels(self, site: ActivationQuantizer) -> None:
        """Lets `site` have the levels of least loss."""
        low, high = self._ends()
        high, table = fit_levels(self.values, self.cost, low, high, self.bits)
        site.take_levels(low, high, table)

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.least.min().clamp_max(0), self.greatest.max().clamp_min(0)

    def _error(self, low: torch.Tensor, high: torch.Tensor) -> float:
        scale, zero = affine_parameters(low, high, self.bits)
        rounded = (self.values / scale).round_().add_(zero).clamp_(0, (1 << self.bits) - 1).sub_(zero).mul_(scale)
        return float(rounded.sub_(self.values).square_().mul_(self.cost).sum())


def takes_levels(layer: QuantLinear) -> bool:
    """Whether what the layer takes may have levels of its own, where it follows an activation."""
    return layer.levels == "nonuniform" and layer.input.bits <= MOST_CLIPPED


def _unseen(size: int, layer: QuantLinear) -> torch.Tensor:
    return torch.full((size,), torch.inf, device=float_weight(layer).device)


def float_weight(layer: QuantLinear) -> torch.Tensor:
    """Of a layer that is not frozen."""
    assert layer.weight is not None
    return layer.weight
