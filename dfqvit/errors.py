"""The errors that dfqvit raises on purpose; the command line turns them into one line and an exit status."""


class UsageError(ValueError):
    """Wrong use: an argument that does not fit. Exit status 2."""


class DfqvitError(RuntimeError):
    """A failure while doing what was asked: an unreadable file, NaN in weights, a damaged model. Exit status 1."""


class Interrupted(DfqvitError):
    """Ctrl-C, where there is more to say than that. Exit status 130."""
