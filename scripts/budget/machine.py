"""A multiprocessor of sm_90, cycle by cycle: what its warps wait for when they issue what the machine code says.

Of each instruction the compiler says how long the next one of the warp must wait and which results it waits for; the rest is here:
how often a pipe takes an instruction, how long results take that are waited for, what shared memory moves in a cycle, how long
global memory takes. Not in it: misses of the caches of instructions, conflicts of register banks, clocks that fall under load.

Rates are those of the CUDA programming guide (arithmetic instructions, compute capability 9.0), for a warp on one of the four
parts of a multiprocessor. Latencies and the share of its peak that `mma.sync` reaches on Hopper (63 %; `wgmma` reaches it all) are
those that arXiv 2402.13499 measured.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from .sass import NONE, Code, Instruction

PROCESSORS, HERTZ = 132, 1.83e9
PARTS = 4  # of a multiprocessor: schedulers
INTERVAL = {
    "fma": 1.0,
    "heavy": 2.0,
    "alu": 2.0,
    "xu": 8.0,
    "tensor": 4 / 0.63,
    "double": 2.0,
    "uniform": 2.0,
    "memory": 2.0,
    "none": 0.0,
}
LATENCY = {
    "xu": 24,
    "LDSM": 33,
    "LDS": 29,
    "LD.": 33,
    "SHFL": 24,
    "LDC": 30,
    "S2R": 30,
    "IMMA": 33,
    "double": 16,
    "other": 20,
}
LAUNCH = 700  # cycles from the end of a block to the first instruction of the next in its place
GLOBAL, SECOND_CACHE = 700, 270  # cycles that a load from there takes
BRANCH = 6  # cycles that a warp loses where it jumps


@dataclass(frozen=True)
class Gpu:
    """Bytes of global memory that all multiprocessors move in a second."""

    name: str
    bytes_a_second: float

    @property
    def bytes_a_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.bytes_a_second / PROCESSORS / HERTZ


H100, H200 = Gpu("H100", 3.35e12), Gpu("H200", 4.8e12)

_PIPES = (
    ("fma", r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2"),
    ("heavy", r"IMAD|IDP"),
    ("xu", r"MUFU|I2F\.|I2F$|F2I|F2F|FRND|FCHK|POPC"),
    ("tensor", r"IMMA|HMMA"),
    ("double", r"DADD|DMUL|DFMA|DSETP|DMMA"),
    ("uniform", r"U[A-Z]|R2UR|S2UR"),
    ("memory", r"LD|ST|SHFL|S2R|BAR|ATOM|RED|CS2R|MEMBAR"),
    ("none", r"NOP|BRA|BSSY|BSYNC|EXIT|WARPSYNC|DEPBAR|YIELD|CALL|RET|BREAK"),
)
_WIDE = re.compile(r"\.(64|128)\b")


def pipe_of(one: Instruction) -> str:
    """The pipe that takes an instruction."""
    return next((pipe for pipe, names in _PIPES if re.match(names, one.operation)), "alu")


def wavefronts(addresses: Iterable[int], width: int = 4) -> int:
    """Cycles of shared memory for one access of a warp: words of `width` bytes at these addresses, 128 bytes of them at a time."""
    every = list(addresses)
    at_once = 32 * 4 // max(width, 4)
    total = 0
    for start in range(0, len(every), at_once):
        banks: dict[int, set[int]] = {}
        for address in every[start : start + at_once]:
            for word in range(address // 4, (address + width + 3) // 4):
                banks.setdefault(word % 32, set()).add(word)
        total += max(len(words) for words in banks.values())
    return total


def moved(one: Instruction) -> int:
    """Bytes of an access of a whole warp."""
    wide = _WIDE.search(one.operation)
    return 32 * (int(wide[1]) // 8 if wide else 1 if ".U8" in one.operation or ".S8" in one.operation else 4)


def shared_cycles(one: Instruction, conflicts: dict[str, float]) -> float:
    """Of shared memory; `conflicts`: for the operations whose addresses meet in a bank, how many wavefronts instead."""
    name = one.operation
    if not re.match(r"LDS|STS|SHFL|LDGSTS|LD\.|ST\.", name):  # addresses of no kind are those of shared memory here
        return 0.0
    if name in conflicts:
        return conflicts[name]
    if name.startswith("LDSM"):
        return float(name.rsplit(".", 1)[1]) if name.rsplit(".", 1)[1].isdigit() else 1.0
    return 1.0 if name.startswith("SHFL") else max(1.0, moved(one) / 128)


@dataclass
class Totals:
    """Cycles of a multiprocessor that a block keeps each of its parts for, at the least."""

    issue: float = 0.0
    pipes: dict[str, float] = field(default_factory=dict)
    shared: float = 0.0

    def add(self, code: Code, issued: Sequence[int], conflicts: dict[str, float]) -> None:
        """The instructions of a warp."""
        for index in issued:
            one = code[index]
            self.issue += 1 / PARTS
            self.shared += shared_cycles(one, conflicts)
            pipe = pipe_of(one)
            self.pipes[pipe] = self.pipes.get(pipe, 0.0) + INTERVAL[pipe] / PARTS


class _Warp:
    __slots__ = ("at", "barriers", "block", "groups", "issued", "open", "part", "ready")

    def __init__(self, issued: Sequence[int], now: float, block: list[int], part: int) -> None:
        self.issued, self.at, self.ready, self.block, self.part = issued, 0, now, block, part
        self.barriers, self.groups, self.open = [0.0] * 8, [], 0.0  # type: ignore[var-annotated]


def simulated(
    code: Code,
    warps: Sequence[Sequence[int]],
    blocks: int,
    resident: int,
    gpu: Gpu,
    conflicts: dict[str, float] | None = None,
    cached: Collection[str] = (),
    absent: Collection[int] = (),
) -> float:
    """Cycles for `blocks` blocks on one multiprocessor, `resident` at a time; `warps`: what each warp of a block issues.

    `cached`: operations of loads that the second cache serves; `absent`: instructions whose predicate is false.
    """
    conflicts = conflicts or {}
    facts = []
    for index, one in enumerate(code):
        pipe = pipe_of(one)
        name = one.operation
        kind = "absent" if index in absent else (
            "global" if re.match(r"LDG|STG|LDGSTS|ATOM|RED", name) and not name.startswith("LDGDEPBAR")
            else "barrier" if name.startswith("BAR.SYNC")
            else "group" if name.startswith("LDGDEPBAR")
            else "depend" if name.startswith("DEPBAR")
            else "plain"
        )  # fmt: skip
        latency = next(
            (time for start, time in LATENCY.items() if name.startswith(start)), LATENCY.get(pipe, LATENCY["other"])
        )
        depth = re.search(r"DEPBAR\.LE SB\d, (0x[0-9a-f]+)", one.line)
        facts.append(
            (
                one,
                pipe,
                INTERVAL[pipe],
                kind,
                latency,
                shared_cycles(one, conflicts),
                moved(one),
                int(depth[1], 16) if depth else 0,
            )
        )
    parts: list[list[_Warp]] = [[] for _ in range(PARTS)]
    free = [dict.fromkeys(INTERVAL, 0.0) for _ in range(PARTS)]
    shared_free = memory_free = 0.0
    started, now, running, counter = 0, 0.0, 0, 0
    waiting: dict[int, list[_Warp]] = {}

    def start(at: float) -> None:
        nonlocal started, running, counter
        block = [len(warps), 0, started]
        started += 1
        running += 1
        for issued in warps:
            parts[counter % PARTS].append(_Warp(issued, at, block, counter % PARTS))
            counter += 1

    for place in range(min(resident, blocks)):
        start(place * LAUNCH / 8)
    while running:
        soonest, any_issued = float("inf"), False
        for part in range(PARTS):
            pipes = free[part]
            for position, warp in enumerate(parts[part]):
                one, pipe, interval, kind, latency, wavefront, size, depth = facts[warp.issued[warp.at]]
                earliest = warp.ready
                for barrier in one.waits:
                    if warp.barriers[barrier] > earliest:
                        earliest = warp.barriers[barrier]
                if kind == "depend" and len(warp.groups) > depth:
                    earliest = max(earliest, warp.groups[-1 - depth])
                if pipes[pipe] > earliest:
                    earliest = pipes[pipe]
                if earliest > now:
                    soonest = min(soonest, earliest)
                    continue
                any_issued = True
                pipes[pipe] = max(pipes[pipe], now) + interval if interval else 0.0
                if interval and pipes[pipe] < now + 1:
                    pipes[pipe] = now + 1
                done = now + (1 if kind == "absent" else latency)
                if wavefront and kind != "absent":
                    shared_free = max(shared_free, now) + wavefront
                    done = shared_free + latency - 1
                if kind == "global":
                    memory_free = max(memory_free, now) + size / gpu.bytes_a_cycle
                    done = memory_free + (SECOND_CACHE if one.operation in cached else GLOBAL)
                    if one.operation.startswith("LDGSTS"):
                        warp.open = max(warp.open, done)
                elif kind == "group":
                    warp.groups.append(warp.open)
                if one.set_when_written != NONE:
                    warp.barriers[one.set_when_written] = max(warp.barriers[one.set_when_written], done)
                if one.set_when_read != NONE:
                    warp.barriers[one.set_when_read] = max(warp.barriers[one.set_when_read], now + 12)
                warp.ready = now + max(one.stall, 1)
                jumps = warp.at + 1 < len(warp.issued) and warp.issued[warp.at + 1] != warp.issued[warp.at] + 1
                if jumps:
                    warp.ready += BRANCH
                warp.at += 1
                if kind == "barrier":
                    warp.ready = float("inf")
                    held = waiting.setdefault(warp.block[2], [])
                    held.append(warp)
                    if len(held) == warp.block[0]:
                        for other in held:
                            other.ready = now + LATENCY["other"]
                        del waiting[warp.block[2]]
                if warp.at == len(warp.issued):
                    parts[part].pop(position)
                    warp.block[1] += 1
                    if warp.block[1] == warp.block[0]:
                        running -= 1
                        if started < blocks:
                            start(now + LAUNCH)
                break
        now = now + 1 if any_issued else max(now + 1, soonest) if soonest < float("inf") else now + 1
    return now
