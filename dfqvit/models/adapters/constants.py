"""Parameters that a placement treats as activations."""

from __future__ import annotations

import torch

from ...kernels import fake_quantize
from ...quantization.ranges import affine_parameters


@torch.no_grad()
def quantize_constant_(parameter: torch.nn.Parameter, bits: int) -> None:
    """Rounds a parameter, in place, to an asymmetric min-max grid of `bits` bits, one scale for the tensor."""
    scale, zero_point = affine_parameters(*parameter.aminmax(), bits)
    parameter.copy_(fake_quantize(parameter, scale, zero_point, quant_min=0, quant_max=(1 << bits) - 1))
