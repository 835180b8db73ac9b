"""Several processes at one job, as `torchrun` starts them: rank, reductions that are exact, and one message when one is lost.

Images are made in parts of `batch_size`; each process takes every so-many-th part. Only least and greatest values and sums with
zeros go between them, so the bits do not depend on how many processes there are. Outside torchrun everything here does nothing.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import LostProcess, ending, interruption

# Whether a LostProcess was raised already: torchrun's SIGTERM comes after gloo's own error, and says no more. For good, where
# `ending` tells only as long as the error is there: the signal may come once it was told, and before the process has ended.
_lost = False
_waiting: Any = None  # the group in which the others wait while the first calibrates, which may take hours
_PATIENCE = timedelta(days=30)


def rank() -> int:
    """Of this process; 0 where there is only one."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def start() -> None:
    """Joins the other processes of a torchrun. torchrun ends the others by SIGTERM when one is lost: that becomes LostProcess.

    So does SIGHUP, which torchrun hands on when its terminal is closed.
    """
    if world() == 1 or dist.is_initialized():
        return
    global _lost, _waiting
    _lost = False
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminated)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)


def stop() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def reduce_(tensor: torch.Tensor, operation: str = "sum") -> torch.Tensor:
    """Replaces the tensor, in place, by the "sum", "min" or "max" over all processes; nothing where there is only one."""
    if dist.is_initialized():
        _call(dist.all_reduce, tensor, getattr(dist.ReduceOp, operation.upper()))
    return tensor


def wait_for_all() -> None:
    """Returns once every process is here, however late; one that is lost is told all the same, by its connection that ends.

    By a barrier, which takes no tensor of Python's: gloo's threads give theirs back a moment after a reduction has returned, need
    Python's lock for it, and abort the process where Python has ended meanwhile (pytorch 179291).
    """
    if dist.is_initialized():
        _call(dist.barrier, _waiting)


def _call(function: Any, *arguments: Any) -> None:
    try:
        function(*arguments)
    except RuntimeError as error:
        if isinstance(error, LostProcess):
            raise
        global _lost
        _lost = True
        raise interruption(LostProcess()) from error


def _terminated(*_: Any) -> None:
    global _lost
    if not _lost and not ending():
        _lost = True
        raise interruption(LostProcess())
