"""A transformer block on integers: see `op.py`."""

from .op import GRIDS, LINEARS, quant_block

__all__ = ["GRIDS", "LINEARS", "quant_block"]
