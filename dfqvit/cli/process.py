"""What the program is to the system: the signals that end it, and its streams, which may be closed, full or gone."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ENDING, ending, interruption

_PATIENCE = 5
_ignored = 0  # signals since the one that is cleaned up after


class Ended(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came: all that cleans up after Ctrl-C cleans up after it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def status_of(error: BaseException) -> int:
    """The exit status for a KeyboardInterrupt, or for what was raised from one: 128 and the signal's number."""
    ended = next((each for each in (error, error.__cause__) if isinstance(each, Ended)), None)
    return 128 + (signal.SIGINT if ended is None else ended.number)


def interrupted(arguments: Sequence[str]) -> str:
    """What is said of Ctrl-C; --resume only where the command has it."""
    told = "interrupted"
    if list(arguments[:1]) in (["synthesize"], ["quantize"]):
        told += "; the same command with --resume goes on where a synthesis stopped"
    return told


def watch_imports() -> None:
    """An import may swallow an exception, so until a command's module is there a signal ends the process itself.

    A signal that is ignored stays so (a background shell's SIGINT, nohup's SIGHUP). torchrun ends its processes by SIGTERM, also
    where one waits for another and would not come to a handler.
    """
    for number in ENDING if "RANK" not in os.environ else (signal.SIGINT,):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)


def take_signals() -> None:
    """From now on the signals of `watch_imports` raise `Ended`."""
    for number in ENDING:
        if signal.getsignal(number) is end_at_once:
            signal.signal(number, _raise)


def leave_at_once(status: int) -> None:
    """From now on those signals end the process with `status`: all is done and said, and Python alone has still to end."""
    for number in ENDING:
        if getattr(signal.getsignal(number), "__module__", "").startswith("dfqvit."):  # a caller's own stays
            signal.signal(number, lambda *_: os._exit(status))
            atexit.register(signal.signal, number, signal.SIG_IGN)  # Python gives handlers back before it is done


def end_at_once(number: int, _: object = None) -> None:
    """Ends the process with a line."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes only the first prints
        with contextlib.suppress(OSError):
            os.write(2, f"dfqvit: {interrupted(sys.argv[1:])}\n".encode())
    os._exit(128 + number)


def _raise(number: int, _: object = None) -> None:
    """Once: who waits presses Ctrl-C again, and torchrun, systemd and closed terminals send two signals or the same one twice."""
    global _ignored
    if not ending():
        _ignored = 0
        # torch's handler raises an error for each process that reads images and had the signal too
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise interruption(Ended(number))
    _ignored += 1
    if _ignored == _PATIENCE:  # the cleaning up hangs
        end_at_once(number)


def empty_argument(arguments: Sequence[str]) -> str:
    """What is wrong with the first argument that is empty, as where a shell's variable is not set; or "".

    A path of no letters would be the folder one is in, and a name of none the default.
    """
    for place, each in enumerate(arguments):
        name, equals, value = each.partition("=")
        if each and not (each.startswith("--") and equals and not value):
            continue
        told = f"the argument after '{arguments[place - 1]}'" if place and not each else f"'{name}'" if each else "''"
        return f"{told} was empty; it must be left out or have a value"
    return ""


def mend_streams() -> None:
    """Streams that were closed lead nowhere, and stderr may fail: a full disk or a closed terminal ends no work.

    Else the next file that is opened would be one of theirs, with messages in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue  # some file has the number already
            os.open(os.devnull, os.O_RDWR)  # has the least number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    if sys.platform != "win32" and sys.stderr is not None:
        raw = io.BufferedWriter(_Forgiving(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


class _Forgiving(io.FileIO):
    """Takes what it cannot write."""

    def write(self, data: Any, /) -> int:
        """How many bytes are done with: all of them where they cannot be written."""
        try:
            return super().write(data)
        except OSError:
            return len(data)
