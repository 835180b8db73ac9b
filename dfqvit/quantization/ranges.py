"""The range that an activation quantizer covers: from the least to the greatest value seen, or less where that loses less.

A rule observes tensors, then gives the ends of its range. With 8 bits the ends cost little; with 4, a few far values take most
of the steps, and clipping them is the lesser error (measured in docs/accuracy.md).
"""

from __future__ import annotations

import torch

from ..errors import DfqvitError

LEAST_SCALE = torch.finfo(torch.float32).eps  # as in PSAQ-ViT: an all-zero channel or a constant activation gets this
_BINS = 4096  # of the histogram, over both signs
_SHARES = torch.linspace(0.05, 1, 39)  # of either end, that are tried


def affine_parameters(least: torch.Tensor, greatest: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero_point) of an asymmetric quantizer for [least, greatest]: `s = (max - min) / (2^b - 1)`, `z = -min / s`.

    A range that leaves zero out is widened to hold it: else it would have no zero point, and clamp everything.
    """
    least, greatest = least.clamp_max(0), greatest.clamp_min(0)
    steps = (1 << bits) - 1
    scale = ((greatest - least) / steps).float().clamp_min(LEAST_SCALE)
    return scale, (-least / scale).round().clamp(0, steps)


class MinMaxRange:
    """The range rule of the baseline: from the least to the greatest value seen."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.least: torch.Tensor | None = None
        self.greatest: torch.Tensor | None = None

    def observe(self, x: torch.Tensor) -> None:
        """Widens the range to hold all of x."""
        least, greatest = x.detach().float().aminmax()
        self.least = least if self.least is None else torch.minimum(self.least, least)
        self.greatest = greatest if self.greatest is None else torch.maximum(self.greatest, greatest)

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero_point) of the range, scalars; errors as of `ends`."""
        return affine_parameters(*self.ends(), self.bits)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(least, greatest), scalars; DfqvitError when nothing was seen, or NaN or Inf."""
        if self.least is None or self.greatest is None:
            raise DfqvitError("calibration: an activation quantizer saw no values; run the calibration images first")
        if not bool(torch.isfinite(self.greatest - self.least)):
            raise DfqvitError("calibration: an activation held NaN or Inf, or its range overflows float32")
        return self.least, self.greatest


class FixedRange(MinMaxRange):
    """A range that was chosen elsewhere; what is observed is only checked.

    Args:
        bits: of the quantizer.
        low: scalar, at most 0.
        high: scalar, at least 0.
    """

    def __init__(self, bits: int, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__(bits)
        self.low, self.high = low, high

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was chosen; errors as of `MinMaxRange.ends`."""
        super().ends()
        return self.low, self.high


class MseRange(MinMaxRange):
    """The range of least squared error: each end is one of 39 shares, 0.05 to 1, of that of min-max.

    The error is that of a histogram over [-limit, limit) with a power of two for limit, which doubles when a value lies beyond:
    two bins then become one, so that what was counted stays exact.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.counts: torch.Tensor | None = None
        self.limit = 0.0

    def observe(self, x: torch.Tensor) -> None:
        """Counts the values of x."""
        super().observe(x)
        size = float(x.detach().abs().max())
        if not 0 < size < torch.inf:
            return
        if self.counts is None:
            self.counts = torch.zeros(_BINS, dtype=torch.float64, device=x.device)
            self.limit = 2.0 ** torch.tensor(size).log2().floor().add(1).item()
        while size >= self.limit:
            quarter = torch.zeros(_BINS // 4, dtype=torch.float64, device=x.device)
            self.counts = torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter])
            self.limit *= 2
        self.counts += torch.histc(x.detach().float(), _BINS, -self.limit, self.limit)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `MinMaxRange.ends`, of the range with the least error."""
        least, greatest = super().ends()
        if self.counts is None:
            return least, greatest
        used = self.counts.nonzero().flatten()
        counts = self.counts[used]
        values = (used.double() + 0.5) * (2 * self.limit / _BINS) - self.limit
        shares = _SHARES.to(values)
        low = (least.double() * shares).repeat_interleave(len(shares))
        high = (greatest.double() * shares).repeat(len(shares))
        candidates = zip(low.split(64), high.split(64), strict=True)
        best = int(torch.cat([_errors(values, counts, *ends, self.bits) for ends in candidates]).argmin())
        return low[best].float(), high[best].float()


def _errors(
    values: torch.Tensor, counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int
) -> torch.Tensor:
    """[n]: the squared error of `counts` values [k] in each range of low and high [n]."""
    scale, zero = (value[:, None] for value in affine_parameters(low, high, bits))
    rounded = ((values / scale).round() + zero).clamp(0, (1 << bits) - 1)
    return ((rounded - zero) * scale - values).square() @ counts
