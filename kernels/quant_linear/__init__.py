"""The quantized matrix product: see `op.py`."""

from .blocked import block_weight, weight_sums
from .op import quant_linear

__all__ = ["block_weight", "quant_linear", "weight_sums"]
