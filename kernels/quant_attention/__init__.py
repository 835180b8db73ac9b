"""Attention on integers: see `op.py`."""

from .op import quant_attention

__all__ = ["quant_attention"]
