"""Bilinear samples of a rolled image on a separable grid: see `op.py`."""

from .op import roll_resize

__all__ = ["roll_resize"]
