"""Where long work is: every stage tells its steps to whoever listens. Bars on stderr are one listener.

What works calls `tracked(items, "name")` or `Stage("name", total)` and takes no callback for it; `showing(...)` around the work
says who listens. Listeners are of the thread that set them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from .distributed import rank

Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """What a step reports. The losses and the crop are the synthesis' own; they are NaN in other stages.

    Attributes:
        step: steps done, 0 to `total`; the synthesis counts from 1.
        entropy: with `onehot` and `tv`, the three weighted terms of the loss.
        crop_ratio: the crop's share of the area.
        stage: what is being done, as "synthesis" or "round weights".
        total: steps of the stage.
    """

    step: int
    entropy: float = math.nan
    onehot: float = math.nan
    tv: float = math.nan
    crop_ratio: float = math.nan
    stage: str = "synthesis"
    total: int = 0


Report = Callable[[Progress], None]
_listener: ContextVar[Report | None] = ContextVar("dfqvit_progress", default=None)


class Stage:
    """One stage of `total` steps; `step()` after each of them."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._tell()

    def step(self) -> None:
        """Says that one more step is done."""
        self.done += 1
        self._tell()

    def _tell(self) -> None:
        listener = _listener.get()
        if listener is not None and self.total:
            listener(Progress(self.done, stage=self.name, total=self.total))


def tracked(items: Sequence[Item], name: str) -> Iterator[Item]:
    """The items, each a step of a stage of that name."""
    stage = Stage(name, len(items))
    for item in items:
        yield item
        stage.step()


class Bars:
    """A listener: a bar on stderr for each stage, with the time left; of the synthesis also the terms of the loss."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.stage = ""

    def __call__(self, progress: Progress) -> None:
        if self.bar is None or progress.stage != self.stage or progress.step < self.bar.n:
            self.close()
            self.stage = progress.stage
            begun = progress.step  # not 0 where a run goes on from its snapshot: the time of those steps was another's
            self.bar = tqdm(total=progress.total, initial=begun, desc=progress.stage, unit="step", dynamic_ncols=True)
        if not math.isnan(progress.entropy):
            terms = {
                "entropy": f"{progress.entropy:.3f}",
                "onehot": f"{progress.onehot:.3f}",
                "tv": f"{progress.tv:.2f}",
            }
            self.bar.set_postfix(terms | {"crop": f"{progress.crop_ratio:.2f}"}, refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if progress.step == progress.total:
            self.close()

    def close(self) -> None:
        """Ends the bar that is open, if one is."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None


@contextmanager
def showing(progress: bool = True, report: Report | None = None) -> Iterator[Report | None]:
    """Lets `report` listen during the block, and bars where `progress` is set and nobody listens yet; yields who is told.

    Of several processes (torchrun) the first alone draws bars.
    """
    outer = _listener.get()
    bars = Bars() if progress and outer is None and rank() == 0 else None
    listeners = [each for each in (report, outer, bars) if each is not None]

    def tell(found: Progress) -> None:
        for each in listeners:
            each(found)

    token = _listener.set(tell if listeners else None)
    try:
        yield _listener.get()
    finally:
        _listener.reset(token)
        if bars is not None:
            bars.close()
