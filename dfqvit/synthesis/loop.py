"""The synthesis loop: Adam on the pixels, one crop a step, with snapshots that an interrupted run resumes from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..adapters import Features, find_adapter
from ..errors import DfqvitError, UsageError
from ..files import atomic
from ..models import Preprocessing, check_finite
from .config import SynthesisConfig
from .curriculum import DRAWS, crop_ratio, crop_shift_flip
from .losses import entropy_loss, onehot_loss, similarity_ranges, tv_loss, union

_BETAS = (0.5, 0.9)
_FRAME_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # when the pictures of the curriculum are taken
_FRAME_SAMPLES = 8
_SNAPSHOT_SECONDS = 30.0


@dataclass(frozen=True)
class Progress:
    """What a step reports: its number (from 1), the three weighted terms of the loss, and the crop's share of the area."""

    step: int
    entropy: float
    onehot: float
    tv: float
    crop_ratio: float


class Synthesis:
    """One run. `images` is [samples, C, H, W], normalised; `frames` holds the first images at several steps.

    Every random number of image i comes from a generator seeded by (seed, i), so an image does not depend on how many
    others are made beside it, except through the range of similarities that the batch shares.
    """

    def __init__(
        self, model: nn.Module, config: SynthesisConfig, preprocessing: Preprocessing, snapshot: Path | None = None
    ) -> None:
        check_finite(model)
        self.model, self.config, self.snapshot = model, config, snapshot
        self.adapter = find_adapter(model, config.compat)
        self.device = next(model.parameters()).device
        self.low, self.high = preprocessing.channel_bounds(self.device)
        self.step = 0
        self.frames: dict[int, torch.Tensor] = {}

        classes = int(getattr(model, "num_classes", 0))
        if classes < 1:
            raise UsageError("model has no classifier (num_classes is 0); synthesis needs its logits")
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(config.seed))
        images, draws, targets = [], [], []
        for index in range(config.samples):
            generator = torch.Generator().manual_seed((config.seed << 20) + index)
            images.append(torch.randn(preprocessing.input_size, generator=generator))
            draws.append(torch.rand(config.iters, DRAWS, generator=generator))
            targets.append(torch.rand((), generator=generator))
        self.images = torch.stack(images).to(self.device)
        self._draws = torch.stack(draws, dim=1).to(self.device)  # [iters, samples, DRAWS]
        self._tv_target = torch.stack(targets).to(self.device)
        self.labels = order[torch.arange(config.samples) % classes].to(self.device)
        self._optimizer = torch.optim.Adam([self.images], lr=config.learning_rate, betas=_BETAS)

    def run(self, report: Callable[[Progress], None] | None = None) -> torch.Tensor:
        """Runs the steps that are left and returns the images; on an interruption the last step is snapshot first."""
        config = self.config
        frame_steps = {round(share * config.iters) for share in _FRAME_SHARES}
        saved = time.monotonic()
        training, needed_grad = self.model.training, [p.requires_grad for p in self.model.parameters()]
        self.model.eval().requires_grad_(False)
        try:
            while self.step < config.iters:
                if self.step in frame_steps:
                    self._take_frame()
                progress = self._advance()
                if report is not None:
                    report(progress)
                if self.snapshot is not None and time.monotonic() - saved > _SNAPSHOT_SECONDS:
                    self.save_snapshot()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if self.snapshot is not None:
                self.save_snapshot()
            raise
        finally:
            self.model.train(training)
            for parameter, needed in zip(self.model.parameters(), needed_grad, strict=True):
                parameter.requires_grad_(needed)
        self._take_frame()
        return self.images.detach().clone()

    def _advance(self) -> Progress:
        config = self.config
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        ratio = crop_ratio(config.schedule, self.step, config.iters, config.crop_lower, config.crop_upper)
        parts = torch.arange(config.samples, device=self.device).split(config.batch_size)
        ranges = None if len(parts) == 1 else union([self._ranges(part, ratio) for part in parts])
        terms, gradients = torch.zeros(3, device=self.device), []
        for part in parts:
            images = self.images[part].requires_grad_(True)
            features, logits = self._forward(images, part, ratio)
            losses = torch.stack(
                [
                    config.entropy_weight * entropy_loss(features, config.points, config.bandwidth, ranges),
                    config.onehot_weight * onehot_loss(logits, self.labels[part]),
                    config.tv_weight * tv_loss(images, self._tv_target[part]),
                ]
            ) * (len(part) / config.samples)
            gradients.append(torch.autograd.grad(losses.sum(), images)[0])
            terms += losses.detach()
        self.images.grad = torch.cat(gradients)
        self._optimizer.step()
        torch.clamp(self.images, self.low, self.high, out=self.images)
        self.step += 1
        entropy, onehot, tv = terms.tolist()
        return Progress(self.step, entropy, onehot, tv, ratio)

    def _forward(self, images: torch.Tensor, part: torch.Tensor, ratio: float) -> tuple[Features, torch.Tensor]:
        """(features, logits) of this step's crops of some of the images."""
        views = crop_shift_flip(images, self._draws[self.step, part], ratio, self.config.jitter)
        with self.adapter.capture() as features:
            logits = self.model(views)
        return features, logits

    @torch.no_grad()
    def _ranges(self, part: torch.Tensor, ratio: float) -> list[torch.Tensor]:
        return similarity_ranges(self._forward(self.images[part], part, ratio)[0])

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine to zero."""
        warmup = max(1, round(self.config.warmup * self.config.iters))
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.config.iters - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def _take_frame(self) -> None:
        self.frames[self.step] = self.images[:_FRAME_SAMPLES].detach().cpu().clone()

    # Snapshots: one safetensors file, replaced atomically.

    def save_snapshot(self) -> None:
        """Writes everything that the rest of the run depends on."""
        assert self.snapshot is not None
        state = self._optimizer.state[self.images]
        tensors = {"images": self.images.detach().contiguous()}
        if state:
            tensors |= {"exp_avg": state["exp_avg"].contiguous(), "exp_avg_sq": state["exp_avg_sq"].contiguous()}
        tensors |= {f"frame.{step}": frame for step, frame in self.frames.items()}
        metadata = {"format": "dfqvit-synthesis", "step": str(self.step), "run": self._fingerprint()}
        with atomic(self.snapshot) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata)

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
        if metadata.get("format") != "dfqvit-synthesis" or metadata.get("run") != self._fingerprint():
            raise DfqvitError(
                f"snapshot '{self.snapshot}' is of another model or other settings; remove it to start anew"
            )
        self.step = int(metadata["step"])
        self.images.copy_(tensors["images"])
        self.frames = {int(key[6:]): tensors[key] for key in tensors if key.startswith("frame.")}
        if "exp_avg" in tensors:
            self._optimizer.state[self.images] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors["exp_avg"].to(self.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(self.device),
            }
        return True

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key}{tuple(tensor.shape)}{float(tensor.double().sum()):.12e}".encode())
        return digest.hexdigest()


def synthesize(
    model: nn.Module,
    samples: int = 16,
    iters: int = 500,
    seed: int = 0,
    *,
    preprocessing: Preprocessing | None = None,
    report: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Optimises images from Gaussian noise against a frozen float model; no data is used.

    Args:
        model: a timm ViT, DeiT or Swin with its weights; left as it was.
        samples: number of images.
        iters: steps of Adam.
        seed: of noise, crops and target classes. Same seed, same device, same thread count: same bits.
        preprocessing: mean, std and size of the model's input; default the model's own.
        report: called after every step.
        settings: the other fields of `SynthesisConfig`: schedule, crop_lower, crop_upper, learning_rate, ...

    Returns:
        float32 [samples, C, H, W], normalised as the model expects, each pixel within the valid range.

    Raises:
        UsageError: a setting or the model does not fit.
        DfqvitError: NaN or Inf in the weights.

    Source: PSAQ-ViT, arXiv 2203.02250 (loss); DFQ-ViT, arXiv 2507.14481 (curriculum).
    """
    unknown = settings.keys() - SynthesisConfig.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(f"synthesize has no setting '{sorted(unknown)[0]}'")
    config = SynthesisConfig(samples=samples, iters=iters, seed=seed, **settings)
    return Synthesis(model, config, preprocessing or Preprocessing.of(model)).run(report)
