"""The quantized matrix product: see `op.py`."""

from .op import quant_linear

__all__ = ["quant_linear"]
