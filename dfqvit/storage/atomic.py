"""Writing files: atomically (`atomic`, from the operators' side), and never over an existing result unasked."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..kernels.files import atomic

__all__ = ["atomic", "refuse_existing"]


def refuse_existing(path: Path, force: bool) -> None:
    """UsageError when `path` exists and `force` is not set."""
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists already; give --force to replace it")
