"""What a model expects of its images, and how that travels with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import timm.data
import torch
from torch import nn

from ..errors import UsageError

FEATURES = "timm.models._features"  # the module of timm's wrappers that features_only=True makes


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
        """The model's own, as timm's pretrained configuration gives it, for the model's actual input size.

        A network around timm models has that of the first; one that normalises images itself takes pixels from 0 to 1.

        Raises:
            UsageError: a network holds timm models of several input sizes, and nothing says which the images have.
        """
        network, model = model, _timms(model)
        if model is not network:
            _expect_one_size(network)
            if any(hasattr(module, "image_mean") for module in network.modules()):  # as torchvision's detectors
                channels = image_shape(model)[0]
                return cls(image_shape(network), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
        config = timm.data.resolve_data_config({}, pretrained_cfg=getattr(model, "pretrained_cfg", {}), model=model)
        channels = image_shape(model)[0]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) != channels:  # timm's figures are for RGB: a model of other channels gets their average
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return cls(
            input_size=(channels, *image_size(network)),
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
    """(height, width) of the images that `model` takes, pixels: its own, or that of timm's configuration where it takes any.

    Those of a network around timm models are the first one's, or what its record says.
    """
    known = getattr(getattr(model, "dfqvit_spec", None), "input_size", None)
    if known is not None:
        return int(known[1]), int(known[2])
    model = _timms(model)
    found = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    if found is None:
        found = (getattr(model, "pretrained_cfg", None) or {})["input_size"][1:]
    height, width = found if isinstance(found, (tuple, list)) else (found, found)
    return int(height), int(width)


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that `model` takes."""
    known = getattr(getattr(model, "dfqvit_spec", None), "input_size", None)
    if known is not None:
        return int(known[0]), int(known[1]), int(known[2])
    model = _timms(model)
    channels = getattr(model, "in_chans", None)
    if channels is None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        channels = 3 if first is None else first.in_channels
    return int(channels), *image_size(model)


def _timms(model: Any) -> Any:
    """The model if it is timm's, else the first timm model that it holds, else the model."""
    found = [module for module in model.modules() if isinstance(getattr(module, "pretrained_cfg", None), dict)]
    inner = [module for module in found if type(module).__module__ != FEATURES]
    return (inner or found or [model])[0]


def _expect_one_size(network: nn.Module) -> None:
    if getattr(getattr(network, "dfqvit_spec", None), "input_size", None) is not None:
        return
    sizes = {
        name: image_size(module)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "pretrained_cfg", None), dict) and type(module).__module__ != FEATURES
    }
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"'{name}' {height} x {width}" for name, (height, width) in sizes.items())
        raise UsageError(
            f"model was a {type(network).__name__} whose timm models take images of several sizes ({told}); give "
            "preprocessing, whose input_size says which the network takes"
        )
