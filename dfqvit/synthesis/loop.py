"""The synthesis loop: steps, progress, frames of the curriculum, and snapshots that an interrupted run resumes from."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from ..distributed import LostProcess, rank
from ..errors import DfqvitError
from ..models import Preprocessing, check_finite
from ..models.frame import evaluating, on_float_reference
from ..models.preprocessing import check_preprocessing
from ..models.spec import settings
from ..progress import Progress
from .config import SynthesisConfig, check_names
from .interruption import autocast_restored, uninterrupted
from .losses import Objective
from .step import Step
from .writing import checksum, write_tensors

_FRAME_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # when the pictures of the curriculum are taken
_FRAME_SAMPLES = 8
_SNAPSHOT_SECONDS = 30.0
_REPORT_EVERY = 10  # steps on a GPU, where numbers come back while later steps are already queued


class Synthesis:
    """One run. `images` is [samples, C, H, W], normalised; `frames` holds the first images at several steps."""

    def __init__(
        self,
        model: nn.Module,
        config: SynthesisConfig,
        preprocessing: Preprocessing,
        snapshot: Path | None = None,
        objective: Objective | None = None,
    ) -> None:
        check_finite(model)
        self.model, self.config, self.preprocessing, self.snapshot = model, config, preprocessing, snapshot
        self.advance = Step(model, config, preprocessing, objective)
        self.frames: dict[int, torch.Tensor] = {}

    @property
    def images(self) -> torch.Tensor:
        """[samples, C, H, W], as they are now."""
        return self.advance.images

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return self.advance.taken

    def run(self, report: Callable[[Progress], None] | None = None) -> torch.Tensor:
        """Runs the steps that are left and returns the finished images; on an interruption the last step is snapshot first.

        `report` is called after every step; on a GPU after every tenth and the last, a little late, so that nothing waits.
        """
        with evaluating(self.model), autocast_restored(self.advance.device.type):
            return self._run(set(frame_steps(self.config.iters)), report)

    def _run(self, moments: set[int], report: Callable[[Progress], None] | None) -> torch.Tensor:
        saved = time.monotonic()
        needed_grad = [p.requires_grad for p in self.model.parameters()]
        reporter = _Reporter(self.advance, report)
        try:
            self.model.requires_grad_(False)
            while self.step < self.config.iters:
                if self.step in moments:
                    self._take_frame()
                self.advance()
                reporter.after(self.step)
                if self.snapshot is not None and rank() == 0 and time.monotonic() - saved > _SNAPSHOT_SECONDS:
                    self.save_snapshot()
                    saved = time.monotonic()
            self._take_frame()
            return self.advance.finished()
        except (KeyboardInterrupt, LostProcess):
            if self.snapshot is not None and rank() == 0:
                self._save_last()
            raise
        finally:
            for parameter, needed in zip(self.model.parameters(), needed_grad, strict=True):
                parameter.requires_grad_(needed)

    def _take_frame(self) -> None:
        self.frames[self.step] = self.images[:_FRAME_SAMPLES].detach().cpu().clone()

    # Snapshots: one safetensors file, replaced atomically.

    def save_snapshot(self) -> None:
        """Writes everything that the rest of the run depends on."""
        assert self.snapshot is not None
        tensors = self.advance.state() | {f"frame.{step}": frame for step, frame in self.frames.items()}
        metadata = {"format": "dfqvit-synthesis", "step": str(self.step), "run": self._fingerprint}
        write_tensors(self.snapshot, tensors, metadata)

    def _save_last(self) -> None:
        """The snapshot of an interrupted run; what ended the run is said, also where the disk is full."""
        try:
            with uninterrupted():  # Ctrl-C reaches torchrun's processes twice, and whoever waits presses it again
                self.save_snapshot()
        except OSError as error:
            warnings.warn(
                f"snapshot '{self.snapshot}' could not be written ({error.strerror or error}): the steps since the one before, if "
                "there is one, are lost",
                stacklevel=2,
            )

    def resume(self) -> bool:
        """Takes up the snapshot, if there is one; DfqvitError when it is unreadable or of another run."""
        if self.snapshot is None or not self.snapshot.exists():
            return False
        try:
            with safetensors.safe_open(self.snapshot, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (safetensors.SafetensorError, OSError) as error:
            raise DfqvitError(f"snapshot '{self.snapshot}' could not be read: {error}") from error
        if metadata.get("format") != "dfqvit-synthesis" or metadata.get("run") != self._fingerprint:
            raise DfqvitError(
                f"snapshot '{self.snapshot}' is of another model or other settings; remove it to start anew"
            )
        self.advance.load_state(int(metadata["step"]), tensors)
        self.frames = {int(key[6:]): tensors[key] for key in tensors if key.startswith("frame.")}
        return True

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Of all that the images depend on: settings, preprocessing, and the model's structure and tensors."""
        config, modules = self.config.to_dict(), structure_of(self.model)
        told = {"config": config, "preprocessing": asdict(self.preprocessing), "modules": modules}
        return checksum(told, dict(self.model.named_parameters()) | dict(self.model.named_buffers()))


