"""What of a model is quantized, to how many bits, and by which rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError, expect_one_of, is_whole
from .levels import LEVELS
from .quantizers import check_rule

PLACEMENTS = ("gemm", "psaq")
ROUNDINGS = ("nearest", "second-order")
SCALINGS = ("none", "channels")


@dataclass(frozen=True)
class Recipe:
    """The settings of a quantized model; what is None is chosen when it is made.

    Args:
        w_bits: bits of the weights, 2 to 8.
        a_bits: bits of the activations, 2 to 8.
        placement: "gemm" quantizes the operands of every matrix product; "psaq" what PSAQ-ViT does.
        quantizer: the rule for scales, see `quantizers`.
        rounding: how weights become integers: "nearest", or "second-order" (see `rounding`). By default second-order with
            "gemm" and "mse", else nearest, which is the literature's baseline.
        edge_bits: bits of the weights of the first and the last layer. By default 8 with "gemm" (two small layers, and at 4
            bits most of the loss), and w_bits with "psaq".
        layer_bits: {name: bits} of the weights of single layers, by timm's names, in place of w_bits and edge_bits;
            `allocation` makes it from a size.
        edge_a_bits: bits of the inputs of the first and the last layer. By default a_bits or edge_bits, whichever is more, with
            "gemm", and a_bits with "psaq".
        scaling: "channels" makes ranges of channels alike where that is free (see `calibration.equalize`) and rotates heads (see
            `calibration.rotate`), "none" leaves them.
            By default "channels" with "gemm" and "mse", else none, which is the literature's baseline.
        levels: the integers that weights of 2 to 4 bits may be, see `levels`: "uniform", or "nonuniform", closer together where
            most weights are. By default nonuniform with "gemm" and "mse", else uniform, which is the literature's baseline. Then
            what MLPs' second layers take has levels of its own too, with few bits (see `calibration.levels`).
        softmax_bits: bits of attention's probabilities; with "psaq", which leaves them alone, 8.

    Raises:
        UsageError: names the setting which does not fit.
    """

    w_bits: int = 4
    a_bits: int = 8
    placement: str = "gemm"
    quantizer: str = "mse"
    rounding: str | None = None
    edge_bits: int | None = None
    layer_bits: dict[str, int] | None = None
    edge_a_bits: int | None = None
    scaling: str | None = None
    softmax_bits: int = 8
    levels: str | None = None

    def __post_init__(self) -> None:
        expect_one_of("placement", self.placement, PLACEMENTS)
        check_rule(self.quantizer)
        gemm = self.placement == "gemm"
        for name, (plain, better) in {"rounding": ROUNDINGS, "scaling": SCALINGS, "levels": LEVELS}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, better if gemm and self.quantizer == "mse" else plain)
            if getattr(self, name) not in (plain, better):
                raise UsageError(f"{name} was '{getattr(self, name)}'; it may be '{plain}', '{better}'")
        if self.rounding == "second-order" and self.quantizer != "mse":
            raise UsageError(
                f"rounding was 'second-order' and quantizer '{self.quantizer}'; second-order rounding searches its own "
                "scales, so quantizer must be 'mse'"
            )
        if self.scaling == "channels" and not (gemm and self.quantizer == "mse"):
            raise UsageError(
                f"scaling was 'channels', placement '{self.placement}' and quantizer '{self.quantizer}'; it is for 'gemm' "
                "and 'mse'"
            )
        if self.levels == "nonuniform" and self.quantizer != "mse":
            raise UsageError(
                f"levels was 'nonuniform' and quantizer '{self.quantizer}'; their scales are searched, so quantizer must be 'mse'"
            )
        for name in ("w_bits", "a_bits", "edge_bits", "softmax_bits", "edge_a_bits"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        layer_bits = {name: _plain(bits) for name, bits in (self.layer_bits or {}).items()}
        object.__setattr__(self, "layer_bits", layer_bits or None)
        if self.edge_bits is None:
            object.__setattr__(self, "edge_bits", 8 if gemm else self.w_bits)
        named = {name: getattr(self, name) for name in ("w_bits", "a_bits", "edge_bits", "softmax_bits")}
        if self.edge_a_bits is not None:
            named["edge_a_bits"] = self.edge_a_bits
        named |= {f"layer_bits['{name}']": bits for name, bits in (self.layer_bits or {}).items()}
        for name, bits in named.items():
            if not is_whole(bits) or not 2 <= bits <= 8:
                raise UsageError(f"{name} was {bits!r}; it may be a whole number from 2 to 8")
        if not gemm and self.softmax_bits != 8:
            raise UsageError(
                f"softmax_bits was {self.softmax_bits} and placement 'psaq', which rounds no probabilities; it is for 'gemm'"
            )
        if self.edge_a_bits is None:
            object.__setattr__(self, "edge_a_bits", max(self.a_bits, self.edge_bits or 0) if gemm else self.a_bits)

    def input_bits(self, edge: bool) -> int:
        """Of the inputs of a layer, which is the first or the last if `edge`."""
        assert self.edge_a_bits is not None
        return self.edge_a_bits if edge else self.a_bits

    def bits_of(self, name: str, edge: bool) -> int:
        """Of the weights of layer `name`, which is the first or the last if `edge`."""
        default = self.edge_bits if edge else self.w_bits
        assert default is not None
        return (self.layer_bits or {}).get(name, default)

    @property
    def label(self) -> str:
        """As "W4/A8", or "W2-8/A8" where the layers differ beyond the edges."""
        widths = {self.w_bits, *(self.layer_bits or {}).values()}
        weights = f"{min(widths)}-{max(widths)}" if len(widths) > 1 else f"{min(widths)}"
        return f"W{weights}/A{self.a_bits}"


def _plain(bits: Any) -> Any:
    """A whole number of numpy's as Python's, which the file's JSON holds; all else as it is."""
    return int(bits) if isinstance(bits, np.integer) else bits
