"""Fused live layers in a float model, and back: `patch`."""

from .fusable import is_patched
from .handle import PatchHandle, patch

__all__ = ["PatchHandle", "is_patched", "patch"]
