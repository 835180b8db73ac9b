"""A ConvNeXt block on integers: see `op.py`."""

from .op import GRIDS, LINEARS, quant_conv_block

__all__ = ["GRIDS", "LINEARS", "quant_conv_block"]
