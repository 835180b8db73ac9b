"""The settings of a synthesis run, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UsageError, expect_one_of, is_whole
from .curriculum import JITTER, SCHEDULES
from .spectrum import SPECTRA

_MOST_SEED = 2**40  # images draw from (seed << 20) + their index, which must fit 64 bits
PRECISIONS = ("auto", "float32", "bfloat16")
_NUMBERS = (
    "crop_lower",
    "crop_upper",
    "learning_rate",
    "warmup",
    "entropy_weight",
    "onehot_weight",
    "tv_weight",
    "jitter",
    "bandwidth",
)


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of `synthesize`; the defaults follow PSAQ-ViT (arXiv 2203.02250) and DFQ-ViT (arXiv 2507.14481).

    But for `iters`: half of their 500 steps gave images as good to calibrate with (docs/accuracy.md).
    """

    samples: int = 16
    iters: int = 250
    seed: int = 0
    schedule: str = "e2h"  # of the crop area: "e2h" (easy to hard), "fixed" or "hard-to-easy"
    crop_lower: float = 0.08  # delta_l, least crop area as a share of the image
    crop_upper: float = 1.0  # delta_u, greatest
    learning_rate: float = 0.2
    warmup: float = 0.2  # share of the iterations in which the learning rate rises
    entropy_weight: float = 1.0
    onehot_weight: float = 1.0
    tv_weight: float = 0.05
    jitter: float = JITTER  # greatest circular shift, as a share of the side
    points: int = 10
    bandwidth: float = 0.01
    batch_size: int = 32  # images in one pass; more samples go in parts, which share the whole batch's range
    precision: str = "auto"  # of the model's passes: "float32", "bfloat16" (autocast) or, by the machine, "auto"
    spectrum: str = "natural"  # of the finished images: "natural" (see `spectrum`) or "free", as they were optimised
    compat: str = ""  # "psaq": drop the first patch of every Swin window, as PSAQ-ViT's code does

    def __post_init__(self) -> None:
        for name in ("samples", "iters", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("points", self.points, 2)
        check_seed(self.seed)
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UsageError(f"{name} was {value!r}; it must be a finite number")
        expect_one_of("schedule", self.schedule, SCHEDULES)
        fixed, plain = self.schedule == "fixed", type(self).crop_lower
        if fixed and self.crop_lower not in (plain, self.crop_upper):
            raise UsageError(
                f"crop_lower was {self.crop_lower} and schedule 'fixed', whose crops all are of the area crop_upper; give that"
            )
        if not 0 < (self.crop_upper if fixed else self.crop_lower) <= self.crop_upper <= 1:
            raise UsageError(
                f"crop bounds were {self.crop_lower} and {self.crop_upper}; they must satisfy 0 < lower <= upper <= 1"
            )
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate was {self.learning_rate}; it must be greater than 0")
        if self.bandwidth <= 0:
            raise UsageError(f"bandwidth was {self.bandwidth}; it must be greater than 0")
        for name in ("warmup", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} was {getattr(self, name)}; it is a share, from 0 to 1")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision was '{self.precision}'; it may be 'auto', 'float32' or 'bfloat16'")
        expect_one_of("spectrum", self.spectrum, SPECTRA)
        if self.compat not in ("", "psaq"):
            raise UsageError(f"compat was '{self.compat}'; it may be '' or 'psaq'")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return asdict(self)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """UsageError unless `value` is a whole number, `least` or more."""
    if not is_whole(value):
        raise UsageError(f"{name} was {value!r}; it must be a whole number, {least} or more")
    if value < least:
        raise UsageError(f"{name} was {value}; it must be at least {least}")


def check_seed(seed: Any) -> None:
    """UsageError unless `seed` is a whole number that every generator takes."""
    if not is_whole(seed) or not 0 <= seed < _MOST_SEED:
        raise UsageError(f"seed was {seed!r}; it must be a whole number from 0 to {_MOST_SEED - 1}")


def check_names(caller: str, settings: Mapping[str, Any], others: Collection[str] = ()) -> None:
    """UsageError unless all `settings` are fields of `SynthesisConfig`; `others` are the caller's own arguments."""
    known = {field.name for field in fields(SynthesisConfig)}
    for name in sorted(settings.keys() - known):
        near = difflib.get_close_matches(name, [*known, *others], n=1)
        raise UsageError(f"{caller} has no setting '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
