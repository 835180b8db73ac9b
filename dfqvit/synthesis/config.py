"""The settings of a synthesis run, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError
from .curriculum import JITTER, SCHEDULES
from .spectrum import SPECTRA


@dataclass(frozen=True)
class SynthesisConfig:
    """Settings of `synthesize`; the defaults follow PSAQ-ViT (arXiv 2203.02250) and DFQ-ViT (arXiv 2507.14481)."""

    samples: int = 16
    iters: int = 500
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
    precision: str = "float32"  # of the model's forward and backward: "float32" or "bfloat16" (autocast)
    spectrum: str = "natural"  # of the finished images: "natural" (see `spectrum`) or "free", as they were optimised
    compat: str = ""  # "psaq": drop the first patch of every Swin window, as PSAQ-ViT's code does

    def __post_init__(self) -> None:
        for name in ("samples", "iters", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} was {getattr(self, name)}; it must be at least 1")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule was '{self.schedule}'; it may be {', '.join(map(repr, SCHEDULES))}")
        if not 0 < self.crop_lower <= self.crop_upper <= 1:
            raise UsageError(
                f"crop bounds were {self.crop_lower} and {self.crop_upper}; they must satisfy 0 < lower <= upper <= 1"
            )
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate was {self.learning_rate}; it must be greater than 0")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"precision was '{self.precision}'; it may be 'float32' or 'bfloat16'")
        if self.spectrum not in SPECTRA:
            raise UsageError(f"spectrum was '{self.spectrum}'; it may be {', '.join(map(repr, SPECTRA))}")
        if self.compat not in ("", "psaq"):
            raise UsageError(f"compat was '{self.compat}'; it may be '' or 'psaq'")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return asdict(self)
