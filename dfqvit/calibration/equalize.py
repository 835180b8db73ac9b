"""Channels of unlike ranges made alike before they share one quantizer, at no cost when the model runs.

A tensor has one scale, so a channel 30 times wider than the others leaves these a thirtieth of the steps. Where a model lets a
channel be scaled without changing what it computes (`models.adapters.scalings`), the scale goes into what comes before and its
inverse into what comes after:

    LayerNorm -> linear      gain and bias of the norm; columns of the weight. A shift goes into both biases.
    values -> proj           rows of qkv; columns of proj. A shift likewise, since a row of probabilities sums to 1.
    queries . keys           rows of qkv. Keys may shift: that moves all scores of a row alike.
    GELU -> fc2              no scale passes the GELU, but fc1 rounds each channel to a step of its own, a power of two times
                             the tensor's: `QuantLinear.factor`; columns of fc2.

What widens a weight's columns narrows an activation's and the reverse, so every candidate is judged by what both lose together:
the squared errors of activations and weights, each counted by the Fisher information that the logits hold about it.

Sources: scales moved into norms, Outlier Suppression (arXiv 2209.13325) and RepQ-ViT (arXiv 2212.08254); between layers, Nagel et
al. 2019 (arXiv 1906.04721); by a power of the range, SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.adapters.scalings import scalings
from ..quantization.layers import QuantLinear
from ..quantization.quantizers import RANGE_RULES, ActivationQuantizer
from ..quantization.ranges import FixedRange, affine_parameters
from ..quantization.rounding import sensitivity

BATCH = 16  # images in one forward pass of calibration; ranges do not depend on it
TOKENS = 768  # of a layer that are kept, at random
LEAST_GAIN = 0.2  # a candidate must lose this much less than no scaling: what is learnt from few images is uncertain
ROUNDING_SHARE = 0.5  # of the squared error of nearest rounding that second-order rounding leaves, about
_THRESHOLDS = (0.75, 0.5, 0.35, 0.25, 0.125, 0.0625, 0.03125, 0.015625)
_POWERS = (0.25, 0.5, 0.75, 1.0)
MOST_CLIPPED = 6  # bits of activations whose ranges are searched; with more, the least and greatest value seen are the ends
_CLIPS = (1.0, 0.7, 0.5, 0.35)  # shares of the ends that are tried for every candidate, and in the end
_FINE_CLIPS = tuple(k / 20 for k in range(20, 1, -1))


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
        self.least = self.greatest = self.y_least = self.y_greatest = None
        self.fisher = torch.zeros_like(layer.weight)
        self.seen = 0

    def watch(self, x: torch.Tensor, y: torch.Tensor, rows: int, generator: torch.Generator) -> None:
        """Takes in x [B, ..., K] and y [B, ..., N]; the rest when gradients reach y."""
        images = x.shape[0]
        x, flat = x.detach().reshape(images, -1, x.shape[-1]), y.detach().reshape(images, -1, y.shape[-1])
        tokens = x.shape[0] * x.shape[1]
        chosen = torch.randperm(tokens, generator=generator)[:rows].to(x.device)
        self.seen += tokens
        for name, value in (("", x), ("y_", flat)):
            low, high = value.flatten(0, 1).amin(0), value.flatten(0, 1).amax(0)
            old_low, old_high = getattr(self, f"{name}least"), getattr(self, f"{name}greatest")
            setattr(self, f"{name}least", low if old_low is None else torch.minimum(low, old_low))
            setattr(self, f"{name}greatest", high if old_high is None else torch.maximum(high, old_high))
        self.parts["x"].append(x.flatten(0, 1)[chosen])
        self.parts["y"].append(flat.flatten(0, 1)[chosen])
        y.register_hook(lambda grad: self._weigh(x, grad.detach().reshape(flat.shape), chosen))

    def _weigh(self, x: torch.Tensor, grad: torch.Tensor, chosen: torch.Tensor) -> None:
        kept = grad.flatten(0, 1)[chosen]
        self.parts["y_cost"].append(kept.square())
        self.parts["cost"].append((kept @ self.layer.weight).square())
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


def gather(qmodel: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, Statistics]:
    """{name of a QuantLinear: its statistics} of a converted model that still computes in float."""
    found = {name: Statistics(qmodel.get_submodule(name)) for name in names}
    generator = torch.Generator().manual_seed(0)
    passes = -(-len(images) // BATCH)
    handles = []
    for statistics in found.values():

        def keep(_: nn.Module, inputs: Any, y: torch.Tensor, statistics: Statistics = statistics) -> None:
            statistics.watch(inputs[0], y, max(TOKENS // passes, 1), generator)

        handles.append(statistics.layer.register_forward_hook(keep))
    draws = torch.Generator().manual_seed(1)
    try:
        for batch in images.split(BATCH):
            with torch.enable_grad():
                sensitivity(qmodel(batch.detach().requires_grad_()), draws).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass
class Side:
    """One quantized tensor whose channels are scaled: values [n, K], their cost [n, K], ends [K] each, bits, weight in the sum."""

    values: torch.Tensor
    cost: torch.Tensor
    least: torch.Tensor
    greatest: torch.Tensor
    bits: int
    share: float

    def scaled(self, factor: torch.Tensor, shift: torch.Tensor | float = 0.0) -> Side:
        """Of `(values - shift) / factor`."""
        ends = ((end - shift) / factor for end in (self.least, self.greatest))
        return Side((self.values - shift) / factor, self.cost * factor.square(), *ends, self.bits, self.share)

    def loss(self) -> float:
        """On one grid for all channels, with the best of a few clippings where bits are few."""
        return self._search(_CLIPS if self.bits <= MOST_CLIPPED else (1.0,))[0]

    def fit(self, site: ActivationQuantizer) -> None:
        """Lets `site` have the range of least loss, where bits are few; else it observes its own."""
        if self.bits <= MOST_CLIPPED:
            _, low, high = self._search(_FINE_CLIPS)
            site.range = FixedRange(self.bits, low, high)

    def _search(self, shares: tuple[float, ...]) -> tuple[float, torch.Tensor, torch.Tensor]:
        """(least loss, low, high): first both ends by the same share, then each by itself."""
        low, high = self.least.min().clamp_max(0), self.greatest.max().clamp_min(0)
        best = min((self._error(low * a, high * a), a, a) for a in shares)
        for _ in range(2 if len(shares) > 1 else 0):
            best = min((self._error(low * a, high * best[2]), a, best[2]) for a in shares)
            best = min((self._error(low * best[1], high * b), best[1], b) for b in shares)
        return best[0] / self.share, low * best[1], high * best[2]

    def _error(self, low: torch.Tensor, high: torch.Tensor) -> float:
        scale, zero = affine_parameters(low, high, self.bits)
        rounded = ((self.values / scale).round_().add_(zero)).clamp_(0, (1 << self.bits) - 1).sub_(zero).mul_(scale)
        return float(rounded.sub_(self.values).square_().mul_(self.cost).sum())


def weight_loss(weight: torch.Tensor, fisher: torch.Tensor, factor: torch.Tensor, bits: int) -> float:
    """Of the weight [N, K] with its columns times `factor`, rounded to nearest at the best of a few scales a row."""
    weight, fisher = weight * factor, fisher / factor.square()
    half = 1 << (bits - 1)
    widest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / (half - 0.5)
    errors = []
    for share in (1.0,) if bits > 5 else (1.0, 0.85, 0.7, 0.6):
        scale = widest * share
        rounded = (weight / scale).round().clamp(-half, half - 1) * scale
        errors.append(((rounded - weight).square() * fisher).sum(dim=1))
    return float(torch.stack(errors).amin(dim=0).sum()) * (ROUNDING_SHARE if bits < 8 else 1.0)


def candidates(low: torch.Tensor, high: torch.Tensor) -> Iterator[torch.Tensor]:
    """Factors [K] for channels that reach from low [K] to high [K]: none, far ones brought in, all by a power of their width."""
    size = _relative(low, high)
    yield torch.ones_like(size)
    for threshold in _THRESHOLDS:
        yield (size / (threshold * size.max())).clamp_min(1)
    for power in _POWERS:
        yield size**power
        yield (size**power).clamp_min(1)


@torch.no_grad()
def equalize(qmodel: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Scales the channels of a converted model that still computes in float, in place; its quantizers have seen nothing after.

    Args:
        qmodel: from `observe.convert`.
        images: [n, C, H, W], normalised.

    Returns:
        {site: what is lost there as a share of what was lost before}, for the sites that changed.
    """
    places = scalings(qmodel)
    layers = {name for pair in places.norms for name in pair[1:]} | {name for pair in places.values for name in pair}
    layers |= set(places.scores) | set(places.hidden)
    names = [n for n in layers if isinstance(qmodel.get_submodule(n), QuantLinear)]
    found = gather(qmodel, sorted(names), images)
    for module in qmodel.modules():
        if isinstance(module, ActivationQuantizer):
            module.range = RANGE_RULES[module.quantizer](module.bits)
    changed = {}
    for norm, name in places.norms:
        if name in found:
            changed[norm] = _scale_norm(qmodel.get_submodule(norm), found[name])
    for qkv, proj in places.values:
        if qkv in found and proj in found:
            changed[f"{qkv} values"] = _scale_values(qmodel.get_submodule(qkv.rpartition(".")[0]), found[qkv], found[proj])
    for qkv in places.scores:
        if qkv in found:
            changed[f"{qkv} scores"] = _scale_scores(qmodel.get_submodule(qkv.rpartition(".")[0]), found[qkv])
    for name in places.hidden:
        if name in found:
            changed[name] = _scale_hidden(found[name])
    return {site: share for site, share in changed.items() if share < 1}


