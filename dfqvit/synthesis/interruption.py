"""Ctrl-C between two states, never within one; and what it leaves behind within torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from ..errors import ENDING


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C, SIGTERM and SIGHUP back until the block is done; for short blocks that must be done wholly or not at all."""
    if threading.current_thread() is not threading.main_thread():  # Python runs signal handlers in the main thread only
        yield
        return
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)

    # Not the system's own handler, which ends the process, nor one that says to ignore the signal.
    handlers = {number: found for number in ENDING if callable(found := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def autocast_restored(kind: str) -> Iterator[None]:
    """Brings torch's autocast for a kind of device back to what it was: Ctrl-C while it is entered or left leaves it on."""
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
    depth = _autocast_depth()
    try:
        yield
    finally:
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])
        torch.set_autocast_cache_enabled(before[2])


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
