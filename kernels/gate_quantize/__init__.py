"""The hidden values of a gated MLP as integers: see `op.py`."""

from .op import gate_quantize

__all__ = ["gate_quantize"]
