"""Which backend is fastest for a shape on this machine: measured once, remembered in a file.

An operator opts in with `Operator(tune=...)`, a function of its arguments that gives the key of a shape, a short text; `bucket`
keeps the keys few. The first call of a new key times the backends that could serve it, on the call's own arguments, and
throws their outputs away. A backend asked for by name is never measured against others, nor is the reference, which is a
fallback. DFQVIT_TUNING=0 ignores all this: the first backend in order serves, as it does for a new key where measuring is not
possible (torch.compile, CUDA graph capture, where autograd would record it, tensors of other classes than torch's own).
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import extension
from .files import atomic, user_cache

_FORMAT = 1
_SAMPLE_SECONDS = 1e-3  # short calls are repeated to fill this
_SLOW_SECONDS = 0.1  # calls longer than this are timed less often
_ADVANTAGE = 1.03  # an earlier backend keeps its place unless one is faster by this factor

Entry = dict[str, Any]  # {"backend": name, "microseconds": {name: median, or None if it failed}}
_entries: dict[str, Entry] | None = None  # what this process knows; None until the file was read
_warned: set[str] = set()


class TuningWarning(UserWarning):
    """The file of measured choices could not be read or written, or a backend failed while it was measured."""


def cache_file() -> Path:
    """Where choices are kept."""
    return user_cache() / "dfqvit" / "tuning.json"


def enabled() -> bool:
    """Whether choices are measured: unless DFQVIT_TUNING=0."""
    return os.environ.get("DFQVIT_TUNING", "1") != "0"


def bucket(size: int) -> int:
    """The least power of two that is not below `size`, for keys."""
    return 1 << max(size - 1, 0).bit_length()


def fastest(operator: str, key: str, candidates: Mapping[str, Callable[..., Any]], args: tuple[Any, ...]) -> str:
    """The name of the fastest of `candidates` for these arguments: remembered, or measured now and remembered.

    Args:
        operator: its name.
        key: of the shape, see `Operator`.
        candidates: name -> implementation, in order of preference; at least one.
        args: the operator's arguments; no candidate may write to them.
    """
    first = next(iter(candidates))
    if not enabled():
        return first
    full_key = f"{operator} | {key} | {_place(args)}"
    entry = _known().get(full_key)
    if entry is None or entry["microseconds"].keys() != candidates.keys():
        if not _measurable(args):
            return first
        entry = _measure(operator, candidates, args)
        if entry is None:
            return first
        _remember(full_key, entry)
    return entry["backend"]


def table() -> dict[str, Any]:
    """What `dfqvit info --tuning` shows, JSON-ready."""
    return {"file": str(cache_file()), "enabled": enabled(), "choices": _read(cache_file())}


def _measurable(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling():
        return False
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False  # autograd would record the candidates
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _measure(operator: str, candidates: Mapping[str, Callable[..., Any]], args: tuple[Any, ...]) -> Entry | None:
    """None where no candidate ran: the call itself will say what is wrong with its arguments."""
    once, failed = {}, {}
    for name, run in candidates.items():
        try:
            _seconds(run, args, 1)  # compiles, allocates
            once[name] = _seconds(run, args, 1)
        except Exception as error:  # a backend may fail in any way; only the chosen one may stop the call
            failed[name] = error
    if not once:
        return None
    for name, reason in failed.items():
        _warn_once(f"{operator}: backend '{name}' failed while it was measured, another serves this shape: {reason}")
    samples: dict[str, list[float]] = {name: [] for name in once}
    for _ in range(3 if max(once.values()) > _SLOW_SECONDS else 9):  # interleaved, so that a disturbance hits all
        for name, seconds in once.items():
            number = math.ceil(min(_SAMPLE_SECONDS / max(seconds, 1e-6), 100))
            samples[name].append(_seconds(candidates[name], args, number))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    best = min(medians.values())
    chosen = next(name for name, median in medians.items() if median <= best * _ADVANTAGE)
    microseconds = {name: round(medians[name] * 1e6, 2) if name in medians else None for name in candidates}
    return {"backend": chosen, "microseconds": microseconds}


@torch.no_grad()
def _seconds(run: Callable[..., Any], args: tuple[Any, ...], number: int) -> float:
    """Of one call, averaged over `number` calls."""
    device = next((arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda), None)
    if device is not None:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        run(*args)
    if device is not None:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / number


def _place(args: tuple[Any, ...]) -> str:
    """What a measurement holds for: the device that the tensors are on, and the software."""
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type != "cpu":
        return _machine(device)
    module, _ = extension.load()
    return _machine(device, torch.get_num_threads(), module.active_isa() if module else "")


@functools.cache
def _machine(device: torch.device, threads: int = 0, isa: str = "") -> str:
    """The device by name, and the build of the kernels: another may rank them otherwise."""
    cpu = f"{extension.cpu_name()}, {threads} threads, {isa or 'nothing compiled'}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    module, _ = extension.load()
    built = int(os.stat(str(module.__file__)).st_mtime) if module else 0
    return f"{name} | torch {torch.__version__}, built {built}"


def _known() -> dict[str, Entry]:
    global _entries
    if _entries is None:
        _entries = _read(cache_file())
    return _entries


def _read(path: Path) -> dict[str, Entry]:
    """The choices in the file; none, with one warning, if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return {}  # of another version of dfqvit, and no fault
        entries = content["choices"]
        for entry in entries.values():
            if entry["backend"] not in entry["microseconds"]:
                raise ValueError("a choice that was not measured")
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_once(f"the tuning file '{path}' is ignored and will be written anew: {error or type(error).__name__}")
        return {}


def _remember(full_key: str, entry: Entry) -> None:
    """Keeps the choice, and adds it to what other processes may have written meanwhile."""
    _known()[full_key] = entry
    if None in entry["microseconds"].values():
        return  # a backend failed, perhaps for want of memory: the next process tries again
    path = cache_file()
    try:
        choices = {**_read(path), full_key: entry}
        with atomic(path) as temporary:
            temporary.write_text(json.dumps({"format": _FORMAT, "choices": choices}, indent=1, sort_keys=True))
    except OSError as error:  # a read-only home: measured again in the next process
        _warn_once(f"the tuning file '{path}' could not be written: {error}")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, TuningWarning, stacklevel=2)