def _input_side(seen: Statistics) -> Side:
    return Side(seen.x, seen.cost, seen.least, seen.greatest, seen.layer.input.bits, seen.share)


def _best(trials: Iterator[tuple[Any, float]]) -> tuple[Any, float]:
    """(the arguments of the least loss, its share of the first's); the first unless another gains enough."""
    first, base = next(trials)
    best, least = first, base
    for each, loss in trials:
        if loss < least:
            best, least = each, loss
    return (best, least / base) if least < (1 - LEAST_GAIN) * base else (first, 1.0)


def _shifts(side: Side) -> list[torch.Tensor]:
    """None, and where bits are few the channels' middles."""
    none = torch.zeros_like(side.least)
    return [none] if side.bits > 6 else [none, (side.least + side.greatest) / 2]


def _scale_norm(norm: nn.Module, seen: Statistics) -> float:
    layer, side = seen.layer, _input_side(seen)

    def trials() -> Iterator[tuple[Any, float]]:
        for shift in _shifts(side):
            for factor in candidates(side.least - shift, side.greatest - shift):
                loss = side.scaled(factor, shift).loss() + weight_loss(layer.weight, seen.fisher, factor, layer.w_bits)
                yield (factor, shift), loss

    (factor, shift), share = _best(trials())
    if share < 1:
        norm.bias.copy_((norm.bias - shift) / factor)
        norm.weight.div_(factor)
        _absorb(layer, factor, shift)
    side.scaled(factor, shift).fit(layer.input)
    return share


