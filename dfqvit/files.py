"""Writing files so that an interruption leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; moves it there when the block ends well, removes it otherwise."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; the result gets the usual mode
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, force: bool) -> None:
    """UsageError when `path` exists and `force` is not set."""
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists already; give --force to replace it")
