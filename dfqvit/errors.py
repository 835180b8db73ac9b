"""The errors that dfqvit raises on purpose; the command line turns them into one line and an exit status."""

from __future__ import annotations

import sys


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


def ending() -> bool:
    """Whether an interruption is being cleaned up after, here or further out: then another signal says nothing new."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, (KeyboardInterrupt, Interrupted, LostProcess)):
        error = error.__context__
    return error is not None