def _absorb(layer: QuantLinear, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Lets the layer take `(x - shift) / factor` for x."""
    if bool(shift.any()):
        moved = layer.weight @ shift
        if layer.bias is None:
            layer.bias = nn.Parameter(moved, requires_grad=False)
        else:
            layer.bias.add_(moved)
    layer.weight.mul_(factor)


def _scale_rows(layer: QuantLinear, rows: slice, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Lets the layer give `(y - shift) / factor` for its outputs y[rows]."""
    layer.weight[rows] /= factor[:, None]
    if layer.bias is None and bool(shift.any()):
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]), requires_grad=False)
    if layer.bias is not None:
        layer.bias[rows] = (layer.bias[rows] - shift) / factor


def _output_side(seen: Statistics, rows: slice, bits: int) -> Side:
    return Side(seen.y[:, rows], seen.y_cost[:, rows], seen.y_least[rows], seen.y_greatest[rows], bits, seen.share)


def _scale_values(attention: Any, qkv: Statistics, proj: Statistics) -> float:
    width = qkv.layer.out_features // 3
    rows = slice(2 * width, 3 * width)
    values, after = _output_side(qkv, rows, attention.operands.v.bits), _input_side(proj)

    def trials() -> Iterator[tuple[Any, float]]:
        for shift in _shifts(values):
            for factor in candidates(values.least - shift, values.greatest - shift):
                loss = values.scaled(factor, shift).loss() + after.scaled(factor, shift).loss()
                yield (factor, shift), loss + weight_loss(proj.layer.weight, proj.fisher, factor, proj.layer.w_bits)

    (factor, shift), share = _best(trials())
    if share < 1:
        _scale_rows(qkv.layer, rows, factor, shift)
        _absorb(proj.layer, factor, shift)
    values.scaled(factor, shift).fit(attention.operands.v)
    after.scaled(factor, shift).fit(proj.layer.input)
    return share


def _scale_scores(attention: Any, qkv: Statistics) -> float:
    width = qkv.layer.out_features // 3
    rows_q, rows_k = slice(0, width), slice(width, 2 * width)
    q = _output_side(qkv, rows_q, attention.operands.q.bits)
    k = _output_side(qkv, rows_k, attention.operands.k.bits)
    none, one = torch.zeros_like(q.least), torch.ones_like(q.least)

    def trials() -> Iterator[tuple[Any, float]]:
        yield (one, none), q.loss() + k.loss()
        for shift in (none, (k.least + k.greatest) / 2):
            wide_q, wide_k = _relative(q.least, q.greatest), _relative(k.least - shift, k.greatest - shift)
            for a in (0.0, *_POWERS):
                for b in (0.0, *_POWERS):
                    factor = wide_q**a / wide_k**b
                    yield (factor, shift), q.scaled(factor).loss() + k.scaled(1 / factor, shift).loss()

    (factor, shift), share = _best(trials())
    if share < 1:
        _scale_rows(qkv.layer, rows_q, factor, none)
        _scale_rows(qkv.layer, rows_k, 1 / factor, shift)
    q.scaled(factor).fit(attention.operands.q)
    k.scaled(1 / factor, shift).fit(attention.operands.k)
    return share


def _relative(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Widths of channels that reach from low to high, as multiples of the median."""
    size = torch.maximum(-low, high)
    size = size.clamp_min(float(size.max()) * 1e-4 + torch.finfo(torch.float32).tiny)
    return size / size.median()


def _scale_hidden(seen: Statistics) -> float:
    layer, side = seen.layer, _input_side(seen)

    def trials() -> Iterator[tuple[Any, float]]:
        for factor in candidates(side.least, side.greatest):
            factor = factor.log2().round().exp2()
            yield factor, side.scaled(factor).loss() + weight_loss(layer.weight, seen.fisher, factor, layer.w_bits)

    factor, share = _best(trials())
    if share < 1:
        layer.weight.mul_(factor)
        layer.factor = factor
    side.scaled(factor).fit(layer.input)
    return share
