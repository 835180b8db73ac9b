"""Packed weights: see `op.py`."""

from .op import pack_integers, pack_weight, packed_row_bytes, round_nearest, unpack_weight

__all__ = ["pack_integers", "pack_weight", "packed_row_bytes", "round_nearest", "unpack_weight"]
