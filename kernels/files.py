"""Writing files so that an interruption leaves the old one or the new one, never half of one; and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

# Letters of a name that its temporary one has, of up to 4 bytes each; 255 bytes are the most.
_BEGINNING, _SUFFIX = 32, 16


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; moves it to `path` when the block ends well, removes it otherwise.

    A link stays one: the file that it leads to is written. A file that is replaced leaves its mode to the new one.

    Raises:
        OSError: `path` names a folder, a device, a pipe or the like; or what was raised while it was written, which names `path`.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise OSError(f"path was '{path}', which is no regular file; it may be one, or a name that is free")
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = Path(path).suffix
    suffix = suffix if len(suffix) <= _SUFFIX else ""
    temporary = target.with_name(f".{target.name[:_BEGINNING]}.{secrets.token_hex(8)}{suffix}")
    try:
        temporary.touch(0o600, exist_ok=False)  # within the `try`: a signal may come at any line
        yield temporary
        temporary.chmod(_mode(target))
        temporary.replace(target)
    except OSError as error:  # a full disk's names no file, or the temporary one
        if error.filename is not None and str(temporary) not in (str(error.filename), str(error.filename2)):
            raise
        if error.errno is None:  # of Pillow
            raise OSError(f"'{path}' could not be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """Of the file that is there, or else the usual one."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def user_cache() -> Path:
    """The folder for files that can be made anew: XDG_CACHE_HOME, or the platform's own."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):  # the specification says that a relative one is to be ignored
        return Path(asked)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
