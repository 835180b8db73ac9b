"""LayerNorm and quantization in one pass: see `op.py`."""

from .op import layer_norm_quantize

__all__ = ["layer_norm_quantize"]
