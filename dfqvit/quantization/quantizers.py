"""Rules that turn values into a scale and a zero point, and the module that quantizes an activation.

A rule is chosen by name: "minmax" is the baseline of the literature, "mse" searches scales for the least squared error, those of
activations up to 5 bits only. Adding one means adding an entry to `WEIGHT_RULES` and `RANGE_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import expect_one_of
from ..kernels import fake_quantize
from ..kernels.round_second_order.reference import rounder
from .levels import levels_of, reach_of
from .precision import KeepsPrecision
from .ranges import LEAST_SCALE, FixedRange, MinMaxRange, MseRange


def minmax_weight_scale(weight: torch.Tensor, bits: int, levels: str = "uniform") -> torch.Tensor:
    """[N] for weight [N, ...]: `max|w|` of each output channel by the levels' reach, `(2^b - 1) / 2` where they are uniform."""
    return _reaching(weight.detach().flatten(1), reach_of(levels, bits))


def _reaching(rows: torch.Tensor, steps: float) -> torch.Tensor:
    """[N] for rows [N, K]: the scale of which each row's farthest value is `steps` away from 0."""
    return (rows.abs().amax(dim=1).float() / steps).clamp_min(LEAST_SCALE)


def mse_weight_scale(weight: torch.Tensor, bits: int, levels: str = "uniform") -> torch.Tensor:
    """[N]: the scale of the least squared rounding error of each channel; see `search_weight_scale`."""
    return search_weight_scale(weight.detach().flatten(1).float(), levels_of(levels, bits))


def search_weight_scale(
    rows: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """[N] for rows [N, K]: of the min-max scale times 0.30, 0.32, ..., 1.10, the one of least squared rounding error.

    Clipping a few large weights buys finer steps for all the others; at 3 and 4 bits that is worth more than the clipped ends.
    A scale may be negative: there is one level more below 0 than above, -4 to 3 at 3 bits, and so turns to the side on
    which the row's weights need it.

    Args:
        rows: float32 [N, K].
        levels: int8 [n], ascending: the integers that a weight may be.
        importance: [K], what a squared error in each column counts; default all the same.
    """
    widest = _reaching(rows, (int(levels[-1]) - int(levels[0])) / 2)  # as if they reached as far to either side
    best, least_error = widest, torch.full_like(widest, torch.inf)
    nearest = rounder(levels, rows)
    for step in range(41):
        size = (widest * (0.3 + 0.02 * step)).clamp_min(LEAST_SCALE)
        for scale in (size, -size):
            errors = nearest(rows / scale[:, None]).mul_(scale[:, None]).sub_(rows).square_()
            error = errors.sum(dim=1) if importance is None else errors @ importance
            best = torch.where(error < least_error, scale, best)
            least_error = torch.minimum(error, least_error)
    return best


def mse_range(bits: int) -> MinMaxRange:
    """The range of least squared error up to 5 bits; min-max above, where clipping far values loses more (docs/accuracy.md)."""
    return MseRange(bits) if bits <= 5 else MinMaxRange(bits)


# Of a weight, its bits and an entry of `LEVELS`: a scale for each output channel.
WEIGHT_RULES: dict[str, Callable[[torch.Tensor, int, str], torch.Tensor]] = {
    "minmax": minmax_weight_scale,
    "mse": mse_weight_scale,
}
RANGE_RULES: dict[str, Callable[[int], MinMaxRange]] = {"minmax": MinMaxRange, "mse": mse_range}


def check_rule(quantizer: str) -> None:
    """UsageError unless `quantizer` names a rule."""
    expect_one_of("quantizer", quantizer, RANGE_RULES)


class TellsBits(nn.Module):
    """A module whose state_dict tells, beside its tensors, the setting `_BITS` that these are for; of another one it is not loaded.

    In a state_dict's metadata, which torch keeps and saves. A file of tensors alone has none: a whole model's state tells it in a
    tensor too (`model.BITS`).
    """

    _BITS: str

    @property
    def told(self) -> int:
        """The setting."""
        return int(getattr(self, self._BITS))

    def said_of(self, name: str, other: int) -> str:
        """What is said where the state of the module `name` is for another setting."""
        return f"'{name}' was quantized with {self._BITS} {other}; here it has {self.told}."

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][self._BITS] = self.told

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: Any
    ) -> None:
        told = local_metadata.get(self._BITS, self.told)
        if told != self.told:
            errors: list[str] = lists[-1]
            if self.said_of(prefix[:-1], told) not in errors:  # the model may have said it
                errors.append(self.said_of(prefix[:-1], told))
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


class ActivationQuantizer(TellsBits, KeepsPrecision):
    """Quantizes one activation tensor: passes x through while observing, rounds it to the grid once frozen.

    Buffers: `scale` and `zero_point`, float32 scalars; `scale` is 0 until the quantizer is frozen or loaded. `table`, uint8 [256],
    where x may only be 2^bits of the 256 integers of an 8-bit grid (see `calibration.levels`): which each of the 256 becomes.
    """

    _BITS = "bits"
    scale: torch.Tensor
    zero_point: torch.Tensor
    table: torch.Tensor | None

    def __init__(self, bits: int, quantizer: str = "minmax") -> None:
        super().__init__()
        self.bits, self.quantizer = bits, quantizer
        self.range = RANGE_RULES[quantizer](bits)
        self.frozen = False
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("table", None)

    @property
    def grid_bits(self) -> int:
        """Of the grid that `scale` and `zero_point` are of."""
        return self.bits if self.table is None else 8

    def take_levels(self, low: torch.Tensor, high: torch.Tensor, table: torch.Tensor) -> None:
        """Rounds from now on to the levels that `table` has, of an 8-bit grid from `low` to `high`."""
        self.range, self.table = FixedRange(8, low, high), table

    def observe(self, x: torch.Tensor) -> None:
        """Lets the range rule see x."""
        self.range.observe(x)

    def freeze(self) -> None:
        """Ends observation: scale and zero point now hold."""
        scale, zero_point = self.range.parameters()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.frozen = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X itself while observing; x on the quantizer's grid once frozen."""
        if not self.frozen:
            self.observe(x)
            return x
        y = fake_quantize(x, self.scale, self.zero_point, quant_min=0, quant_max=(1 << self.grid_bits) - 1)
        if self.table is None:
            return y
        places = ((y / self.scale).round() + self.zero_point).nan_to_num().int()
        levels = (self.table[places].to(y.dtype) - self.zero_point.to(y.dtype)) * self.scale.to(y.dtype)
        if y.requires_grad:
            return y + (levels - y).detach()  # straight through
        return torch.where(y.isnan(), y, levels)

    def ends(self) -> tuple[float, float]:
        """(least, greatest) value that a frozen quantizer rounds to."""
        scale, zero = float(self.scale), float(self.zero_point)
        least, greatest = (0, (1 << self.bits) - 1) if self.table is None else (int(self.table[0]), int(self.table[-1]))
        return (least - zero) * scale, (greatest - zero) * scale

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"bits={self.bits}, frozen={self.frozen}"
