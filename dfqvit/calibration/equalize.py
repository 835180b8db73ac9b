"""Channels of unlike ranges made alike before they share one quantizer, at no cost when the model runs.

A tensor has one scale, so a channel 30 times wider than the others leaves these a thirtieth of the steps. Where a model lets a
channel be scaled without changing what it computes (`models.adapters.scalings`), the scale goes into what comes before and its
inverse into what comes after:

    LayerNorm -> linear      gain and bias of the norm; columns of the weight. A shift goes into both biases.
    values -> proj           rows of qkv; columns of proj. A shift likewise, since a row of probabilities sums to 1.
    queries . keys           rows of qkv. Keys may shift: that moves all scores of a row alike.
    GELU -> fc2              no scale passes the GELU, but fc1 rounds each channel to a step of its own, a power of two times
                             the tensor's: `QuantLinear.exponents`; columns of fc2.

What widens a weight's columns narrows an activation's and the reverse, so every candidate is judged by what both lose together:
the squared errors of activations and weights, each counted by the Fisher information that the logits hold about it.

Sources: scales moved into norms, Outlier Suppression (arXiv 2209.13325) and RepQ-ViT (arXiv 2212.08254); between layers, Nagel et
al. 2019 (arXiv 1906.04721); by a power of the range, SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..models.adapters.scalings import scalings
from ..progress import Stage
from ..quantization.attention import AttentionOperands
from ..quantization.layers import QuantLinear, quantized_layers
from ..quantization.quantizers import RANGE_RULES, ActivationQuantizer
from .fisher import Side, Statistics, float_weight, gather, takes_levels

LEAST_GAIN = 0.2  # a candidate must lose this much less than no scaling: what is learnt from few images is uncertain
_THRESHOLDS = (0.75, 0.5, 0.35, 0.25, 0.125, 0.0625, 0.03125, 0.015625)
_TINY = torch.finfo(torch.float32).tiny
_POWERS = (0.25, 0.5, 0.75, 1.0)


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
        qmodel: from `calibration.convert`.
        images: [n, C, H, W], normalised.

    Returns:
        {site: what is lost there as a share of what was lost before}, for the sites that changed.
    """
    places = scalings(qmodel)
    layers = {name for pair in places.norms for name in pair[1:]} | {name for pair in places.values for name in pair}
    layers |= set(places.scores) | set(places.hidden)
    found = gather(qmodel, sorted(layers & quantized_layers(qmodel).keys()), images)
    stage = Stage("scale channels", sum(map(len, (places.norms, places.values, places.scores, places.hidden))))
    for module in qmodel.modules():
        if isinstance(module, ActivationQuantizer):
            module.range = RANGE_RULES[module.quantizer](module.bits)
    changed = {}
    for norm, name in places.norms:
        if name in found:
            changed[norm] = _scale_norm(qmodel.get_submodule(norm), found[name], norm not in places.padded)
        stage.step()
    for qkv, proj in places.values:
        operands = _operands(qmodel, qkv)
        if qkv in found and proj in found and operands is not None:
            changed[f"{qkv} values"] = _scale_values(operands, found[qkv], found[proj])
        stage.step()
    for qkv in places.scores:
        operands = _operands(qmodel, qkv)
        if qkv in found and operands is not None:
            changed[f"{qkv} scores"] = _scale_scores(operands, found[qkv])
        stage.step()
    for name in places.hidden:
        if name in found:
            changed[name] = _scale_hidden(found[name])
        stage.step()
    return {site: share for site, share in changed.items() if share < 1}


def _operands(qmodel: nn.Module, qkv: str) -> AttentionOperands | None:
    """Those of the attention that `qkv` is of; None where its own products are not quantized."""
    return getattr(qmodel.get_submodule(qkv.rpartition(".")[0]), "operands", None)


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
    return [none, (side.least + side.greatest) / 2] if side.clips else [none]


def _scale_norm(norm: Any, seen: Statistics, shifting: bool) -> float:
    layer, side = seen.layer, seen.inputs()

    def trials() -> Iterator[tuple[Any, float]]:
        for shift in _shifts(side)[: 2 if shifting else 1]:
            for factor in candidates(side.least - shift, side.greatest - shift):
                yield (factor, shift), side.scaled(factor, shift).loss() + seen.weight_loss(factor)

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
        moved = float_weight(layer) @ shift
        if layer.bias is None:
            layer.bias = nn.Parameter(moved, requires_grad=False)
        else:
            layer.bias.add_(moved)
    float_weight(layer).mul_(factor)


def _scale_rows(layer: QuantLinear, rows: slice, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Lets the layer give `(y - shift) / factor` for its outputs y[rows]."""
    float_weight(layer)[rows] /= factor[:, None]
    if layer.bias is None and bool(shift.any()):
        layer.bias = nn.Parameter(torch.zeros_like(float_weight(layer)[:, 0]), requires_grad=False)
    if layer.bias is not None:
        layer.bias[rows] = (layer.bias[rows] - shift) / factor


def _scale_values(operands: AttentionOperands, qkv: Statistics, proj: Statistics) -> float:
    width = qkv.layer.out_features // 3
    rows = slice(2 * width, 3 * width)
    values, after = qkv.outputs(rows, operands.v.bits), proj.inputs()

    def trials() -> Iterator[tuple[Any, float]]:
        for shift in _shifts(values):
            for factor in candidates(values.least - shift, values.greatest - shift):
                loss = values.scaled(factor, shift).loss() + after.scaled(factor, shift).loss()
                yield (factor, shift), loss + proj.weight_loss(factor)

    (factor, shift), share = _best(trials())
    if share < 1:
        _scale_rows(qkv.layer, rows, factor, shift)
        _absorb(proj.layer, factor, shift)
    values.scaled(factor, shift).fit(operands.v)
    after.scaled(factor, shift).fit(proj.layer.input)
    return share


def _scale_scores(operands: AttentionOperands, qkv: Statistics) -> float:
    width = qkv.layer.out_features // 3
    rows_q, rows_k = slice(0, width), slice(width, 2 * width)
    q, k = qkv.outputs(rows_q, operands.q.bits), qkv.outputs(rows_k, operands.k.bits)
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
    q.scaled(factor).fit(operands.q)
    k.scaled(1 / factor, shift).fit(operands.k)
    return share


def _relative(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Widths of channels that reach from low to high, as multiples of the median."""
    size = torch.maximum(-low, high)
    size = size.clamp_min(float(size.max()) * 1e-4 + _TINY)
    return size / size.median()


def _scale_hidden(seen: Statistics) -> float:
    layer, side = seen.layer, seen.inputs()

    def trials() -> Iterator[tuple[Any, float]]:
        for factor in candidates(side.least, side.greatest):
            exponents = factor.log2().round()
            factor = exponents.exp2()
            yield (factor, exponents), side.scaled(factor).loss() + seen.weight_loss(factor)

    (factor, exponents), share = _best(trials())
    if share < 1:
        float_weight(layer).mul_(factor)
        layer.exponents = exponents.to(torch.int8)
    side = side.scaled(factor)
    if takes_levels(layer):
        side.fit_levels(layer.input)
    else:
        side.fit(layer.input)
    return share
