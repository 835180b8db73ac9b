"""From a float model and calibration images to a quantized model: convert, observe, freeze."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .adapters import find_adapter
from .adapters.base import PLACEMENTS
from .errors import UsageError
from .layers import QuantLinear
from .models import check_finite
from .quantizers import ActivationQuantizer, check_rule

BATCH = 32  # images in one forward pass of calibration; ranges do not depend on it


def check_settings(w_bits: int, a_bits: int, placement: str, quantizer: str, patch_bits: int | None = None) -> int:
    """The bits of the patch projection's weights; UsageError that names the setting which does not fit.

    By default those are 8 with "gemm" (one small layer, and at 4 bits most of the loss), and `w_bits` with "psaq", which is
    the literature's.
    """
    if patch_bits is None:
        patch_bits = 8 if placement == "gemm" else w_bits
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits), ("patch_bits", patch_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UsageError(f"{name} was {bits!r}; it may be a whole number from 2 to 8")
    if placement not in PLACEMENTS:
        raise UsageError(f"placement was '{placement}'; it may be {', '.join(map(repr, PLACEMENTS))}")
    check_rule(quantizer)
    return patch_bits


def convert(
    model: nn.Module,
    w_bits: int,
    a_bits: int,
    placement: str = "gemm",
    quantizer: str = "minmax",
    patch_bits: int | None = None,
) -> nn.Module:
    """A copy of `model` with quantized layers that still compute in float and observe ranges; `calibrate` comes next.

    Raises:
        UsageError: a setting or the model does not fit.
        DfqvitError: NaN or Inf in the weights.
    """
    patch_bits = check_settings(w_bits, a_bits, placement, quantizer, patch_bits)
    check_finite(model)
    qmodel = copy.deepcopy(model).eval().requires_grad_(False)
    find_adapter(qmodel).convert(w_bits, a_bits, placement, quantizer, patch_bits)
    return qmodel.to(next(model.parameters()).device)


@torch.no_grad()
def calibrate(qmodel: nn.Module, images: torch.Tensor, placement: str, a_bits: int) -> None:
    """Runs the images [n, C, H, W] through a converted model, then freezes every quantizer and packs the weights."""
    for batch in images.split(BATCH):
        qmodel(batch)
    freeze(qmodel)
    if placement == "psaq":
        find_adapter(qmodel).quantize_constants(a_bits)


def freeze(qmodel: nn.Module, allocate_only: bool = False) -> None:
    """Freezes every quantizer; with `allocate_only`, makes the frozen shapes without values, for load_state_dict."""
    for module in list(qmodel.modules()):
        if isinstance(module, QuantLinear):
            module.allocate() if allocate_only else module.freeze()
    for module in qmodel.modules():
        if isinstance(module, ActivationQuantizer) and not module.frozen:
            if allocate_only:
                module.frozen = True
            else:
                module.freeze()
