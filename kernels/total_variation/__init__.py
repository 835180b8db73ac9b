"""Total variation of images: see `op.py`."""

from .op import total_variation

__all__ = ["total_variation"]