def structure_of(model: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, class, plain settings) of each module: what a model computes beside its tensors."""
    return [(name, type(module).__qualname__, settings(module)) for name, module in model.named_modules()]


def frame_steps(iters: int) -> list[int]:
    """The steps at which a run of `iters` steps keeps its images for the picture of the curriculum; 0 is the noise."""
    return sorted({round(share * iters) for share in _FRAME_SHARES})


class _Reporter:
    """Calls `report` with what the steps wrote on the device: at once on a CPU, without ever waiting on a GPU."""

    def __init__(self, steps: Step, report: Callable[[Progress], None] | None) -> None:
        self.steps, self.report = steps, report
        self.waiting: tuple[int, torch.Tensor, torch.cuda.Event] | None = None

    def after(self, step: int) -> None:
        """To be called when `step` steps were taken or queued."""
        if self.report is None:
            return
        last = step == self.steps.config.iters
        if self.steps.device.type != "cuda" or last:
            self._emit(step, self.steps.terms[step - 1])
        elif self.waiting is not None and self.waiting[2].query():
            self._emit(*self.waiting[:2])
            self.waiting = None
        if self.steps.device.type == "cuda" and self.waiting is None and step % _REPORT_EVERY == 0 and not last:
            with torch.cuda.device(self.steps.device):  # an event of another one's stream would be done at once
                row, event = _pinned_row(), torch.cuda.Event()
                row.copy_(self.steps.terms[step - 1], non_blocking=True)
                event.record()
            self.waiting = (step, row, event)

    def _emit(self, step: int, terms: torch.Tensor) -> None:
        assert self.report is not None
        entropy, onehot, tv = terms.tolist()
        ratio, total = self.steps.crop_ratios[step - 1], self.steps.config.iters
        self.report(Progress(step, entropy, onehot, tv, ratio, "synthesis", total))


def _pinned_row() -> torch.Tensor:
    """Host memory that a GPU writes to by itself: the three terms of a step."""
    return torch.empty(3, pin_memory=True)


@on_float_reference
def synthesize(
    model: nn.Module,
    samples: int = SynthesisConfig.samples,
    iters: int = SynthesisConfig.iters,
    seed: int = 0,
    *,
    preprocessing: Preprocessing | None = None,
    report: Callable[[Progress], None] | None = None,
    objective: Objective | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Optimises images from Gaussian noise against a frozen float model; no data is used.

    Args:
        model: a timm ViT, DeiT or Swin with its weights, or a network that holds some; left as it was, and read in eval mode and
            float32.
        samples: number of images.
        iters: steps of Adam.
        seed: of noise, crops and target classes. Same seed, same device, same thread count: same bits.
        preprocessing: mean, std and size of the model's input; default the model's own.
        report: called after every step.
        objective: of what the model gives for a batch, to a scalar loss: in place of the target classes, which are left out where
            the model has no classifier.
        settings: the other fields of `SynthesisConfig`: schedule, crop_lower, crop_upper, learning_rate, spectrum, ...

    Returns:
        float32 [samples, C, H, W], normalised as the model expects, each pixel within the valid range; finished by
        `spectrum.natural_spectrum` unless spectrum="free".

    Raises:
        UsageError: a setting or the model does not fit.
        DfqvitError: NaN or Inf in the weights.

    Source: PSAQ-ViT, arXiv 2203.02250 (loss); DFQ-ViT, arXiv 2507.14481 (curriculum).
    """
    check_names("synthesize", settings)
    check_preprocessing(preprocessing)
    config = SynthesisConfig(samples=samples, iters=iters, seed=seed, **settings)
    preprocessing = preprocessing or Preprocessing.of(model)
    return Synthesis(model, config, preprocessing, objective=objective).run(report)
