"""The fallback: block by block, tunes what the weights were rounded to until a block's output is the float one's.

Weights become `scale * clamp(round(u))` with u and scale learnt by Adam, the rounding straight-through, on the calibration images
and crops of them. It starts from the integers that the recipe's rounding chose, and a block whose error on images held back
does not fall keeps those. The inputs are those of the quantized model so far, so a block also takes back what came before it.

Sources: the block as the unit, BRECQ (arXiv 2102.05426); learnt rounding, AdaRound (arXiv 2004.10568); learnt scales, LSQ
(arXiv 1902.08153).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from ..models.adapters import find_adapter
from ..progress import tracked
from ..quantization.layers import QuantLinear, quantized_layers
from ..quantization.levels import levels_of
from ..quantization.quantizers import ActivationQuantizer
from .fisher import float_weight
from .observation import crops

BATCH = 16
RATE = 0.02  # of u, in steps of the quantizer
SCALE_RATE = 0.002  # of the scales, relative
HELD = 4  # every fourth image is held back with its crops; the last crops where there are fewer images
_MARGIN = 0.25  # u starts at the float weight, or as far from its integer: nearer to an edge, the first steps only stir


def reconstruct_blocks(
    model: nn.Module,
    qmodel: nn.Module,
    images: torch.Tensor,
    steps: int,
    seed: int = 0,
) -> list[float]:
    """Tunes the blocks of `qmodel` in order, in place.

    Args:
        model: the float model.
        qmodel: its copy from `calibration.convert` that has observed; `calibration.freeze` comes next.
        images: [n, C, H, W], normalised; crops of them are added.
        steps: for each block, of BATCH images.
        seed: of the order of the images.

    Returns:
        For every block, its error on the images held back as a share of what it was.
    """
    views = torch.cat([images, crops(images)])
    source = torch.arange(len(images)).repeat_interleave(len(views) // len(images) - 1)
    source = torch.cat([torch.arange(len(images)), source if len(images) >= HELD else torch.arange(len(source))])
    held = source % HELD == HELD - 1
    floats = _decide_all(qmodel)
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = find_adapter(model).blocks(), find_adapter(qmodel).blocks()
    left = []
    for block, qblock in tracked(list(zip(ours, theirs, strict=True)), "reconstruct blocks"):
        wanted = _passing(model, block, views)[1]
        inputs = _passing(qmodel, qblock, views)[0]
        left.append(_tune(qblock, floats, inputs, wanted, held, steps, generator))
    return left


def _decide_all(qmodel: nn.Module) -> dict[QuantLinear, torch.Tensor]:
    """Rounds every layer and freezes every quantizer, so that the model computes as it will; {layer: its float weight}."""
    floats = {}
    for layer in quantized_layers(qmodel).values():
        floats[layer] = float_weight(layer).detach()
        layer.decide(*layer.round_weight(layer.w_bits))
    for module in qmodel.modules():
        if isinstance(module, ActivationQuantizer):
            module.freeze()
    return floats


def _tune(
    block: nn.Module,
    floats: dict[QuantLinear, torch.Tensor],
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    held: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> float:
    train = (~held).nonzero().flatten()
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(block).items()}
    learnt = {name: _Learnt(layer, floats[layer]) for name, layer in layers.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": [each.u for each in learnt.values()], "lr": RATE},
            {"params": [each.log_scale for each in learnt.values()], "lr": SCALE_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = _error(block, {}, inputs[held], wanted[held])
    for _ in range(steps):
        chosen = train[torch.randint(len(train), (BATCH,), generator=generator)]
        with torch.enable_grad():
            weights = {name: each.weight() for name, each in learnt.items()}
            found = torch.func.functional_call(block, weights, (inputs[chosen],))
            loss = (found - wanted[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        weights = {name: each.weight() for name, each in learnt.items()}
        after = _error(block, weights, inputs[held], wanted[held])
        if after < before:
            for name, each in learnt.items():
                layers[name].decide(each.integers(), each.scale())
    return min(after / before, 1.0) if before > 0 else 1.0


class _Learnt:
    """The weight of one layer, [N, K]: u its place among the levels, in steps, and the scale of each row."""

    def __init__(self, layer: QuantLinear, weight: torch.Tensor) -> None:
        integers, scale = layer.round_weight(layer.w_bits)
        self.levels = levels_of(layer.levels, layer.w_bits).to(weight)
        places = torch.searchsorted(self.levels, integers.to(weight).contiguous())
        wanted = self._place(weight / scale[:, None])
        self.u = (places + (wanted - places).clamp(-_MARGIN, _MARGIN)).requires_grad_(True)
        self.sign = scale.sign()
        self.log_scale = scale.abs().log().requires_grad_(True)

    def scale(self) -> torch.Tensor:
        return self.log_scale.exp().detach() * self.sign

    def integers(self) -> torch.Tensor:
        return self.levels[self.u.detach().round().clamp(0, len(self.levels) - 1).long()]

    def weight(self) -> torch.Tensor:
        clamped = self.u.clamp(0, len(self.levels) - 1)
        lower = clamped.detach().floor().clamp_max(len(self.levels) - 2).long()
        here, next_ = self.levels[lower], self.levels[lower + 1]
        between = here + (clamped - lower) * (next_ - here)
        return (between + (self.integers() - between).detach()) * (self.log_scale.exp() * self.sign)[:, None]

    def _place(self, values: torch.Tensor) -> torch.Tensor:
        """Where the values lie among the levels, in steps from the first; beyond the ends by the steps there."""
        lower = torch.searchsorted(self.levels, values.contiguous(), right=True).sub(1).clamp(0, len(self.levels) - 2)
        here, next_ = self.levels[lower], self.levels[lower + 1]
        return lower + (values - here) / (next_ - here)


@torch.no_grad()
def _error(block: nn.Module, weights: dict[str, torch.Tensor], inputs: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean squared distance of the block's output from what is wanted."""
    parts = zip(inputs.split(BATCH), wanted.split(BATCH), strict=True)
    total = sum(float((torch.func.functional_call(block, weights, (x,)) - y).square().double().sum()) for x, y in parts)
    return total / wanted.numel()


class _Reached(Exception):
    """Ends a forward pass once the block has run."""


@torch.no_grad()
def _passing(model: nn.Module, block: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, outputs) of one block, [n, ...] each."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.append((inputs[0], output))
        raise _Reached

    with block.register_forward_hook(keep):
        for batch in images.split(2 * BATCH):
            with contextlib.suppress(_Reached):
                model(batch)
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
