"""Fake quantization: see `op.py`."""

from .op import fake_quantize

__all__ = ["fake_quantize"]
