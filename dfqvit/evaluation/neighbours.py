"""Busy processes to measure beside: what a server that is not alone on its machine will see."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Ends by itself should its parent die without a word.
_BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`count` processes that keep a CPU busy each, from the first line of the block to its end, however it ends."""
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            command = [sys.executable, "-S", "-c", _BUSY, str(os.getpid())]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            stack.callback(_stop, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield processes


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
