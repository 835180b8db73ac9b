"""A kernel on a GPU that is not there: what its warps issue, what each part of a multiprocessor has to do, and the time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .machine import HERTZ, PROCESSORS, Gpu, Totals, simulated
from .sass import Code, is_one_of, loops, trace, way

Trips = Callable[[str, int], int]  # rounds of a loop, by what it does and the warp


@dataclass(frozen=True)
class Launch:
    """Blocks of a launch, those that a multiprocessor has room for, and bytes that must be moved at least."""

    blocks: int
    resident: int
    bytes: float


@dataclass(frozen=True)
class Prediction:
    """Microseconds of all multiprocessors, if nothing waited but for this part; and `time`, with all waiting."""

    name: str
    instructions: float  # of a block's warps
    issue: float
    tensor: float
    special: float  # exponentials, reciprocals, conversions to integers
    arithmetic: float  # the busier one of both pipes of arithmetic
    shared: float
    memory: float
    time: float

    @property
    def floor(self) -> float:
        """Of this code: the busiest part."""
        return max(self.issue, self.tensor, self.special, self.arithmetic, self.shared, self.memory)


@dataclass
class Kernel:
    """Machine code, and the way of its warps: the exit they take, and the loops on it by name."""

    name: str
    code: Code
    path: list[int]
    loops: dict[tuple[int, int], str]
    conflicts: dict[str, float] = field(default_factory=dict)  # wavefronts of operations whose addresses meet in a bank
    cached: Sequence[str] = ()
    absent: Sequence[int] = ()

    def warp(self, trips: Trips, number: int) -> list[int]:
        """What warp `number` issues."""
        return trace(self.code, self.path, {loop: trips(name, number) for loop, name in self.loops.items()})

    def predict(self, warps: int, trips: Trips, launch: Launch, gpu: Gpu) -> Prediction:
        """The launch on that GPU: the multiprocessor that has most blocks."""
        issued = [self.warp(trips, number) for number in range(warps)]
        totals = Totals()
        for one in issued:
            totals.add(self.code, one, self.conflicts)
        share = launch.blocks / PROCESSORS / HERTZ * 1e6
        most = -(-launch.blocks // PROCESSORS)
        cycles = simulated(
            self.code, issued, most, launch.resident, gpu, self.conflicts, self.cached, frozenset(self.absent)
        )
        memory = launch.bytes / gpu.bytes_a_second * 1e6
        pipes = {name: cycles * share for name, cycles in totals.pipes.items()}
        fused = (pipes.get("fma", 0.0) + pipes.get("heavy", 0.0), pipes.get("alu", 0.0))
        return Prediction(
            self.name,
            sum(map(len, issued)),
            totals.issue * share,
            pipes.get("tensor", 0.0),
            pipes.get("xu", 0.0),
            max(fused),
            totals.shared * share,
            memory,
            max(cycles / HERTZ * 1e6, memory),
        )


def found(name: str, code: Code, work: Sequence[str], kinds: Sequence[tuple[str, str]] | Sequence[str]) -> Kernel:
    """The kernel's way: to the exit on which most of `work` is done, the shortest there.

    `kinds`: (name, pattern) of loops, the first pattern that a loop's operations match; or the names of all loops in order.
    ValueError where the loops are others.
    """
    best: list[int] = []
    most = -1
    for end, one in enumerate(code):
        if one.operation == "EXIT" and not one.conditional:
            try:
                path = way(code, 0, end, work)
            except ValueError:
                continue
            met = sum(is_one_of(code[index], tuple(work)) for index in path)
            if met > most:
                best, most = path, met
    on_way = set(best)
    there = [loop for loop in loops(code) if loop[0] in on_way and loop[1] in on_way]
    named = {}
    for number, loop in enumerate(there):
        operations = [code[index].operation for index in best if loop[0] <= index <= loop[1]]
        if kinds and isinstance(kinds[0], str):
            if len(kinds) != len(there):
                raise ValueError(f"{name} had {len(there)} loops; the names of {len(kinds)} were given")
            named[loop] = str(kinds[number])
            continue
        matching = [kind for kind, pattern in kinds if re.search(pattern, " ".join(operations))]
        if not matching:
            raise ValueError(f"{name} had a loop of {len(operations)} instructions that is none of {kinds}")
        named[loop] = matching[0]
    return Kernel(name, code, best, named)
