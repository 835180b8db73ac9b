"""What a model expects of its images, and how that travels with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import timm.data
import torch
from torch import nn

from ..errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input: pixels in [0, 1], resized, centre-cropped, then `(pixel - mean) / std`."""

    input_size: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise UsageError(f"{name} had {len(values)} values; the model takes images of {channels} channels")
        if min(self.std) <= 0:
            raise UsageError(f"std was {self.std}; every value must be greater than 0")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise UsageError(f"interpolation was '{self.interpolation}'; it may be 'nearest', 'bilinear' or 'bicubic'")

    @classmethod
    def of(cls, model: Any) -> Preprocessing:
        """The model's own, as timm's pretrained configuration gives it, for the model's actual input size."""
        config = timm.data.resolve_data_config({}, pretrained_cfg=getattr(model, "pretrained_cfg", {}), model=model)
        channels = image_shape(model)[0]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) != channels:  # timm's figures are for RGB: a model of other channels gets their average
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return cls(
            input_size=(channels, *image_size(model)),
            mean=mean,
            std=std,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    def write_to(self, model: nn.Module) -> None:
        """Lets timm's own code (`resolve_model_data_config`, its validation loop) prepare images for `model` as this says."""
        config = dict(getattr(model, "pretrained_cfg", None) or {})
        for key in ("test_input_size", "test_crop_pct"):  # timm's validation prefers them
            config.pop(key, None)
        config |= asdict(self)
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]

    def channel_bounds(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised values of pixel 0 and pixel 1, each [C, 1, 1]."""
        mean = torch.tensor(self.mean, device=device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=device).view(-1, 1, 1)
        return (0 - mean) / std, (1 - mean) / std

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(pixel - mean) / std` in float32 on the pixels' device; pixels [..., C, H, W], uint8 or float in [0, 1].

        The same bits on every device: torch on GPUs divides by a plain number as a product with its reciprocal, so all
        divisors are tensors.
        """
        device = pixels.device
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / torch.tensor(255.0, device=device)
        mean = torch.tensor(self.mean, device=device).view(-1, 1, 1)
        return (pixels - mean) / torch.tensor(self.std, device=device).view(-1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, also after a trip through JSON."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)


def image_size(model: Any) -> tuple[int, int]:
    """(height, width) of the images that `model` takes, pixels: its own, or that of timm's configuration where it takes any."""
    found = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    if found is None:
        found = (getattr(model, "pretrained_cfg", None) or {})["input_size"][1:]
    height, width = found if isinstance(found, (tuple, list)) else (found, found)
    return int(height), int(width)


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that `model` takes."""
    channels = getattr(model, "in_chans", None)
    if channels is None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        channels = 3 if first is None else first.in_channels
    return int(channels), *image_size(model)
