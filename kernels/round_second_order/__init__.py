"""Weights rounded together, to second order: see `op.py`."""

from .op import round_second_order

__all__ = ["round_second_order"]
