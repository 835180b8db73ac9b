"""Mixed precision: which layer gets how many bits, so that the file fits a size and the network loses least.

What a layer loses at a bit width is measured: its weights alone are rounded, and the divergence of the logits (KL, from the
float ones) on the calibration images is its cost. Costs are taken to add up. All layers start at 8 bits; then the step down
that costs least for each byte it saves is taken, again and again, until the file fits.

Source: sensitivity by divergence with a greedy frontier, as in HAWQ (arXiv 1911.03852) and ZeroQ (arXiv 2001.00281).
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..errors import UsageError
from ..kernels.pack_weight import packed_row_bytes
from ..models import ModelSpec
from ..models.adapters.scalings import scalings
from ..models.copying import copied
from ..models.network import NetworkSpec
from ..models.tables import changed_tables, tables_of
from ..progress import tracked
from ..quantization.layers import QuantLinear, allocate, quantized_layers
from ..quantization.model import state_of
from ..quantization.recipe import Recipe
from .correction import ENTRY_BYTES, kl_divergence, log_probabilities
from .fisher import takes_levels
from .observation import BATCH, convert, observe

WIDTHS = (8, 6, 5, 4, 3, 2)
_RECORD_BYTES = 4096  # what the record in the file's header takes at most, but for its layer_bits


@dataclass(frozen=True)
class LayerCost:
    """One layer: the bytes of its packed weights and the divergence it causes, by bit width."""

    size: Mapping[int, int]
    divergence: Mapping[int, float]


def allocate_bits(
    model: nn.Module,
    images: torch.Tensor,
    recipe: Recipe,
    size_budget: float,
    beside: int = 0,
) -> Recipe:
    """The recipe with `layer_bits` that fits a saved model into `size_budget`; its w_bits are those of most layers.

    Args:
        model: the float model; left as it was.
        images: [n, C, H, W], normalised, on the model's device.
        recipe: all other settings.
        size_budget: megabytes (10^6 bytes) of the file.
        beside: bytes of what else the file holds: its corrections (`correction.correction_bytes`) and tables (`table_bytes`).

    Raises:
        UsageError: not even the least widths fit.
    """
    check_budget(model, recipe, size_budget, beside)
    qmodel = _widest(model, recipe)
    observe(qmodel, images, replace(recipe, scaling="none"))  # single layers are put into the float model as it is
    layers = quantized_layers(qmodel)
    divergences = measure_divergence(model, images, layers)
    costs = {name: LayerCost(_sizes(layer), divergences[name]) for name, layer in layers.items()}
    widths = choose_widths(costs, int(size_budget * 1e6) - beside - _fixed_bytes(qmodel, recipe))
    if min(widths.values()) == WIDTHS[0]:
        warnings.warn(
            f"size_budget was {size_budget:g} MB, into which weights of {WIDTHS[0]} bits fit: all layers have so many",
            stacklevel=2,
        )
    return replace(recipe, w_bits=statistics.mode(widths.values()), layer_bits=widths)


def check_budget(model: nn.Module, recipe: Recipe, size_budget: float, beside: int = 0) -> None:
    """UsageError unless `size_budget`, in megabytes, is what a saved model takes with all layers at the least width, or more.

    `beside`: as in `allocate_bits`.
    """
    if isinstance(size_budget, bool) or not isinstance(size_budget, (int, float)):
        raise UsageError(f"size_budget was {size_budget!r}; it must be a number of megabytes")
    if not (math.isfinite(size_budget) and size_budget > 0):
        raise UsageError(f"size_budget was {size_budget:g} MB; it must be finite and above 0")
    qmodel = _widest(model, recipe)
    least = beside + _fixed_bytes(qmodel, recipe) + _packed_bytes(qmodel, WIDTHS[-1])
    if size_budget * 1e6 < least:
        raise UsageError(
            f"size_budget was {size_budget:g} MB; this model needs {least / 1e6:.3f} MB at least (weights of {WIDTHS[-1]} bits)"
        )


def table_bytes(qmodel: nn.Module, spec: ModelSpec | NetworkSpec) -> int:
    """What the tables take in a file that are not as `spec` builds them (see `models.tables`)."""
    if not tables_of(qmodel) or (isinstance(spec, NetworkSpec) and spec.function is None):  # the latter is in no file
        return 0
    return sum(table.nbytes + ENTRY_BYTES for table in changed_tables(qmodel, spec.build()).values())


@torch.no_grad()
def measure_divergence(
    model: nn.Module,
    images: torch.Tensor,
    layers: Mapping[str, QuantLinear],
) -> dict[str, dict[int, float]]:
    """{name: {bits: mean KL of the logits}} with the weights of that layer alone rounded; `layers` have observed."""
    probe = copied(model).eval()
    wanted = log_probabilities(probe, images, BATCH)
    found: dict[str, dict[int, float]] = {}
    for name, layer in tracked(list(layers.items()), "choose bits"):
        weight: torch.Tensor = probe.get_submodule(name).weight  # type: ignore[assignment]
        kept = weight.detach().clone()
        found[name] = {}
        for bits in WIDTHS:
            integers, scale = layer.round_weight(bits)
            weight.copy_((integers * scale[:, None]).view_as(weight))
            lost = kl_divergence(wanted, log_probabilities(probe, images, BATCH))
            found[name][bits] = float(lost.mean().clamp_min(0))
        weight.copy_(kept)
    return found


def choose_widths(costs: Mapping[str, LayerCost], budget: int) -> dict[str, int]:
    """{name: bits}: from the greatest widths downwards by the least divergence for each byte saved, until `budget` holds.

    A step may pass over widths, so that one bad width between two good ones does not end a layer's descent.
    """
    chosen = dict.fromkeys(costs, WIDTHS[0])
    spent = sum(cost.size[WIDTHS[0]] for cost in costs.values())
    while spent > budget:
        steps = [
            (
                (cost.divergence[bits] - cost.divergence[chosen[name]]) / (cost.size[chosen[name]] - cost.size[bits]),
                name,
                bits,
            )
            for name, cost in costs.items()
            for bits in WIDTHS
            if cost.size[bits] < cost.size[chosen[name]]
        ]
        _, name, bits = min(steps)
        spent -= costs[name].size[chosen[name]] - costs[name].size[bits]
        chosen[name] = bits
    return chosen


def _sizes(layer: QuantLinear) -> dict[int, int]:
    return {bits: layer.out_features * packed_row_bytes(layer.in_features, bits) for bits in WIDTHS}


def _packed_bytes(qmodel: nn.Module, bits: int) -> int:
    return sum(_sizes(layer)[bits] for layer in quantized_layers(qmodel).values())


def _widest(model: nn.Module, recipe: Recipe) -> nn.Module:
    return convert(model, replace(recipe, layer_bits=None, w_bits=WIDTHS[0], edge_bits=WIDTHS[0]))


def _fixed_bytes(qmodel: nn.Module, recipe: Recipe) -> int:
    """Of a file, beside the packed weights, at most; `qmodel` is of `_widest`."""
    frozen = copied(qmodel)
    if recipe.scaling == "channels":
        _add_scaled(frozen)
    allocate(frozen)
    whole = len(safetensors.torch.save({key: value.contiguous() for key, value in state_of(frozen).items()}))
    record = _RECORD_BYTES + len(json.dumps(dict.fromkeys(quantized_layers(qmodel), WIDTHS[0])))
    return whole + record - _packed_bytes(qmodel, WIDTHS[0])


def _add_scaled(qmodel: nn.Module) -> None:
    """Gives the layers all that `equalize` may: powers of two, and biases that take what is shifted out of their inputs."""
    places = scalings(qmodel)
    for name in places.hidden:
        layer: Any = qmodel.get_submodule(name)
        layer.exponents = torch.zeros(layer.in_features, dtype=torch.int8)
        if takes_levels(layer):
            layer.input.table = torch.zeros(256, dtype=torch.uint8)
    readers = [reader for _, reader in places.norms]
    for name in {*readers, *chain.from_iterable(places.values), *places.scores}:
        layer = qmodel.get_submodule(name)
        if isinstance(layer, QuantLinear) and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
