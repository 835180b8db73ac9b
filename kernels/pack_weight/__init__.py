"""Packed weights: see `op.py`."""

from .op import integers_of, pack_integers, pack_weight, packed_row_bytes, round_nearest, unpack_weight

__all__ = ["integers_of", "pack_integers", "pack_weight", "packed_row_bytes", "round_nearest", "unpack_weight"]
