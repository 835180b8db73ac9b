"""The errors that dfqvit raises on purpose; the command line turns them into one line and an exit status."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Collection
from typing import TypeGuard, TypeVar

Error = TypeVar("Error", bound=BaseException)
# The signals that end a program, as far as the system has them.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class UsageError(ValueError):
    """Wrong use: an argument that does not fit. Exit status 2."""


class DfqvitError(RuntimeError):
    """A failure while doing what was asked: an unreadable file, NaN in weights, a damaged model. Exit status 1."""


class Interrupted(DfqvitError):
    """Ctrl-C, where there is more to say than that. Exit status 130."""


class LostProcess(DfqvitError):
    """Another process of the run has ended, or this one was told to end."""

    def __init__(self) -> None:
        super().__init__(
            "a process of this run was lost; the same command with --resume goes on where a synthesis stopped"
        )


def expect_one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """UsageError unless the argument of that name has a value that is allowed."""
    if value not in allowed:
        raise UsageError(f"{name} was '{value}'; it may be {', '.join(map(repr, allowed))}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether an argument is a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def first_line(error: BaseException) -> str:
    """What an error says, without what follows; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_raised: weakref.ref[BaseException] | None = None  # what the last signal raised


def interruption(error: Error) -> Error:
    """The error, to be raised because of a signal."""
    global _raised
    _raised = weakref.ref(error)
    return error


def ending() -> bool:
    """Whether what the last signal raised is on its way, or cleaned up after: then another signal says nothing new.

    By its being there: `sys.exc_info` tells nothing of it in what Python frees on its way.
    """
    return _raised is not None and _raised() is not None
