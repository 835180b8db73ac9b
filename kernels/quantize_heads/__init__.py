"""Q, K and V of an attention as integers."""

from .op import quantize_heads

__all__ = ["quantize_heads"]
