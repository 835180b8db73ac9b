"""What a model expects of its images, and how that travels with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import timm.data
import torch
from timm.models import PretrainedCfg
from torch import nn

from ..errors import UsageError

_MODES = ("center", "squash", "border")  # timm's
_GREATEST = 2.0  # of mean and std, for pixels from 0 to 1; timm's own are at most 1
_LEAST_STD = 1e-6  # a network of pixels from 0 to 65535 has 1.5e-5
_MOST_CHANNELS = 16  # of images, in what may be their mean
_MOST_CROP = 2.0  # timm's are at most 1.15
_MARGIN = 0.01  # what a resize in float may overshoot
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
            if not all(_is_finite(value) for value in values):
                raise UsageError(f"{name} was {tuple(values)}; every value must be a finite number")
        if min(self.std) <= 0:
            raise UsageError(f"std was {self.std}; every value must be greater than 0")
        if min(self.std) < _LEAST_STD:
            raise UsageError(f"std was {self.std}; every value must be {_LEAST_STD:g} or more")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if max(abs(value) for value in values) > _GREATEST:
                raise UsageError(
                    f"{name} was {tuple(values)}; it is of pixels from 0 to 1, and this looks like values of 0 to 255; "
                    "divide by 255"
                )
        if not _is_finite(self.crop_pct) or not 0 < self.crop_pct <= _MOST_CROP:
            raise UsageError(f"crop_pct was {self.crop_pct!r}; it may be a number above 0, {_MOST_CROP:g} at most")
        if self.crop_mode not in _MODES:
            raise UsageError(f"crop_mode was {self.crop_mode!r}; it may be 'center', 'squash' or 'border'")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise UsageError(f"interpolation was '{self.interpolation}'; it may be 'nearest', 'bilinear' or 'bicubic'")

    @classmethod
    def of(cls, model: Any) -> Preprocessing:
        """The model's own, as timm's pretrained configuration gives it, for the model's actual input size.

        A network around timm models has that of the first. One with a mean and a std of its own, such as torchvision's Normalize
        before the model, normalises images itself: it takes pixels from 0 to 1, or to 255 where that mean is of such.

        Raises:
            UsageError: a network holds timm models of several input sizes, and nothing says which the images have.
        """
        network, model = model, _timms(model)
        if model is not network:
            _expect_one_size(network)
            if _as_detectors(network):
                channels = image_shape(model)[0]
                return cls(image_shape(network), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
        config = timm.data.resolve_data_config({}, pretrained_cfg=config_of(model), model=model)
        channels = image_shape(model)[0]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        greatest = None if model is network else _taken(network, model)
        if greatest is not None:
            mean, std = (0.0,) * channels, (1 / greatest,) * channels
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
        config = dict(config_of(model) or {})
        for key in ("test_input_size", "test_crop_pct"):  # timm's validation prefers them
            config.pop(key, None)
        config |= asdict(self)
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]

    def transform(self) -> Any:
        """timm's for evaluation, up to `normalise`: a PIL image to uint8 [C, H, W]."""
        return timm.data.create_transform(
            self.input_size,
            is_training=False,
            normalize=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def channel_bounds(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised values of pixel 0 and pixel 1, each [C, 1, 1]."""
        mean, std = self._statistics(device)
        return (0 - mean) / std, (1 - mean) / std

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(pixel - mean) / std` in float32 on the pixels' device; pixels [..., C, H, W], uint8 or float in [0, 1].

        The same bits on every device: torch on GPUs divides by a plain number as a product with its reciprocal, so all
        divisors are tensors.

        Raises:
            UsageError: pixels of another type, other channels, or values outside [0, 1].
        """
        self._check_pixels(pixels)
        mean, std = self._statistics(pixels.device)
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / torch.tensor(255.0, device=pixels.device)
        return (pixels - mean) / std

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`: images [..., C, H, W] to pixels from 0 to 1; what lies beyond is cut off.

        UsageError: images of other channels.
        """
        if images.dim() < 3 or images.shape[-3] != len(self.mean):
            raise UsageError(f"images had shape {tuple(images.shape)}; they must be [..., {len(self.mean)}, H, W]")
        mean, std = self._statistics(images.device)
        return (images.float() * std + mean).clamp(0, 1)

    def _statistics(self, device: torch.device | None) -> list[torch.Tensor]:
        """Mean and std, [C, 1, 1] each."""
        return [torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std)]

    def _check_pixels(self, pixels: Any) -> None:
        if not isinstance(pixels, torch.Tensor):
            raise UsageError(f"pixels was a {type(pixels).__name__}; it must be a tensor [..., C, H, W]")
        if pixels.dim() < 3 or pixels.shape[-3] != len(self.mean):
            raise UsageError(f"pixels had shape {tuple(pixels.shape)}; it must be [..., {len(self.mean)}, H, W]")
        if pixels.dtype == torch.uint8:
            return
        if not pixels.is_floating_point():
            kind = str(pixels.dtype).removeprefix("torch.")
            raise UsageError(f"pixels had dtype {kind}; it must be uint8, or float from 0 to 1")
        if not pixels.numel():
            return
        least, greatest = (float(value) for value in pixels.aminmax())
        if not (least >= -_MARGIN and greatest <= 1 + _MARGIN):  # NaN too
            hint = "; divide by 255" if least >= 0 and 2 < greatest <= 255 else ""
            raise UsageError(
                f"pixels held values from {least:.4g} to {greatest:.4g}; floats must lie from 0 to 1{hint}"
            )

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


def check_preprocessing(preprocessing: Any) -> None:
    """UsageError unless it is a `Preprocessing`, or None."""
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise UsageError(
            f"preprocessing was {preprocessing!r}; it may be a dfqvit.models.Preprocessing, or None for the model's own"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def image_size(model: Any) -> tuple[int, int]:
    """(height, width) of the images that `model` takes, pixels: its own, or that of timm's configuration where it takes any.

    Those of a network around timm models are the first one's, or what its record says.
    """
    known = getattr(getattr(model, "dfqvit_spec", None), "input_size", None)
    if known is not None:
        return int(known[1]), int(known[2])
    whole, model = model, _timms(model)
    found = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    found = found or _asked_size(model) or _asked_size(whole)
    if found is None:
        found = (config_of(model) or {})["input_size"][1:]
    height, width = found if isinstance(found, (tuple, list)) else (found, found)
    return int(height), int(width)


def _asked_size(model: Any) -> Any:
    """The `img_size` that timm's create_model was given, as it left it on the model; None where it was given none."""
    return (getattr(model, "_model_args", None) or {}).get("img_size")


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


def config_of(model: Any) -> dict[str, Any] | None:
    """timm's configuration of a model, also where that is timm's dataclass; None of what is no timm model."""
    found = getattr(model, "pretrained_cfg", None)
    found = found.to_dict() if isinstance(found, PretrainedCfg) else found
    return found if isinstance(found, dict) else None


def _timms(model: Any) -> Any:
    """The model if it is timm's, else the first timm model that it holds, else the model."""
    found = [module for module in model.modules() if config_of(module) is not None]
    inner = [module for module in found if type(module).__module__ != FEATURES]
    return (inner or found or [model])[0]


def normalises(network: nn.Module) -> bool:
    """Whether `Preprocessing.of` takes a network around timm models for one that normalises images itself."""
    return _as_detectors(network) or _taken(network, _timms(network)) is not None


def _as_detectors(network: nn.Module) -> bool:
    """As torchvision's do."""
    return any(hasattr(module, "image_mean") for module in network.modules())


def _taken(network: nn.Module, model: nn.Module) -> float | None:
    """The pixel 1 of what a network takes that normalises images itself before `model` sees them; None where it does not."""
    inside = set(model.modules())
    for module in (each for each in network.modules() if each not in inside):
        for names in (("mean", "std"), ("pixel_mean", "pixel_std")):
            mean, std = (_numbers(getattr(module, name, None)) for name in names)
            if mean is not None and std is not None:
                return 255.0 if max(map(abs, mean)) > _GREATEST else 1.0
    return None


def _numbers(value: Any) -> list[float] | None:
    """A number, a few of them or a small tensor as a list; None for anything else."""
    if isinstance(value, torch.Tensor):
        return value.detach().float().flatten().tolist() if 0 < value.numel() <= _MOST_CHANNELS else None
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    return [float(each) for each in listed] if listed and all(_is_finite(each) for each in listed) else None


def _expect_one_size(network: nn.Module) -> None:
    if getattr(getattr(network, "dfqvit_spec", None), "input_size", None) is not None:
        return
    sizes = {
        name: image_size(module)
        for name, module in network.named_modules()
        if config_of(module) is not None and type(module).__module__ != FEATURES
    }
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"'{name}' {height} x {width}" for name, (height, width) in sizes.items())
        raise UsageError(
            f"model was a {type(network).__name__} whose timm models take images of several sizes ({told}); give "
            "preprocessing, whose input_size says which the network takes"
        )
