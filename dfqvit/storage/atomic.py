"""Writing files: atomically (`atomic`, from the operators' side), never over an existing result unasked, and only where one can."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DfqvitError, UsageError
from ..kernels.files import atomic

__all__ = ["atomic", "refuse_existing"]


def refuse_existing(path: Path, force: bool) -> None:
    """Before the work: UsageError when `path` exists and `force` is not set; what `expect_place` raises."""
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists already; give --force to replace it")
    expect_place(path)


def expect_place(path: Path) -> None:
    """UsageError where a file is in place of a folder of `path`, DfqvitError where nothing may be written there."""
    folder = Path(os.path.realpath(path)).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"'{path}' cannot be written: '{folder}' is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DfqvitError(f"'{path}' cannot be written: nothing may be written to '{folder}'")
